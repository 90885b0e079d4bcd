"""The axes of a weight that is used more than once: what its uses agree on, and which do not.

Uses agree where they contract the same digits of a weight's axes. Whether the other digits are a
batch or outputs need not be the same to all: a stack may be met layer by layer here and as one
wide kernel there. What any of them takes layer by layer is a batch then, and a use that meets all
layers at once is one of each. A use that contracts other digits has no part in the weight's axes;
`astray` tells where that leaves a part of the weight without any use of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jquant.axes.digits import Part
from jquant.axes.layout import Role
from jquant.axes.roles import Axes, Reading, Sighting, decisive

_FIRST: tuple[Role, ...] = "batch", "in", "out"  # of a digit that has several roles


class Digit(NamedTuple):
    """A digit of an axis of a weight; axis `axis` counts it in units of `stride`."""

    axis: int
    stride: int
    size: int

    @property
    def end(self) -> int:
        return self.stride * self.size

    def holds(self, part: Part) -> bool:
        """Whether a part is this digit, or a digit of it."""
        return (
            part.axis == self.axis
            and part.stride % self.stride == 0
            and part.stride * part.size <= self.end
        )

    def meets(self, part: Part) -> bool:
        """Whether a part tells anything of this digit."""
        return (
            part.axis == self.axis
            and part.stride < self.end
            and self.stride < part.stride * part.size
        )


def digits(axes: Axes, role: Role) -> tuple[Digit, ...]:
    """The digits of a role that have more than one value, neighbours as one, in axis order.

    Example:
        >>> digits((((3, "batch"),), ((2, "in"), (4, "out"))), "in")
        (Digit(axis=1, stride=4, size=2),)
    """
    own: list[Digit] = []
    for k, axis in enumerate(axes):
        stride, inner = math.prod(n for n, _ in axis), None
        for size, name in axis:
            stride //= max(size, 1)
            if name != role or size == 1:
                continue
            if inner is not None and inner.stride == stride * size:
                own.pop()
                size *= inner.size
            inner = Digit(k, stride, size)
            own.append(inner)
    return tuple(own)


def settled(sightings: Sequence[Sighting], shape: Sequence[int]) -> Axes:
    """The axes of a weight with these uses: as where it meets most rows, and all that agree.

    Example:
        >>> layers, inner, outer = Part.of(0, 2), Part.of(1, 4), Part.of(2, 6)
        >>> together = Reading("dot", (), (), (inner,), (layers, outer))
        >>> first = Reading("dot", (), (layers._replace(length=1),), (inner,), (outer,))
        >>> settled([Sighting("w", together, 9), Sighting("w", first, 5)], (2, 4, 6))
        (((2, 'batch'),), ((4, 'in'),), ((6, 'out'),))
    """
    decision = decisive(sightings)
    axes = decision.axes(shape)
    inner = digits(axes, "in")
    is_lookup = decision.kind == "lookup"
    all_ = [s.reading for s in sightings if (s.reading.kind == "lookup") == is_lookup]
    agreeing = [own for r in all_ if digits(own := r.axes(shape), "in") == inner]
    if all(digits(own, "batch") == digits(axes, "batch") for own in agreeing):
        return axes
    joined = [_joined([axis, *(own[k] for own in agreeing)]) for k, axis in enumerate(axes)]
    together = tuple(axis for axis in joined if axis is not None)
    widest = max(agreeing, key=_width)
    if len(together) < len(shape) or (_width(together) == 1 and _width(widest) > 1):
        return widest  # rows of a table that are met one by one make no stack of it
    return together


def _width(axes: Axes) -> int:
    """How many outputs a weight of these axes has."""
    return math.prod(n for axis in axes for n, role in axis if role == "out")


def _joined(read: Sequence[tuple[tuple[int, Role], ...]]) -> tuple[tuple[int, Role], ...] | None:
    """One axis as all these uses read it, a batch where one of them has one; None: it is none."""
    owned: list[tuple[int, int, Role]] = []  # stride, end, role
    for own in read:
        stride = 1
        for size, role in own[::-1]:
            owned.append((stride, stride * size, role))
            stride *= size
    borders = sorted({border for stride, end, _ in owned for border in (stride, end)})
    axis: list[tuple[int, Role]] = []
    for low, high in zip(borders[-2::-1], borders[:0:-1], strict=True):
        if high % low:
            return None
        roles = {role for stride, end, role in owned if stride <= low and high <= end}
        role: Role = next(role for role in _FIRST if role in roles)
        if axis and axis[-1][1] == role:
            axis[-1] = axis[-1][0] * (high // low), role
        else:
            axis.append((high // low, role))
    return tuple(axis) or read[0]


def counted(reading: Reading, axes: Axes, shape: Sequence[int]) -> bool:
    """Whether the inputs of a use are those of a weight with these axes."""
    if digits(reading.axes(shape), "in") != digits(axes, "in"):
        return False
    for digit in digits(axes, "batch"):
        layers = [part for part in (*reading.batch, *reading.fixed) if digit.meets(part)]
        others = [part for part in reading.outer if digit.meets(part)]
        if layers and not all(map(digit.holds, (*layers, *others))):
            return False
    return True


class Spot(NamedTuple):
    """What a use has of a batch digit: the values `index`, in the order of the parts they are of.

    `parts` are those parts, outermost first, each with its place among the batch parts of the
    reading; None for a part that the use meets all at once, or in one value.
    """

    index: tuple[int, ...]
    parts: tuple[tuple[int, int | None], ...]  # (length, place)

    @staticmethod
    def of(reading: Reading, digit: Digit, shape: Sequence[int]) -> Spot:
        """Of a use that is `counted`."""
        own: list[tuple[Part, Iterable[int], int | None]] = [
            (part, range(part.start, part.start + part.length), place)
            for place, part in enumerate(reading.batch)
            if digit.holds(part)
        ]
        own += [(part, (part.start,), None) for part in reading.fixed if digit.holds(part)]
        if not own and any(map(digit.meets, reading.outer)):  # of outputs, whatever is touched
            shown = np.flatnonzero(covered(reading.outer, digit.axis, shape[digit.axis]))
            touched = np.unique(shown // digit.stride % digit.size).tolist()
            return Spot(tuple(touched), ((len(touched), None),))
        own += [
            (part, range(part.start, part.start + part.length), None)
            for part in reading.outer
            if digit.holds(part)
        ]
        if not own:
            return Spot(tuple(range(digit.size)), ((digit.size, None),))
        own.sort(key=lambda each: -each[0].stride)
        values = [[v * (p.stride // digit.stride) for v in chosen] for p, chosen, _ in own]
        index = tuple(sum(row) for row in itertools.product(*values))
        places = [place for *_, place in own]
        return Spot(index, tuple(zip(map(len, values), places, strict=True)))


def is_together(reading: Reading, axes: Axes, shape: Sequence[int]) -> bool:
    """Whether one input meets several of a weight's matrices in a use that is `counted`."""
    spots = [Spot.of(reading, digit, shape) for digit in digits(axes, "batch")]
    return any(place is None and n > 1 for spot in spots for n, place in spot.parts)


def covered(parts: Iterable[Part], axis: int, size: int) -> np.ndarray:
    """Which entries of an axis some parts leave, bool `[size]`; a choice that is not known, all."""
    at, kept = np.arange(size), np.ones(size, bool)
    for part in parts:
        if part.axis == axis and not part.shuffled:
            values = at // part.stride % part.size
            kept &= (values >= part.start) & (values < part.start + part.length)
    return kept


def outputs(
    reading: Reading, axes: Axes, shape: Sequence[int]
) -> Iterator[tuple[Hashable, tuple[int, ...]]]:
    """Which outputs of a weight's matrices a use shows, and by which of its inputs, one or several.

    It is `counted`. What is equal shows the same outputs.
    """
    batch = digits(axes, "batch")

    def is_layer(part: Part) -> bool:
        return any(digit.holds(part) for digit in batch)

    pinned = [part for part in reading.fixed if not is_layer(part)]
    apart = [p for p in reading.batch if p.axis >= 0 and p.size > 1 and not is_layer(p)]
    for values in itertools.product(*(range(p.start, p.start + p.length) for p in apart)):
        ones = [p._replace(start=v, length=1) for p, v in zip(apart, values, strict=True)]
        parts = (*reading.outer, *pinned, *ones)
        shown = (_shown(parts, axis, size, batch) for axis, size in enumerate(shape))
        yield tuple(shown), values


def _shown(parts: Sequence[Part], axis: int, size: int, batch: Iterable[Digit]) -> Hashable:
    """The outputs among the entries of an axis, whatever the layer; None: all."""
    own = [part for part in parts if part.axis == axis and not (part.whole and not part.shuffled)]
    if not own:
        return None
    at = np.flatnonzero(covered(own, axis, size))
    for digit in batch:
        if digit.axis == axis:
            at, size = at - at // digit.stride % digit.size * digit.stride, size // digit.size
    at = np.unique(at)
    choices = tuple(part for part in own if part.shuffled)
    return None if len(at) == size and not choices else (at.tobytes(), choices)


class Patch(NamedTuple):
    """A part of a weight whose entries all have the same uses.

    `places` are its entries along each axis, `sightings` the uses.
    """

    places: tuple[tuple[int, ...], ...]
    sightings: tuple[Sighting, ...]


def patches(sightings: Sequence[Sighting], shape: Sequence[int]) -> Iterator[Patch]:
    """The parts of a weight that have uses of their own; what nothing uses is left out."""
    parts = [s.reading.parts for s in sightings]
    kinds: list[list[tuple[np.ndarray, tuple[int, ...]]]] = []
    for axis, size in enumerate(shape):
        table = np.stack([covered(own, axis, size) for own in parts])
        classes, which = np.unique(table, axis=1, return_inverse=True)
        alike = [
            (classes[:, k], tuple(np.flatnonzero(which.reshape(-1) == k).tolist()))
            for k in range(classes.shape[1])
        ]
        kinds.append(sorted(alike, key=lambda kind: kind[1]))
    for combination in itertools.product(*kinds):
        uses = np.all([flags for flags, _ in combination], axis=0)
        if uses.any():
            own = tuple(s for s, used in zip(sightings, uses, strict=True) if used)
            yield Patch(tuple(places for _, places in combination), own)


def astray(sightings: Sequence[Sighting], shape: Sequence[int], axes: Axes) -> list[Patch]:
    """The parts of a weight that would have other axes than these by themselves.

    Args:
        sightings: its uses.
        shape: of the weight.
        axes: as `settled` has them.
    """
    if all(counted(s.reading, axes, shape) for s in sightings):
        return []
    return [
        patch
        for patch in patches(sightings, shape)
        if not counted(decisive(patch.sightings), axes, shape)
    ]
