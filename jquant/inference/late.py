"""Arrays that are not computed before another one is there.

A compiler is free to decode all weights of a network first, and some do. What is computed from a
weight's parameters waits for the other operand of its product by adding a zero to them that only
that operand can tell (`numerics/opaque.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from jquant.numerics.opaque import zero
from jquant.weights.qtensor import QTensor, dequantize_weight


def decoded(q: QTensor, after: jax.Array | None = None) -> jax.Array:
    """The array a weight stands for, computed not before `after` is there."""
    return dequantize_weight(q if after is None else _held_weight(q, after))


def _held_weight(q: QTensor, after: jax.Array) -> QTensor:
    """The weight itself, without parts that are nothing of the array; it waits for `after`."""
    q = q.only(lambda part: not part.alters)
    rest = replace(_held(replace(q, codes=None), after), codes=q.codes)
    return rest if jax.tree.leaves(q.params) else replace(rest, codes=_held(q.codes, after))


def held_codes(codes: Array, after: jax.Array) -> Array:
    """The codes themselves, likewise."""
    return _held(codes, after)


def _held(leaves: Any, after: jax.Array) -> Any:
    """The leaves themselves; on the CPU computed from `after` too."""
    if not after.size or not jax.tree.leaves(leaves):
        return leaves

    def later(leaves: Any, after: jax.Array) -> Any:
        late = zero(after)
        return jax.tree.map(lambda leaf: _plus(leaf, late), leaves)

    return lax.platform_dependent(
        leaves, lax.stop_gradient(after), cpu=later, default=lambda leaves, after: leaves
    )


def _plus(leaf: Array, zero: Int32[Array, ""]) -> Array:
    """The leaf itself, computed from `zero` too."""
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        # Not by a sum: where the CPU compiler of JAX 0.10 fuses a large product with what is done
        # to its operands and result, sums of a byte in two operands come out wrong.
        return leaf | zero.astype(leaf.dtype)
    if leaf.dtype.itemsize > 1:
        return leaf + zero.astype(leaf.dtype)
    # The bits of floats of one byte: among powers of two there is no zero to add.
    return lax.bitcast_convert_type(
        _plus(lax.bitcast_convert_type(leaf, jnp.uint8), zero), leaf.dtype
    )
