"""The walker's client that watches weights being used: one rule per kind of operation.

Views of a weight keep their tag (`origin.py`). Where a tagged array meets its input, the reading is
recorded and the input's evidence is emitted. An operation that is neither, but yields something
computed from weights alone, breaks the tag; a broken tag may still be added to or multiply an
activation (biases, norm scales, positions), but contracting it with one raises: the weight behind
it would silently go unseen. So does any operation on a weight that is not listed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.calibration.evidence import Evidence
from jquant.calibration.origin import Origin, Part, Tagged
from jquant.calibration.reading import Kind, Reading, order
from jquant.calibration.spread import Spread
from jquant.errors import UnsupportedPrimitiveError
from jquant.interpreter import DESCENDED, Walker, bind

# One operand (or several, each for itself), the same array out.
_IDENTITIES = frozenset(
    "copy copy_p stop_gradient optimization_barrier sharding_constraint device_put "
    "reduce_precision name pvary pcast mesh_cast reshard".split()
)
# Where a parameter may meet an activation without being a weight: biases, scales, positions, masks.
_MIXERS = frozenset(
    "add sub mul div max min pow rem atan2 add_any select_n clamp concatenate "
    "dynamic_update_slice eq ne lt le gt ge and or xor".split()
)


class Observer:
    """Client of `interpreter.Walker`; see the module docstring.

    To see two networks at once (one with quantized weights, one without), an observer that walks
    the first is given the `rows` that another has kept of the second, walked in the same order.

    Args:
        keep: keep the rows of inputs in `rows`, by site.
        full: the rows another observer has kept.
        spread: whether evidence says how inputs are spread.
    """

    def __init__(
        self,
        *,
        keep: bool = False,
        full: Mapping[Any, jax.Array] | None = None,
        spread: bool = False,
    ) -> None:
        self.keep, self.full, self.spread = keep, full, spread
        self.rows: dict[Any, jax.Array] = {}
        self.uses: dict[tuple[Any, ...], tuple[str, Reading]] = {}  # by site: each use once
        self.mixed: dict[str, str] = {}  # path -> the operation that took it in as a plain array

    def special(self, value: Any) -> bool:
        return isinstance(value, Tagged)

    def name(self, value: Tagged) -> str:
        return value.origin.path

    def merge(self, left: Evidence, right: Evidence) -> Evidence:
        return left.merge(right)

    def drop(self, value: Tagged, eqn: core.JaxprEqn) -> jax.Array:
        raise unsupported(value.origin, eqn, "a loop or branch changes it or passes it out")

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any] | None:
        name = eqn.primitive.name
        if name in DESCENDED:
            return None
        if name in _RULES:
            return _RULES[name](self, eqn, values, walker)
        if name in _VIEW_RULES and not values[0].origin.broken:
            origins = _VIEW_RULES[name](values[0], eqn.params)
            results = bind(eqn, [values[0].array, *map(_array, values[1:])])
            if origins is not None:
                return [Tagged(r, o) for r, o in zip(results, origins, strict=True)]
        elif name in _IDENTITIES:
            results = bind(eqn, [_array(v) for v in values])
            return [_retag(v, r) for v, r in zip(values, results, strict=False)]
        return self._other(eqn, values)

    def _other(self, eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
        """An operation that is no view and no use."""
        name = eqn.primitive.name
        tagged = [v for v in values if isinstance(v, Tagged)]
        if any(True for _ in core.jaxprs_in_params(eqn.params)):
            raise unsupported(tagged[0].origin, eqn, "jquant has no rule to look inside it")
        alone = all(
            isinstance(v, Tagged) or isinstance(atom, core.Literal)
            for v, atom in zip(values, eqn.invars, strict=True)
        )
        if not alone and name not in _MIXERS and name not in _VIEW_RULES:
            raise unsupported(tagged[0].origin, eqn, "it mixes the weight with other values")
        results = bind(eqn, [_array(v) for v in values])
        if alone or name in _VIEW_RULES:
            origin = next((v.origin for v in tagged if v.origin.broken is None), tagged[0].origin)
            return [Tagged(r, Origin(origin.path, (), (), origin.broken or name)) for r in results]
        for v in tagged:
            self.mixed.setdefault(v.origin.path, name)
        return results

    def _use(
        self,
        walker: Walker,
        slot: int,
        kind: Kind,
        tagged: Tagged,
        roles: Mapping[str, Sequence[Part]],
    ) -> Reading:
        """Record a use of a weight and return its reading."""
        origin = tagged.origin
        scanned = [p for p in origin.scanned(tagged.array.ndim) if p.axis >= 0]
        batch = [p for p in roles["batch"] if p.axis >= 0]
        reading = Reading(
            kind,
            (*scanned, *[batch[k] for k in order(batch)]),
            origin.fixed,
            tuple(roles["in"][k] for k in order(roles["in"])),
            tuple(p for p in roles["out"] if p.axis >= 0),
        )
        self.uses[(*walker.site, slot)] = origin.path, reading
        return reading

    def _dot(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        contract, batch = eqn.params["dimension_numbers"]
        products = [isinstance(v, Tagged) and v.origin.broken == "dot_general" for v in values]
        for slot, weight in enumerate(values):
            other = values[1 - slot]
            if not isinstance(weight, Tagged) or products[slot]:
                continue
            if weight.origin.broken:
                raise unsupported(
                    weight.origin, eqn, f"it has been through {weight.origin.broken!r}"
                )
            parts = weight.origin.own(weight.array.ndim)
            roles: dict[str, list[Part]] = {"in": [], "out": [], "batch": []}
            for dim, axis in enumerate(parts):
                roles[
                    "in" if dim in contract[slot] else "batch" if dim in batch[slot] else "out"
                ] += axis
            if any(part.axis < 0 for part in roles["in"]):
                raise unsupported(weight.origin, eqn, "it is contracted along a broadcast axis")
            reading = self._use(walker, slot, "dot", weight, roles)
            x = _array(other)
            split: list[list[tuple[str, Part | None, int]]] = [
                [("token", None, n)] for n in x.shape
            ]
            for role, dims in (("in", contract), ("batch", batch)):
                for mine, theirs in zip(dims[slot], dims[1 - slot], strict=True):
                    split[theirs] = [
                        ("token", None, p.length) if p.axis < 0 else (role, p, p.length)
                        for p in parts[mine]
                    ]  # fmt: skip
            self._emit(
                walker, weight.origin.path, reading, x, [part for axis in split for part in axis]
            )
        results = bind(eqn, [_array(v) for v in values])
        if all(isinstance(v, Tagged) for v in values):
            # A product of parameters: an activation nothing flows into (learned queries), unless it
            # is added to a weight (a low-rank adapter), which then is broken by that addition.
            return [
                Tagged(r, Origin(values[1].origin.path, (), (), "dot_general")) for r in results
            ]
        return results

    def _evidence(
        self, walker: Walker, what: Any, rows: jax.Array, count: jax.Array | None = None
    ) -> Evidence:
        """The evidence of these rows, and of their drift where the other network's are known."""
        if len(walker.site) > 1:  # inside a loop, whose values stay in it
            return Evidence.of(rows, count, spread=self.spread)
        if self.keep:
            self.rows[walker.site, what] = rows
        full = None if self.full is None else self.full[walker.site, what]
        return Evidence.of(rows, count, full=full, spread=self.spread)

    def _emit(
        self,
        walker: Walker,
        path: str,
        reading: Reading,
        x: jax.Array,
        split: list[tuple[str, Part | None, int]],
    ) -> None:
        """Emit the evidence of input `x`, whose axes are made of the labelled factors `split`."""
        batch = [k for k, (role, _, _) in enumerate(split) if role == "batch"]
        inner = [k for k, (role, _, _) in enumerate(split) if role == "in"]
        tokens = [k for k in range(len(split)) if k not in batch and k not in inner]
        turn = [
            *(batch[k] for k in order([split[k][1] for k in batch])),  # type: ignore[misc]
            *tokens,
            *(inner[k] for k in order([split[k][1] for k in inner])),  # type: ignore[misc]
        ]
        sizes = tuple(n for _, _, n in split)

        def compute() -> Evidence:
            lead = [sizes[k] for k in turn[: len(batch)]]
            rows = x.reshape(sizes).transpose(turn)
            rows = rows.reshape(*lead, -1, math.prod(sizes[k] for k in inner))
            count = None
            if batch:  # experts: slots that hold no token are zero rows
                count = jnp.sum(jnp.any(rows != 0, -1), -1, dtype=jnp.float32)
            return self._evidence(walker, what, _floats(rows), count)

        what = "dot", sizes, tuple(turn), len(batch), len(inner)
        walker.emit((path, reading), walker.share(what, x, compute))

    def _conv(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        x, weight, params = values[0], values[1], eqn.params
        if isinstance(x, Tagged) and not (isinstance(weight, Tagged) or x.origin.broken):
            raise unsupported(x.origin, eqn, "it is the convolution's input")
        x, numbers, groups = _array(x), params["dimension_numbers"], params["feature_group_count"]
        if weight.origin.broken:
            raise unsupported(weight.origin, eqn, f"it has been through {weight.origin.broken!r}")
        if params["batch_group_count"] != 1:
            raise unsupported(weight.origin, eqn, "batch_group_count is not 1")
        out_dim, in_dim, *window = numbers.rhs_spec
        parts = weight.origin.own(weight.array.ndim)
        out = list(parts[out_dim])
        lead: list[Part] = []
        if groups > 1:
            if len(out) != 1 or not out[0].whole:
                raise unsupported(weight.origin, eqn, "a grouped kernel was reshaped or sliced")
            axis, stride, size = out[0][:3]
            lead = [Part(axis, stride * (size // groups), groups, 0, groups)]
            out = [Part(axis, stride, size // groups, 0, size // groups)]
        dims = [in_dim, *window]  # the order of a patch's features: channel, then position
        inner = [part for dim in dims for part in parts[dim]]
        reading = self._use(walker, 1, "conv", weight, {"in": inner, "out": out, "batch": lead})

        def compute() -> Evidence:
            patches = lax.conv_general_dilated_patches(
                x, [weight.array.shape[dim] for dim in window], params["window_strides"],
                params["padding"], params["lhs_dilation"], params["rhs_dilation"],
                dimension_numbers=numbers, precision=lax.Precision.HIGHEST,
            )  # fmt: skip
            rows = jnp.moveaxis(patches, numbers.out_spec[1], -1)
            sizes = [part.length for part in inner]
            rows = rows.reshape(-1, groups, *sizes).transpose(1, 0, *(2 + k for k in order(inner)))
            rows = rows.reshape(groups, rows.shape[1], -1)
            return self._evidence(walker, what, _floats(rows if groups > 1 else rows[0]))

        what = "conv", str(params), weight.array.shape, tuple(inner)
        walker.emit((weight.origin.path, reading), walker.share(what, x, compute))
        return bind(eqn, [x, weight.array])

    def _ragged_dot(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (contract, batch), ragged = numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions
        x, weight, sizes = values
        tagged = next(v for v in values if isinstance(v, Tagged))
        plain = not any(isinstance(v, Tagged) for v in (x, sizes)) and not tagged.origin.broken
        if (
            not plain
            or batch != ((), ())
            or len(contract[0]) != 1
            or not numbers.rhs_group_dimensions
        ):
            raise unsupported(tagged.origin, eqn, "only rows [tokens, in] in groups are supported")
        parts = weight.origin.own(weight.array.ndim)
        roles: dict[str, list[Part]] = {"in": [], "out": [], "batch": []}
        for dim, axis in enumerate(parts):
            group = dim in numbers.rhs_group_dimensions
            roles["batch" if group else "in" if dim in contract[1] else "out"] += axis
        reading = self._use(walker, 1, "ragged_dot", weight, roles)
        evidence = walker.share(
            ("ragged", contract[0], ragged), (x, sizes),
            lambda: _grouped(_floats(x if ragged == (0,) else x.T), sizes, self.spread),
        )  # fmt: skip
        walker.emit((weight.origin.path, reading), evidence)
        return bind(eqn, [x, weight.array, *values[2:]])

    def _gather(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        table, numbers = values[0], eqn.params["dimension_numbers"]
        if not isinstance(table, Tagged) or table.origin.broken:
            return self._other(eqn, values)
        rows = set(numbers.collapsed_slice_dims)
        batch = set(numbers.operand_batching_dims)
        kept = [d for d in range(table.array.ndim) if d not in rows | batch]
        whole = all(eqn.params["slice_sizes"][d] == table.array.shape[d] for d in kept)
        result = bind(eqn, [_array(v) for v in values])
        if not whole or len(kept) != 1 or rows != set(numbers.start_index_map):
            # Picking whole matrices (experts, layers) by index: the pick is not the weight any
            # more.
            return [Tagged(r, Origin(table.origin.path, (), (), "gather")) for r in result]
        parts = table.origin.own(table.array.ndim)
        roles: dict[str, list[Part]] = {"in": [], "out": [], "batch": []}
        for dim, axis in enumerate(parts):
            roles["out" if dim in rows else "batch" if dim in batch else "in"] += axis
        self._use(walker, 0, "lookup", table, roles)
        return result


def unsupported(origin: Origin, eqn: core.JaxprEqn, why: str) -> UnsupportedPrimitiveError:
    return UnsupportedPrimitiveError(
        f"weight {origin.path!r} enters {eqn.primitive.name!r}: {why}, so its evidence cannot be "
        "read. Rewrite that operation with dot, conv or einsum on the weight itself, or leave the "
        f"weight out: find_weights(..., ignore={origin.path!r})"
    )


def _array(value: Any) -> Any:
    return value.array if isinstance(value, Tagged) else value


def _retag(value: Any, result: Any) -> Any:
    return Tagged(result, value.origin) if isinstance(value, Tagged) else result


def _floats(rows: jax.Array) -> jax.Array:
    """Half-precision rows as they are, everything else as float32."""
    return rows if rows.dtype in (jnp.bfloat16, jnp.float16) else rows.astype(jnp.float32)


def _grouped(rows: jax.Array, sizes: jax.Array, spread: bool) -> Evidence:
    """Evidence per group of `rows[tokens, in]`, whose groups are runs of the given sizes."""
    groups = sizes.shape[0]
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")  # past the end: dropped
    moment = lax.ragged_dot_general(
        rows, rows, sizes,
        lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ()),
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    wide = rows.astype(jnp.float32)
    return Evidence(
        moment,
        sizes.astype(jnp.float32),
        jax.ops.segment_sum(wide, group, groups),
        jnp.maximum(jax.ops.segment_max(jnp.abs(wide), group, groups), 0),
        spread=Spread.grouped(wide, group, groups) if spread else None,
    )


def _slice(value: Tagged, params: dict[str, Any]) -> list[Origin] | None:
    origin: Origin | None = value.origin
    if params["strides"] is not None and any(s != 1 for s in params["strides"]):
        return None
    bounds = zip(params["start_indices"], params["limit_indices"], strict=True)
    for dim, (start, stop) in enumerate(bounds):
        origin = origin and origin.window(value.array.shape, dim, start, stop - start)
    return origin and [origin]


def _split(value: Tagged, params: dict[str, Any]) -> list[Origin] | None:
    at, origins = 0, []
    for size in params["sizes"]:
        origins.append(value.origin.window(value.array.shape, params["axis"], at, int(size)))
        at += int(size)
    return None if None in origins else origins


def _convert(value: Tagged, params: dict[str, Any]) -> list[Origin] | None:
    return [value.origin] if jnp.issubdtype(params["new_dtype"], jnp.floating) else None


def _reshape(value: Tagged, params: dict[str, Any]) -> list[Origin] | None:
    origin = value.origin.reshape(value.array.shape, params["new_sizes"])
    return origin and [origin]


def _broadcast(value: Tagged, params: dict[str, Any]) -> list[Origin] | None:
    dims = params["broadcast_dimensions"]
    origin = value.origin.broadcast(value.array.ndim, params["shape"], dims)
    return origin and [origin]


_VIEW_RULES = {
    "convert_element_type": _convert,
    "transpose": lambda value, params: [value.origin.transpose(params["permutation"])],
    "reshape": _reshape,
    "squeeze": lambda value, params: [value.origin.squeeze(value.array.ndim, params["dimensions"])],
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": lambda value, params: None,
}
_RULES = {
    "dot_general": Observer._dot,
    "conv_general_dilated": Observer._conv,
    "ragged_dot_general": Observer._ragged_dot,
    "ragged_dot": Observer._ragged_dot,
    "gather": Observer._gather,
}
