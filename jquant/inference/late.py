"""Arrays that are not computed before another one is there.

A compiler is free to decode all weights of a network first, and some do. What is computed from a
weight's parameters waits for the other operand of its product by adding a zero to them that only
that operand can tell (`opaque.py`).
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from jquant.opaque import zero
from jquant.qtensor import QTensor


def held(q: QTensor, after: jax.Array) -> QTensor:
    """The weight itself; it cannot be decoded before `after` is there."""
    if not after.size:
        return q
    late = zero(lax.stop_gradient(after))
    if q.compensation is not None:
        q = replace(q, compensation=jax.tree.map(lambda leaf: _plus(leaf, late), q.compensation))
    if jax.tree.leaves(q.params):
        return replace(q, params=jax.tree.map(lambda leaf: _plus(leaf, late), q.params))
    return replace(q, codes=_plus(q.codes, late))


def held_codes(codes: Array, after: jax.Array) -> Array:
    """The codes themselves, likewise."""
    return _plus(codes, zero(lax.stop_gradient(after))) if after.size else codes


def _plus(leaf: Array, zero: Int32[Array, ""]) -> Array:
    """The leaf itself, computed from `zero` too."""
    if leaf.dtype.itemsize > 1 or jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf + zero.astype(leaf.dtype)
    # The bits of floats of one byte: among powers of two there is no zero to add.
    bits = lax.bitcast_convert_type(leaf, jnp.uint8) + zero.astype(jnp.uint8)
    return lax.bitcast_convert_type(bits, leaf.dtype)
