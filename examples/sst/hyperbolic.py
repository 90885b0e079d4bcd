"""A network on the Poincaré ball, quantized like any function.

python -m examples.sst.hyperbolic       # seconds

A hyperbolic layer (Ganea et al., Hyperbolic Neural Networks, 2018, https://arxiv.org/abs/1805.09112)
takes a point of the ball to the tangent space at the origin, multiplies it there, goes back, and
adds a bias as the ball adds. To jquant these are operations between two products: `find_weights`
sees that both are reached by activations, and `apply` runs the function as it is written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jquant as jq

LEAST = 1e-6


def length(x: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), LEAST)


def exponential(v: jax.Array) -> jax.Array:
    """From the tangent space at the origin into the ball."""
    size = length(v)
    return jnp.tanh(size) * v / size


def logarithm(x: jax.Array) -> jax.Array:
    """From the ball to the tangent space at the origin."""
    size = jnp.minimum(length(x), 1 - LEAST)
    return jnp.arctanh(size) * x / size


def added(x: jax.Array, y: jax.Array) -> jax.Array:
    """Möbius addition: where a point of the ball comes to when it is moved by another."""
    xy, xx, yy = (jnp.sum(a * b, -1, keepdims=True) for a, b in ((x, y), (x, x), (y, y)))
    return ((1 + 2 * xy + yy) * x + (1 - xx) * y) / (1 + 2 * xy + xx * yy)


def multiplied(w: jax.Array, x: jax.Array) -> jax.Array:
    """Möbius product of a matrix `[in, out]` and a point."""
    return exponential(logarithm(x) @ w)


def network(params: Any, x: jax.Array) -> jax.Array:
    """Two layers on the ball; distances from the origin at the end."""
    x = exponential(x)
    x = added(multiplied(params["first"], x), exponential(params["bias"]))
    x = exponential(jax.nn.relu(logarithm(x)))
    x = multiplied(params["second"], x)
    return 2 * jnp.arctanh(jnp.minimum(jnp.linalg.norm(x, axis=-1), 1 - LEAST))


def initial(key: jax.Array) -> dict[str, jax.Array]:
    one, two, three = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(one, (32, 64)) / 6,
        "bias": jax.random.normal(two, (64,)) / 50,
        "second": jax.random.normal(three, (64, 16)) / 8,
    }


def compared() -> dict[str, Any]:
    """How far quantized networks are from full precision, and from their own dequantized weights.

    Returns:
        the paths of the weights; for each width the largest difference of `apply` on codes from the
        function of the dequantized weights, and the mean relative error of distances.
    """
    params, inputs = initial(jax.random.key(0)), jax.random.normal(jax.random.key(1), (256, 32)) / 8
    weights = jq.find_weights(network, params, inputs)
    result: dict[str, Any] = {"weights": sorted(weights)}
    full = network(params, inputs)
    presets = {"8 bits": jq.presets.int8_nearest(16), "4 bits": jq.presets.int4_gptq(16)}
    for name, scheme in presets.items():
        qparams, _ = jq.quantize(network, params, jq.plan(weights, {".*": scheme}), [inputs])
        on_codes = jq.apply(network)(qparams, inputs)
        on_arrays = network(jq.dequantize(qparams), inputs)
        result[name] = {
            "difference": float(jnp.abs(on_codes - on_arrays).max()),
            "error": float(jnp.mean(jnp.abs(on_codes - full) / full)),
        }
    return result


if __name__ == "__main__":
    for name, value in compared().items():
        print(name, value)
