"""How wrong a quantized weight is: in itself, in its outputs, and what it costs to store.

With `E = W - Q` and `H = Σ x xᵀ` over the inputs, `tr(E H Eᵀ) = Σ ‖E x‖²` is the squared error of
the outputs; every layer-wise method (GPTQ, AdaRound, EoRA) minimises it. All are pure functions of
arrays over the trailing axes; leading axes are batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def output_error(
    error: Float[Array, "*batch out in"], moment: Float[Array, "*batch in in"]
) -> Float[Array, "*batch"]:
    """`tr(E H Eᵀ)`, float32 throughout.

    Example:
        >>> float(output_error(jnp.array([[1.0, 2.0]]), jnp.eye(2)))
        5.0
    """
    error, moment = error.astype(jnp.float32), moment.astype(jnp.float32)
    pushed = jnp.matmul(error, moment, precision=lax.Precision.HIGHEST)
    return jnp.sum(pushed * error, axis=(-2, -1))


def mse(
    a: Float[Array, "*batch out in"], b: Float[Array, "*batch out in"]
) -> Float[Array, "*batch"]:
    """Mean squared difference over the last two axes, float32."""
    return jnp.mean((a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2, axis=(-2, -1))


def sqnr_db(
    signal: Float[Array, "*batch out in"], approximation: Float[Array, "*batch out in"]
) -> Float[Array, "*batch"]:
    """Signal to quantization noise, `10 log10(mean s² / mean (s - a)²)`; infinite if equal.

    Example:
        >>> round(float(sqnr_db(jnp.array([[1.0, 1.0]]), jnp.array([[0.9, 0.9]]))), 3)
        20.0
    """
    power = jnp.mean(signal.astype(jnp.float32) ** 2, axis=(-2, -1))
    return 10.0 * jnp.log10(power / mse(signal, approximation))


def bits_per_weight(codes: Any, params: Mapping[str, Any], bits: int) -> float:
    """Stored bits per weight: codes at `bits`, and every parameter.

    Zero points that are integers are stored at `bits` as codes are; other parameters at the width
    of their dtype. Works on all that has a shape and a dtype.

    Example:
        >>> params = {"scale": jnp.ones((4, 1), jnp.float16), "zero": jnp.zeros((4, 1), jnp.uint4)}
        >>> bits_per_weight(jnp.zeros((4, 10), jnp.uint4), params, 4)
        6.0
    """
    total = codes.size * bits
    for name, leaf in params.items():
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        own = (jnp.iinfo if integer else jnp.finfo)(leaf.dtype).bits
        total += leaf.size * (bits if integer and name == "zero" else own)
    return total / codes.size
