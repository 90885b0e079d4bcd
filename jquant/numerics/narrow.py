"""Numbers in a dtype of fewer bits, never beyond its largest.

A cast to a narrow float gives NaN or infinity for what is beyond the dtype's largest number. Values
on a grid are: a grid's ends lie up to half a step outside the weights it was fitted to, and weights
in eight bits or less are scaled to fill their dtype. So values that take a dtype again do it here.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def as_dtype(x: Float[Array, "*s"], dtype: Any) -> Float[Array, "*s"]:
    """`x` in a floating dtype: a cast, but what is beyond the dtype's range becomes its end.

    Args:
        x: float32 or float64, any shape. Infinity is beyond, too; NaN stays where the dtype has it.
        dtype: floating. One that reaches as far as that of `x` makes this a plain cast, and so do
            integers. Where it has neither zero nor a sign (E8M0), what is below 2^-126 becomes
            that.

    Gradients are those of the cast, and zero beyond the range.

    Example:
        >>> as_dtype(jnp.array([500.0, -1e9, 1.0]), jnp.float8_e4m3fn).astype(float).tolist()
        [448.0, -448.0, 1.0]
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return x.astype(dtype)
    (low, high), own = ends(dtype), jnp.finfo(x.dtype)
    # Not `clip`: it halves the gradient of a number that is the end.
    if high < float(own.max):
        x = jnp.where(x > high, high, x)
    if low > float(own.min):
        x = jnp.where(x < low, low, x)
    return x.astype(dtype)


def ends(dtype: Any) -> tuple[float, float]:
    """The ends of a floating dtype; the lower one is negative, or at least 2^-126."""
    info = jnp.finfo(dtype)
    low = float(info.min)
    return low if low < 0 else max(low, 2.0**-126), float(info.max)


def is_coarse(dtype: Any) -> bool:
    """Whether rounding to a dtype is an error of the order of quantization: eight bits or less."""
    return jnp.finfo(dtype).bits <= 8
