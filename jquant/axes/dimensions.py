"""A contraction with a quantized weight, ordered as the weight's codes are.

A `Contraction` says where axes meet; codes lie in the canonical view `[*batch, out, in]`. A
`Product` is both: rows of the input meet the rows of codes, and `result` takes `[*batch, tokens,
out]` to the axes that the equation has. `Dimensions` are the axes of the other operand there: seen
as rows it is `[*batch, tokens, in]`, whatever its axes are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jax.extend import core

from jquant.axes.contraction import Contraction
from jquant.axes.layout import Factor, Layout

Role = Literal["out", "in"]
Pairs = tuple[tuple[int, int], ...]  # an axis of the weight, and the axis of the input it meets


@dataclass(frozen=True)
class Dimensions:
    """The axes of an array that meets a weight, by what the product does with them.

    Attributes:
        batch: those that run along with axes of the weight.
        free: those that only the array has.
        contracted: those that are summed over.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((4, 2, 3, 5))
        >>> dimensions = Dimensions(batch=(1,), free=(0, 2), contracted=(3,))
        >>> dimensions.rows(x).shape
        (2, 12, 5)
        >>> dimensions.place(dimensions.rows(x), x.shape).shape
        (4, 2, 3, 5)
    """

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contracted: tuple[int, ...]

    @staticmethod
    def of(rank: int, batch: Iterable[int], contracted: Iterable[int]) -> Dimensions:
        """Those of an array of a rank; what is neither batch nor contracted is free."""
        batch, contracted = tuple(batch), tuple(contracted)
        free = tuple(k for k in range(rank) if k not in contracted and k not in batch)
        return Dimensions(batch, free, contracted)

    @property
    def order(self) -> tuple[int, ...]:
        """All axes, in the order in which rows have them."""
        return (*self.batch, *self.free, *self.contracted)

    def rows(self, x: jax.Array) -> jax.Array:
        """An array with these axes as `[*batch, tokens, in]`."""
        sizes = [
            *(x.shape[k] for k in self.batch),
            math.prod(x.shape[k] for k in self.free),
            math.prod(x.shape[k] for k in self.contracted),
        ]
        return x.transpose(self.order).reshape(sizes)

    def place(self, rows: jax.Array, shape: Sequence[int]) -> jax.Array:
        """The inverse of `rows`, for an array that had `shape`."""
        turned = rows.reshape([shape[k] for k in self.order])
        return turned.transpose([self.order.index(k) for k in range(len(shape))])


@dataclass(frozen=True)
class Product:
    """A `dot_general` of an array and a weight that contracts the weight's whole input axis.

    Or, as a tied embedding is used, its whole output axis. It runs along all batch axes.

    Attributes:
        at: which of its operands the weight is, 0 or 1.
        layout: of the weight's array.
        role: of the weight's contracted axes.
        batch: axes that run along, in the equation's order.
        contracted: axes that are summed over, in the order of the weight's.
        input: the axes of the other operand, in the order of the weight's canonical view.
    """

    at: int
    layout: Layout
    role: Role
    batch: Pairs
    contracted: Pairs
    input: Dimensions

    @staticmethod
    def of(eqn: core.JaxprEqn, at: int, layout: Layout) -> Product | None:
        """The product that a `dot_general` is; None where it contracts a part of an axis only.

        Also where an array's axis plays two roles in the canonical view.
        """
        contraction = Contraction.of(eqn, at)
        batch = contraction.pairs(contraction.along)
        contracted = contraction.pairs(contraction.contracted)
        role = _role(layout, [k for k, _ in contracted], [k for k, _ in batch])
        if role is None:
            return None

        def ordered(pairs: Pairs) -> list[int]:
            return [k for _, k in sorted((_place(layout, mine), k) for mine, k in pairs)]

        input_ = Dimensions.of(len(contraction.operand), ordered(batch), ordered(contracted))
        return Product(at, layout, role, batch, contracted, input_)

    @property
    def other(self) -> Role:
        """The role of the weight's free axes."""
        return "in" if self.role == "out" else "out"

    def result(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
        """`[*batch, tokens, out]` with the axes of the equation's result, which has `shape`."""
        batch, used = [k for k, _ in self.batch], {k for k, _ in (*self.batch, *self.contracted)}
        free = [k for k in range(len(self.layout.axes)) if k not in used]
        # The result: batch axes as the equation has them, then what is left of each operand.
        sides = [[("input", k) for k in self.input.free], [("weight", k) for k in free]]
        axes = [*(("batch", k) for k in batch), *sides[1 - self.at], *sides[self.at]]
        sizes = dict(zip(axes, shape, strict=True))

        def canonical(kind: str, numbers: Sequence[int]) -> list[tuple[str, int]]:
            return [(kind, k) for k in sorted(numbers, key=lambda k: _place(self.layout, k))]

        now = [*canonical("batch", batch), *sides[0], *canonical("weight", free)]
        return y.reshape([sizes[axis] for axis in now]).transpose(
            [now.index(axis) for axis in axes]
        )

    def factor(self, role: Role, rank: int) -> tuple[Layout, dict[int, int]]:
        """How a factor `[*batch, out, rank]` or `[*batch, rank, in]` stands in for the weight.

        Args:
            role: which of the weight's axes it has, beside the batch axes.
            rank: the size of its axis of its own.

        Returns:
            its layout, that axis last; and for each axis of the weight that it has, where.
        """
        kept = [k for k, axis in enumerate(self.layout.axes) if axis[0].role in ("batch", role)]
        own = (Factor("in" if role == "out" else "out", 0, rank),)
        layout = Layout((*(self.layout.axes[k] for k in kept), own))
        return layout, {axis: place for place, axis in enumerate(kept)}


def _place(layout: Layout, axis: int) -> int:
    """Where the canonical view has an array's axis, among those of its role."""
    return layout.axes[axis][0].place


def _role(layout: Layout, contracted: Sequence[int], batch: Sequence[int]) -> Role | None:
    """The role of the contracted axes, if these are all of their role and `batch` are all of it."""
    roles: dict[str, list[int]] = {"batch": [], "out": [], "in": []}
    for number, axis in enumerate(layout.axes):
        kinds = {f.role for f in axis}
        if len(kinds) != 1 or (kinds == {"batch"} and len(axis) > 1):
            return None
        roles[kinds.pop()].append(number)
    if sorted(batch) != roles["batch"] or not contracted:
        return None
    whole: tuple[Role, ...] = ("in", "out")
    return next((role for role in whole if sorted(contracted) == roles[role]), None)
