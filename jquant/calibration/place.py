"""Which tokens an array's axes run over: an account of axes, as `axes/origin.py` is of weights.

Token weights have axes of their own, `[batch, time]` as a rule. A `Place` says of every axis of an
activation which of them it runs along, or a digit or window of which, so that a row's token is
known by descent, never guessed by shape. Axes that run along no tokens (features, heads) are blank,
their digits of axis -1.
Where an operation moves tokens by what is in them, or into one another, the place is *lost* there,
and says by what; the axes that are still told of are right nevertheless. A place is static.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jquant.axes.digits import Axis, Part, regroup


@jax.tree_util.register_static
@dataclass(frozen=True)
class Place:
    """The digits of each axis, digits that indexing has pinned to one value, what lost the rest."""

    axes: tuple[Axis, ...]
    fixed: tuple[Part, ...] = ()
    lost: str = ""

    @staticmethod
    def blank(shape: Sequence[int], lost: str = "") -> Place:
        return Place(tuple(_axis([Part.of(-1, n)]) for n in shape), (), lost)

    @staticmethod
    def of(shape: Sequence[int], tokens: Sequence[int], name: str) -> Place:
        """An input's: its first axes are those of the tokens, or it knows of none or of the first.

        Another array that a function is given may hold tokens in an order of its own: it is lost.
        """
        shape, tokens = tuple(shape), tuple(tokens)
        plain = Place.blank(shape)
        many = next((n for n in range(len(tokens), 0, -1) if shape[:n] == tokens[:n]), 0)
        if not shape or many == len(tokens) or (many and shape == tokens[:many]):
            own = [_axis([Part.of(k, n)]) for k, n in enumerate(tokens[:many])]
            return replace(plain, axes=(*own, *plain.axes[many:]))
        return replace(plain, lost=f"{name} of shape {shape} is not of theirs")

    @property
    def is_blank(self) -> bool:
        """Whether nothing is told of tokens."""
        return not (self.fixed or self.lost or any(map(_told, self.axes)))

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

    def extend(self, dim: int, before: int, size: int, why: str) -> Place:
        """Axis `dim` as a share of one of `size` entries, beginning at `before`.

        The others are of no token: class tokens, learned prompts.
        """
        axis = self.axes[dim]
        if len(axis) != 1 or axis[0].axis < 0 or not axis[0].whole:
            return self.resize(dim, size, why)
        one = axis[0]._replace(start=-before, length=size)
        return replace(self, axes=(*self.axes[:dim], (one,), *self.axes[dim + 1 :]))

    def broadcast(self, shape: Sequence[int], dims: Sequence[int]) -> Place:
        axes = list(Place.blank(shape).axes)
        pinned: list[Part] = []
        for axis, dim in zip(self.axes, dims, strict=True):
            if _size(axis) == shape[dim]:
                axes[dim] = axis
            else:
                pinned += [d for d in axis if d.axis >= 0]
        return replace(self, axes=tuple(axes), fixed=(*self.fixed, *pinned))

    def reshape(self, shape: Sequence[int]) -> Place:
        """Regroup the digits into axes of these sizes, splitting whole ones at the boundaries."""
        digits = [d for axis in self.axes for d in axis]
        axes = regroup(_axis([d for d in digits if d.length > 1]), shape)
        if axes is None:
            why = "reshape" if any(map(_told, self.axes)) else ""
            return Place.blank(shape, self.lost or why)
        pinned = (d for d in digits if d.pinned)
        return replace(self, axes=tuple(map(_axis, axes)), fixed=(*self.fixed, *pinned))

    def weights(
        self, tokens: Array, sizes: Sequence[int], turn: Sequence[int], kept: int
    ) -> tuple[Array, str]:
        """The weights of rows of an array with this place, and why that is not certain, if so.

        Rows are an array of axes `sizes`, turned by `turn`, without those after the first `kept`.
        A row that stands for several tokens has the largest weight of them, and so has one that was
        joined to them and stands for none (a class token); one that stands for a pair of them (an
        attention score) has the smaller one.

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
        first = firsts._laid(tokens)
        if first is None:
            return jnp.broadcast_to(jnp.max(tokens), shape), rows.lost or "reshape"
        last = first if lasts == firsts else lasts._laid(tokens)
        both = first if last is None or last is first else jnp.minimum(first, last)
        return both.reshape(shape), why

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
            kept: list[Part] = []
            for one in axis[::order]:
                again = one.axis >= 0 and one[:3] in seen
                seen.add(one[:3])
                kept.append(Part.of(-1, one.length) if again else one)
            axes.append(tuple(kept[::order]))
        return replace(self, axes=tuple(axes[::order]))

    def _covers(self, axis: int, size: int) -> bool:
        digits = [d for d in (*self.fixed, *sum(self.axes, ())) if d.axis == axis]
        return math.prod(d.size for d in digits) == size

    def _laid(self, tokens: Array) -> Array | None:
        """The weights by digit of the axes in turn; None where the digits are of two kinds."""
        shown = [d for axis in self.axes for d in axis]
        cut = _cut(tokens.shape, {d for d in (*shown, *self.fixed) if d.axis >= 0})
        if cut is None:
            return None
        sizes, where = cut
        by_digit = tokens.reshape(sizes)
        for one, dim in where.items():
            by_digit = _window(by_digit, dim, one.start, one.start + one.length)
        kept = [where[d] for d in shown if d.axis >= 0]
        by_digit = jnp.max(by_digit, axis=tuple(k for k in range(len(sizes)) if k not in kept))
        by_digit = by_digit.transpose([sorted(kept).index(k) for k in kept])
        dims = [k for k, d in enumerate(shown) if d.axis >= 0]
        return jax.lax.broadcast_in_dim(by_digit, [d.length for d in shown], dims)


def _window(weights: Array, dim: int, start: int, stop: int) -> Array:
    """Weights `start .. stop` along a dimension; before and behind it stands the largest."""
    size = weights.shape[dim]
    inside = jax.lax.slice_in_dim(weights, max(start, 0), max(min(stop, size), 0), axis=dim)
    largest = jnp.max(weights, dim, keepdims=True)
    before, behind = (
        jnp.repeat(largest, max(n, 0), dim) for n in (min(stop, 0) - start, stop - max(start, size))
    )
    return jnp.concatenate([before, inside, behind], dim)


def _cut(
    shape: Sequence[int], digits: Collection[Part]
) -> tuple[list[int], dict[Part, int]] | None:
    """Axes cut at these digits, and which of the parts each digit is; None if two of them overlap.

    Between two digits of an axis lies what nobody asked for.
    """
    sizes: list[int] = []
    where: dict[Part, int] = {}
    for axis, left in enumerate(shape):
        own = [digit for digit in digits if digit.axis == axis]
        for digit in sorted(own, key=lambda d: -d.stride):
            gap, rest = divmod(left, digit.stride * digit.size)
            if rest or gap < 1:
                return None
            where[digit] = len(sizes) + 1
            sizes += [gap, digit.size]
            left = digit.stride
        sizes.append(left)
    return sizes, where


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
        d for place in places for d in place.fixed if not any(_overlap(d, r) for r in running)
    }
    often = Counter((d.axis, d.stride) for d in pinned)
    if len(often) < len(pinned):  # of several tokens at once
        pinned, lost = {d for d in pinned if often[d.axis, d.stride] == 1}, lost or why
    return Place(tuple(axes), tuple(sorted(pinned)), lost)


def _overlap(one: Part, two: Part) -> bool:
    """Whether two digits share values of an axis."""
    below = one.stride < two.stride * two.size and two.stride < one.stride * one.size
    return one.axis == two.axis and below


def _told(axis: Axis) -> bool:
    return any(d.axis >= 0 for d in axis)


def _size(axis: Axis) -> int:
    return math.prod(d.length for d in axis)


def _axis(digits: Sequence[Part]) -> Axis:
    """Digits without those of size 1, neighbours that are one joined."""
    axis: list[Part] = []
    for one in digits:
        if one.size == 1 and one.length == 1:
            continue
        both = _both(axis[-1], one) if axis else None
        axis = [*axis, one] if both is None else [*axis[:-1], both]
    return tuple(axis)


def _both(outer: Part, inner: Part) -> Part | None:
    """Neighbours as one digit, if they are one."""
    if outer.axis == inner.axis == -1:
        return Part.of(-1, outer.length * inner.length)
    adjacent = outer.axis == inner.axis and outer.stride == inner.stride * inner.size
    if not (adjacent and outer.whole and inner.whole):
        return None
    return inner._replace(size=outer.size * inner.size, length=outer.size * inner.size)
