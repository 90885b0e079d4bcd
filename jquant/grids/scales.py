"""How the scale of a group is stored, and which stored scale brings a largest weight to a unit.

A scale is rounded to its dtype when it is fitted, so that codes are chosen for the scale that is
there. "e8m0" is the powers of two in one byte, of which `power_of_two` has four rules; "e4m3" is
one byte too, but reaches only from 2^-9 to 448, so whoever uses it adds a scale per tensor.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jquant.grids.ranges import LEAST_SCALE
from jquant.numerics.formats import FORMATS, Format

Rule = Literal["floor", "even", "ceil", "oas"]


class Storage(NamedTuple):
    """How a scale is stored: the dtype, and the least and greatest scale that are used of it."""

    dtype: str
    least: float
    most: float


SCALES: dict[str, Storage] = {
    **{d: Storage(d, least, float(jnp.finfo(d).max)) for d, least in LEAST_SCALE.items()},
    "e8m0": Storage("float8_e8m0fnu", 2.0**-126, 2.0**127),
    "e4m3": Storage("float8_e4m3fn", FORMATS["E4M3"].smallest, FORMATS["E4M3"].largest),
}

# Ranges are capped at half of float32's, so that no scale rounded up makes a value infinite.
CAP = 2.0**127


def as_stored(
    largest: Float[Array, "*g"], unit: Float[Array, "*#g"] | float, stored: Storage, least: float
) -> Float[Array, "*g"]:
    """The scale `largest / unit`, at least `least`, as it is stored; 1 for groups of zeros,
    NaN for those that hold NaN."""
    # As in `Uniform`: XLA would multiply by the reciprocal of a constant.
    scale = largest / (unit + 0.0 * largest)
    scale = jnp.clip(scale, max(stored.least, least), stored.most)
    return jnp.where(largest == 0, 1.0, scale).astype(stored.dtype)


def power_of_two(largest: Float[Array, "*g"], numbers: Format, rule: Rule) -> Float[Array, "*g"]:
    """The power of two for a group, from the bits of its largest weight.

    OCP's "floor" brings that weight below the power of two above the format's largest number, so it
    may clip. "even" rounds the weight to the format's mantissa first: if that reaches the next
    power of two, so does the scale. "ceil" is the least scale that clips nothing. "oas" halves it
    where that clips the largest weight by no more than half a step: "even" but for ties.
    """
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    fraction, exponent = math.frexp(numbers.largest)  # largest = fraction * 2^exponent
    above = {
        "floor": 0,
        "even": (1 << 22) >> numbers.mantissa_bits,
        "oas": ((1 << 22) >> numbers.mantissa_bits) - 1,
        "ceil": (1 << 23) - 1 - int((2 * fraction - 1) * 2**23),
    }[rule]
    field = ((bits + above) >> 23) - (exponent - 1)
    # Between the field at which the least number stays normal, and that of the largest finite one.
    field = jnp.clip(field, max(1, numbers.bias + numbers.mantissa_bits), min(254, 255 - exponent))
    scale = lax.bitcast_convert_type(jnp.where(largest > 0, field, 127) << 23, jnp.float32)
    return jnp.where(jnp.isnan(largest), largest, scale).astype(SCALES["e8m0"].dtype)
