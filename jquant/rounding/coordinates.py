"""Sweeps over a weight that is rounded already: each code, and each group's scale, anew.

For codes with values Q and a target V, `loss = tr((Q - V) H (Q - V)ᵀ)` is a parabola in all that
one column or the scale of one group can change. With the pull `P = (Q - V) H`, a column moved by δ
changes the loss of a row by `δ (2 P_j + H_jj δ)`: its best code is the one nearest to
`Q_j - P_j / H_jj`. A group whose values v become `(1 + α) v + β` moves by `δ = α v + β`, and the
best α and β are those of a system of two equations in `v H vᵀ`, `v H 1` and `1 H 1`. Nothing is
taken that does not lower the loss, of the values as they are stored: it never rises.

Columns lie as in `substitution`, `[m, b]` each and along the first axis, and are blocked by
recursion: `sizes` lists nested block sizes down to 1, a change is felt at once inside its block,
and outside by one matrix product. Columns that share parameters are one of the sizes, the *unit*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jquant.grids.base import Grid, GridParams, nearest

EXACT = lax.Precision.HIGHEST
# A group whose values are this near to being all alike has no scale and offset apart.
LEAST_DETERMINANT = 1e-5


class State(NamedTuple):
    """Columns `[n, m, b]` and what pulls at them."""

    pull: Float[Array, "n m b"]  # (Q - V) H
    codes: Integer[Array, "n m b"]  # whole bytes
    table: GridParams  # leaves [units, m, …]


class Bowl(NamedTuple):
    """The loss's second derivative: H, damped; rows and columns of zeros where an input is dead."""

    moment: Float[Array, "n n"]
    live: Bool[Array, " n"]


@dataclass(frozen=True)
class Sweep:
    """One sweep over all columns.

    Args:
        grid: the grid.
        sizes: nested block sizes.
        unit: how many columns share parameters, one of `sizes`.
        refit: whether parameters are refitted, each unit's before its codes.
    """

    grid: Grid
    sizes: tuple[int, ...]
    unit: int
    refit: bool

    def __call__(
        self, state: State, bowl: Bowl, real: Bool[np.ndarray, "m b"] | Bool[Array, "m b"]
    ) -> State:
        """The state afterwards; `real` are the numbers of a column that are weights."""
        return self._over(state, bowl, jnp.asarray(real))[0]

    def _over(
        self, state: State, bowl: Bowl, real: Bool[Array, "m b"]
    ) -> tuple[State, Float[Array, "n m b"]]:
        """A block of columns: its state afterwards, and by how much its values have moved."""
        size, moved = self.sizes[0], jnp.zeros_like(state.pull)
        if self.refit and size == self.unit:
            state, moved = self._refitted(state, bowl, real)
        if size == 1:
            state, more = self._column(state, bowl)
            return state, moved + more
        part, own = self.sizes[1], self.sizes[1] >= self.unit
        inner = replace(self, sizes=self.sizes[1:])

        def step(pull: Array, at: Array) -> tuple[Array, tuple[Array, Array, GridParams | None]]:
            def cut(x: Array, axis: int = 0) -> Array:
                return lax.dynamic_slice_in_dim(x, at, part, axis)

            def entries(leaf: Array) -> Array:
                return lax.dynamic_slice_in_dim(leaf, at // self.unit, part // self.unit)

            rows = cut(bowl.moment)
            table = jax.tree.map(entries, state.table) if own else state.table
            here = State(cut(pull), cut(state.codes), table)
            here, change = inner._over(here, Bowl(cut(rows, 1), cut(bowl.live)), real)
            left = here.codes, change, here.table if own else None
            return pull + _product(rows.T, change), left

        starts = jnp.arange(0, size, part, jnp.int32)
        pull, (codes, change, table) = lax.scan(step, state.pull, starts)

        def flat(leaf: Array) -> Array:
            return leaf.reshape(-1, *leaf.shape[2:])

        table = jax.tree.map(flat, table) if own else state.table
        return State(pull, flat(codes), table), moved + flat(change)

    def _column(self, state: State, bowl: Bowl) -> tuple[State, Float[Array, "1 m b"]]:
        """The best codes of one column, all else as it is."""
        params = jax.tree.map(lambda leaf: leaf[0], state.table)
        codes, pull, pivot = state.codes[0], state.pull[0], bowl.moment[0, 0]
        value = self.grid.decode(codes, params)
        aim = value - pull / jnp.where(pivot > 0, pivot, 1.0)
        best = nearest(self.grid, aim, params)
        reached = self.grid.decode(best, params)
        # Nearest by a grid's own rule need not be nearest in value.
        better = bowl.live[0] & ((reached - aim) ** 2 < (value - aim) ** 2)
        change = jnp.where(better, reached - value, 0.0)[None]
        codes = jnp.where(better, best.astype(codes.dtype), codes)
        return State(state.pull + pivot * change, codes[None], state.table), change

    def _refitted(
        self, state: State, bowl: Bowl, real: Bool[Array, "m b"]
    ) -> tuple[State, Float[Array, "n m b"]]:
        """The parameters of one unit, m groups of it, refitted to the codes that it has."""
        old = jax.tree.map(lambda leaf: leaf[0], state.table)
        value = self._values(state.codes, old)
        carried = _product(bowl.moment, value)
        one = jnp.where(real, jnp.sum(bowl.moment, 1)[:, None, None], 0.0)
        zero = jnp.zeros((), jnp.float32)

        def summed(x: Array) -> Float[Array, " m"]:
            return jnp.sum(jnp.where(real, x, zero), (0, 2))

        curve = summed(value * carried), summed(carried), summed(one)
        slope = summed(value * state.pull), summed(state.pull)
        factor, shift = _least(curve, slope, getattr(self.grid, "shifts", False))
        new = self.grid.rescaled(old, 1.0 + factor, shift)  # pyright: ignore
        change = self._values(state.codes, new) - value
        carried = _product(bowl.moment, change)
        gained = summed(change * (2.0 * state.pull + carried))
        better = (gained < 0) & (factor > -1.0)

        def pick(one: Array, two: Array) -> Array:
            return jnp.where(better.reshape(-1, *(1,) * (one.ndim - 1)), one, two)[None]

        change = jnp.where(better[None, :, None], change, zero)
        pull = state.pull + jnp.where(better[None, :, None], carried, zero)
        return State(pull, state.codes, jax.tree.map(pick, new, old)), change

    def _values(self, codes: Integer[Array, "n m b"], params: GridParams) -> Float[Array, "n m b"]:
        """The values of the columns of a unit."""
        n, m, b = codes.shape
        groups = codes.transpose(1, 0, 2).reshape(m, n * b)
        return self.grid.decode(groups, params).reshape(m, n, b).transpose(1, 0, 2)


def _product(rows: Float[Array, "k n"], columns: Float[Array, "n m b"]) -> Float[Array, "k m b"]:
    n, m, b = columns.shape
    if n == 1:  # as a product, it would be a call
        return rows[:, :, None] * columns
    return jnp.matmul(rows, columns.reshape(n, m * b), precision=EXACT).reshape(-1, m, b)


def _least(
    curve: tuple[Array, Array, Array], slope: tuple[Array, Array], shifts: bool
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Where `α (2 s + α A) + β (2 t + β D) + 2 α β B` is least; β is 0 where it has to be.

    Args:
        curve: A, B and D.
        slope: s and t.
        shifts: whether β may be another number than 0.
    """
    (a, b, d), (s, t) = curve, slope
    alone = jnp.where(a > 0, -s / jnp.where(a > 0, a, 1.0), 0.0)
    if not shifts:
        return alone, jnp.zeros_like(alone)
    rest = a * d - b * b
    apart = (a > 0) & (d > 0) & (rest > LEAST_DETERMINANT * a * d)
    rest = jnp.where(apart, rest, 1.0)
    factor = jnp.where(apart, (b * t - d * s) / rest, alone)
    return factor, jnp.where(apart, (b * s - a * t) / rest, 0.0)
