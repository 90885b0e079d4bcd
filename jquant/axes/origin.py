"""Where an array came from: which axes of which parameter its axes are made of.

A weight seldom meets its input as it was stored: it is cast, transposed, reshaped to heads, split
into q, k and v, sliced out of a stack, joined with others. An `Origin` follows it through such
*views*: for every axis of the current array it lists the `Part`s of the parameter's axes that make
it up, outermost first. When the array is at last contracted, each part's role (in, out, batch) is
the role of the array axis it lies on; nothing is guessed by rank. An origin is static. A scan drops
leading array axes without telling it: they are simply the first entries of `axes` beyond the
array's rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from jquant.axes.digits import Axis, Part, apart, regroup, windowed


@jax.tree_util.register_static
@dataclass(frozen=True)
class Origin:
    """What an array owes to one parameter, or to one product of parameters.

    Attributes:
        path: the parameter's; empty for a product.
        axes: the parts of each array axis.
        fixed: parts that indexing has pinned to one value.
        broken: the first operation that was no view: the array is computed from the weight, but is
            no longer the weight.
        through: the elementwise operations, other than by one common factor, that the weight has
            been through.
        offsets: for each array axis, where the parameter's share of it begins if it does not fill
            it (a concatenation, padding); None where it does.
        product: the number of a product of parameters, whose axes `axes` speaks of; see
            `products.py`.
        had: of a broken one, the parts of the parameter that it was of.
    """

    path: str
    axes: tuple[Axis, ...]
    fixed: tuple[Part, ...] = ()
    broken: str | None = None
    through: tuple[str, ...] = ()
    offsets: tuple[int | None, ...] = ()
    product: int | None = None
    had: tuple[Part, ...] = ()

    @staticmethod
    def of(path: str, shape: Sequence[int], product: int | None = None) -> Origin:
        axes = tuple((Part.of(k, n),) for k, n in enumerate(shape))
        return Origin(path, axes, offsets=(None,) * len(axes), product=product)

    def break_at(self, operation: str) -> Origin:
        """No view any more, since this operation."""
        if self.broken:
            return self
        had = self.parts
        return replace(self, axes=(), fixed=(), offsets=(), broken=operation, had=had)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the parameter that it is of, or was."""
        return self.had or (*(part for axis in self.axes for part in axis), *self.fixed)

    def overlaps(self, other: Origin) -> bool:
        """Whether both are of one parameter, and not of different parts of it."""
        return self.path == other.path and not apart(self.parts, other.parts)

    def pass_through(self, operation: str) -> Origin:
        """The same axes, other numbers."""
        if operation in self.through:
            return self
        return replace(self, through=(*self.through, operation))

    def scanned(self, rank: int) -> tuple[Axis, ...]:
        """The axes that scans have sliced away from an array of `rank`, outermost first."""
        return self.axes[: len(self.axes) - rank]

    def own(self, rank: int) -> tuple[Axis, ...]:
        """The axes that an array of `rank` still has."""
        return self.axes[len(self.axes) - rank :]

    def own_offsets(self, rank: int) -> tuple[int | None, ...]:
        return self.offsets[len(self.offsets) - rank :]

    @property
    def stretched(self) -> bool:
        """Whether broadcasting has repeated it."""
        return any(part.axis < 0 and part.length > 1 for axis in self.axes for part in axis)

    def _with(
        self,
        rank: int,
        axes: Sequence[Axis],
        offsets: Sequence[int | None],
        fixed: Sequence[Part] = (),
    ) -> Origin:
        return replace(
            self,
            axes=(*self.scanned(rank), *axes),
            offsets=(*self.offsets[: len(self.offsets) - rank], *offsets),
            fixed=(*self.fixed, *fixed),
        )

    def transpose(self, permutation: Sequence[int]) -> Origin:
        rank = len(permutation)
        own, offsets = self.own(rank), self.own_offsets(rank)
        return self._with(rank, [own[k] for k in permutation], [offsets[k] for k in permutation])

    def broadcast(self, rank: int, shape: Sequence[int], dims: Sequence[int]) -> Origin | None:
        """`broadcast_in_dim`: new axes come from nowhere, and so does what stretches an axis."""
        axes: list[Axis] = [() if n == 1 else (Part.of(-1, n),) for n in shape]
        offsets: list[int | None] = [None] * len(shape)
        for parts, offset, dim in zip(self.own(rank), self.own_offsets(rank), dims, strict=True):
            length = math.prod(p.length for p in parts)
            if length == shape[dim] or offset is not None:
                axes[dim], offsets[dim] = parts, offset
            elif any(p.axis >= 0 and p.size > 1 for p in parts):
                return None
        return self._with(rank, axes, offsets)

    def squeeze(self, rank: int, dims: Sequence[int]) -> Origin | None:
        own, offsets = self.own(rank), self.own_offsets(rank)
        fixed = [part for dim in dims for part in own[dim] if part.axis >= 0 and not part.whole]
        if any(part.shuffled for part in fixed):
            return None
        left = [k for k in range(rank) if k not in dims]
        return self._with(rank, [own[k] for k in left], [offsets[k] for k in left], fixed)

    def window(self, shape: Sequence[int], dim: int, start: int, length: int) -> Origin | None:
        """Values `start .. start + length` of one array axis."""
        if length == shape[dim]:
            return self
        own, offsets = list(self.own(len(shape))), list(self.own_offsets(len(shape)))
        offset = offsets[dim]
        if offset is not None:  # what the window shows of this share of the axis
            mine = math.prod(part.length for part in own[dim])
            low, high = max(start, offset), min(start + length, offset + mine)
            if low >= high:
                return GONE
            whole = (low, high) == (start, start + length)
            offsets[dim] = None if whole else low - start
            start, length = low - offset, high - low
            if length == mine:
                return self._with(len(shape), own, offsets)
        parts = windowed([part for part in own[dim] if part.size > 1], start, length)
        if parts is None:
            return None
        own[dim] = parts
        return self._with(len(shape), own, offsets)

    def strided(
        self, shape: Sequence[int], dim: int, start: int, stride: int, length: int
    ) -> Origin | None:
        """Every `stride`-th value of one array axis, `length` of them from `start` on.

        Where the axis has as many values as that takes, it is one of its inner digit's; elsewhere
        a choice like others.
        """
        if shape[dim] != stride * length:
            return self.shuffle(shape, dim, length, (-1, start, stride))
        digits = (*shape[:dim], length, stride, *shape[dim + 1 :])
        split = self.reshape(shape, digits)
        one = split and split.window(digits, dim + 1, start, 1)
        return one and one.squeeze(len(digits), [dim + 1])

    def place(self, rank: int, dim: int, offset: int) -> Origin | None:
        """One array axis as a share of a longer one, beginning at `offset`."""
        offsets = list(self.own_offsets(rank))
        offsets[dim] = offset + (offsets[dim] or 0)
        return self._with(rank, self.own(rank), offsets)

    def reverse(self, shape: Sequence[int], dims: Sequence[int]) -> Origin:
        own, offsets = list(self.own(len(shape))), list(self.own_offsets(len(shape)))
        for dim in dims:
            own[dim] = tuple(part._replace(reversed=not part.reversed) for part in own[dim])
            offset = offsets[dim]
            if offset is not None:
                offsets[dim] = shape[dim] - offset - math.prod(part.length for part in own[dim])
        return self._with(len(shape), own, offsets)

    def shuffle(
        self, shape: Sequence[int], dim: int, length: int, choice: tuple[int, ...]
    ) -> Origin | None:
        """One array axis indexed: `length` of its values, in an order that is not known.

        `choice`: what tells it from others, and is not empty.
        """
        own = list(self.own(len(shape)))
        parts = [part for part in own[dim] if part.size > 1]
        if len(parts) != 1 or self.own_offsets(len(shape))[dim] is not None:
            return None
        own[dim] = (parts[0]._replace(length=length, shuffled=choice),)
        return self._with(len(shape), own, self.own_offsets(len(shape)))

    def reshape(self, shape: Sequence[int], new: Sequence[int]) -> Origin | None:
        """Regroup the parts into axes of sizes `new`, splitting whole ones at the boundaries."""
        own, offsets = self.own(len(shape)), self.own_offsets(len(shape))
        placed = [k for k, offset in enumerate(offsets) if offset is not None]
        if not placed:
            regrouped = _regroup(own, new)
            if regrouped is None:
                return None
            axes, ones = regrouped
            return self._with(len(shape), axes, [None] * len(new), ones)
        # A shared axis stays as it is; what lies on either side of it is regrouped by itself.
        at = placed[0]
        before = math.prod(shape[:at])
        there = next(
            (k for k in range(len(new)) if math.prod(new[:k]) == before and new[k] == shape[at]),
            None,
        )
        if len(placed) > 1 or there is None:
            return None
        sides = _regroup(own[:at], new[:there]), _regroup(own[at + 1 :], new[there + 1 :])
        if sides[0] is None or sides[1] is None:
            return None
        left, ones = sides[0]
        right, more = sides[1]
        axes = [*left, own[at], *right]
        after = [offsets[at] if k == there else None for k in range(len(new))]
        return self._with(len(shape), axes, after, [*ones, *more])


GONE = Origin("", ())  # of a window that shows nothing of the parameter's share of an axis


def _regroup(axes: Sequence[Axis], new: Sequence[int]) -> tuple[list[Axis], list[Part]] | None:
    """The parts as axes of sizes `new`, and those that indexing has pinned."""
    pinned = [part for axis in axes for part in axis if part.pinned]
    grouped = regroup((part for axis in axes for part in axis), new)
    if grouped is None or any(part.shuffled for part in pinned):
        return None
    return grouped, pinned
