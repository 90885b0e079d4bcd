"""Fewer bits for a float: of its significand, by arithmetic on its bits, or of a fixed step.

The bits of a float without its sign count the magnitudes from zero up, through subnormals and
powers of two alike. So a significand is cut to `keep` bits by adding to these bits and clearing the
last `drop = mantissa - keep` of them, with a carry into the exponent where one is due:

    nearest, ties to even   add 2^(drop-1) - 1, and the last kept bit
    at random               add a random number below 2^drop: up with the probability of the rest

`onto_steps` is for numbers below the least normal one of a narrower format, where steps no longer
shrink. Arrays: all; `keep` may be a number or a traced integer. Numbers are float32 or float64, and
keep their dtype.

References: IEEE 754-2019 §4.3.1; Croci et al., Stochastic rounding, 2022 (§7.3 has the addition).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer, UInt32


class Layout(NamedTuple):
    """How a dtype lays out its bits."""

    words: np.dtype
    mantissa: int
    bias: int


LAYOUTS = {
    "float32": Layout(np.dtype(np.uint32), 23, 127),
    "float64": Layout(np.dtype(np.uint64), 52, 1023),
}


Number = int | Array | np.ndarray


def nearest_bits(bits: Integer[Array, "*s"], drop: Number) -> Integer[Array, "*s"]:
    """The magnitude's (or number's) bits with the last `drop` cleared, to nearest even."""
    one = np.ones((), bits.dtype)
    ones = (one << _as(drop, bits.dtype)) - one
    return (bits + (ones >> one) + ((bits >> drop) & (ones & one))) & ~ones


def cut(
    x: Float[Array, "*s"], keep: Number, word: UInt32[Array, "*s"] | None = None
) -> Float[Array, "*s"]:
    """`x` with `keep` bits of significand, the leading one not counted, and its own exponents.

    Args:
        x: float32 or float64, any shape.
        keep: from 0 to what the dtype has (then nothing changes). Beyond the largest number is
            infinity, as the carry has it; infinities and NaN stay.
        word: random words to round with; None: to nearest, ties to even. Where more than 32 bits
            are dropped, the chance of going up is a multiple of 2^-32.

    Example:
        >>> cut(jnp.array([1.25, 1.375, 1.75]), 1).tolist()
        [1.0, 1.5, 2.0]
    """
    layout = LAYOUTS[x.dtype.name]
    bits = lax.bitcast_convert_type(x, layout.words)
    keep = _as(keep, layout.words)
    drop = np.array(layout.mantissa, layout.words) - keep
    if word is None:
        bits = nearest_bits(bits, drop)
    else:
        one = np.ones((), layout.words)
        ones = (one << drop) - one
        bits = (bits + (_below(word, layout) >> keep)) & ~ones
    return jnp.where(jnp.isnan(x), x, lax.bitcast_convert_type(bits, x.dtype))


def _below(word: UInt32[Array, "*s"], layout: Layout) -> Integer[Array, "*s"]:
    """A random number of as many bits as a mantissa has."""
    spare = layout.mantissa - 32
    if spare < 0:
        return word >> np.uint32(-spare)
    middle = np.array(1 << (spare - 1), layout.words)  # of what one word cannot tell apart
    return (word.astype(layout.words) << np.array(spare, layout.words)) | middle


def onto_steps(
    x: Float[Array, "*s"], step: float, word: UInt32[Array, "*s"] | None = None
) -> Float[Array, "*s"]:
    """`x >= 0` as a multiple of `step`, a power of two; for `x < step * 2^mantissa`.

    To nearest, ties to even, or with `word` at random.
    """
    layout, unit = LAYOUTS[x.dtype.name], np.array(step, x.dtype)
    if word is None:
        # Where the last place of the dtype is the step, adding rounds to it.
        lift = np.array(step * 2.0**layout.mantissa, x.dtype)
        signed = np.dtype(f"i{layout.words.itemsize}")
        count = lax.bitcast_convert_type(x + lift, signed) - lift.view(signed)
        count = count.astype(x.dtype)
    else:
        share = x / unit
        count = jnp.floor(share)  # and the rest is exact: what lies on a step stays
        count = count + (share_of(word, x.dtype) < share - count).astype(x.dtype)
    return count * unit


def share_of(word: UInt32[Array, "*s"], dtype: Any) -> Float[Array, "*s"]:
    """Random words as numbers in `[0, 1)`: multiples of 2^-24 in float32, of 2^-32 in float64."""
    spare = np.uint32(max(31 - LAYOUTS[jnp.dtype(dtype).name].mantissa, 0))
    return (word >> spare).astype(dtype) * np.array(2.0 ** (int(spare) - 32), dtype)


def with_sign(size: Float[Array, "*s"], x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`size >= 0`, or NaN, with the sign of `x`, zeros included."""
    words = LAYOUTS[x.dtype.name].words
    sign = np.array(1 << (8 * words.itemsize - 1), words)
    bits = lax.bitcast_convert_type(x, words) & sign
    return lax.bitcast_convert_type(lax.bitcast_convert_type(size, words) | bits, x.dtype)


def _as(number: Number, dtype: np.dtype) -> Array | np.ndarray:
    if isinstance(number, jax.Array):
        return number.astype(dtype)
    return np.asarray(number).astype(dtype)
