"""Floating point formats as data, and the rounding of float32 to any of them, bit for bit.

With `m` mantissa bits and a bias, the magnitudes of a format are, in order,

    f * 2^(1 - bias - m)            for exponent field e = 0 (subnormal), f = 0 ... 2^m - 1
    (2^m + f) * 2^(e - bias - m)    for e > 0

and the bit pattern `rank = e * 2^m + f` counts them: neighbouring magnitudes have neighbouring
ranks, through subnormals and powers of two alike. So a format needs no table of values, and
rounding to it is one addition to the bits of a float32. `special` says which patterns at the top
are no magnitudes: "ieee" reserves the top exponent for infinity and NaN, "nan" one pattern for NaN
(the `fn` formats), "none" nothing. Fixed point is the case of one exponent bit: the row INT8 is
`k / 64`, k = 0 ... 127. Static: everything here.

References: IEEE 754-2019 §3.4; Micikevicius et al., FP8 formats for deep learning, 2022,
https://arxiv.org/abs/2209.05433 (E4M3, E5M2); OCP Microscaling Formats v1.0, 2023 (the others).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt32

from jquant.numerics import require
from jquant.numerics.significand import LAYOUTS, cut, nearest_bits, onto_steps, with_sign

Special = Literal["none", "nan", "ieee"]
Overflow = Literal["saturate", "infinity"]

_MAGNITUDE = 0x7FFFFFFF  # the bits of a float32 without its sign


class Format(NamedTuple):
    """One row of the table. `signed` has no part in the magnitudes."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    special: Special
    signed: bool = True

    @property
    def top(self) -> int:
        """The largest rank."""
        spare = {"none": 1, "nan": 2, "ieee": 1 + (1 << self.mantissa_bits)}[self.special]
        return (1 << (self.exponent_bits + self.mantissa_bits)) - spare

    @property
    def smallest(self) -> float:
        """The least magnitude above zero."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def largest(self) -> float:
        """The greatest magnitude."""
        e, f = divmod(self.top, 1 << self.mantissa_bits)
        return (f + (e > 0) * 2.0**self.mantissa_bits) * 2.0 ** (
            max(e, 1) - self.bias - self.mantissa_bits
        )

    def rank(self, x: Float32[Array, "*s"]) -> Int32[Array, "*s"]:
        """The rank of the magnitude nearest to `|x|`, ties to the even rank; beyond `top` as if
        magnitudes went on, and far beyond for infinity and NaN."""
        # Infinity stands for NaN: the largest NaN would carry into the sign.
        bits = jnp.minimum(lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE, 0x7F800000)
        drop = 23 - self.mantissa_bits
        rank = nearest_bits(bits, drop) >> drop
        if self.bias == 127:
            return rank  # float32's own exponents, subnormal ones included
        # Where the last place of float32 is the format's least magnitude, adding rounds to it.
        lift = jnp.float32(2.0 ** (24 - self.bias - self.mantissa_bits))
        low = lax.bitcast_convert_type(jnp.abs(x) + lift, jnp.int32)
        low = low - lax.bitcast_convert_type(lift, jnp.int32)
        rank = rank - ((127 - self.bias) << self.mantissa_bits)
        return jnp.where(bits < ((128 - self.bias) << 23), low, rank)

    def magnitude(self, rank: Int32[Array, "*s"]) -> Float32[Array, "*s"]:
        """The magnitude of a rank from 0 to `top`."""
        bits = (rank << (23 - self.mantissa_bits)) + ((127 - self.bias) << 23)
        normal = lax.bitcast_convert_type(bits, jnp.float32)
        if self.bias == 127:
            return normal
        low = rank.astype(jnp.float32) * 2.0 ** (1 - self.bias - self.mantissa_bits)
        return jnp.where(rank < (1 << self.mantissa_bits), low, normal)

    def round(
        self,
        x: Float[Array, "*s"],
        overflow: Overflow = "saturate",
        word: UInt32[Array, "*s"] | None = None,
    ) -> Float[Array, "*s"]:
        """Every number as the nearest one of the format, ties to even. See
        `jquant.grids.Float.round`. With random `word`s, as one of its two neighbours. float64 stays
        float64, so that nothing is rounded twice; all else becomes float32.

        With `overflow="infinity"` that is what a cast to the signed type of the format and back
        gives, but for NaN where the type has none. It is not what a cast to E8M0 gives: that type
        has neither zero nor a sign, and casts send ties up, so 3 becomes 4 and 0 and -1 NaN, where
        the nearest powers of two, ties to even, and zero for what is not above, are 2, 0 and 0.
        """
        x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        size = jnp.abs(x)
        value = cut(size, self.mantissa_bits, word)
        if self.bias != LAYOUTS[x.dtype.name].bias:  # else the subnormals are the dtype's own
            low = size < np.array(2.0 ** (1 - self.bias), x.dtype)
            value = jnp.where(low, onto_steps(size, self.smallest, word), value)
        beyond = {"none": self.largest, "nan": np.nan, "ieee": np.inf}[self.special]
        beyond = self.largest if overflow == "saturate" else beyond
        most = np.array(self.largest, x.dtype)
        value = jnp.where(value > most, np.array(beyond, x.dtype), value)
        if not self.signed:
            return jnp.where(jnp.signbit(x) & ~jnp.isnan(x), np.zeros((), x.dtype), value)
        return with_sign(value, x)


FORMATS: dict[str, Format] = {
    "E2M1": Format(2, 1, 1, "none"),
    "E2M3": Format(2, 3, 1, "none"),
    "E3M2": Format(3, 2, 3, "none"),
    "E4M3": Format(4, 3, 7, "nan"),
    "E5M2": Format(5, 2, 15, "ieee"),
    "INT8": Format(1, 6, 1, "none"),
    "E8M0": Format(8, 0, 127, "nan", signed=False),  # its 2^-127 reads as zero here
    "FP16": Format(5, 10, 15, "ieee"),
    "BF16": Format(8, 7, 127, "ieee"),
    "TF32": Format(8, 10, 127, "ieee"),
}


def find_format(
    exponent_bits: int,
    mantissa_bits: int,
    bias: int | None = None,
    special: Special | None = None,
    signed: bool = True,
) -> Format:
    """The format of these bits: what is None is as in the row of `FORMATS` with as many bits, or,
    if there is none, as IEEE 754 has it: `bias = 2^(e-1) - 1`, the top exponent reserved.

    Raises:
        ValueError: an argument is out of its set, or float32 arithmetic does not reach the values.

    Example:
        >>> find_format(4, 3).largest, find_format(4, 3, special="ieee").largest
        (448.0, 240.0)
    """
    require.integer("exponent_bits", exponent_bits, 1, 8)
    require.integer("mantissa_bits", mantissa_bits, 0, 23)
    if special not in (None, *get_args(Special)):
        raise ValueError(f"special must be one of {get_args(Special)} or None, got {special!r}")
    require.boolean("signed", signed)
    require.integer_or_none("bias", bias)
    size = exponent_bits, mantissa_bits, signed
    rows = {(r.exponent_bits, r.mantissa_bits, r.signed): r for r in FORMATS.values()}
    usual = rows.get(size, Format(*size[:2], (1 << (exponent_bits - 1)) - 1, "ieee", signed))
    row = usual._replace(
        bias=usual.bias if bias is None else bias, special=special or usual.special
    )
    if row.top < 1:
        raise ValueError(f"{row} has no number but zero; pass special='none'")
    # Subnormals have to be ordinary numbers of float32, unless they are its own.
    if row.bias != 127 and row.bias + mantissa_bits > 126:
        raise ValueError(f"{row} has values too small for float32 arithmetic; pass a lower bias")
    if (row.top >> mantissa_bits) - row.bias > 127 or 24 - row.bias - mantissa_bits > 127:
        raise ValueError(f"{row} has values too large for float32; pass a higher bias")
    return row
