"""Which tokens an array's axes run over: an account of axes, as `axes/origin.py` is of weights.

Token weights have axes of their own, `[batch, time]` as a rule. A `Place` says of every axis of an
activation which of them it runs along, or a digit or window of which, so that a row's token is
known by descent, never guessed by shape. Axes that run along no tokens (features, heads) are blank.
Where an operation moves tokens by what is in them, or into one another, the place is *lost* there,
and says by what; the axes that are still told of are right nevertheless. A place is static.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Digit(NamedTuple):
    """A mixed-radix digit of an axis of the token weights, or a window of one; axis -1: blank."""

    axis: int
    stride: int
    size: int
    start: int
    length: int

    @property
    def whole(self) -> bool:
        return self.length == self.size


Axis = tuple[Digit, ...]  # digits of one axis, outermost first; none where its size is 1


@jax.tree_util.register_static
@dataclass(frozen=True)
class Place:
    """The digits of each axis, digits that indexing has pinned to one value, what lost the rest."""

    axes: tuple[Axis, ...]
    fixed: tuple[Digit, ...] = ()
    lost: str = ""

    @staticmethod
    def blank(shape: Sequence[int], lost: str = "") -> Place:
        return Place(tuple(_axis([Digit(-1, 1, n, 0, n)]) for n in shape), (), lost)

    @staticmethod
    def of(shape: Sequence[int], tokens: Sequence[int], name: str) -> Place:
        """An input's: its first axes are those of the tokens, or it knows of none or of the first.

        Another array that a function is given may hold tokens in an order of its own: it is lost.
        """
        shape, tokens = tuple(shape), tuple(tokens)
        plain = Place.blank(shape)
        many = next((n for n in range(len(tokens), 0, -1) if shape[:n] == tokens[:n]), 0)
        if not shape or many == len(tokens) or (many and shape == tokens[:many]):
            own = [_axis([Digit(k, 1, n, 0, n)]) for k, n in enumerate(tokens[:many])]
            return replace(plain, axes=(*own, *plain.axes[many:]))
        return replace(plain, lost=f"{name} of shape {shape} is not of theirs")

    @property
    def known(self) -> bool:
        """Whether anything is known of tokens."""
        return bool(self.fixed or self.lost or any(map(_told, self.axes)))

    def transpose(self, permutation: Sequence[int]) -> Place:
        return replace(self, axes=tuple(self.axes[k] for k in permutation))

    def drop(self, dims: Collection[int]) -> Place:
        """Without these axes: added up, or chosen from."""
        return replace(self, axes=tuple(a for k, a in enumerate(self.axes) if k not in dims))

    def squeeze(self, dims: Collection[int]) -> Place:
        pinned = [d for k in dims for d in self.axes[k] if d.axis >= 0 and not d.whole]
        return replace(self.drop(dims), fixed=(*self.fixed, *pinned))

    def resize(self, dim: int, size: int, why: str) -> Place:
        """Axis `dim` with other entries in another number."""
        lost = self.lost or (why if _told(self.axes[dim]) else "")
        axes = list(self.axes)
        axes[dim] = Place.blank([size]).axes[0]
        return replace(self, axes=tuple(axes), lost=lost)

    def window(self, dim: int, start: int, length: int, why: str) -> Place:
        """Values `start .. start + length` of one axis."""
        axis = self.axes[dim]
        if _size(axis) == length:
            return self
        if len(axis) != 1 or axis[0].axis < 0:
            return self.resize(dim, length, why)
        one = axis[0]._replace(start=axis[0].start + start, length=length)
        return replace(self, axes=(*self.axes[:dim], (one,), *self.axes[dim + 1 :]))

    def broadcast(self, shape: Sequence[int], dims: Sequence[int]) -> Place:
        axes = list(Place.blank(shape).axes)
        pinned: list[Digit] = []
        for axis, dim in zip(self.axes, dims, strict=True):
            if _size(axis) == shape[dim]:
                axes[dim] = axis
            else:
                pinned += [d for d in axis if d.axis >= 0]
        return replace(self, axes=tuple(axes), fixed=(*self.fixed, *pinned))

    def reshape(self, shape: Sequence[int]) -> Place:
        """Regroup the digits into axes of these sizes, splitting whole ones at the boundaries."""
        digits = list(_axis([d for axis in self.axes for d in axis if d.length > 1]))
        pinned = [d for axis in self.axes for d in axis if d.length == 1 and not d.whole]
        axes: list[Axis] = []
        for size in shape:
            axis: list[Digit] = []
            left = size
            while left > 1:
                one = digits.pop(0) if digits else None
                if one is not None and left % one.length == 0:
                    axis.append(one)
                    left //= one.length
                elif one is not None and one.whole and one.length % left == 0:
                    inner = one.length // left
                    axis.append(Digit(one.axis, one.stride * inner, left, 0, left))
                    digits.insert(0, Digit(one.axis, one.stride, inner, 0, inner))
                    left = 1
                else:
                    why = "reshape" if any(map(_told, self.axes)) else ""
                    return Place.blank(shape, self.lost or why)
            axes.append(_axis(axis))
        return replace(self, axes=tuple(axes), fixed=(*self.fixed, *pinned))

    def weights(
        self, tokens: Array, sizes: Sequence[int], turn: Sequence[int], kept: int
    ) -> tuple[Array, str]:
        """The weights of rows of an array with this place, and why that is not certain, if so.

        Rows are an array of axes `sizes`, turned by `turn`, without those after the first `kept`.
        A row that stands for several tokens has the largest weight of them; one that stands for a
        pair of them (an attention score) the smaller one.

        Args:
            tokens: the weights of the tokens.

        Returns:
            as rows, `[sizes[turn[0]], …, sizes[turn[kept - 1]]]`.
        """
        whole = self.reshape(sizes).transpose(turn)
        rows = replace(whole, axes=whole.axes[:kept])
        shape = [sizes[k] for k in turn[:kept]]
        firsts, lasts = rows._once(1), rows._once(-1)
        why = rows.unknown(tokens.shape)
        inner = {d.axis for axis in whole.axes[kept:] for d in axis if d.axis >= 0}
        if not why and any(not firsts._covers(axis, tokens.shape[axis]) for axis in inner):
            why = "spread over its channels"
        found = firsts._laid(tokens)
        if found is None:
            return jnp.broadcast_to(jnp.max(tokens), shape), rows.lost or "reshape"
        if lasts != firsts:
            other = lasts._laid(tokens)
            found = found if other is None else jnp.minimum(found, other)
        return found.reshape(shape), why

    def over(self, tokens: Array, shape: Sequence[int]) -> Array:
        """The weight of every entry of an array with this place, `[*shape]`, float32."""
        rank = len(shape)
        return self.weights(tokens, shape, range(rank), rank)[0].astype(jnp.float32)

    def unknown(self, tokens: Sequence[int]) -> str:
        """Why the tokens of the entries are not known; nothing where they are."""
        firsts = self._once(1)
        told = all(firsts._covers(axis, n) for axis, n in enumerate(tokens) if n > 1)
        return "" if told else self.lost

    def _once(self, order: int) -> Place:
        """With each digit in one place only: the first (order 1) or the last (-1) it is in."""
        seen: set[tuple[int, int, int]] = set()
        axes: list[Axis] = []
        for axis in self.axes[::order]:
            kept: list[Digit] = []
            for one in axis[::order]:
                again = one.axis >= 0 and one[:3] in seen
                seen.add(one[:3])
                kept.append(Digit(-1, 1, one.length, 0, one.length) if again else one)
            axes.append(tuple(kept[::order]))
        return replace(self, axes=tuple(axes[::order]))

    def _covers(self, axis: int, size: int) -> bool:
        digits = [d for d in (*self.fixed, *sum(self.axes, ())) if d.axis == axis]
        return math.prod(d.size for d in digits) == size

    def _laid(self, tokens: Array) -> Array | None:
        """The weights by digit of the axes in turn; None where the digits are of two kinds."""
        shown = [d for axis in self.axes for d in axis]
        told = sorted(
            {d for d in (*shown, *self.fixed) if d.axis >= 0}, key=lambda d: (d.axis, -d.stride)
        )
        sizes: list[int] = []
        where: dict[Digit, int] = {}
        for axis, size in enumerate(tokens.shape):
            left = size
            for one in [d for d in told if d.axis == axis]:
                gap, rest = divmod(left, one.stride * one.size)
                if rest or gap < 1:
                    return None
                where[one] = len(sizes) + 1
                sizes += [gap, one.size]
                left = one.stride
            sizes.append(left)
        found = tokens.reshape(sizes)
        for one, dim in where.items():
            found = jax.lax.slice_in_dim(found, one.start, one.start + one.length, axis=dim)
        kept = [where[d] for d in shown if d.axis >= 0]
        found = jnp.max(found, axis=tuple(k for k in range(found.ndim) if k not in kept))
        found = found.transpose([sorted(kept).index(k) for k in kept])
        dims = [k for k, d in enumerate(shown) if d.axis >= 0]
        return jax.lax.broadcast_in_dim(found, [d.length for d in shown], dims)


def joined(places: Sequence[Place], why: str) -> Place:
    """The place of an array made of others of its shape, entry by entry."""
    axes: list[Axis] = []
    lost = next((place.lost for place in places if place.lost), "")
    for several in zip(*(place.axes for place in places), strict=True):
        told = {axis for axis in several if _told(axis)}
        if len(told) > 1:
            lost = lost or why
        blank = Place.blank([_size(several[0])]).axes[0]
        axes.append(told.pop() if len(told) == 1 else blank)
    return settled(axes, places, lost, why)


def settled(axes: Sequence[Axis], places: Sequence[Place], lost: str, why: str) -> Place:
    """The place with these axes, of an array that is computed from arrays of these places."""
    running = [d for axis in axes for d in axis]
    pinned = {
        d for place in places for d in place.fixed
        if not any(
            r.axis == d.axis and r.stride < d.stride * d.size and d.stride < r.stride * r.size
            for r in running
        )
    }  # fmt: skip
    by = {(d.axis, d.stride): d for d in pinned}
    if len(by) < len(pinned):  # of several tokens at once
        clash = {key for key in by if sum(d[:2] == key for d in pinned) > 1}
        pinned, lost = {d for d in pinned if d[:2] not in clash}, lost or why
    return Place(tuple(axes), tuple(sorted(pinned)), lost)


def _told(axis: Axis) -> bool:
    return any(d.axis >= 0 for d in axis)


def _size(axis: Axis) -> int:
    return math.prod(d.length for d in axis)


def _axis(digits: Sequence[Digit]) -> Axis:
    """Digits without those of size 1, neighbours that are one joined."""
    found: list[Digit] = []
    for one in digits:
        if one.size == 1 and one.length == 1:
            continue
        last = found[-1] if found else None
        if last is not None and last.axis == one.axis == -1:
            n = last.length * one.length
            found[-1] = Digit(-1, 1, n, 0, n)
        elif (
            last is not None
            and last.axis == one.axis
            and last.whole
            and one.whole
            and last.stride == one.stride * one.size
        ):
            n = last.size * one.size
            found[-1] = Digit(one.axis, one.stride, n, 0, n)
        else:
            found.append(one)
    return tuple(found)
