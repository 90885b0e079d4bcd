"""Powers of the sizes of errors, as searches for ranges weigh them."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def powered(error: Float[Array, "*s"], norm: float) -> Float[Array, "*s"]:
    """`|error| ** norm` for a norm above zero, float32.

    By products and square roots where the norm is whole or a half, else by `exp` and `log`, which
    processors compute for several numbers at once: XLA's own power is six times slower there.
    """
    if norm == 2:
        return error * error
    size = jnp.abs(error)
    if float(norm).is_integer():
        return lax.integer_pow(size, int(norm))
    if float(2 * norm).is_integer():
        return lax.integer_pow(jnp.sqrt(size), int(2 * norm))
    return jnp.exp(norm * jnp.log(size))
