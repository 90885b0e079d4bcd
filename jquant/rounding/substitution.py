"""GPTQ's sweep over the columns, read as forward substitution with a rounding in it.

With `H + λI = Gᵀ D² G` (see `factor`) and errors `E = W - Q`, GPTQ's updated weight of column j is

    w'_j = w_j + Σ_{k<j} G_jk E_k,      q_j = round(w'_j),      loss = Σ_j D_j² ‖w'_j - q_j‖²

(Babai's nearest plane; Chen et al. 2025, arXiv 2507.18553). A triangular solve is blocked by
recursion, and so is this: `sizes` lists nested block sizes down to 1, and a block's errors reach
the blocks after it by matrix products. Every level is one `lax.scan`, so the program is as long for
a layer of 512 inputs as for one of 16384.

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

CHUNK = 512  # earlier columns per matrix product; see docs/notes/gptq-solver.md


class Known(NamedTuple):
    """Parameters of a run of columns: a table, and every column's place in it."""

    table: Params  # leaves [units, m, …]
    place: Integer[Array, "n"]


class Solved(NamedTuple):
    """What the sweep leaves behind, per column."""

    codes: Integer[Array, "n m b"]  # int8 or uint8
    residual: Float[Array, "n"]  # ‖w' - q‖² over the rows that count
    fitted: Params | None  # leaves [units, m, …], if the parameters were fitted on the way


def substitute(
    weights: Float[Array, "n m b"],
    gain: Float[Array, "n n"],
    sizes: tuple[int, ...],
    grid: Grid,
    known: Known | None,
    *,
    counted: Float[Array, "m b"],
    unit: int = 1,
    edge: Integer[Array, "n"] | None = None,
) -> tuple[Float[Array, "n m b"], Solved]:
    """Errors `W - Q` and codes of all columns, in order.

    Args:
        weights: the columns.
        gain: the strictly lower part of `G`.
        sizes: nested block sizes, n first and 1 last, each a multiple of the next.
        grid: the grid.
        known: the parameters, where they do not depend on the sweep.
        counted: one for every row that counts in `residual`, zero for padding.
        unit: where they do, the number of columns that share parameters, one of `sizes`.
        edge: for every column, the place in its unit whose weight stands for it in a fit; default
            its own.
    """
    m, b = weights.shape[1:]

    def fit(w: Array, pull: Array, inner: Array, edges: Array) -> Params:
        """Parameters of one unit from its weights as moved by all columns before: `w + G⁻¹ pull`."""
        n = w.shape[0]
        moved = lax.linalg.triangular_solve(
            inner + jnp.eye(n, dtype=inner.dtype),
            pull.reshape(n, m * b),
            left_side=True,
            lower=True,
            unit_diagonal=True,
        )
        group = jnp.take(w + moved.reshape(n, m, b), edges, axis=0)
        return grid.fit(group.transpose(1, 0, 2).reshape(m, n * b))

    def solve(
        w: Array, pull: Array, inner: Array, edges: Array, known: Known | None, sizes: tuple[int, ...]
    ) -> tuple[Array, Solved]:
        """A block of `sizes[0]` columns; `pull` is what all columns before it do to them."""
        if known is None and sizes[0] == unit:
            table = jax.tree.map(lambda leaf: leaf[None], fit(w, pull, inner, edges))
            here = Known(table, jnp.zeros(sizes[0], jnp.int32))
            error, solved = solve(w, pull, inner, edges, here, sizes)
            return error, solved._replace(fitted=table)
        if sizes[0] == 1 and known is not None:
            params = jax.tree.map(lambda leaf: jnp.take(leaf, known.place, axis=0), known.table)
            moved = w + pull
            codes = nearest(grid, moved, params)
            value = grid.decode(codes, params)
            residual = jnp.sum((moved - value) ** 2 * counted, axis=(1, 2))
            narrow = jnp.int8 if grid.codes[0] < 0 else jnp.uint8
            return w - value, Solved(codes.astype(narrow), residual, None)

        def step(done: Array, at: Array) -> tuple[Array, Solved]:
            def cut(x: Array, axis: int = 0) -> Array:
                return lax.dynamic_slice_in_dim(x, at, sizes[1], axis)

            rows = cut(inner)
            here = None if known is None else Known(known.table, cut(known.place))
            more = cut(pull) + prefix_product(rows, done, at)
            error, solved = solve(cut(w), more, cut(rows, 1), cut(edges), here, sizes[1:])
            return lax.dynamic_update_slice_in_dim(done, error, at, axis=0), solved

        starts = jnp.arange(0, sizes[0], sizes[1])
        error, solved = lax.scan(step, jnp.zeros_like(w), starts)
        return error, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), solved)

    edge = jnp.arange(sizes[0]) % unit if edge is None else edge
    return solve(weights, jnp.zeros_like(weights), gain, edge, known, sizes)


def push(
    gain: Float[Array, "n n"], error: Float[Array, "n m b"], block: int, counted: Float[Array, "m b"]
) -> Float[Array, "n"]:
    """`‖(G E)_j‖²` of errors that are known: the residuals of another rounding, for comparison.

    Products are of bfloat16 with float32 sums. The errors of that are relative to each column's
    terms and do not add up: a few 1e-4 of the sum over j, at a fraction of the sweep's cost.
    """
    low, brief = gain.astype(jnp.bfloat16), error.astype(jnp.bfloat16)

    def step(_: None, at: Array) -> tuple[None, Array]:
        rows = lax.dynamic_slice_in_dim(low, at, block)
        moved = prefix_product(rows, brief, at + block)
        moved = moved + lax.dynamic_slice_in_dim(error, at, block)
        return None, jnp.sum(moved**2 * counted, axis=(1, 2))

    _, norms = lax.scan(step, None, jnp.arange(0, len(gain), block))
    return norms.reshape(-1)


def prefix_product(
    rows: Float[Array, "c n"], columns: Float[Array, "n m b"], end: Integer[Array, ""]
) -> Float[Array, "c m b"]:
    """`rows @ columns` in float32, for which either factor must be zero from `end` on.

    Takes as many chunks as needed to get there, so that a sweep costs a triangle, not a square.
    """
    n, m, b = columns.shape
    flat = columns.reshape(n, m * b)
    size = min(n, CHUNK)

    def chunk(i: Array, total: Array) -> Array:
        # The last chunk starts early enough to fit, and leaves out what its predecessor had.
        first = jnp.minimum(i * size, n - size)
        part = lax.dynamic_slice_in_dim(rows, first, size, axis=1)
        part = jnp.where(jnp.arange(size) + first >= i * size, part, jnp.zeros((), rows.dtype))
        piece = lax.dynamic_slice_in_dim(flat, first, size)
        return total + jnp.matmul(
            part, piece, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )

    total = jnp.zeros((rows.shape[0], m * b), jnp.float32)
    return lax.fori_loop(0, (end + size - 1) // size, chunk, total).reshape(-1, m, b)
