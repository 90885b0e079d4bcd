"""The largest and the least number, and whether all are finite, with no NaN forgotten on the way.

XLA's compiler for CPUs (JAX 0.10 to 0.12) drops NaN from a `jnp.max` or `jnp.min` whose operand has
4096 elements or more; below that, and on other backends, the result is NaN. Sums, products with
zero, `all` and `any` keep it everywhere. Whatever relies on a NaN that shows in an extreme asks
here.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Axis = int | tuple[int, ...] | None


def all_finite(x: Float[Array, "..."], axis: Axis = None) -> Bool[Array, "..."]:
    """Whether no number along these axes is NaN or infinite.

    Any floating dtype of two bytes or more, any shape; True where there are no numbers at all.

    Example:
        >>> all_finite(jnp.array([[1.0, -2.0], [jnp.inf, 0.0]]), axis=-1).tolist()
        [True, False]
    """
    # A sum of zeros and NaN: half the time of `all(isfinite(x))` beside a maximum (XLA:CPU).
    return jnp.sum(x * jnp.zeros((), x.dtype), axis) == 0


def largest(
    x: Float[Array, "..."],
    axis: Axis = None,
    *,
    initial: float | None = None,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """`jnp.max`, and NaN where one of the numbers is NaN.

    Example:
        >>> rows = jnp.ones((2, 4096)).at[0, 7].set(jnp.nan)
        >>> largest(rows, axis=-1).tolist()
        [nan, 1.0]
    """
    return _of(jnp.max, x, axis, initial, keepdims)


def least(
    x: Float[Array, "..."],
    axis: Axis = None,
    *,
    initial: float | None = None,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """`jnp.min`, and NaN where one of the numbers is NaN."""
    return _of(jnp.min, x, axis, initial, keepdims)


def _of(
    extreme: Callable[..., Array], x: Array, axis: Axis, initial: float | None, keepdims: bool
) -> Array:
    value = extreme(x, axis=axis, initial=initial, keepdims=keepdims)
    bad = jnp.any(jnp.isnan(x), axis=axis, keepdims=keepdims)
    # NumPy's NaN: JAX would make the constant at once, which `jax_debug_nans` takes for a result.
    return jnp.where(bad, np.asarray(np.nan, x.dtype), value)
