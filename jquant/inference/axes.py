"""Where a product of two arrays finds the axes of a quantized weight, and those of its input.

`axes_of` reads the dimension numbers of a `dot_general`: which axes of the weight are contracted,
which run along, in the order of the equation. `Places` takes the other operand to the canonical
view of inputs, `[*batch, tokens, in]`; `as_result` gives a result `[*batch, tokens, out]` the axes
that the equation has for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
from jax.extend import core

from jquant.axes.layout import Layout

Role = Literal["out", "in"]


class Axes(NamedTuple):
    """Where a product finds a weight: its contracted axes, its batch axes, in the other's order."""

    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    role: Role  # of all contracted axes


def axes_of(eqn: core.JaxprEqn, at: int, layout: Layout) -> Axes | None:
    """The axes that operand `at` gives, if each plays one role and factors can follow."""
    (contract, batch) = eqn.params["dimension_numbers"]
    contracted, batched = tuple(contract[at]), tuple(batch[at])
    roles: dict[str, list[int]] = {"batch": [], "out": [], "in": []}
    for number, axis in enumerate(layout.axes):
        kinds = {f.role for f in axis}
        if len(kinds) != 1 or (kinds == {"batch"} and len(axis) > 1):
            return None
        roles[kinds.pop()].append(number)
    if sorted(batched) != roles["batch"]:
        return None
    for role in ("in", "out"):
        if sorted(contracted) == roles[role] and contracted:
            return Axes(contracted, batched, role)
    return None


@dataclass(frozen=True)
class Places:
    """The axes of an input by what they are; its canonical order is batch, tokens, inner."""

    batch: tuple[int, ...]
    tokens: tuple[int, ...]
    inner: tuple[int, ...]

    @staticmethod
    def of(eqn: core.JaxprEqn, at: int) -> Places:
        """Of the operand beside `at`, batch and inner axes as the equation orders them."""
        (contract, batch) = eqn.params["dimension_numbers"]
        inner, along = tuple(contract[1 - at]), tuple(batch[1 - at])
        rank = eqn.invars[1 - at].aval.ndim  # type: ignore[attr-defined]
        free = tuple(k for k in range(rank) if k not in inner and k not in along)
        return Places(along, free, inner)

    def canonical(self, x: jax.Array) -> jax.Array:
        """An array with these axes as `[*batch, tokens, in]`."""
        sizes = [
            *(x.shape[k] for k in self.batch),
            math.prod(x.shape[k] for k in self.tokens),
            math.prod(x.shape[k] for k in self.inner),
        ]
        return x.transpose(*self.batch, *self.tokens, *self.inner).reshape(sizes)

    def original(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        """The inverse of `canonical`, for an array that had `shape`."""
        turn = [*self.batch, *self.tokens, *self.inner]
        turned = x.reshape([shape[k] for k in turn])
        return turned.transpose([turn.index(k) for k in range(len(turn))])


def in_order(eqn: core.JaxprEqn, at: int, layout: Layout, axes: Axes) -> Places:
    """The places of an input, in the order in which the weight's canonical view has its axes."""
    (contract, batch) = eqn.params["dimension_numbers"]

    def ordered(mine: Sequence[int], theirs: Sequence[int]) -> tuple[int, ...]:
        pairs = zip(mine, theirs, strict=True)
        return tuple(k for _, k in sorted((layout.axes[axis][0].place, k) for axis, k in pairs))

    found = Places.of(eqn, at)
    return Places(
        ordered(axes.batch, batch[1 - at]), found.tokens, ordered(axes.contracted, contract[1 - at])
    )


def as_result(
    y: jax.Array, eqn: core.JaxprEqn, at: int, layout: Layout, axes: Axes, x_shape: Sequence[int]
) -> jax.Array:
    """A canonical result `[*batch, tokens, out]` with the axes that the equation's result has."""
    shape = eqn.outvars[0].aval.shape  # type: ignore[attr-defined]
    places = in_order(eqn, at, layout, axes)
    rank = len(layout.axes)
    free = [k for k in range(rank) if k not in axes.batch and k not in axes.contracted]
    # The result: batch axes as the equation has them, then what is left of each operand in turn.
    sides = {at: [("weight", k) for k in free], 1 - at: [("input", k) for k in places.tokens]}
    wanted = [*(("batch", k) for k in axes.batch), *sides[0], *sides[1]]
    sizes = dict(zip(wanted, shape, strict=True))

    def canonical(kind: str, numbers: Sequence[int]) -> list[tuple[str, int]]:
        return [(kind, k) for k in sorted(numbers, key=lambda k: layout.axes[k][0].place)]

    now = [*canonical("batch", axes.batch), *sides[1 - at], *canonical("weight", free)]
    return y.reshape([sizes[axis] for axis in now]).transpose([now.index(axis) for axis in wanted])
