"""From an operand as a product takes it to the rows that a weight sees, `[*batch, tokens, in]`.

The operand's axes are split into the digits that the weight's axes are made of (`Part`), each with
a role: it runs along with the weight (batch), is contracted (in), or is neither (token). An
`Arrangement` puts them in the canonical order. Where the weight was repeated along a contracted
axis, all copies meet one row, the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jquant.axes.digits import Axis, Part
from jquant.axes.layout import Role
from jquant.axes.roles import order


class Share(NamedTuple):
    """What a weight's axis is to the operand's axis that it meets: its parts, and a share of it."""

    role: Role
    parts: Axis
    offset: int | None

    def cut(self, axis: int) -> tuple[int, int, int]:
        """`(axis, start, stop)` of the operand's axis, of which the weight has a share only."""
        start = self.offset or 0
        return axis, start, start + math.prod(part.length for part in self.parts)


class _Digit(NamedTuple):
    role: str  # "batch", "token" or "in"; "copy" where the weight is repeated along what it sums
    part: Part


class Arrangement(NamedTuple):
    """Static and hashable: equal ones make equal rows of one operand.

    Attributes:
        cuts: `(axis, start, stop)` of the operand, where a weight has a share of an axis.
        sizes: the digits of all axes.
        copies: the digits to be summed over.
        flips: those read backwards.
        turn: the order of the digits that are left.
        batch, inner: how many of them, from the front and the back.
    """

    cuts: tuple[tuple[int, int, int], ...]
    sizes: tuple[int, ...]
    copies: tuple[int, ...]
    flips: tuple[int, ...]
    turn: tuple[int, ...]
    batch: int
    inner: int

    @staticmethod
    def of(shape: Sequence[int], shares: Mapping[int, Share]) -> Arrangement:
        """Of an operand of `shape`, some of whose axes meet axes of the weight."""
        digits = [d for axis, size in enumerate(shape) for d in _digits(size, shares.get(axis))]
        left = [digit for digit in digits if digit.role != "copy"]
        batch, tokens, inner = (_places(left, role) for role in ("batch", "token", "in"))
        return Arrangement(
            tuple(s.cut(axis) for axis, s in sorted(shares.items()) if s.offset is not None),
            tuple(digit.part.length for digit in digits),
            tuple(k for k, digit in enumerate(digits) if digit.role == "copy"),
            tuple(k for k, digit in enumerate(digits) if digit.part.reversed),
            (*batch, *tokens, *inner),
            len(batch),
            len(inner),
        )

    @property
    def tokens(self) -> int:
        """How many rows there are for each weight of a batch."""
        left = [n for k, n in enumerate(self.sizes) if k not in self.copies]
        return math.prod(left[k] for k in self.turn[self.batch : len(self.turn) - self.inner])

    @property
    def lead(self) -> tuple[int, ...]:
        """The shape of the rows without their inputs, `[*batch, tokens]`."""
        left = [n for k, n in enumerate(self.sizes) if k not in self.copies]
        return (*(left[k] for k in self.turn[: self.batch]), self.tokens)

    @property
    def outline(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """The digits, their order with copies last, and how many of them make up the rows."""
        left = [k for k in range(len(self.sizes)) if k not in self.copies]
        turn = (*(left[k] for k in self.turn), *self.copies)
        return self.sizes, turn, len(self.turn) - self.inner

    def rows(self, x: jax.Array) -> jax.Array:
        """`[*batch, tokens, in]`, the batch axes digit by digit."""
        for axis, start, stop in self.cuts:
            x = jax.lax.slice_in_dim(x, start, stop, axis=axis)
        x = x.reshape(self.sizes)
        if self.flips:
            x = jnp.flip(x, self.flips)
        if self.copies:
            x = jnp.sum(x, self.copies, dtype=x.dtype)
        x = x.transpose(self.turn)
        lead, inner = x.shape[: self.batch], x.shape[len(self.turn) - self.inner :]
        return x.reshape(*lead, self.tokens, math.prod(inner))


def _digits(size: int, share: Share | None) -> list[_Digit]:
    """The digits of one axis of the operand, of which a weight has `share`, outermost first."""
    if share is None:
        return [_Digit("token", Part(-1, 1, size, 0, size))]
    repeated = "copy" if share.role == "in" else "token"
    return [_Digit(share.role if part.axis >= 0 else repeated, part) for part in share.parts]


def _places(digits: Sequence[_Digit], role: str) -> list[int]:
    """Where digits of a role are: tokens as they come, others as the parameter's axes are."""
    places = [k for k, digit in enumerate(digits) if digit.role == role]
    if role == "token":
        return places
    return [places[k] for k in order([digits[k].part for k in places])]
