"""Where an array came from: which axes of which parameter its axes are made of.

A weight seldom meets its input as it was stored: it is cast, transposed, reshaped to heads, split
into q, k and v, sliced out of a stack. An `Origin` follows it through such *views*: for every axis
of the current array it lists the `Part`s of the parameter's axes that make it up, outermost first.
When the array is at last contracted, each part's role (in, out, batch) is the role of the array
axis it lies on; nothing is guessed by rank. An origin is static. A scan drops leading array axes
without telling it: they are simply the first entries of `axes` beyond the array's rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
from jaxtyping import Array


class Part(NamedTuple):
    """A mixed-radix digit of a parameter axis, or a window of one.

    Parameter axis `axis` is read as digits; this one has the given `stride` and `size`, and the
    array holds its values `start .. start + length`. `axis` is -1 for an axis made by broadcasting.
    """

    axis: int
    stride: int
    size: int
    start: int
    length: int

    @property
    def whole(self) -> bool:
        return self.length == self.size


@jax.tree_util.register_static
@dataclass(frozen=True)
class Origin:
    """The parameter's path, the parts of each array axis, parts fixed by indexing.

    `broken` names the first operation that was no view: the array is computed from the weight, but
    is no longer the weight.
    """

    path: str
    axes: tuple[tuple[Part, ...], ...]
    fixed: tuple[Part, ...] = ()
    broken: str | None = None

    @staticmethod
    def of(path: str, shape: Sequence[int]) -> Origin:
        return Origin(path, tuple((Part(k, 1, n, 0, n),) for k, n in enumerate(shape)))

    def scanned(self, rank: int) -> tuple[Part, ...]:
        """Parts on axes that scans have sliced away from an array of `rank`, outermost first."""
        return tuple(part for axis in self.axes[: len(self.axes) - rank] for part in axis)

    def _with(
        self, rank: int, axes: Sequence[tuple[Part, ...]], fixed: Sequence[Part] = ()
    ) -> Origin:
        dropped = self.axes[: len(self.axes) - rank]
        return replace(self, axes=(*dropped, *axes), fixed=(*self.fixed, *fixed))

    def own(self, rank: int) -> tuple[tuple[Part, ...], ...]:
        """The axes that an array of `rank` still has."""
        return self.axes[len(self.axes) - rank :]

    def transpose(self, permutation: Sequence[int]) -> Origin:
        own = self.own(len(permutation))
        return self._with(len(permutation), [own[k] for k in permutation])

    def broadcast(self, rank: int, shape: Sequence[int], dims: Sequence[int]) -> Origin | None:
        """`broadcast_in_dim`: new axes come from nowhere; stretching the weight is no view."""
        own = self.own(rank)
        axes: list[tuple[Part, ...]] = [() if n == 1 else (Part(-1, 1, n, 0, n),) for n in shape]
        for part, dim in zip(own, dims, strict=True):
            if math.prod(p.length for p in part) == shape[dim]:
                axes[dim] = part
            elif any(p.axis >= 0 and p.size > 1 for p in part):
                return None
        return self._with(rank, axes)

    def squeeze(self, rank: int, dims: Sequence[int]) -> Origin:
        own = self.own(rank)
        fixed = [part for dim in dims for part in own[dim] if part.axis >= 0 and not part.whole]
        return self._with(rank, [axis for k, axis in enumerate(own) if k not in dims], fixed)

    def window(self, shape: Sequence[int], dim: int, start: int, length: int) -> Origin | None:
        """Values `start .. start + length` of one array axis."""
        own = list(self.own(len(shape)))
        if length == shape[dim]:
            return self
        parts = [part for part in own[dim] if part.size > 1]
        if len(parts) != 1:
            return None
        part = parts[0]
        own[dim] = (part._replace(start=part.start + start, length=length),)
        return self._with(len(shape), own)

    def reshape(self, shape: Sequence[int], new: Sequence[int]) -> Origin | None:
        """Regroup the parts into axes of sizes `new`, splitting whole ones at the boundaries."""
        parts = [p for axis in self.own(len(shape)) for p in axis if p.length > 1]
        ones = [p for axis in self.own(len(shape)) for p in axis if p.length == 1 and not p.whole]
        axes: list[tuple[Part, ...]] = []
        for size in new:
            axis: list[Part] = []
            left = size
            while left > 1:
                if not parts:
                    return None
                part = parts.pop(0)
                if left % part.length == 0:
                    axis.append(part)
                    left //= part.length
                elif part.whole and part.length % left == 0:
                    inner = part.length // left
                    axis.append(Part(part.axis, part.stride * inner, left, 0, left))
                    parts.insert(0, Part(part.axis, part.stride, inner, 0, inner))
                    left = 1
                else:
                    return None
            axes.append(tuple(axis))
        return self._with(len(shape), axes, ones)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tagged:
    """An array and its origin. As a pytree it has one leaf, so control flow slices it."""

    array: Array
    origin: Origin = field(metadata={"static": True})
