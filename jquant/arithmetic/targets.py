"""What a number is rounded to: a significand of some bits, or the numbers of a whole format.

The numbers of a program lie in float32 or float64, its *carrier*, and a format is a subset of them:

* an int, or a traced integer: so many bits of significand, the leading one not counted, with the
  exponents of the carrier (Paxton et al. 2022; the emulator RPE);
* `jq.grids.Float(e, m)`: with the range, the subnormals and the overflow of that format;
* a dtype: `float16`, `bfloat16`, `float32`, `float8_e4m3fn`, `float8_e5m2`, overflowing as a cast
  does, to infinity or else NaN.

For `+ - * / sqrt` of numbers of a format with p bits of significand (the leading one counted), the
carrier's result rounded to the format is the exact result rounded to it where the carrier has
2p + 2: float32 for p <= 11, which is all of float16, and float64 for p <= 25. Static: all but a
traced number of bits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact, UInt32

from jquant.errors import FormatError
from jquant.grids.floating import Float
from jquant.numerics.formats import Format, Overflow
from jquant.numerics.significand import LAYOUTS, cut

DTYPES = {
    "float16": Float(5, 10, overflow="infinity"),
    "bfloat16": Float(8, 7, overflow="infinity"),
    "float32": Float(8, 23, overflow="infinity"),
    "float8_e4m3fn": Float(4, 3, overflow="infinity"),
    "float8_e5m2": Float(5, 2, overflow="infinity"),
}
CARRIERS = {
    "float32": "float32",
    "float64": "float64",
    "complex64": "float32",
    "complex128": "float64",
}
KINDS = f"bits of significand (int), jq.grids.Float(e, m), one of {[*DTYPES]}, or None"


@dataclass(frozen=True)
class Significand:
    """So many bits; `traced` tells that `bits` is the place of a traced number among such."""

    bits: int
    traced: bool = False

    def __str__(self) -> str:
        return f"{'traced' if self.traced else self.bits} bits of significand"


@dataclass(frozen=True)
class Numbers:
    """The numbers of a format."""

    row: Format
    overflow: Overflow

    @property
    def bits(self) -> int:
        return self.row.mantissa_bits

    def __str__(self) -> str:
        return f"Float({self.row.exponent_bits}, {self.row.mantissa_bits})"


Target = Significand | Numbers


def target(format: Any, traced: list[Array], where: str) -> Target | None:
    """What a user's format is; a traced number of bits is put at the end of `traced`.

    Raises:
        FormatError: it is none.
    """
    if format is None:
        return None
    if isinstance(format, bool | np.bool_):
        raise FormatError(f"{where}: expected {KINDS}, got {format!r}")
    if isinstance(format, int | np.integer):
        return Significand(_in_range(int(format), where))
    if isinstance(format, jax.Array | np.ndarray):
        if format.ndim or not jnp.issubdtype(format.dtype, jnp.integer):
            raise FormatError(
                f"{where}: a traced number of bits must be an integer scalar, got "
                f"{format.dtype}{list(format.shape)}; jax.vmap over several"
            )
        with contextlib.suppress(jax.errors.ConcretizationTypeError):  # traced: not known yet
            _in_range(int(format), where)
        traced.append(jnp.asarray(format))
        return Significand(len(traced) - 1, traced=True)
    if isinstance(format, Float):
        if format.scale is not None or not format.signed:
            raise FormatError(
                f"{where}: {format} is no format for arithmetic; pass a signed Float without scale"
            )
        return Numbers(format.format, format.overflow)
    try:
        name = jnp.dtype(format).name
    except TypeError:
        raise FormatError(f"{where}: expected {KINDS}, got {format!r}") from None
    if name not in DTYPES:
        raise FormatError(f"{where}: the dtype must be one of {[*DTYPES]}, got {name}")
    return Numbers(DTYPES[name].format, DTYPES[name].overflow)


def _in_range(bits: int, where: str) -> int:
    if not 1 <= bits <= 52:
        raise FormatError(f"{where}: bits of significand must be from 1 to 52, got {bits}")
    return bits


def check(target: Target, dtype: str, what: str, random: bool) -> None:
    """Refuse a format that the carrier of a result does not hold.

    Raises:
        FormatError: naming the operation, its dtype and the format.
    """
    if dtype not in CARRIERS:
        raise FormatError(
            f"{what} gives {dtype}; arithmetic is emulated in float32 or float64: cast the "
            f"program's numbers, or leave these with a rule {{{dtype!r}: None, ...}}"
        )
    if isinstance(target, Significand) and target.traced:
        return
    most = LAYOUTS[CARRIERS[dtype]].mantissa
    wider = "; run the program in float64 (jax_enable_x64)" if most == 23 else ""
    if target.bits > most:
        raise FormatError(f"{what} gives {dtype}, which holds {most} bits, not {target}{wider}")
    if random and target.bits == most:
        raise FormatError(
            f"{what} gives {dtype}, which has no more bits than {target} to round at random{wider}"
        )


@partial(jax.jit, static_argnames="target", inline=True)
def rounded(
    x: Inexact[Array, "*s"],
    target: Target,
    traced: list[Array],
    word: UInt32[Array, "..."] | None = None,
) -> Inexact[Array, "*s"]:
    """`x` in a format, in its own dtype: to nearest, ties to even, or with random words.

    The parts of complex numbers are rounded each by itself; their words have one more axis of two.
    The derivative is that of `x`: rounding is taken for the identity.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        words = (None, None) if word is None else (word[0], word[1])
        parts = zip((x.real, x.imag), words, strict=True)
        return lax.complex(*(rounded(part, target, traced, luck) for part, luck in parts))
    still = lax.stop_gradient(x)
    if isinstance(target, Numbers):
        return _instead(x, target.row.round(still, target.overflow, word))
    keep: Any = target.bits
    if target.traced:  # beyond what the carrier holds, all of it
        keep = jnp.clip(traced[target.bits], 0, LAYOUTS[x.dtype.name].mantissa)
    return _instead(x, cut(still, keep, word))


@jax.custom_jvp
def _instead(x: Array, y: Array) -> Array:
    """y, with the derivative of x."""
    del x
    return y


@_instead.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    return primals[1], tangents[0]
