"""A zero that no compiler knows to be one: what is computed from it waits for what it is made of.

`lax.optimization_barrier` is meant for that, but XLA's CPU compiler of JAX 0.10 and 0.12 drops it
before it fuses and schedules. Users: weights that are not decoded before they are needed
(`inference/late.py`), numbers that are not computed twice (`arithmetic/once.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32


@jax.custom_batching.custom_vmap
def zero(x: Array) -> Int32[Array, ""]:
    """Zero, but only `x` can tell: the number of set bits of a 32-bit word, divided by 64.

    Other compilers than the CPU's know it. So does that one where there are several devices: the
    first element would lie on one of them, and all others would wait for its message.

    Args:
        x: numbers, at least one; its first element is the word. Under vmap the first of all stands
            for all, so that what is computed from the zero is not batched.

    Example:
        >>> zero(jnp.array([1.5, 2.0])).item()
        0
    """
    if jax.device_count() > 1:
        return jnp.int32(0)
    return lax.platform_dependent(x, cpu=_bits, default=lambda x: jnp.int32(0))


def _bits(x: Array) -> Int32[Array, ""]:
    first = lax.squeeze(lax.slice(x, (0,) * x.ndim, (1,) * x.ndim), range(x.ndim))
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    word = lax.bitcast_convert_type(first.astype(jnp.float32), jnp.int32) if floating else first
    return lax.shift_right_logical(lax.population_count(word.astype(jnp.int32)), jnp.int32(6))


@zero.def_vmap
def _(size: int, batched: Sequence[bool], x: Array) -> tuple[Array, bool]:
    del size, batched
    return zero(x[0]), False
