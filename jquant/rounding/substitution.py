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
from jquant.rounding.factor import Factor

EXACT = lax.Precision.HIGHEST
CHUNK = 256  # earlier columns per matrix product; see docs/notes/gptq-solver.md


class Known(NamedTuple):
    """Parameters of a run of columns: a table, and every column's place in it."""

    table: Params  # leaves [units, m, …]
    place: Integer[Array, " n"]


class Run(NamedTuple):
    """What is given for every column of a block."""

    weights: Float[Array, "n m b"]
    pivots: Float[Array, " n"]
    penalty: Float[Array, " n"]
    edge: Integer[Array, " n"]


class Solved(NamedTuple):
    """What the sweep leaves behind, per column."""

    codes: Integer[Array, "n m b"]  # int8 or uint8
    fitted: Params | None  # leaves [units, m, …], if the parameters were fitted on the way


def substitute(
    weights: Float[Array, "n m b"],
    factor: Factor,
    sizes: tuple[int, ...],
    grid: Grid,
    known: Known | None,
    *,
    unit: int = 1,
    edge: Integer[Array, " n"] | None = None,
) -> tuple[Float[Array, "m b"], Solved]:
    """The loss of every row, without the damping's share, and the codes of all columns, in order.

    Args:
        weights: the columns.
        factor: of the columns' second moment.
        sizes: nested block sizes, n first and 1 last, each a multiple of the next.
        grid: the grid.
        known: the parameters, where they do not depend on the sweep.
        unit: where they do, the number of columns that share parameters, one of `sizes`.
        edge: for every column, the place in its unit whose weight stands for it in a fit; default
            its own.
    """
    m, b = weights.shape[1:]

    def fit(w: Array, pull: Array, inner: Array, edges: Array) -> Params:
        """Parameters of one unit, from its weights as moved by earlier columns: `w + G⁻¹ pull`."""
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
        run: Run, pull: Array, inner: Array, known: Known | None, sizes: tuple[int, ...]
    ) -> tuple[Array, Array, Solved]:
        """A block of `sizes[0]` columns; `pull` is what all columns before it do to them."""
        if known is None and sizes[0] == unit:
            table = jax.tree.map(lambda leaf: leaf[None], fit(run.weights, pull, inner, run.edge))
            here = Known(table, jnp.zeros(sizes[0], jnp.int32))
            error, loss, solved = solve(run, pull, inner, here, sizes)
            return error, loss, solved._replace(fitted=table)
        if sizes[0] == 1 and known is not None:
            params = jax.tree.map(lambda leaf: jnp.take(leaf, known.place, axis=0), known.table)
            moved = run.weights + pull
            codes = nearest(grid, moved, params)
            value = grid.decode(codes, params)
            narrow = jnp.int8 if grid.codes[0] < 0 else jnp.uint8
            error = run.weights - value
            loss = (run.pivots * (moved - value) ** 2 - run.penalty * error**2)[0]
            return error, loss, Solved(codes.astype(narrow), None)

        def step(state: tuple[Array, Array], at: Array) -> tuple[tuple[Array, Array], Solved]:
            def cut(x: Array, axis: int = 0) -> Array:
                return lax.dynamic_slice_in_dim(x, at, sizes[1], axis)

            done, total = state
            rows = cut(inner)
            here = None if known is None else Known(known.table, cut(known.place))
            more = cut(pull) + prefix_product(rows, done, at)
            error, loss, solved = solve(jax.tree.map(cut, run), more, cut(rows, 1), here, sizes[1:])
            return (lax.dynamic_update_slice_in_dim(done, error, at, axis=0), total + loss), solved

        starts = jnp.arange(0, sizes[0], sizes[1])
        nothing = (jnp.zeros_like(run.weights), jnp.zeros((m, b), jnp.float32))
        (error, loss), solved = lax.scan(step, nothing, starts)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), solved)
        return error, loss, flat

    edge = jnp.arange(sizes[0]) % unit if edge is None else edge
    run = Run(weights, factor.pivots, factor.penalty, edge)
    _, loss, solved = solve(run, jnp.zeros_like(weights), factor.gain, known, sizes)
    return loss, solved


def loss_of(error: Float[Array, "n m b"], factor: Factor) -> Float[Array, "m b"]:
    """The loss of every row for errors that are known: another rounding's, to compare with."""
    block = max(size for size in range(1, CHUNK + 1) if len(error) % size == 0)

    def step(total: Array, at: Array) -> tuple[Array, None]:
        def cut(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, at, block)

        here = cut(error)
        moved = here + prefix_product(cut(factor.gain), error, at + block)
        both = jnp.stack([moved**2, here**2])
        signs = jnp.stack([cut(factor.pivots), -cut(factor.penalty)])
        # As a product: XLA's reduction over the columns would cost more than all of the above.
        return total + jnp.einsum("sj,sjmb->mb", signs, both, precision=EXACT), None

    return lax.scan(step, jnp.zeros(error.shape[1:]), jnp.arange(0, len(error), block))[0]


def prefix_product(
    rows: Float[Array, "c n"], columns: Float[Array, "n m b"], end: Integer[Array, ""]
) -> Float[Array, "c m b"]:
    """`rows @ columns` in full float32, where one or the other is zero from `end` on.

    Takes as many chunks as needed to get there, so that a sweep costs a triangle, not a square.
    """
    n, m, b = columns.shape
    flat = columns.reshape(n, m * b)
    size = min(n, CHUNK)

    def chunk(i: Array, total: Array) -> Array:
        # The last chunk starts early enough to fit, and leaves out what its predecessor had.
        first = jnp.minimum(i * size, n - size)
        part = lax.dynamic_slice_in_dim(rows, first, size, axis=1)
        part = jnp.where(jnp.arange(size) + first >= i * size, part, 0.0)
        piece = lax.dynamic_slice_in_dim(flat, first, size)
        return total + jnp.matmul(part, piece, precision=EXACT)

    total = jnp.zeros((rows.shape[0], m * b), jnp.float32)
    return lax.fori_loop(0, (end + size - 1) // size, chunk, total).reshape(-1, m, b)
