"""GPTQ's sweep over the columns, read as forward substitution with a rounding in it.

With `H + λI = Gᵀ D² G` (see `factor`) and errors `E = W - Q`, GPTQ's updated weight of column j is

    w'_j = w_j + Σ_{k<j} G_jk E_k,      q_j = round(w'_j),      loss = Σ_j D_j² ‖w'_j - q_j‖²

(Babai's nearest plane; Chen et al. 2025, arXiv 2507.18553). A triangular solve is blocked by
recursion: `sizes` lists nested block sizes, and a block's errors reach the blocks after it by
matrix products. The innermost block is unrolled; the outer ones are `lax.scan`, so the program is
as long for a layer of 512 inputs as for one of 16384.

A column is `[m, b]`: m groups of b weights (b = 1 for groups along the input axis), so that the
grid sees its own `[*g, b]`. Columns lie along the first axis: a column is contiguous in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from jquant.grids.base import Grid, Params, nearest

EXACT = lax.Precision.HIGHEST
CHUNK = 512  # earlier columns per matrix product; see docs/notes/gptq-solver.md


class Known(NamedTuple):
    """Parameters of a run of columns: a table, and every column's place in it."""

    table: Params  # leaves [units, m, …]
    place: Integer[Array, "n"]


class Solved(NamedTuple):
    """What the sweep leaves behind, per column."""

    codes: Integer[Array, "n m b"]  # int32
    residual: Float[Array, "n"]  # ‖w' - q‖² over the rows that count
    fitted: Params | None  # leaves [units, m, …], if the parameters were fitted on the way


def substitute(
    weights: Float[Array, "n m b"],
    gain: Float[Array, "n n"],
    sizes: tuple[int, ...],
    grid: Grid,
    known: Known | None,
    *,
    unit: int | None = None,
    edge: Integer[Array, "n"] | None = None,
    counted: Float[Array, "m b"] | None = None,
) -> tuple[Float[Array, "n m b"], Solved]:
    """Errors `W - Q` and codes of all columns, in order.

    Args:
        weights: the columns.
        gain: the strictly lower part of `G`.
        sizes: nested block sizes, each a multiple of the next; the first is n.
        grid: the grid.
        known: the parameters, where they do not depend on the sweep.
        unit: otherwise, the number of columns that share parameters: 1, or one of `sizes`.
        edge: for every column, the place in its unit whose weight stands for it in a fit.
        counted: weights of the rows in `residual` (zero for padding); default all one.
    """
    m, b = weights.shape[1:]

    def fit(w: Array, pull: Array, inner: Array, edges: Array) -> Params:
        """Parameters of one unit, from its weights as moved by all columns before: `w + G⁻¹ pull`."""
        n = w.shape[0]
        moved = lax.linalg.triangular_solve(
            inner + jnp.eye(n, dtype=inner.dtype), pull.reshape(n, m * b),
            left_side=True, lower=True, unit_diagonal=True,
        )
        group = jnp.take(w + moved.reshape(n, m, b), edges, axis=0)
        return grid.fit(group.transpose(1, 0, 2).reshape(m, n * b))

    def column(w: Array, params: Params | None) -> tuple[Array, Array, Params | None]:
        fresh = grid.fit(w) if params is None else None
        params = fresh if params is None else params
        code = nearest(grid, w, params)
        return code, grid.decode(code, params), fresh

    def unrolled(w: Array, pull: Array, inner: Array, known: Known | None) -> tuple[Array, Solved]:
        table = known and jax.tree.map(lambda leaf: jnp.take(leaf, known.place, 0), known.table)
        errors, codes, residuals, fitted = [], [], [], []
        for j in range(w.shape[0]):
            moved = w[j] + pull[j]
            for k in range(j):
                moved = moved + inner[j, k] * errors[k]
            params = None if table is None else jax.tree.map(lambda leaf, j=j: leaf[j], table)
            code, value, fresh = column(moved, params)
            errors.append(w[j] - value)
            codes.append(code.astype(jnp.int16))
            square = (moved - value) ** 2
            residuals.append(jnp.sum(square if counted is None else square * counted))
            fitted.append(fresh)
        joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *fitted) if table is None else None
        return jnp.stack(errors), Solved(jnp.stack(codes), jnp.stack(residuals), joined)

    def solve(
        w: Array, pull: Array, inner: Array, edges: Array | None, known: Known | None,
        sizes: tuple[int, ...],
    ) -> tuple[Array, Solved]:
        if known is None and sizes[0] == unit and edges is not None:
            table = jax.tree.map(lambda leaf: leaf[None], fit(w, pull, inner, edges))
            here = Known(table, jnp.zeros(sizes[0], jnp.int32))
            error, solved = solve(w, pull, inner, None, here, sizes)
            return error, solved._replace(fitted=table)
        if len(sizes) == 1:
            return unrolled(w, pull, inner, known)

        def step(done: Array, at: Array) -> tuple[Array, Solved]:
            def cut(x: Array) -> Array:
                return lax.dynamic_slice_in_dim(x, at, sizes[1])

            rows = cut(inner)
            error, solved = solve(
                cut(w),
                cut(pull) + _before(rows, done, at),
                lax.dynamic_slice_in_dim(rows, at, sizes[1], axis=1),
                None if edges is None else cut(edges),
                None if known is None else Known(known.table, cut(known.place)),
                sizes[1:],
            )
            return lax.dynamic_update_slice_in_dim(done, error, at, axis=0), solved

        starts = jnp.arange(0, sizes[0], sizes[1])
        error, solved = lax.scan(step, jnp.zeros_like(w), starts)
        return error, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), solved)

    return solve(weights, jnp.zeros_like(weights), gain, edge, known, sizes)


def _before(
    rows: Float[Array, "c n"], error: Float[Array, "n m b"], at: Integer[Array, ""]
) -> Float[Array, "c m b"]:
    """`rows[:, :at] @ error[:at]`, in as many chunks as that takes; errors from `at` on are zero."""
    n, m, b = error.shape
    error = error.reshape(n, m * b)
    size = min(n, CHUNK)

    def chunk(i: Array, total: Array) -> Array:
        # The last chunk starts early enough to fit, and leaves out what its predecessor had.
        first = jnp.minimum(i * size, n - size)
        part = lax.dynamic_slice_in_dim(rows, first, size, axis=1)
        part = jnp.where(jnp.arange(size) + first >= i * size, part, 0.0)
        return total + jnp.matmul(
            part, lax.dynamic_slice_in_dim(error, first, size), precision=EXACT
        )

    total = jnp.zeros((rows.shape[0], m * b), jnp.float32)
    if n == size:
        total = chunk(jnp.int32(0), total)
    else:
        total = lax.fori_loop(0, (at + size - 1) // size, chunk, total)
    return total.reshape(-1, m, b)
