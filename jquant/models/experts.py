"""Many gated networks in the place of one, of which every token goes through a few.

    y = sum over the chosen e of p[e] * down[e](activation(gate[e](x)) * up[e](x))

A router gives each token a probability of every expert, and the token's experts are the likeliest.
Rows are sorted by expert and multiplied group by group (`ragged_dot`), so that nothing is dropped,
whatever the router does. It is also the form in which evidence is right: the moment of an expert's
kernel is that of the rows that were sent to it, and their number its count of tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jquant.models.config import DecoderConfig
from jquant.models.layers import ACTIVATIONS, Linear, normal


class Grouped(nnx.Module):
    """One kernel `[in, out]` for each group of rows, with a float32 result."""

    def __init__(self, groups: int, inputs: int, outputs: int, rngs: nnx.Rngs | None):
        self.kernel = nnx.Param(normal(rngs, (groups, inputs, outputs), inputs**-0.5))

    def __call__(self, x: Float[Array, "n i"], sizes: Int[Array, " e"]) -> Float[Array, "n o"]:
        return jax.lax.ragged_dot(
            x, self.kernel[...].astype(x.dtype), sizes, preferred_element_type=jnp.float32
        )


class Experts(nnx.Module):
    """The experts of one layer and their router."""

    def __init__(self, config: DecoderConfig, dtype: str, rngs: nnx.Rngs | None):
        c = config
        self.config, self.dtype = config, dtype
        self.router = Linear(c.width, c.experts, False, rngs)
        self.gate = Grouped(c.experts, c.width, c.hidden, rngs)
        self.up = Grouped(c.experts, c.width, c.hidden, rngs)
        self.down = Grouped(c.experts, c.hidden, c.width, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        c = self.config
        rows = x.reshape(-1, c.width)
        shares, chosen = jax.lax.top_k(jax.nn.softmax(self.router(rows), axis=-1), c.experts_used)
        if c.renormalized:
            shares = shares / shares.sum(-1, keepdims=True)
        expert = chosen.reshape(-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=c.experts).astype(jnp.int32)
        sent = rows[order // c.experts_used]
        inner = ACTIVATIONS[c.activation](self.gate(sent, sizes)) * self.up(sent, sizes)
        back = self.down(inner.astype(self.dtype), sizes)[jnp.argsort(order)]
        each = back.reshape(-1, c.experts_used, c.width) * shares[..., None]
        return each.sum(1).reshape(x.shape)
