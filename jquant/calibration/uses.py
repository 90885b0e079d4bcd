"""Operations other than a `dot_general` in which a weight meets its input.

Convolutions and `ragged_dot` come down to rows as a product does. A lookup has none: it picks rows
of a table. Picked by data, a row is a use of the table; picked at fixed positions, it is one if it
meets an input as it is, and where it is contracted instead the table is a weight like others, read
in another order. Whole matrices that data picks (experts, layers) are no weight any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.axes.origin import Origin, Part
from jquant.axes.roles import Kind, Reading, order
from jquant.calibration.evidence import Evidence
from jquant.calibration.rows import Arrangement, Role, Share
from jquant.calibration.tagged import Tagged, array_of, changed, is_independent
from jquant.errors import UnsupportedPrimitiveError
from jquant.programs.walker import Walker, bind
from jquant.trees.placement import automatic


def unsupported(origin: Origin, eqn: core.JaxprEqn, why: str) -> UnsupportedPrimitiveError:
    return UnsupportedPrimitiveError(
        f"weight {origin.path!r} enters {eqn.primitive.name!r}: {why}, so its evidence cannot be "
        "read. Rewrite that operation with dot, conv or einsum on the weight itself, or leave the "
        f"weight out: find_weights(..., ignore={origin.path!r})"
    )


def floats(rows: jax.Array) -> jax.Array:
    """Half-precision rows as they are, everything else as float32."""
    return rows if rows.dtype in (jnp.bfloat16, jnp.float16) else rows.astype(jnp.float32)


def reading_of(kind: Kind, origin: Origin, roles: Sequence[Role], walker: Walker) -> Reading:
    """How a weight is read where the axes of its array have these roles."""
    parts: dict[str, list[Part]] = {"batch": [], "in": [], "out": []}
    for role, axis in zip(roles, origin.own(len(roles)), strict=True):
        parts[role] += [p._replace(reversed=False) for p in axis if p.axis >= 0]
    if any(part.shuffled for role in ("batch", "in") for part in parts[role]):
        why = "it was indexed along an axis that is contracted"
        raise unsupported(origin, walker.within[-1], why)
    scanned = origin.scanned(len(roles))
    windows = [
        (k, offset, offset + math.prod(p.length for p in axis))
        for k, (axis, offset) in enumerate(zip(scanned, origin.offsets, strict=False))
        if offset is not None
    ]
    return Reading(
        kind,
        (*(p for axis in scanned for p in axis), *_ordered(parts["batch"])),
        origin.fixed,
        _ordered(parts["in"]),
        tuple(parts["out"]),
        tuple(windows),
    )


def _ordered(parts: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(parts[k] for k in order(parts))


def _weights(eqn: core.JaxprEqn, weight: Tagged) -> tuple[Origin, ...]:
    """The origins of an operand that is used other than by a `dot_general`."""
    if weight.lost:
        raise unsupported(weight.lost[0], eqn, f"it has been through {weight.lost[0].broken!r}")
    for origin in weight.good:
        if origin.product is not None:
            raise unsupported(origin, eqn, "it is a product of parameters")
    return weight.good


def conv(observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
    x, weight, params = values[0], values[1], eqn.params
    if isinstance(x, Tagged) and x.good and not (isinstance(weight, Tagged) and weight.origins):
        raise unsupported(x.good[0], eqn, "it is the convolution's input")
    observer.reach(values)
    results = bind(eqn, list(map(array_of, values)))
    if not isinstance(weight, Tagged) or not weight.origins:
        return results
    x, numbers, groups = array_of(x), params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        raise unsupported(weight.origins[0], eqn, "batch_group_count is not 1")
    out_dim, in_dim, *window = numbers.rhs_spec
    features = (in_dim, *window)  # the order of a patch's features: channel, then position
    shape = weight.array.shape

    def patches(x: jax.Array) -> jax.Array:
        seen = lax.conv_general_dilated_patches(
            x, [shape[dim] for dim in window], params["window_strides"],
            params["padding"], params["lhs_dilation"], params["rhs_dilation"],
            dimension_numbers=numbers, precision=lax.Precision.HIGHEST,
        )  # fmt: skip
        seen = jnp.moveaxis(seen, numbers.out_spec[1], -1)
        return seen.reshape(-1, groups, *[shape[dim] for dim in features])

    tokens = math.prod(results[0].shape) // results[0].shape[numbers.out_spec[1]]
    for k, origin in enumerate(_weights(eqn, weight)):
        parts, offsets = origin.own(weight.array.ndim), origin.own_offsets(weight.array.ndim)
        split, lead = origin, ()
        roles: list[Role] = ["in"] * weight.array.ndim
        roles[out_dim] = "out"
        if groups > 1:
            grouped = _grouped_out(origin, shape, out_dim, groups)
            if grouped is None:
                raise unsupported(origin, eqn, "a grouped kernel was reshaped, sliced or joined")
            split, lead = grouped
            roles[out_dim : out_dim + 1] = ["batch", "out"]
        shares = {2 + j: Share("in", parts[dim], offsets[dim]) for j, dim in enumerate(features)}
        if lead:
            shares[1] = Share("batch", lead, None)
        way = Arrangement.of((tokens, groups, *[shape[dim] for dim in features]), shares)
        reading = observer.see(walker, (1, k), "conv", split, roles, way.tokens)

        own = None
        if observer.tokens is not None:
            result, feature = eqn.outvars[0].aval, numbers.out_spec[1]
            own = observer.tokens.result(walker.site, origin.path, result, feature)

        def compute(x: jax.Array, way: Arrangement = way, own: jax.Array | None = own) -> Evidence:
            rows = floats(way.rows(patches(x)))
            return observer._evidence(walker, (1, way), rows, weights=own)

        what = "conv", str(params), shape, way
        found = walker.share(what, x, partial(automatic, compute, x))
        walker.emit((origin.path, reading), found)
    return results


def _grouped_out(
    origin: Origin, shape: Sequence[int], dim: int, groups: int
) -> tuple[Origin, tuple[Part, ...]] | None:
    """The origin of a kernel whose output channels are `groups` times as many, and the groups."""
    own = origin.own(len(shape))[dim]
    if origin.own_offsets(len(shape))[dim] is not None or len(own) != 1 or not own[0].whole:
        return None
    split = origin.reshape(shape, (*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :]))
    return None if split is None else (split, split.own(len(shape) + 1)[dim])


def ragged_dot(observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch), ragged = numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions
    x, weight, sizes = values[:3]
    results = bind(eqn, list(map(array_of, values)))
    tagged = [v for v in values if isinstance(v, Tagged) and v.origins]
    observer.reach(values)
    if not tagged:
        return results
    if (
        tagged != [weight]
        or tuple(map(tuple, batch)) != ((), ())
        or len(contract[0]) != 1
        or not numbers.rhs_group_dimensions
    ):
        why = "only rows [tokens, in] in groups are supported"
        raise unsupported(tagged[0].origins[0], eqn, why)
    x, sizes, rank = array_of(x), array_of(sizes), weight.array.ndim
    turned = x if tuple(ragged) == (0,) else x.T
    roles: list[Role] = [
        "batch" if k in numbers.rhs_group_dimensions else "in" if k in contract[1] else "out"
        for k in range(rank)
    ]
    for k, origin in enumerate(_weights(eqn, weight)):
        own, offsets = origin.own(rank), origin.own_offsets(rank)
        groups = roles.index("batch")
        if any(p.axis < 0 or p.reversed for p in own[groups]) or offsets[groups] is not None:
            raise unsupported(origin, eqn, "its groups were repeated, reversed or joined")
        way = Arrangement.of(
            turned.shape, {1: Share("in", own[contract[1][0]], offsets[contract[1][0]])}
        )
        reading = observer.see(walker, (1, k), "ragged_dot", origin, roles, way.tokens)

        what = "ragged", contract[0], ragged, way

        own = None
        if observer.tokens is not None:
            turn = (0, 1) if tuple(ragged) == (0,) else (1, 0)
            own = observer.tokens.operand(walker.site, 0, origin.path, x.shape, turn, 1)

        def compute(
            x: jax.Array,
            sizes: jax.Array,
            way: Arrangement = way,
            what: Any = what,
            own: jax.Array | None = own,
        ) -> Evidence:
            rows = way.rows(floats(x))
            return observer._evidence(walker, what, rows, sizes=sizes, weights=own)

        walker.emit(
            (origin.path, reading),
            walker.share(what, (x, sizes), partial(automatic, compute, turned, sizes)),
        )
    return results


def gather(observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
    table, numbers = values[0], eqn.params["dimension_numbers"]
    if not isinstance(table, Tagged) or not table.good:
        return observer.other(eqn, values, all(map(is_independent, eqn.invars, values)))
    shape, sizes = table.array.shape, eqn.params["slice_sizes"]
    batch = set(numbers.operand_batching_dims)
    rows = {
        d
        for d in numbers.start_index_map
        if sizes[d] != shape[d] or d in numbers.collapsed_slice_dims
    }
    indices = array_of(values[1])
    where: list[int] | None = None
    if len(rows) == 1 and indices.ndim == 2 and not batch:  # one axis, in another order
        (row,) = rows
        left = [d for d in range(len(shape)) if d not in numbers.collapsed_slice_dims]
        out = {int(k): d for k, d in zip(numbers.offset_dims, left, strict=True)}
        if numbers.collapsed_slice_dims == (row,):
            where = [out[k] if k in out else row for k in range(len(shape))]
    return _picked(observer, eqn, values, walker, rows, batch, where)


def dynamic_slice(
    observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker
) -> list[Any]:
    table = values[0]
    if not isinstance(table, Tagged) or not table.good:
        return observer.other(eqn, values, all(map(is_independent, eqn.invars, values)))
    sizes = eqn.params["slice_sizes"]
    rows = {d for d, size in enumerate(table.array.shape) if sizes[d] != size}
    where = list(range(table.array.ndim)) if len(rows) == 1 else None
    return _picked(observer, eqn, values, walker, rows, set(), where)


def _picked(
    observer: Any,
    eqn: core.JaxprEqn,
    values: list[Any],
    walker: Walker,
    rows: set[int],
    batch: set[int],
    where: list[int] | None,
) -> list[Any]:
    """Parts of a table along the axes `rows`.

    `where`: for each axis of the result that of the table, if it is one axis in another order.
    """
    table, name, sizes = values[0], eqn.primitive.name, eqn.params["slice_sizes"]
    (result,) = bind(eqn, list(map(array_of, values)))
    rank, shape = table.array.ndim, table.array.shape
    kept = [d for d in range(rank) if d not in rows | batch and shape[d] > 1]
    whole = all(sizes[d] == shape[d] for d in kept) and all(sizes[d] == 1 for d in rows)
    free = all(map(is_independent, eqn.invars[1:], values[1:]))
    observer.reach(values[1:])
    reach, one = table.reach, whole and len(kept) == 1
    if whole and kept and rows:
        roles: list[Role] = [
            "out" if d in rows else "batch" if d in batch else "in" for d in range(rank)
        ]
        if one and not free:
            for k, origin in enumerate(table.good):
                observer.see(walker, (0, k), "lookup", origin, roles, 0)
            return [result]
        reach = (*reach, observer.postpone(walker, table.good, roles))
    if free and where is not None:
        (row,) = rows
        origins = [o.shuffle(shape, row, result.shape[where.index(row)]) for o in table.origins]
        origins = [o and o.transpose(where) for o in origins]
        return [changed(_with(table, reach), result, origins, name)]
    if free and one:
        return [Tagged(result, (), reach)]
    value = changed(_with(table, reach), result, [None] * len(table.origins), name)
    return [Tagged(result, value.origins, value.reach, dependent=not free)]


def _with(table: Tagged, reach: Sequence[int]) -> Tagged:
    return Tagged(table.array, table.origins, tuple(reach))


RULES: Mapping[str, Any] = {
    "conv_general_dilated": conv,
    "ragged_dot": ragged_dot,
    "ragged_dot_general": ragged_dot,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
}
