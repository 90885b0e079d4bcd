"""Axes as mixed-radix digits: which part of another array's axis an axis is made of.

A reshape splits axes and joins them; an index leaves a window. Written as digits of the axes of the
array that it came from, an axis stays known through both: a parameter's axes are followed so to
where they are contracted (`origin.py`), and tokens to where they meet a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A mixed-radix digit of an axis, or a window of one.

    Axis `axis` is read as digits; this one has the given `stride` and `size`, and the array holds
    its values `start .. start + length`, last first where it is `reversed`. A window may begin
    before the axis or end behind it, where entries of no axis were joined to it. `axis` is -1 for
    an axis made by broadcasting, or of which nothing is told. A `shuffled` part holds the values in
    an order, or a choice, that only the array knows; the numbers tell it from other choices.
    """

    axis: int
    stride: int
    size: int
    start: int
    length: int
    reversed: bool = False
    shuffled: tuple[int, ...] = ()

    @staticmethod
    def of(axis: int, size: int) -> Part:
        """All of an axis."""
        return Part(axis, 1, size, 0, size)

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.length == self.size

    @property
    def pinned(self) -> bool:
        """Whether indexing has left one value of several."""
        return self.length == 1 and not self.whole

    def split(self, size: int) -> tuple[Part, ...] | None:
        """The part, or its outer digit of `size` values and the inner one.

        None where it neither fits into an axis of `size` values nor can be split there.
        """
        if size % self.length == 0:
            return (self,)
        if not self.whole or self.shuffled or self.length % size:
            return None
        inner = self.length // size
        outer = self._replace(stride=self.stride * inner, size=size, length=size)
        return outer, self._replace(size=inner, length=inner)


Axis = tuple[Part, ...]  # outermost first


def apart(one: Iterable[Part], two: Iterable[Part]) -> bool:
    """Whether two windows of one array have no entry in common, as far as their digits tell.

    Example:
        >>> layers = Part.of(0, 3)
        >>> apart([layers._replace(length=1)], [layers._replace(start=1, length=2)])
        True
        >>> apart([layers._replace(length=1), Part.of(1, 4)], [Part.of(0, 3), Part.of(1, 4)])
        False
    """
    digits = {(p.axis, p.stride, p.size): p for p in two if p.axis >= 0 and not p.shuffled}
    return any(
        part.start + part.length <= other.start or other.start + other.length <= part.start
        for part in one
        if not part.shuffled
        and (other := digits.get((part.axis, part.stride, part.size))) is not None
    )


def regroup(parts: Iterable[Part], sizes: Sequence[int]) -> list[Axis] | None:
    """The parts as axes of these sizes, split at the boundaries; None where they do not lie so.

    Example:
        >>> axes = regroup([Part.of(0, 6), Part.of(1, 4)], [2, 12])
        >>> [[part.size for part in axis] for axis in axes]
        [[2], [3, 4]]
    """
    left = [part for part in parts if part.length > 1]
    axes: list[Axis] = []
    for size in sizes:
        axis = _taken(left, size)
        if axis is None:
            return None
        axes.append(axis)
    return axes


def _taken(parts: list[Part], size: int) -> Axis | None:
    """Parts of `size` values from the front; the list is left without them."""
    axis: list[Part] = []
    while size > 1:
        split = parts.pop(0).split(size) if parts else None
        if split is None:
            return None
        axis.append(split[0])
        parts[:0] = split[1:]
        size //= split[0].length
    return tuple(axis)


def windowed(axis: Sequence[Part], start: int, length: int) -> Axis | None:
    """Values `start .. start + length` of an axis; None where no window of each part holds them.

    Example:
        >>> parts = windowed([Part.of(0, 2), Part.of(1, 3)], 3, 2)
        >>> [(part.start, part.length) for part in parts]
        [(1, 1), (0, 2)]
    """
    if not axis:
        return None
    outer, inner = axis[0], axis[1:]
    each = math.prod(part.length for part in inner)
    if start % each == length % each == 0:
        rows, below = range(start // each, (start + length) // each), tuple(inner)
    else:
        rows = range(start // each, start // each + 1)
        below = windowed(inner, start % each, length) if start % each + length <= each else None
    if outer.shuffled or below is None:
        return None
    skipped = outer.length - rows.stop if outer.reversed else rows.start
    return outer._replace(start=outer.start + skipped, length=len(rows)), *below
