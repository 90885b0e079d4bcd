"""Arrays that are not computed before another one is there.

A compiler is free to decode all weights of a network first, and some do. What is computed from a
weight's parameters waits for the other operand of its product by adding a zero to them that only
that operand can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from jquant.qtensor import QTensor


def held(q: QTensor, after: jax.Array) -> QTensor:
    """The weight itself; it cannot be decoded before `after` is there."""
    if not after.size:
        return q
    late = _zero(lax.stop_gradient(after))
    if q.compensation is not None:
        q = replace(q, compensation=jax.tree.map(lambda leaf: _plus(leaf, late), q.compensation))
    if jax.tree.leaves(q.params):
        return replace(q, params=jax.tree.map(lambda leaf: _plus(leaf, late), q.params))
    return replace(q, codes=_plus(q.codes, late))


def held_codes(codes: Array, after: jax.Array) -> Array:
    """The codes themselves, likewise."""
    return _plus(codes, _zero(lax.stop_gradient(after))) if after.size else codes


def _plus(leaf: Array, zero: Int32[Array, ""]) -> Array:
    """The leaf itself, computed from `zero` too."""
    if leaf.dtype.itemsize > 1 or jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf + zero.astype(leaf.dtype)
    # The bits of floats of one byte: among powers of two there is no zero to add.
    bits = lax.bitcast_convert_type(leaf, jnp.uint8) + zero.astype(jnp.uint8)
    return lax.bitcast_convert_type(bits, leaf.dtype)


@jax.custom_batching.custom_vmap
def _zero(x: Array) -> Int32[Array, ""]:
    """Zero, but only `x` can tell: the number of set bits of a 32-bit word, divided by 64.

    A weight decoded from parameters to which this is added cannot be decoded before `x` is known.
    `lax.optimization_barrier` says the same, but XLA's CPU compiler of JAX 0.10 drops it before it
    schedules, and then decodes all weights first. Under vmap the first element stands for all, so
    that weights are not batched.
    """
    first = x[(0,) * x.ndim]
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    word = lax.bitcast_convert_type(first.astype(jnp.float32), jnp.int32) if floating else first
    return lax.shift_right_logical(lax.population_count(word.astype(jnp.int32)), jnp.int32(6))


@_zero.def_vmap
def _(size: int, batched: Sequence[bool], x: Array) -> tuple[Array, bool]:
    del size, batched
    return _zero(x[0]), False
