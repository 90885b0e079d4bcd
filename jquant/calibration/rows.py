"""From an operand as a product takes it to the rows that a weight sees, `[*batch, tokens, in]`.

The operand's axes are split into the digits that the weight's axes are made of (`Part`), each with
a role: it runs along with the weight (batch), is contracted (in), or is neither (token). An
`Arrangement` puts them in the canonical order. Where the weight was repeated along a contracted
axis, all copies meet one row, the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jquant.axes.origin import Axis, Part
from jquant.axes.roles import order

Role = Literal["batch", "in", "out"]


class Share(NamedTuple):
    """What a weight's axis is to the operand's axis that it meets: its parts, and a share of it."""

    role: Role
    parts: Axis
    offset: int | None


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
        cuts: list[tuple[int, int, int]] = []
        digits: list[tuple[str, Part | None, int]] = []
        for axis, size in enumerate(shape):
            share = shares.get(axis)
            if share is None:
                digits.append(("token", None, size))
                continue
            length = math.prod(part.length for part in share.parts)
            if share.offset is not None:
                cuts.append((axis, share.offset, share.offset + length))
            for part in share.parts:
                role = share.role if part.axis >= 0 else "copy" if share.role == "in" else "token"
                digits.append((role, part, part.length))
        copies = [k for k, (role, _, _) in enumerate(digits) if role == "copy"]
        flips = [k for k, (_, part, _) in enumerate(digits) if part is not None and part.reversed]
        left = [digit for digit in digits if digit[0] != "copy"]
        places: dict[str, list[int]] = {"batch": [], "token": [], "in": []}
        for k, (role, _, _) in enumerate(left):
            places[role].append(k)
        turn = (
            *_canonical(places["batch"], left),
            *places["token"],
            *_canonical(places["in"], left),
        )
        return Arrangement(
            tuple(cuts), tuple(n for _, _, n in digits), tuple(copies), tuple(flips), turn,
            len(places["batch"]), len(places["in"]),
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """How many rows there are for each weight of a batch."""
        left = [n for k, n in enumerate(self.sizes) if k not in self.copies]
        return math.prod(left[k] for k in self.turn[self.batch : len(self.turn) - self.inner])

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


def _canonical(places: Sequence[int], digits: Sequence[tuple[str, Part | None, int]]) -> list[int]:
    """Places of digits in the order of the parameter's axes."""
    parts = [part for k in places if (part := digits[k][1]) is not None]
    return [places[k] for k in order(parts)]
