"""The smallest parts of a decoder as Flax NNX modules: a projection and a norm.

Two choices serve whoever interprets the jaxpr. Every projection is one `dot_general` of an
activation with an `[in, out]` kernel. The compute dtype is where matmul *inputs* live; results are
always float32, and so is the residual stream (bfloat16 inputs with float32 results are also what
CPUs run fastest).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}  # jax.nn.gelu is the one by tanh


def normal(
    rngs: nnx.Rngs | None, shape: tuple[int, ...], deviation: float
) -> Float[Array, "..."] | jax.ShapeDtypeStruct:
    """Normal random numbers, float32; without `rngs` only what shape and dtype they would have.

    Tracing would tell these too, but it takes a hundredth of a second for every weight.
    """
    if rngs is None:
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.random.normal(rngs.params(), shape, jnp.float32) * deviation


class Linear(nnx.Module):
    """`x @ kernel + bias`, with a float32 result whatever the dtype of the inputs."""

    def __init__(self, inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs | None):
        self.kernel = nnx.Param(normal(rngs, (inputs, outputs), inputs**-0.5))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = dot(x, self.kernel[...], kernel_axis=0)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class Norm(nnx.Module):
    """`x / rms(x) * scale`, computed in float32 and returned in `dtype`."""

    def __init__(self, width: int, eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * rms * self.scale[...].astype(jnp.float32)).astype(self.dtype)


def dot(x: Array, kernel: Array, kernel_axis: int) -> Array:
    """Contract the last axis of `x` with one axis of `kernel`, in x's dtype, into float32.

    Rows and steps are one axis: gradients that sum over two take 2.5 times as long on XLA:CPU.
    """
    contract = (((1,), (kernel_axis,)), ((), ()))
    y = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]),
        kernel.astype(x.dtype),
        contract,
        preferred_element_type=jnp.float32,
    )
    return y.reshape(*x.shape[:-1], -1)
