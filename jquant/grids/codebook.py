"""Codebooks: `value = scale * values[code]`, for any table of increasing numbers.

The table is static, one for all groups; `scale` makes the largest weight of a group the largest
magnitude of the table (absmax). A weight takes the nearest value: the code is how many of the
midpoints between neighbours it exceeds. Tables that are known by a name are rows here:

* `NF4` (QLoRA, Dettmers et al. 2023): quantiles of the normal distribution from 1 - δ to δ, eight
  at equal distances above zero and seven below, and zero, divided by the largest; δ = 0.9677083.
  The digits are those of bitsandbytes, so that codes agree with its.
* `AF4` (Yoshida 2023, for groups of 64), meant to make the expected absolute error of normal
  weights least, with -1, 0 and 1 kept: values are medians of what is rounded to them. As published,
  the values next to zero are medians of what lies up to zero, not up to the midpoint with it, which
  costs: on normal weights the absolute error is 3 % above that of NF4, the squared error 8 %.

Static: the table; array: `scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jquant.grids.base import GridParams
from jquant.grids.ranges import LEAST_SCALE, MSE, MinMax, best_of
from jquant.numerics import require
from jquant.numerics.extremes import largest

# Magnitudes a table may hold, so that scale * value neither overflows nor vanishes in float32, and
# how near two neighbours may be, relative to their size, and still differ after that product.
BOUNDS, LEAST_GAP = (2.0**-40, 2.0**40), 2.0**-20


@jax.tree_util.register_static
@dataclass(frozen=True)
class Codebook:
    """Points `scale * values[code]`, codes from 0.

    Args:
        values: 2 to 256 increasing numbers, magnitudes from 2^-40 to 2^40 or zero.
        range: `MinMax()`, or `MSE()` to search for a scale that clips on purpose.
        scale_dtype: `"float32"`, `"float16"` or `"bfloat16"`, of the stored scale.

    Raises:
        ValueError: values that are too few, too many, not finite, equal or not in order, or too
            near each other for float32; or another argument is out of its set.

    Example:
        >>> grid = Codebook((-1.0, -0.25, 0.0, 0.5))
        >>> params = grid.fit(jnp.array([[-4.0, -0.7, 0.1, 3.0]]))
        >>> codes = grid.nearest(jnp.array([[-4.0, -0.7, 0.1, 3.0]]), params)
        >>> codes.tolist(), grid.decode(codes, params).tolist()
        ([[0, 1, 2, 3]], [[-4.0, -1.0, 0.0, 2.0]])
        >>> NF4.bits, NF4.values[8]
        (4, 0.07958029955625534)
    """

    values: tuple[float, ...]
    range: MinMax | MSE = MinMax()
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        try:
            values = tuple(float(value) for value in self.values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Codebook.values must be numbers, got {self.values!r}") from error
        if not 2 <= len(values) <= 256:
            raise ValueError(f"Codebook.values must be 2 to 256 numbers, got {len(values)}")
        for value in values:
            if value != 0 and not BOUNDS[0] <= abs(value) <= BOUNDS[1]:
                raise ValueError(f"Codebook.values must be 0 or ± 2^-40 to 2^40, got {value!r}")
        for low, high in zip(values[:-1], values[1:], strict=True):
            if not high - low >= LEAST_GAP * max(abs(low), abs(high)):
                raise ValueError(
                    "Codebook.values must increase, by 2^-20 of their size or more, got "
                    f"{low!r} before {high!r}; pass sorted values without duplicates"
                )
        object.__setattr__(self, "values", values)
        require.made_by("Codebook.range", self.range, MinMax, MSE)
        require.one_of("Codebook.scale_dtype", self.scale_dtype, tuple(LEAST_SCALE))

    def __call__(
        self, *, range: MinMax | MSE | None = None, scale_dtype: str | None = None
    ) -> Codebook:
        """The same table with another range, or scales of another dtype; None: as it is.

        So that `NF4()` and `NF4(range=MSE())` are what `MX()` and `NV(range=MSE())` lead to expect.

        Example:
            >>> NF4() == NF4, NF4(scale_dtype="float16").scale_dtype
            (True, 'float16')
        """
        given = {"range": range, "scale_dtype": scale_dtype}
        return replace(self, **{name: to for name, to in given.items() if to is not None})

    @property
    def papers(self) -> tuple[str, ...]:
        return tuple(paper for grid, paper in PAPERS if grid.values == self.values)

    @property
    def bits(self) -> int:
        """The least number of bits that count the values."""
        return (len(self.values) - 1).bit_length()

    @property
    def codes(self) -> tuple[int, int]:
        """0 and the last index."""
        return 0, len(self.values) - 1

    @property
    def _scales(self) -> tuple[float, float]:
        """The least and the greatest scale: values stay normal, and finite."""
        sizes, stored = np.abs(self.values), jnp.finfo(self.scale_dtype)
        small, large = float(sizes[sizes > 0].min()), float(sizes.max())
        least = max(2.0**-126 / min(1.0, small), LEAST_SCALE[self.scale_dtype])
        most = min(float(jnp.finfo(jnp.float32).max) / 4 / max(1.0, large), float(stored.max))
        return least, most

    def fit(
        self, w: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None = None
    ) -> GridParams:
        """`scale` `[*g]`, in its stored dtype; `importance` weighs the errors of `MSE`.

        Finite weights give finite parameters and values; a group of zeros has scale 1, one
        that holds NaN a scale of NaN.
        """
        w = w.astype(jnp.float32)
        top = largest(jnp.abs(w), axis=-1)
        large = float(np.abs(self.values).max())
        least, most = self._scales

        def at(factor: Float[Array, "*#g"]) -> GridParams:
            # XLA would multiply by the reciprocal of a constant.
            scale = top * factor / (large + 0.0 * top)
            scale = jnp.where(top == 0, 1.0, jnp.clip(scale, least, most))
            return {"scale": scale.astype(self.scale_dtype)}

        if isinstance(self.range, MinMax):
            return at(jnp.float32(1.0))
        return best_of(self.range, self, w, importance, at)

    def bracket(
        self, w: Float[Array, "*g b"], params: GridParams
    ) -> tuple[Integer[Array, "*g b"], Integer[Array, "*g b"]]:
        """The neighbouring int32 codes; equal where the weight is outside the scaled table."""
        table = np.asarray(self.values, np.float32)
        part = w / params["scale"].astype(jnp.float32)[..., None]
        lo = count(part, table[1:], jnp.greater_equal)
        return lo, jnp.minimum(lo + (part >= table[0]).astype(jnp.int32), self.codes[1])

    def nearest(self, w: Float[Array, "*g b"], params: GridParams) -> Integer[Array, "*g b"]:
        """The code of the nearest value; ties go to the lower one, as in bitsandbytes."""
        table = np.asarray(self.values)
        middle = ((table[:-1] + table[1:]) / 2).astype(np.float32)
        return count(w / params["scale"].astype(jnp.float32)[..., None], middle)

    def decode(self, codes: Integer[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """`scale * values[code]`, float32."""
        table = jnp.asarray(self.values, jnp.float32)
        values = jnp.take(table, codes.astype(jnp.int32), mode="clip")
        return params["scale"].astype(jnp.float32)[..., None] * values

    shifts = False

    def rescaled(
        self, params: GridParams, factor: Float[Array, "*g"], shift: Float[Array, "*g"]
    ) -> GridParams:
        """Parameters, as stored, of values near `factor * value`."""
        del shift
        least, most = self._scales
        scale = jnp.clip(params["scale"].astype(jnp.float32) * factor, least, most)
        return {"scale": scale.astype(self.scale_dtype)}


def count(
    x: Float[Array, "*g b"],
    thresholds: np.ndarray | Float[Array, "*#g k"],
    above: Callable[[Array, Array], Array] = jnp.greater,
) -> Integer[Array, "*g b"]:
    """How many of k increasing thresholds each number is above, int32: one table, or one a group.

    The first four binary digits are counted, sixteen comparisons that fuse into one pass; others
    are halved with a look-up each. On a CPU that is faster than only the one or only the other.
    """
    each = thresholds.ndim > 1
    k = thresholds.shape[-1]
    full = (1 << k.bit_length()) - 1
    pad = [(0, 0)] * (thresholds.ndim - 1) + [(0, full - k)]
    table = jnp.pad(jnp.asarray(thresholds), pad, constant_values=jnp.inf)
    step = max(1, (full + 1) // 16)
    code = jnp.zeros(x.shape, jnp.int32)
    for at in range(step - 1, full, step):
        bound = table[..., at, None] if each else table[at]
        code = code + jnp.where(above(x, bound), step, 0)
    while step := step // 2:
        at = code + (step - 1)
        bound = jnp.take_along_axis(table, at, axis=-1) if each else table[at]
        code = code + jnp.where(above(x, bound), step, 0)
    return code


NF4 = Codebook((
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))  # fmt: skip
AF4 = Codebook((
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
))  # fmt: skip
PAPERS = ((NF4, "dettmers2023qlora"), (AF4, "yoshida2023nf4"))
