"""Tables fitted to each group by k-means: `value = table[group, code]` (SqueezeLLM's grid).

For the weights w of a group and their importance h (the diagonal of the second moment), the table c
makes `Σ h (w - c[code])²` least. Lloyd's algorithm alone ends in poor minima: started at quantiles,
with 16 values for 600 weights, at 1.4 (normal weights) to 1.7 times the least error (Student's t).
But on a line clusters are runs of the sorted weights, so dynamic programming over where runs end is
exact. Here it is, for up to 128 weights; more are first gathered in 128 bins that hold equal shares
of `∫ density^(1/3)`, as the runs of the best tables do (Panter and Dite); Lloyd's algorithm then
moves the ends of runs into the bins. That is within 0.2 % of the least error at 4 bits and 1 % at
5. Tables of more bits are cut into programs of 32 values each for an equal share: within 4 % at 6
bits, if there are ten weights to a value; at 7 and 8 bits with five weights to a value it may be
1.1 to 1.7 times the least.

Groups of a whole row (`Groups()`) give SqueezeLLM's one table per row. Static: the choice; array:
`table` `[*g, 2**bits]`, strictly increasing, in the type it is stored in.

References: Kim et al., SqueezeLLM: Dense-and-Sparse Quantization, 2023,
https://arxiv.org/abs/2306.07629; Panter and Dite, Quantization distortion in pulse-count modulation
with nonuniform spacing of levels, 1951.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer

from jquant.grids.base import GridParams
from jquant.grids.codebook import count
from jquant.grids.ranges import LEAST_SCALE
from jquant.numerics import require

# Bins and the most values of one dynamic program; groups that are fitted at a time.
BINS, MOST, CHUNK = 128, 32, 1024


@jax.tree_util.register_static
@dataclass(frozen=True)
class KMeans:
    """Any `2**bits` values for each group, those of least squared error.

    Args:
        bits: 1 to 8.
        iterations: of Lloyd's algorithm, at least 0; after ten little changes (measured).
        table_dtype: `"float32"`, or `"float16"` (as SqueezeLLM's) or `"bfloat16"`: tables are most
            of what is stored besides codes. Their values are rounded to it, and codes chosen for
            them. float16 holds magnitudes from 6e-8 to 65504; others become those.

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> grid = KMeans(1)
        >>> w = jnp.array([[0.0, 1.0, 2.0, 10.0, 11.0]])
        >>> grid.fit(w)["table"].tolist(), grid.nearest(w, grid.fit(w)).tolist()
        ([[1.0, 10.5]], [[0, 0, 0, 1, 1]])
        >>> jnp.round(grid.fit(w, jnp.array([[1.0, 0.0, 0.0, 1.0, 1.0]]))["table"], 2).tolist()
        [[0.0, 10.5]]
    """

    bits: int
    iterations: int = 10
    table_dtype: str = "float32"

    def __post_init__(self) -> None:
        require.integer("KMeans.bits", self.bits, 1, 8)
        require.integer("KMeans.iterations", self.iterations, 0, 10_000)
        require.one_of("KMeans.table_dtype", self.table_dtype, tuple(LEAST_SCALE))

    @property
    def papers(self) -> tuple[str, ...]:
        return ("kim2024squeezellm",)

    @property
    def codes(self) -> tuple[int, int]:
        """0 and `2**bits - 1`."""
        return 0, 2**self.bits - 1

    def fit(
        self, w: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None = None
    ) -> GridParams:
        """`table` `[*g, 2**bits]`. Weights of no importance at all still draw values (by 2^-20).

        Groups of no more distinct weights than values are kept as they are. Values that are left
        over, or that their type cannot tell apart, follow at its least steps. A group
        that holds NaN has a table of NaN.
        """
        table = _tables(w.astype(jnp.float32), importance, 2**self.bits, self.iterations)
        table = _increasing(table, self.table_dtype)
        bad = jnp.any(jnp.isnan(w), axis=-1, keepdims=True)  # the ranks of values know no NaN
        return {"table": jnp.where(bad, np.asarray(np.nan, table.dtype), table)}

    def bracket(
        self, w: Float[Array, "*g b"], params: GridParams
    ) -> tuple[Integer[Array, "*g b"], Integer[Array, "*g b"]]:
        """The neighbouring int32 codes; equal where the weight is outside the table."""
        table = params["table"].astype(jnp.float32)
        lo = count(w, table[..., 1:], jnp.greater_equal)
        hi = lo + (w >= table[..., :1]).astype(jnp.int32)
        return lo, jnp.minimum(hi, self.codes[1])

    def nearest(self, w: Float[Array, "*g b"], params: GridParams) -> Integer[Array, "*g b"]:
        """The code of the nearest value; ties go to the lower one."""
        return count(w, _middle(params["table"].astype(jnp.float32)))

    def decode(self, codes: Integer[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """`table[code]` of each group, float32."""
        table = params["table"].astype(jnp.float32)
        return jnp.take_along_axis(table, codes.astype(jnp.int32), axis=-1, mode="clip")

    shifts = True

    def rescaled(
        self, params: GridParams, factor: Float[Array, "*g"], shift: Float[Array, "*g"]
    ) -> GridParams:
        """The table of `factor * value + shift`, as stored."""
        table = params["table"].astype(jnp.float32)
        moved = factor[..., None] * table + shift[..., None]
        return {"table": _increasing(moved, self.table_dtype)}


@partial(jax.jit, static_argnames=("k", "steps"))
def _tables(
    w: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None, k: int, steps: int
) -> Float[Array, "*g k"]:
    """k values for each group, not decreasing."""
    # A quarter of the largest number can be subtracted, and powers of two divide without error.
    w = jnp.clip(w, -(2.0**126), 2.0**126)
    top = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    power = lax.bitcast_convert_type(top, jnp.int32) & 0x7F800000
    unit = jnp.where(power > 0, lax.bitcast_convert_type(power, jnp.float32), 1.0)
    weight = jnp.ones_like(w)
    if importance is not None:
        share = jnp.broadcast_to(importance.astype(jnp.float32), w.shape)
        mean = jnp.mean(share, axis=-1, keepdims=True)
        weight = share / jnp.where(mean > 0, mean, 1.0) + 2.0**-20
    rows = [part.reshape(-1, w.shape[-1]) for part in (w / unit, weight)]
    # Some at a time: of each a square of BINS numbers may be in memory.
    table = lax.map(lambda row: _table(row[0], row[1], k, steps), rows, batch_size=CHUNK)
    return table.reshape(*w.shape[:-1], k) * unit


def _table(x: Float[Array, " n"], h: Float[Array, " n"], k: int, steps: int) -> Float[Array, " k"]:
    """k values for the numbers x of weights h; not decreasing."""
    n = x.size
    x, h = lax.sort((x, h), num_keys=1)
    middle = x[n // 2]  # sums of numbers far from zero would lose what they differ by
    mass, moment = (jnp.pad(jnp.cumsum(part), (1, 0)) for part in (h, h * (x - middle)))

    def means(ends: Integer[Array, " k+1"]) -> Float[Array, " k"]:
        """Of the runs between `ends`; an empty one gets the number that follows."""
        weight, first, last = jnp.diff(mass[ends]), ends[:-1], ends[1:] - 1
        mean = middle + jnp.diff(moment[ends]) / jnp.where(weight > 0, weight, 1.0)
        low, high = x[jnp.minimum(first, n - 1)], x[jnp.maximum(last, 0)]
        return jnp.where((weight > 0) & (last >= first), jnp.clip(mean, low, high), low)

    def lloyd(_: int, values: Float[Array, " k"]) -> Float[Array, " k"]:
        inner = jnp.searchsorted(x, _middle(values), side="right")
        return means(jnp.pad(inner, (1, 1), constant_values=(0, n)))

    # A run for each distinct number, if there are no more of them than values.
    number = jnp.pad(jnp.cumsum(x[1:] > x[:-1], dtype=jnp.int32), (1, 0))
    ends = jnp.searchsorted(number, jnp.arange(k + 1, dtype=jnp.int32))
    if n > k:
        parts = -(-k // MOST)
        exact = parts == 1 and n <= BINS
        bins = jnp.arange(n + 1, dtype=jnp.int32) if exact else _shares(x, h, BINS * parts)
        each = bins[np.arange(parts)[:, None] * BINS + np.arange(min(bins.size, BINS + 1))]
        cuts = jax.vmap(lambda e: e[_runs(mass[e], moment[e], k // parts)])(each)
        ends = jnp.where(number[-1] < k, ends, jnp.append(cuts[:, :-1], n))
    return lax.fori_loop(0, steps, lloyd, means(ends))


def _middle(table: Float[Array, "*g k"]) -> Float[Array, "*g k-1"]:
    """Half-way between neighbours, or the lower one if no float lies between them."""
    low, high = table[..., :-1], table[..., 1:]
    middle = low + (high - low) / 2
    return jnp.where(middle < high, middle, low)


def _shares(x: Float[Array, " n"], h: Float[Array, " n"], parts: int) -> Integer[Array, " parts+1"]:
    """Ends of runs of sorted numbers with equal shares of `∫ density^(1/3)`."""
    gap = jnp.diff(x, append=x[-1:])
    share = jnp.cumsum(jnp.cbrt(h * gap**2))  # (h / gap)^(1/3) over a gap
    inner = 1 + jnp.searchsorted(share, jnp.arange(1, parts, dtype=jnp.float32) / parts * share[-1])
    return jnp.pad(jnp.minimum(inner, x.size), (1, 1), constant_values=(0, x.size))


def _runs(
    mass: Float[Array, " m+1"], moment: Float[Array, " m+1"], k: int
) -> Integer[Array, " k+1"]:
    """Where to cut m bins into k runs of least squared error, by dynamic programming.

    `mass` and `moment` are sums up to each end of a bin. The error of a run is the sum of squares,
    which all cuts have in common, less `moment² / mass`.
    """
    place = jnp.arange(mass.size, dtype=jnp.int32)

    def error(first: Array, last: Array) -> Array:
        weight = mass[last] - mass[first]
        gain = (moment[last] - moment[first]) ** 2 / jnp.where(weight > 0, weight, 1.0)
        return jnp.where(first <= last, jnp.where(weight > 0, -gain, 0.0), jnp.inf)

    def extend(best: Array, _: None) -> tuple[Array, Array]:
        """The least error of one more run, up to each end."""
        return jnp.min(best[:, None] + error(place[:, None], place[None, :]), axis=0), best

    def back(last: Array, best: Array) -> tuple[Array, Array]:
        first = jnp.argmin(best + error(place, last)).astype(jnp.int32)
        return first, first

    _, best = lax.scan(extend, error(jnp.zeros_like(place), place), None, length=k - 1)
    _, inner = lax.scan(back, jnp.int32(mass.size - 1), best, reverse=True)
    return jnp.pad(inner, (1, 1), constant_values=(0, mass.size - 1))


def _increasing(table: Float[Array, "*g k"], dtype: str) -> Float[Array, "*g k"]:
    """Values in their stored type, each at least one step of it above the one before.

    Floats of one sign are ordered as their bits; subnormals that arithmetic flushes are left out.
    """
    kind, k = jnp.dtype(dtype), table.shape[-1]
    whole = jnp.int32 if kind.itemsize == 4 else jnp.int16
    least, most = (
        lax.bitcast_convert_type(jnp.asarray(value, kind), whole).astype(jnp.int32)
        for value in (LEAST_SCALE[dtype], jnp.finfo(kind).max)
    )
    size = lax.bitcast_convert_type(jnp.abs(table).astype(kind), whole).astype(jnp.int32)
    size = jnp.clip(size - least + 1, 0, most - least + 1 - k)
    rank = lax.broadcasted_iota(jnp.int32, table.shape, table.ndim - 1)
    place = rank + lax.cummax(jnp.where(table < 0, -size, size) - rank, axis=table.ndim - 1)
    bits = jnp.where(place == 0, 0, jnp.abs(place) + least - 1).astype(whole)
    value = lax.bitcast_convert_type(bits, kind)
    return jnp.where(place < 0, -value, value)
