"""Numbers of less than a byte: XLA packs them, and cannot do to them all it does to bytes.

What was tried on every operation a quantized weight goes through (JAX 0.10.2, XLA's CPU compiler):
slices, gathers, updates, transposes, reshapes, pads, selects, stacks and loops are right for 2 and
4 bits. Joining arrays of 2 bits or sorting them ends the process, and so does gathering them from
several devices inside a program; where a lookup crosses devices, the compiler refuses. So they are
joined, and looked up while a weight is rounded, as bytes. 4 bits are treated alike: one rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def joined(arrays: Sequence[Array], axis: int) -> Array:
    """`jnp.concatenate` that may be given integers of less than a byte; same dtype, same values.

    Example:
        >>> halves = jnp.array([[0, 1]], jnp.uint2), jnp.array([[2, 3]], jnp.uint2)
        >>> joined(halves, 0).tolist(), joined(halves, 0).dtype.name
        ([[0, 1], [2, 3]], 'uint2')
    """
    return jnp.concatenate([unpacked(array) for array in arrays], axis).astype(arrays[0].dtype)


def whole_bytes(dtype: Any) -> Any:
    """The dtype that holds the same numbers in bytes: `dtype` itself unless it is of fewer bits.

    Example:
        >>> whole_bytes(jnp.dtype("uint2")).name, whole_bytes(jnp.dtype("float32")).name
        ('uint8', 'float32')
    """
    if not jnp.issubdtype(dtype, jnp.integer) or jnp.iinfo(dtype).bits >= 8:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.int8 if jnp.issubdtype(dtype, jnp.signedinteger) else jnp.uint8)


def unpacked(values: Array) -> Array:
    """The same numbers in whole bytes, to be joined, sorted, looked up, or moved."""
    return values.astype(whole_bytes(values.dtype))
