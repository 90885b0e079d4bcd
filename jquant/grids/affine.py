"""Affine grids with an offset in place of a zero point: `value = scale * code + bias`.

So are MLX's. The least code stands for `bias`, which is stored as the scale is, so zero need not be
a code, and nothing ties the two. `Uniform` covers the conventions with zero points; a grid of those
can be written as one of these with `bias = -scale * zero`, and not the other way round. Static: the
bits, the search for a range and the dtype; the parameters `scale` and `bias` are `[*g]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jquant.grids.base import GridParams, closest, neighbours
from jquant.grids.ranges import LEAST_SCALE, MSE, MinMax, best_of
from jquant.grids.uniform import LEAST_STEP
from jquant.numerics import require
from jquant.numerics.extremes import largest, least


@jax.tree_util.register_static
@dataclass(frozen=True)
class Affine:
    """Equally spaced points from a least one on, `2**bits` codes per weight: MLX's grid.

    Args:
        bits: 2 to 8.
        range: `MinMax()`, or `MSE()` to search for a range that clips on purpose.
        scale_dtype: `"float32"`, `"float16"` or `"bfloat16"`, of scale and bias, which are rounded
            to it in `fit`, so codes are chosen for what is stored.

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> grid = Affine(2)
        >>> params = grid.fit(jnp.array([[1.0, 1.9, 4.0]]))
        >>> float(params["scale"][0]), float(params["bias"][0])
        (1.0, 1.0)
        >>> grid.nearest(jnp.array([[1.0, 1.9, 4.0]]), params).tolist()
        [[0, 1, 3]]
    """

    bits: int
    range: MinMax | MSE = MinMax()
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        require.integer("Affine.bits", self.bits, 2, 8)
        require.made_by("Affine.range", self.range, MinMax, MSE)
        require.one_of("Affine.scale_dtype", self.scale_dtype, list(LEAST_SCALE))

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code, both included."""
        return 0, 2**self.bits - 1

    def fit(
        self, w: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None = None
    ) -> GridParams:
        """Group parameters: `scale` and `bias`, `[*g]`.

        `importance` weighs the errors of `MSE`. Finite weights give finite parameters and values,
        as of `Uniform`; a group of zeros has scale 1, one that holds NaN a scale of NaN.
        """
        w = w.astype(jnp.float32)
        cap = float(jnp.finfo(jnp.float32).max) / 4
        low, high = (jnp.clip(end(w, axis=-1), -cap, cap) for end in (least, largest))
        if isinstance(self.range, MinMax):
            return self._params(low, high)
        return best_of(self.range, self, w, importance, lambda f: self._params(low * f, high * f))

    def _params(self, low: Float[Array, "*g"], high: Float[Array, "*g"]) -> GridParams:
        """Scale and bias of a range, which begins where the stored bias is."""
        magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
        stored = jnp.finfo(self.scale_dtype)
        most = float(stored.max)
        bias = jnp.clip(low, -most, most).astype(self.scale_dtype)
        # As in `Uniform`: XLA would multiply by the reciprocal of a constant.
        steps = 2**self.bits - 1 + 0.0 * magnitude
        scale = (high - bias.astype(jnp.float32)) / steps
        scale = jnp.maximum(scale, magnitude * LEAST_STEP)
        scale = jnp.clip(scale, LEAST_SCALE[self.scale_dtype], most)
        scale = jnp.where(magnitude == 0, 1.0, scale).astype(self.scale_dtype)
        return {"scale": scale, "bias": bias}

    def _position(self, w: Float[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """Where weights lie among the codes, as real numbers; zero where a file's step is zero."""
        scale, bias = _columns(params)
        some = scale != 0
        return jnp.where(some, (w - bias) / jnp.where(some, scale, 1.0), 0.0)

    def bracket(
        self, w: Float[Array, "*g b"], params: GridParams
    ) -> tuple[Integer[Array, "*g b"], Integer[Array, "*g b"]]:
        """The neighbouring int32 codes; equal where the weight is outside the grid's range."""
        return neighbours(self._position(w, params), self.codes)

    def nearest(self, w: Float[Array, "*g b"], params: GridParams) -> Integer[Array, "*g b"]:
        """The code of the nearest value; ties go to even codes."""
        return closest(self._position(w, params), self.codes)

    def decode(self, codes: Integer[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """`scale * code + bias`, float32; a scale of a file may be negative."""
        scale, bias = _columns(params)
        return scale * codes.astype(jnp.float32) + bias

    @property
    def shifts(self) -> bool:
        """Whether all values of a group can be moved by any one number: the bias may be any."""
        return True

    def rescaled(
        self, params: GridParams, factor: Float[Array, "*g"], shift: Float[Array, "*g"]
    ) -> GridParams:
        """Parameters, as stored, of values near `factor * value + shift`."""
        old, bias = (params[name].astype(jnp.float32) for name in ("scale", "bias"))
        small, most = LEAST_SCALE[self.scale_dtype], float(jnp.finfo(self.scale_dtype).max)
        scale = jnp.sign(old) * jnp.clip(jnp.abs(old) * factor, small, most)
        bias = jnp.clip(factor * bias + shift, -most, most)
        return {"scale": scale.astype(self.scale_dtype), "bias": bias.astype(self.scale_dtype)}


def _columns(params: GridParams) -> tuple[Float[Array, "*g 1"], Float[Array, "*g 1"]]:
    """Scale and bias as float32, with an axis for the weights of a group."""
    scale, bias = (params[name].astype(jnp.float32)[..., None] for name in ("scale", "bias"))
    return scale, bias
