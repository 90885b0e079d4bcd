"""How a weight is read: which parts of its axes are contracted, kept, or run along.

Every use of a weight (`dot_general`, a convolution, `ragged_dot`, an embedding lookup) comes down
to a `Reading`: a role for each part of each parameter axis. From a reading follow the public axes
of a `Weight`, the `Layout` that leads to `[*batch, out, in]`, and the place where evidence gathered
on a window of the weight belongs in the evidence of the whole. Readings are static and hashable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jquant.axes.digits import Part
from jquant.axes.layout import Role
from jquant.axes.origin import Origin

Kind = Literal["dot", "conv", "ragged_dot", "lookup"]
# For each axis its digits, `(size, role)`, outermost first.
Axes = tuple[tuple[tuple[int, Role], ...], ...]


class Reading(NamedTuple):
    """The roles of a weight's parts at one use.

    `batch` is ordered as the leading axes of the evidence gathered there; `fixed` are batch parts
    that indexing has pinned to one value; `inner` is in canonical order. Where the weight was
    joined with others along a loop's axis, `windows` say which part of the evidence's leading axes
    is its own, `(axis, start, stop)`.
    """

    kind: Kind
    batch: tuple[Part, ...]
    fixed: tuple[Part, ...]
    inner: tuple[Part, ...]
    outer: tuple[Part, ...]
    windows: tuple[tuple[int, int, int], ...] = ()

    @staticmethod
    def of(kind: Kind, origin: Origin, roles: Sequence[Role]) -> Reading | None:
        """How a weight is read where the axes of its array have these roles.

        None: it was indexed along an in or batch axis, or one that a loop goes along, in an order
        that is not known.
        """
        parts: dict[Role, list[Part]] = {"batch": [], "in": [], "out": []}
        for role, axis in zip(roles, origin.own(len(roles)), strict=True):
            parts[role] += [p._replace(reversed=False) for p in axis if p.axis >= 0]
        scanned = origin.scanned(len(roles))
        ordered_by = (*parts["batch"], *parts["in"], *(p for axis in scanned for p in axis))
        if any(part.shuffled for part in ordered_by):
            return None
        windows = [
            (k, offset, offset + math.prod(p.length for p in axis))
            for k, (axis, offset) in enumerate(zip(scanned, origin.offsets, strict=False))
            if offset is not None
        ]
        return Reading(
            kind,
            (*(p for axis in scanned for p in axis), *ordered(parts["batch"])),
            origin.fixed,
            ordered(parts["in"]),
            tuple(parts["out"]),
            tuple(windows),
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts of the weight that the use is of."""
        return (*self.batch, *self.fixed, *self.inner, *self.outer)

    def axes(self, shape: Sequence[int]) -> Axes:
        """For each parameter axis, its digits `(size, role)`, outermost first.

        Neighbouring digits of one role are joined, so two uses that split a head axis differently
        agree when they mean the same. A digit nobody mentions has size 1 and is an out digit.
        """
        digits: list[list[tuple[int, int, Role]]] = [[] for _ in shape]
        roles: list[tuple[Role, tuple[Part, ...]]] = [
            ("batch", (*self.batch, *self.fixed)),
            ("in", self.inner),
            ("out", self.outer),
        ]
        for role, parts in roles:
            for part in parts:
                if part.axis >= 0:
                    digits[part.axis].append((-part.stride, part.size, role))
        axes: list[tuple[tuple[int, Role], ...]] = []
        for size, own in zip(shape, digits, strict=True):
            joined: list[tuple[int, Role]] = []
            for _, n, role in sorted(set(own)):
                if joined and joined[-1][1] == role:
                    joined[-1] = joined[-1][0] * n, role
                else:
                    joined.append((n, role))
            axes.append(tuple(joined) or ((size, "out"),))
        return tuple(axes)


class Sighting(NamedTuple):
    """A use of the weight called `path`: how it is read there, by how many rows, after what.

    `through` are the elementwise operations that the weight had been through.
    """

    path: str
    reading: Reading
    rows: int
    through: tuple[str, ...] = ()


def decisive(sightings: Sequence[Sighting]) -> Reading:
    """The reading that decides a weight's axes: where it meets most rows, the first of equals."""
    met = [s for s in sightings if s.reading.kind != "lookup"] or list(sightings)
    return max(met, key=lambda s: s.rows).reading  # of equals, max takes the first


def order(parts: Sequence[Part]) -> list[int]:
    """Positions of the parts in the order of the parameter's axes: the canonical order."""
    return sorted(range(len(parts)), key=lambda k: (parts[k].axis, -parts[k].stride))


def ordered(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts in the canonical order."""
    return tuple(parts[k] for k in order(parts))
