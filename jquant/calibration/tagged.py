"""Values that depend on no input: what is known of them, and the views that keep it so.

A `Tagged` array is computed from parameters and constants alone, so it is one and the same for all
inputs. What it owes to weights is told by its origins: one for a weight or a view of it, several
where weights were added or joined, none for a constant. A function then contracts the *effective*
weight with an input, and every origin that is not broken says which axes of which parameter that
input meets. Elementwise operations on the way leave axes as they are: they are noted
(`Origin.through`), but for multiplication by one common factor, which a grid's scales follow.

Two kinds of values that do depend on inputs are tagged too: `dependent` ones, rows or matrices that
data has picked from a weight, and `uniform` dependent ones, a single number in the shape of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from jquant.axes.origin import GONE, Origin, Part
from jquant.programs.walker import bind

# One operand (or several, each for itself), the same array out.
IDENTITIES = frozenset(
    "copy copy_p stop_gradient optimization_barrier sharding_constraint device_put "
    "reduce_precision name pvary pcast mesh_cast reshard".split()
)
# Operations that act on every element by itself, on arrays of one shape.
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not "
    "or pow real rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical "
    "sign sin sinh sqrt square sub tan tanh xor".split()
)
# Those of them, of operands made of parameters, that leave a product of parameters one.
_LINEAR = frozenset("add add_any convert_element_type div mul neg select_n sub".split())


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Tagged:
    """An array and what is known of it. As a pytree it has one leaf, so control flow slices it.

    Attributes:
        array: the array.
        origins: the weights, or products of parameters, that it stands for; none of a constant.
        reach: the numbers of other uses of weights that went into it (see `pending.py`): they count
            if it meets an input.
        dependent: whether it depends on inputs after all.
        uniform: whether all its elements are one number.
    """

    array: Array
    origins: tuple[Origin, ...] = field(default=(), metadata={"static": True})
    reach: tuple[int, ...] = field(default=(), metadata={"static": True})
    dependent: bool = field(default=False, metadata={"static": True})
    uniform: bool = field(default=False, metadata={"static": True})

    @staticmethod
    def of(path: str, array: Array) -> Tagged:
        """A leaf of the parameters; a vector or an empty one is a constant like others."""
        weight = array.ndim > 1 and array.size > 0
        return Tagged(array, (Origin.of(path, array.shape),) if weight else ())

    @property
    def good(self) -> tuple[Origin, ...]:
        """The origins that are still views."""
        return tuple(origin for origin in self.origins if origin.broken is None)

    @property
    def lost(self) -> tuple[Origin, ...]:
        """Those of weights that it has no view of any more."""
        seen = {origin.path for origin in self.good if origin.product is None}
        return tuple(o for o in self.origins if o.broken is not None and o.path not in seen)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(origin.path for origin in self.origins if origin.product is None)


def constant(value: Any, kind: Any, walker: Any) -> Any:
    """What a walker puts in place of an array that stands in the program."""
    del kind, walker
    return Tagged(jnp.asarray(value)) if isinstance(value, jax.Array) or jnp.ndim(value) else value


def is_key(leaf: Any) -> bool:
    """Whether an input is a key of random numbers: what is made of it is noise, not data."""
    raw = leaf.dtype == jnp.uint32 and leaf.shape == (2,)
    return raw or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def array_of(value: Any) -> Any:
    return value.array if isinstance(value, Tagged) else value


def is_independent(atom: Any, value: Any) -> bool:
    """Whether an operand is the same for all inputs."""
    if isinstance(value, Tagged):
        return not value.dependent
    return isinstance(atom, core.Literal) or not isinstance(value, jax.Array)


def is_uniform(value: Any) -> bool:
    if isinstance(value, Tagged):
        return value.uniform or value.array.size == 1
    return jnp.size(value) == 1


def settled(origins: Iterable[Origin], reach: Iterable[int]) -> tuple[Any, tuple[int, ...]]:
    """Origins without broken products, which are among the uses that went into the value."""
    origins, reach = tuple(origins), set(reach)
    lost = {o.product for o in origins if o.product is not None and o.broken is not None}
    kept = tuple(o for o in origins if o.product not in lost or o.broken is None)
    return kept, tuple(sorted(reach | {number for number in lost if number is not None}))


def changed(value: Tagged, array: Array, origins: Iterable[Origin | None], name: str) -> Tagged:
    """A value that `name` has made an array of; an origin that is None was broken by it."""
    after = [
        old.break_at(name) if new is None else new
        for old, new in zip(value.origins, origins, strict=True)
        if new is not GONE
    ]
    kept, reach = settled(after, value.reach)
    return replace(value, array=array, origins=kept, reach=reach)


def combined(name: str, values: Sequence[Any], result: Array) -> tuple[Tagged, tuple[str, ...]]:
    """An elementwise operation of independent operands, and paths that only scale or shift in it.

    A weight that is one number throughout, or was stretched to the shape of another, is a factor
    or a bias of that one.
    """
    tagged = [fitted(v, result.shape) for v in values if isinstance(v, Tagged)]
    uniform = all(map(is_uniform, tagged))
    full = [v for v in tagged if uniform or not is_uniform(v)]
    good = [o for v in full for o in v.good]
    kept = [o for o in good if not o.stretched] or good
    scaled = name == "mul" or (name == "div" and not is_uniform(values[0]))
    factor = scaled and len(full) == 1  # the others are one common factor
    through = factor or name in ("neg", "convert_element_type")
    after = [o if through else o.pass_through(name) for o in kept]
    if name not in _LINEAR:  # what it makes of a product is an activation that nothing flows into
        after = [o if o.product is None else o.break_at(name) for o in after]
    # What is left of a weight that fills the shape is a summand or factor like others.
    whole = [o for v in full for o in v.lost if not o.stretched or not after]
    after += [o for o in whole if o.path not in [kept.path for kept in after]]
    reach = {number for v in tagged for number in v.reach}
    reach |= {o.product for v in tagged for o in v.good if o.product is not None and o not in kept}
    origins, numbers = settled(_distinct(after), reach)
    paths = tuple(p for v in tagged for p in v.paths if p not in [o.path for o in origins])
    return Tagged(result, origins, numbers, uniform=uniform), paths


def _distinct(origins: Iterable[Origin]) -> Iterable[Origin]:
    """One of those that are views of one weight alike; the first."""
    return {replace(o, through=()): o for o in reversed(list(origins))}.values()


def fitted(value: Tagged, shape: tuple[int, ...]) -> Tagged:
    """An operand whose axes of size 1 an elementwise operation stretches to `shape`."""
    if value.array.shape == shape or value.array.ndim != len(shape):
        return value
    rank = len(shape)
    origins = [o.broadcast(rank, shape, range(rank)) if not o.broken else o for o in value.origins]
    return replace(
        changed(value, value.array, origins, "broadcast_in_dim"), uniform=is_uniform(value)
    )


View = Callable[[Origin, tuple[int, ...], dict[str, Any]], list[Origin | None]]


def view(eqn: core.JaxprEqn, values: list[Any]) -> list[Tagged] | None:
    """The results of a view of `values[0]`; None for any other operation."""
    rule, value = _VIEWS.get(eqn.primitive.name), next(iter(values), None)
    if rule is None or not isinstance(value, Tagged):
        return None
    value = replace(value, uniform=value.uniform or value.array.size == 1)
    results = bind(eqn, list(map(array_of, values)))
    by_origin = [
        [_still_broken(o, value.array, r) for r in results]
        if o.broken
        else rule(o, value.array.shape, eqn.params)
        for o in value.origins
    ]
    return [
        changed(value, result, [origins[k] for origins in by_origin], eqn.primitive.name)
        for k, result in enumerate(results)
    ]


def _still_broken(origin: Origin, before: Array, after: Array) -> Origin:
    """What is no view any more, maybe stretched."""
    stretched = replace(origin, axes=((Part(-1, 1, 2, 0, 2),),))
    return stretched if after.size > before.size else origin


def joined(eqn: core.JaxprEqn, values: list[Any]) -> Tagged:
    """Independent operands concatenated or stacked: every weight has its share of the axis."""
    (result,) = bind(eqn, list(map(array_of, values)))
    stack = eqn.primitive.name == "stack"
    dim, offset = eqn.params["axis" if stack else "dimension"], 0
    origins: list[Origin] = []
    reach: set[int] = set()
    for value in values:
        shape = jnp.shape(array_of(value))
        if isinstance(value, Tagged):
            placed = [
                None
                if o.broken
                else _with_axis(o, shape, dim, stack).place(result.ndim, dim, offset)
                for o in value.origins
            ]
            origins += changed(value, result, placed, eqn.primitive.name).origins
            reach |= set(value.reach)
        offset += 1 if stack else shape[dim]
    return Tagged(result, *settled(origins, reach))


def _with_axis(origin: Origin, shape: tuple[int, ...], dim: int, new: bool) -> Origin:
    """With a new axis of size 1 before `dim`, if there is to be one."""
    if not new:
        return origin
    whole = (*shape[:dim], 1, *shape[dim:])
    after = origin.broadcast(len(shape), whole, [k for k in range(len(whole)) if k != dim])
    assert after is not None, "a new axis of size 1 stretches nothing"
    return after


def padded(eqn: core.JaxprEqn, values: list[Any]) -> Tagged:
    """Padding of an independent operand; between its elements only, it is no view."""
    (result,) = bind(eqn, list(map(array_of, values)))
    value = values[0]
    if not isinstance(value, Tagged):
        return Tagged(result)
    origins: list[Origin | None] = []
    for origin in value.origins:
        now: Origin | None = origin
        for dim, (low, high, inner) in enumerate(eqn.params["padding_config"]):
            if now is None or origin.broken or (low, high, inner) == (0, 0, 0):
                continue
            plain = low >= 0 and high >= 0 and inner == 0
            now = now.place(value.array.ndim, dim, low) if plain else None
        origins.append(now)
    return changed(value, result, origins, "pad")


def _slice(origin: Origin, shape: tuple[int, ...], params: dict[str, Any]) -> list[Origin | None]:
    if params["strides"] is not None and any(s != 1 for s in params["strides"]):
        return [None]
    now: Origin | None = origin
    bounds = zip(params["start_indices"], params["limit_indices"], strict=True)
    for dim, (start, stop) in enumerate(bounds):
        if now is not None and now is not GONE:
            now = now.window(shape, dim, start, stop - start)
    return [now]


def _split(origin: Origin, shape: tuple[int, ...], params: dict[str, Any]) -> list[Origin | None]:
    ends = [sum(params["sizes"][:k]) for k in range(len(params["sizes"]))]
    return [
        origin.window(shape, params["axis"], int(at), int(size))
        for at, size in zip(ends, params["sizes"], strict=True)
    ]


def _unstack(origin: Origin, shape: tuple[int, ...], params: dict[str, Any]) -> list[Origin | None]:
    axis = params["axis"]
    rows = [origin.window(shape, axis, k, 1) for k in range(shape[axis])]
    return [row if row is None or row is GONE else row.squeeze(len(shape), [axis]) for row in rows]


def _tile(origin: Origin, shape: tuple[int, ...], params: dict[str, Any]) -> list[Origin | None]:
    reps = tuple(params["reps"])
    split = [n for pair in zip(reps, shape, strict=True) for n in pair]
    copies = origin.broadcast(len(shape), split, [2 * k + 1 for k in range(len(shape))])
    whole = [n * reps for n, reps in zip(shape, reps, strict=True)]
    return [copies and copies.reshape(split, whole)]


def _reshape(origin: Origin, shape: tuple[int, ...], params: dict[str, Any]) -> list[Origin | None]:
    if params["dimensions"] is not None:  # the order in which the axes are read
        origin = origin.transpose(params["dimensions"])
        shape = tuple(shape[k] for k in params["dimensions"])
    return [origin.reshape(shape, params["new_sizes"])]


def _broadcast(
    origin: Origin, shape: tuple[int, ...], params: dict[str, Any]
) -> list[Origin | None]:
    return [origin.broadcast(len(shape), params["shape"], params["broadcast_dimensions"])]


_VIEWS: dict[str, View] = {
    "transpose": lambda origin, shape, params: [origin.transpose(params["permutation"])],
    "reshape": _reshape,
    "squeeze": lambda origin, shape, params: [origin.squeeze(len(shape), params["dimensions"])],
    "broadcast_in_dim": _broadcast,
    "rev": lambda origin, shape, params: [origin.reverse(shape, params["dimensions"])],
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "tile": _tile,
}
