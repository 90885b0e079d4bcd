"""Power grids (PowerQuant, NUPES): uniform codes for `|w| ** a`, so finer steps near zero if a < 1.

With `m = max |w|` of a group, `K = 2**(bits - 1) - 1` and the exponent `a > 0`,

    position(w) = sign(w) * K * (|w| / m) ** a         value(q) = sign(q) * m * (|q| / K) ** (1 / a)

and codes from -K to K. Powers are the only continuous maps of the positive reals that keep
products: the product of two values is the value of the product of their codes (over K). `a = 1` is
`Uniform(symmetric=True, convention="S3")`, bit for bit. Where `1 / a` is a whole number r (a = 1,
1/2, 1/3 …) values are `sign(q) * |q| ** r`, exact integers, times one step `m / K ** r`
(`Power.integers`): an integer matmul needs nothing else.

Half-way between two codes is not half-way between their values. The papers round the position
(`domain="codes"`); the default takes the nearest value, as every other grid does. At the best
exponents that makes the squared error less by 1 % (Gaussian), 3 % (Laplace) and 6 % (Student's t,
4 degrees of freedom) at 4 bits, and by 6, 17 and 28 % at 3 bits.

The exponent is given, or fitted without data (`exponents.py`). Static: everything but `scale` (m)
and, if fitted, `exponent` (a, float16).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jquant.grids.base import GridParams, neighbours
from jquant.grids.exponents import SEARCHED, best_exponent, losses, power, summed
from jquant.grids.ranges import LEAST_SCALE, MSE, MinMax, best_of
from jquant.numerics import require
from jquant.numerics.extremes import largest

# Exponents that can be given: outside, neighbouring values of an 8-bit grid meet in float32.
BOUNDS = (0.125, 8.0)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Power:
    """Points `±m * (k / K) ** (1 / exponent)`, symmetric codes from -K to K.

    Args:
        bits: 2 to 8. K is `2**(bits - 1) - 1`.
        exponent: from 0.125 to 8; below 1 steps are finer near zero. None (default): searched in
            `fit`, from 0.2 to 1.2, for the least squared error, weighed by `importance` if given.
        per: what a searched exponent stands for: the whole `"weight"` (default: a float16 for each
            of the groups is worth its bits only in groups of many hundreds), or each `"group"`.
            `allocation.power_exponent` finds one for many weights.
        domain: where to round: to the nearest of the `"values"` (default), or the `"codes"`
            nearest to the position, as in the papers.
        range: `MinMax()`, or `MSE()` to search for an m that clips on purpose (after the exponent).
        scale_dtype: `"float32"`, `"float16"` or `"bfloat16"`, of the stored m.

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> grid = Power(3, exponent=0.5)
        >>> params = grid.fit(jnp.array([[-9.0, 0.0, 1.2, 4.0]]))
        >>> grid.decode(jnp.arange(-3, 4)[None], params).tolist()
        [[-9.0, -4.0, -1.0, 0.0, 1.0, 4.0, 9.0]]
        >>> sorted(Power(3).fit(jnp.array([[-9.0, 0.0, 1.2, 4.0]])))
        ['exponent', 'scale']

    References:
        Yvinec et al., PowerQuant: Automorphism Search for Non-Uniform Quantization, ICLR 2023,
        https://arxiv.org/abs/2301.09858
        Yvinec et al., NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search,
        2023, https://arxiv.org/abs/2308.05600
    """

    bits: int
    exponent: float | None = None
    per: Literal["group", "weight"] = "weight"
    domain: Literal["values", "codes"] = "values"
    range: MinMax | MSE = MinMax()
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        require.integer("Power.bits", self.bits, 2, 8)
        given = self.exponent
        if given is not None:
            number = isinstance(given, int | float) and not isinstance(given, bool)
            if not number or not BOUNDS[0] <= given <= BOUNDS[1]:
                raise ValueError(
                    f"Power.exponent must be a number from {BOUNDS[0]} to {BOUNDS[1]}, or None to "
                    f"search for it, got {given!r}"
                )
            object.__setattr__(self, "exponent", float(given))
        require.made_by("Power.range", self.range, MinMax, MSE)
        require.one_of("Power.per", self.per, ("group", "weight"))
        require.one_of("Power.domain", self.domain, ("values", "codes"))
        require.one_of("Power.scale_dtype", self.scale_dtype, tuple(LEAST_SCALE))

    @property
    def papers(self) -> tuple[str, ...]:
        return ("yvinec2023powerquant",)

    @property
    def codes(self) -> tuple[int, int]:
        """-K and K."""
        return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1

    @property
    def _root(self) -> int | None:
        """`1 / exponent` if it is whole and `K ** r` is exact in float32."""
        if self.exponent is None:
            return None
        root = round(1 / self.exponent)
        whole = root > 0 and abs(root * self.exponent - 1) < 1e-6
        return root if whole and self.codes[1] ** root <= 2**24 else None

    def fit(
        self, w: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None = None
    ) -> GridParams:
        """`scale` `[*g]`; `exponent` float16, `[*g]`, or of size 1 in the last two if per weight.

        Finite weights give finite parameters and increasing values: m is capped at a quarter of
        float32's largest, and is at least what keeps the smallest value normal; NaN in a group
        that holds NaN.
        """
        w = w.astype(jnp.float32)
        top = largest(jnp.abs(w), axis=-1)
        params = {"scale": self._scale(top)}
        if self.exponent is None:
            params["exponent"] = _searched(self, w, params["scale"], importance)
        if isinstance(self.range, MinMax):
            return params
        return best_of(
            self.range, self, w, importance, lambda f: {**params, "scale": self._scale(top * f)}
        )

    def _scale(self, top: Float[Array, "*g"]) -> Float[Array, "*g"]:
        """The stored m of groups whose largest magnitude is `top`."""
        # The smallest value is normal; exp and log err by more than integers do.
        tiny = 2.0**-125 if self._root is None else 2.0**-126
        least = tiny * self.codes[1] ** (1 / (self.exponent or SEARCHED[0]))
        cap = float(min(jnp.finfo(jnp.float32).max / 4, jnp.finfo(self.scale_dtype).max))
        least = max(least, LEAST_SCALE[self.scale_dtype])
        return jnp.clip(jnp.where(top == 0, 1.0, top), least, cap).astype(self.scale_dtype)

    def _parts(self, params: GridParams) -> tuple[Array, Array | float]:
        """m and the exponent as float32, with an axis for the weights of a group."""
        scale = params["scale"].astype(jnp.float32)[..., None]
        if self.exponent is not None:
            return scale, self.exponent
        return scale, params["exponent"].astype(jnp.float32)[..., None]

    def _position(self, w: Float[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """Where weights lie among the codes, as real numbers."""
        if self.exponent == 1:
            # XLA would make `w * K / m` of it, an ulp off, were there no sum in between.
            step = self._step(params)[..., None]
            return w / (step + 0.0 * step)
        scale, exponent = self._parts(params)
        part = jnp.minimum(jnp.abs(w) / scale, 1.0)
        return jnp.sign(w) * self.codes[1] * power(part, exponent)

    def bracket(
        self, w: Float[Array, "*g b"], params: GridParams
    ) -> tuple[Integer[Array, "*g b"], Integer[Array, "*g b"]]:
        """The neighbouring int32 codes; equal where the weight is outside ±m."""
        return neighbours(self._position(w, params), self.codes)

    def nearest(self, w: Float[Array, "*g b"], params: GridParams) -> Integer[Array, "*g b"]:
        """The code of the nearest value, or the nearest code, as `domain` says; ties to even."""
        if self.domain == "codes" or self.exponent == 1:
            position = jnp.round(self._position(w, params))
            return jnp.clip(position, *self.codes).astype(jnp.int32)
        lo, hi = self.bracket(w, params)
        down, up = w - self.decode(lo, params), self.decode(hi, params) - w
        return jnp.where((down < up) | ((down == up) & (lo % 2 == 0)), lo, hi)

    def decode(self, codes: Integer[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """`sign(q) * m * (|q| / K) ** (1 / a)`, float32; differentiable in m, a and (real) q."""
        q = codes.astype(jnp.float32)
        if self._root is not None:
            return _whole_power(q, self._root) * self._step(params)[..., None]
        scale, exponent = self._parts(params)
        return jnp.sign(q) * scale * power(jnp.abs(q) / self.codes[1], 1.0 / exponent)

    def _step(self, params: GridParams) -> Float[Array, "*g"]:
        """`m / K ** r`, what the integers are multiplied by; divided, see `Uniform`."""
        scale = params["scale"].astype(jnp.float32)
        return scale / (self.codes[1] ** (self._root or 1) + 0.0 * scale)

    shifts = False

    def rescaled(
        self, params: GridParams, factor: Float[Array, "*g"], shift: Float[Array, "*g"]
    ) -> GridParams:
        """Parameters, as stored, of values near `factor * value`; the exponent stays."""
        del shift
        return {**params, "scale": self._scale(params["scale"].astype(jnp.float32) * factor)}

    def integers(
        self, codes: Integer[Array, "*g b"], params: GridParams
    ) -> tuple[Integer[Array, "*g b"], Float[Array, "*g"]]:
        """Values as integers `sign(q) * |q| ** r`, r = 1 / exponent, and one float32 step a group.

        Integers have the narrowest of int8, int16 and int32 that holds `K ** r`. Their product with
        the step is what `decode` returns, bit for bit.

        Raises:
            ValueError: `1 / exponent` is not whole, or `K ** r` is beyond float32's exact integers.

        Example:
            >>> grid = Power(4, exponent=0.5)
            >>> integers, step = grid.integers(jnp.array([[-7, 2]]), grid.fit(jnp.array([[98.0]])))
            >>> integers.tolist(), integers.dtype.name, float(step[0])
            ([[-49, 4]], 'int8', 2.0)
        """
        if self._root is None:
            raise ValueError(
                f"{self} has no integers: pass an exponent of which 1 / exponent is a whole r, "
                f"with {self.codes[1]} ** r at most 2**24"
            )
        top = self.codes[1] ** self._root
        dtype = next(d for d in (jnp.int8, jnp.int16, jnp.int32) if top <= jnp.iinfo(d).max)
        return _whole_power(codes.astype(jnp.int32), self._root).astype(dtype), self._step(params)


@partial(jax.jit, static_argnames="grid")
def _searched(
    grid: Power,
    w: Float[Array, "*g b"],
    scale: Float[Array, "*g"],
    importance: Float[Array, "*#g #b"] | None,
) -> Float[Array, "*#g"]:
    """The exponent of least error of each group, or of all along the last two group axes."""
    unit = scale.astype(jnp.float32)
    proxy, error = losses(grid, w / unit[..., None], importance)
    if grid.per == "weight":
        axes = tuple(range(-min(2, unit.ndim), 0))
        share = (unit / largest(unit, axis=axes, keepdims=True)) ** 2
        proxy, error = (summed(loss, share, axes) for loss in (proxy, error))
    return best_exponent(proxy, error)


def _whole_power(q: Array, root: int) -> Array:
    """`sign(q) * |q| ** root`, exact."""
    power = q
    for _ in range(root - 1):
        power = power * jnp.abs(q)
    return power
