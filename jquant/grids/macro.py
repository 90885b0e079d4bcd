"""Macro blocks: neighbouring groups that share what a power of two lacks, a mantissa of 8 bits.

A scale of MX is a power of two, so the largest weight of a group lies anywhere between two of them.
Four groups of 32 share one byte m, and all their scales are multiplied by `1 + m / 256`:

    value = 2^k * (1 + m / 256) * number              16th of a bit per weight for m

By default m brings the largest weight of a macro block to the largest number. Searched, it is the
best of that one and of 16 others, each with the best powers of two that go with it. The paper
multiplies weights before they are rounded, and sums after; here the inverse is part of the scale,
whose products with numbers are exact in float32.

Reference: Chhugani et al., Unveiling the Potential of Quantization with MXFP4: Strategies for
Quantization Error Reduction, 2026, https://arxiv.org/abs/2603.08713 (macro block scaling).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, Shaped, UInt8

from jquant.numerics.extremes import largest

_COUNT = 16  # mantissas that are tried, as in the paper
_KEPT = 8  # bits of a mantissa


def in_blocks(x: Shaped[Array, "..."], together: int, axis: int = -1) -> Shaped[Array, "..."]:
    """An axis of groups as one of blocks and one of their groups, zeros at the end.

    Example:
        >>> in_blocks(jnp.arange(1, 4), 2).tolist()
        [[1, 2], [3, 0]]
    """
    axis %= x.ndim
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % together)
    return jnp.pad(x, pad).reshape(*x.shape[:axis], -1, together, *x.shape[axis + 1 :])


def of_groups(x: Shaped[Array, "*g m"], together: int, count: int) -> Shaped[Array, "*g n"]:
    """What blocks share, for each of `count` groups; as it is where it is of groups already.

    Example:
        >>> of_groups(jnp.array([7, 9]), 2, 3).tolist()
        [7, 7, 9]
    """
    if x.shape[-1] == count:
        return x
    return jnp.repeat(x, together, axis=-1)[..., :count]


def multiplier(mantissa: Integer[Array, "*s"]) -> Float[Array, "*s"]:
    """`1 + m / 256`, float32."""
    return 1.0 + mantissa.astype(jnp.float32) / 2.0**_KEPT


def of_largest(top: Float[Array, "*g n"], number: float, together: int) -> UInt8[Array, "*g m"]:
    """The mantissas that bring the largest of each macro block just below `number * 2^k`.

    Args:
        top: largest magnitudes of groups.
        number: the largest of the format.
        together: groups in a macro block.
    """
    most = largest(in_blocks(top, together), axis=-1)
    bits = lax.bitcast_convert_type(most / (number + 0.0 * most), jnp.int32)
    dropped = 23 - _KEPT
    rounded_up = (bits + (1 << dropped) - 1) >> dropped  # 256 of 256 is the next power of two
    sound = (most > 0) & jnp.isfinite(most)
    return jnp.where(sound, rounded_up & ((1 << _KEPT) - 1), 0).astype(jnp.uint8)


def best_mantissa(
    start: UInt8[Array, "*g m"],
    together: int,
    loss: Callable[[UInt8[Array, "*g m"]], Float[Array, "*g n"]],
) -> UInt8[Array, "*g m"]:
    """The mantissa of each macro block at which its groups lose least; `start` wins ties.

    Args:
        start: the first that is tried.
        together: groups in a macro block.
        loss: of every group, with the scale that is best for it.
    """

    def total(mantissa: UInt8[Array, "*g m"]) -> Float[Array, "*g m"]:
        return jnp.sum(in_blocks(loss(mantissa), together), axis=-1)

    def better(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        mantissa = jnp.full_like(start, (i * (2**_KEPT // _COUNT)).astype(jnp.uint8))
        now = total(mantissa)
        return jnp.where(now < best[0], now, best[0]), jnp.where(now < best[0], mantissa, best[1])

    return lax.fori_loop(0, _COUNT, better, (total(start), start))[1]
