"""The one canonical view of a weight: `[*batch, out, in]`.

A Flax kernel is `[in, out]`, an attention projection `[D, N, H]`, a convolution `[H, W, I, O]`, a
stack of experts `[E, D, F]`. Only this module knows. A `Layout` says, for every axis of the array,
which factors of the batch, out and in axes it is made of; `Layout.canonical` and `Layout.original`
go there and back. A layout is a static value. It stores no batch sizes: they are read off the
array, so a layout stays true when `scan`, `vmap` or `a[0]` slices leading batch axes away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Shaped

Role = Literal["batch", "out", "in"]


class Factor(NamedTuple):
    """One factor of an array axis: its role, its place among that role's factors, its size.

    Batch factors are ordered as the array's axes are, and their size is 0: it is read off the data.
    """

    role: Role
    place: int
    size: int


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """How an array's axes make up `[*batch, out, in]`: for each axis, its factors, outermost first.

    Example:
        >>> stack = jax.numpy.ones((3, 8, 5))
        >>> Layout.of(stack.shape, batch_axes=(0,), in_axes=(1,)).canonical(stack).shape
        (3, 5, 8)
    """

    axes: tuple[tuple[Factor, ...], ...]

    @staticmethod
    def of(
        shape: Sequence[int],
        *,
        in_axes: Sequence[int],
        batch_axes: Sequence[int] = (),
        split_shape: Sequence[int] | None = None,
    ) -> Layout:
        """The layout of an array of `shape`; all axes that are neither in nor batch are out.

        The axis numbers index `split_shape`, which is `shape` with axes that play two roles split
        (a grouped convolution's output channels are `groups × out`). In and out axes keep the
        array's order.
        """
        split = tuple(shape) if split_shape is None else tuple(split_shape)
        counters: dict[str, int] = {"batch": 0, "out": 0, "in": 0}
        factors: list[Factor] = []
        for axis, size in enumerate(split):
            role: Role = "in" if axis in in_axes else "batch" if axis in batch_axes else "out"
            factors.append(Factor(role, counters[role], 0 if role == "batch" else size))
            counters[role] += 1
        axes, at = [], 0
        for size in shape:
            start, product = at, 1
            while at < len(split) and (product < size or (at == start and split[at] == size)):
                product *= split[at]
                at += 1
            if product != size:
                raise ValueError(f"split_shape {split} does not refine shape {tuple(shape)}")
            axes.append(tuple(factors[start:at]))
        return Layout(tuple(axes))

    def _flat(self, batch_rank: int) -> tuple[list[tuple[Factor, ...]], list[Factor]]:
        """Axes and factors that are left when the array holds `batch_rank` batch axes."""
        gone = sum(f.role == "batch" for axis in self.axes for f in axis) - batch_rank
        kept: list[tuple[Factor, ...]] = []
        for axis in self.axes:
            left = tuple(f for f in axis if not (f.role == "batch" and f.place < gone))
            if left or not axis:
                kept.append(left)
        return kept, [f for axis in kept for f in axis]

    def canonical_marks(self, marks: Sequence[Any]) -> list[Any]:
        """Marks of the array's axes as marks of `[*batch, out, in]`; None where none is left.

        Of an axis that is split, or flattened with others, only the outermost part can bear one.

        Example:
            >>> Layout.of((8, 4), in_axes=(0,)).canonical_marks(["rows", None])
            [None, 'rows']
        """
        moved: list[Any] = [None] * (self.batch_rank + 2)
        for axis, mark in zip(self.axes, marks, strict=True):
            for factor in axis[:1]:
                if factor.role == "batch" or factor.place == 0:
                    moved[self._canonical_axis(factor)] = mark
        return moved

    def original_marks(self, marks: Sequence[Any]) -> list[Any]:
        """The inverse of `canonical_marks`, for whom it has lost nothing."""
        return [
            marks[self._canonical_axis(axis[0])]
            if axis and (axis[0].role == "batch" or axis[0].place == 0)
            else None
            for axis in self.axes
        ]

    def _canonical_axis(self, factor: Factor) -> int:
        if factor.role == "batch":
            return factor.place
        return self.batch_rank + (factor.role == "in")

    @staticmethod
    def _order(factors: list[Factor]) -> list[int]:
        """Positions of the factors in canonical order: batch, out, in."""
        rank = {"batch": 0, "out": 1, "in": 2}
        return sorted(range(len(factors)), key=lambda k: (rank[factors[k].role], factors[k].place))

    def trimmed(self, batch_rank: int) -> Layout:
        """The layout of an array with only its last `batch_rank` batch axes left."""
        gone = self.batch_rank - batch_rank
        kept, _ = self._flat(batch_rank)
        return Layout(tuple(
            tuple(f._replace(place=f.place - gone) if f.role == "batch" else f for f in axis)
            for axis in kept
        ))  # fmt: skip

    @property
    def batch_rank(self) -> int:
        """How many batch axes an unsliced array has."""
        return sum(f.role == "batch" for axis in self.axes for f in axis)

    def size(self, role: Role) -> int:
        """Length of the flattened out or in axis (1 when the array has none)."""
        return math.prod(f.size for axis in self.axes for f in axis if f.role == role)

    def shape(self, canonical_shape: Sequence[int]) -> tuple[int, ...]:
        """The original shape of an array whose canonical shape is given."""
        batch = list(canonical_shape[:-2])
        kept, _ = self._flat(len(batch))
        return tuple(
            math.prod(batch.pop(0) if f.role == "batch" else f.size for f in axis) for axis in kept
        )

    def canonical(self, array: Shaped[Array, ...]) -> Shaped[Array, "*batch out in"]:
        """The array as `[*batch, out, in]`. All of the layout's batch axes must be present."""
        split: list[int] = []
        for axis, size in zip(self.axes, array.shape, strict=True):
            inner = math.prod(f.size for f in axis if f.role != "batch")
            split += [f.size if f.role != "batch" else size // inner for f in axis]
        order = self._order([f for axis in self.axes for f in axis])
        turned = array.reshape(split).transpose(order)
        batch = turned.shape[: self.batch_rank]
        return turned.reshape(*batch, self.size("out"), self.size("in"))

    def original(self, canonical: Shaped[Array, "*batch out in"]) -> Shaped[Array, ...]:
        """The inverse of `canonical`; leading batch axes may have been sliced away."""
        batch = canonical.shape[:-2]
        _, factors = self._flat(len(batch))
        order = self._order(factors)
        sizes = [*batch, *(factors[k].size for k in order[len(batch) :])]
        turned = canonical.reshape(sizes)
        back = [order.index(k) for k in range(len(order))]
        return turned.transpose(back).reshape(self.shape(canonical.shape))
