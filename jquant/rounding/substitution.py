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

from jquant.grids.base import Grid, GridParams, code_dtype, nearest
from jquant.numerics.packed import unpacked, whole_bytes
from jquant.rounding.factor import Factor

EXACT = lax.Precision.HIGHEST
CHUNK = 256  # earlier columns per matrix product; see docs/notes/gptq-solver.md


class ColumnParams(NamedTuple):
    """Parameters of all columns: a table, and every column's entry in it."""

    table: GridParams  # leaves [units, m, …]; [1, m, …] where one serves all units
    entry: Integer[Array, " in"]

    def at(self, source: Integer[Array, " n"]) -> GridParams:
        entry = jnp.take(self.entry, source)

        def pick(leaf: Array) -> Array:
            return jnp.take(leaf, jnp.minimum(entry, leaf.shape[0] - 1), axis=0)

        return jax.tree.map(pick, self.table)


class Run(NamedTuple):
    """What is given for every place of a block."""

    source: Integer[Array, " n"]
    edge: Integer[Array, " n"]
    pivots: Float[Array, " n"]
    penalty: Float[Array, " n"]


class Solved(NamedTuple):
    """What the sweep leaves behind, place by place."""

    codes: Integer[Array, "n m b"]  # whole bytes: XLA slices no smaller ones
    plain: Float[Array, "n m b"]  # errors of nearest rounding with the static parameters
    fitted: GridParams | None  # leaves [units, m, …], if parameters were fitted on the way


def substitute(
    columns: Float[Array, "in m b"],
    source: Integer[Array, " n"],
    static: ColumnParams,
    factor: Factor,
    grid: Grid,
    sizes: tuple[int, ...],
    *,
    unit: int | None = None,
    edge: Integer[Array, " n"] | None = None,
) -> tuple[Float[Array, "m b"], Solved]:
    """The loss of every row, without the damping's share, and the codes at all places.

    Args:
        columns: the weights.
        source: the column at each place, first to last.
        static: parameters fitted to the weights as they are.
        factor: of the second moment, by place.
        grid: the grid.
        sizes: nested block sizes, n first and 1 last, each a multiple of the next.
        unit: how many places share parameters that are fitted when the sweep gets to them, one of
            `sizes`; `None`: the static ones are used.
        edge: for every place, the one in its unit whose weight stands for it in a fit; default its
            own.
    """
    m, b = columns.shape[1:]
    everyone = jnp.zeros(len(columns), jnp.int32)
    byte = whole_bytes(code_dtype(grid))

    def fit(w: Array, pull: Array, inner: Array, edges: Array) -> GridParams:
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
        return jax.tree.map(unpacked, grid.fit(group.transpose(1, 0, 2).reshape(m, n * b)))

    def solve(
        run: Run, pull: Array, inner: Array, fitted: ColumnParams | None, sizes: tuple[int, ...]
    ) -> tuple[Array, Array, Solved]:
        """A block of `sizes[0]` places; `pull` is what all columns before it do to them."""
        if fitted is None and sizes[0] == unit:
            w = jnp.take(columns, run.source, axis=0)
            table = jax.tree.map(lambda leaf: leaf[None], fit(w, pull, inner, run.edge))
            error, loss, solved = solve(run, pull, inner, ColumnParams(table, everyone), sizes)
            return error, loss, solved._replace(fitted=table)
        if sizes[0] == 1:
            # Single rows, here and in `at`: XLA's gather of many is slower by an order.
            w = jnp.take(columns, run.source, axis=0)
            moved = w + pull
            params = (fitted or static).at(run.source)
            codes = nearest(grid, moved, params)
            value = grid.decode(codes, params)
            error = w - value
            pivot, penalty = run.pivots[0], run.penalty[0]
            loss = (pivot * (moved - value) ** 2 - penalty * error**2)[0]
            params = static.at(run.source)
            plain = w - grid.decode(nearest(grid, w, params), params)
            return error, loss, Solved(codes.astype(byte), plain, None)

        def step(state: tuple[Array, Array], at: Array) -> tuple[tuple[Array, Array], Solved]:
            def cut(x: Array, axis: int = 0) -> Array:
                return lax.dynamic_slice_in_dim(x, at, sizes[1], axis)

            done, total = state
            rows = cut(inner)
            more = cut(pull) + prefix_product(rows, done, at)
            here = jax.tree.map(cut, run)
            error, loss, solved = solve(here, more, cut(rows, 1), fitted, sizes[1:])
            return (lax.dynamic_update_slice_in_dim(done, error, at, axis=0), total + loss), solved

        starts = jnp.arange(0, sizes[0], sizes[1], jnp.int32)
        nothing = (jnp.zeros_like(pull), jnp.zeros((m, b), jnp.float32))
        (error, loss), solved = lax.scan(step, nothing, starts)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), solved)
        return error, loss, flat

    edge = jnp.arange(sizes[0], dtype=jnp.int32) % (unit or sizes[0]) if edge is None else edge
    run = Run(source, edge, factor.pivots, factor.penalty)
    fitted = static if unit is None else None
    still = jnp.zeros((sizes[0], m, b), jnp.float32)
    _, loss, solved = solve(run, still, factor.gain, fitted, sizes)
    return loss, solved


def loss_of(error: Float[Array, "n m b"], factor: Factor) -> Float[Array, "m b"]:
    """The loss of every row for errors that are known: another rounding's, to compare with.

    Beyond one chunk of columns, products are of bfloat16 with float32 sums, which matrix units take
    at several times the speed. Every term is then off by up to 2^-9 at random, and the loss of a
    whole layer by well under 1e-3.
    """
    n = len(error)
    block = max(size for size in range(1, CHUNK + 1) if n % size == 0)
    low = jnp.float32 if n <= CHUNK else jnp.bfloat16
    gain, brief = factor.gain.astype(low), error.astype(low)

    def step(total: Array, at: Array) -> tuple[Array, None]:
        def cut(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, at, block)

        here = cut(error)
        moved = here + prefix_product(cut(gain), brief, at + block)
        both = jnp.stack([moved**2, here**2])
        signs = jnp.stack([cut(factor.pivots), -cut(factor.penalty)])
        # As a product: XLA's reduction over the columns would cost more than all of the above.
        return total + jnp.einsum("sj,sjmb->mb", signs, both, precision=EXACT), None

    nothing = jnp.zeros(error.shape[1:], jnp.float32)
    return lax.scan(step, nothing, jnp.arange(0, n, block, jnp.int32))[0]


def prefix_product(
    rows: Float[Array, "c n"], columns: Float[Array, "n m b"], end: Integer[Array, ""]
) -> Float[Array, "c m b"]:
    """`rows @ columns` with float32 sums, where one or the other is zero from `end` on.

    Takes as many chunks as needed to get there, so that a sweep costs a triangle, not a square.
    """
    n, m, b = columns.shape
    flat = columns.reshape(n, m * b)
    size = min(n, CHUNK)

    def chunk(i: Array | int, total: Array) -> Array:  # a number under disable_jit
        # The last chunk starts early enough to fit, and leaves out what its predecessor had.
        first = jnp.minimum(i * size, n - size)
        part = lax.dynamic_slice_in_dim(rows, first, size, axis=1)
        fresh = jnp.arange(size, dtype=jnp.int32) + first >= i * size
        part = jnp.where(fresh[None], part, jnp.zeros((), rows.dtype))
        piece = lax.dynamic_slice_in_dim(flat, first, size)
        return total + jnp.matmul(part, piece, precision=EXACT, preferred_element_type=jnp.float32)

    total = jnp.zeros((rows.shape[0], m * b), jnp.float32)
    return lax.fori_loop(0, (end + size - 1) // size, chunk, total).reshape(-1, m, b)
