"""The views of a value that depends on no input: which axes of a weight the result's axes are.

A view gives back the numbers it was given, in another shape or order, or a window of them: one rule
per kind says what becomes of an `Origin`. Concatenating, stacking and padding give every weight its
share of an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from jquant.axes.digits import Part
from jquant.axes.origin import GONE, Origin
from jquant.calibration.tagged import Tagged, array_of, changed, settled
from jquant.programs.walker import bind

View = Callable[[Origin, tuple[int, ...], dict[str, Any]], list[Origin | None]]


def view(eqn: core.JaxprEqn, values: list[Any]) -> list[Tagged] | None:
    """The results of a view of `values[0]`; None for any other operation."""
    rule, value = VIEWS.get(eqn.primitive.name), next(iter(values), None)
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
    now: Origin | None = origin
    steps = params["strides"] or (1,) * len(shape)
    bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    for dim, (start, stop, step) in enumerate(bounds):
        length = -(-(stop - start) // step)
        if now is None or now is GONE:
            break
        if step == 1:
            now = now.window(shape, dim, start, length)
        else:
            now = now.strided(shape, dim, start, step, length)
        shape = (*shape[:dim], length, *shape[dim + 1 :])
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


VIEWS: dict[str, View] = {
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

# Made of several operands, none of which depends on inputs.
MADE: Mapping[str, Callable[[core.JaxprEqn, list[Any]], Tagged]] = {
    "concatenate": joined,
    "stack": joined,
    "pad": padded,
}
