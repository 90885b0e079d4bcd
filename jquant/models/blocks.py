"""The blocks of a decoder as Flax NNX modules: attention and the gated network, with their norms.

q, k and v (and gate and up) receive the very same value, so that one moment serves them all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jquant.models.attention import attend
from jquant.models.config import DecoderConfig
from jquant.models.experts import Experts
from jquant.models.layers import ACTIVATIONS, Linear, Norm
from jquant.models.positions import Rope, rotate

Cache = dict[str, Any]


class Attention(nnx.Module):
    """Causal attention with `heads` queries sharing `kv_heads` keys and values."""

    def __init__(self, config: DecoderConfig, dtype: str, rngs: nnx.Rngs | None):
        c = config
        self.config, self.dtype = config, dtype
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        if c.fused:
            self.qkv = Linear(c.width, queries + 2 * keys, c.qkv_bias, rngs)
        else:
            self.q = Linear(c.width, queries, c.qkv_bias, rngs)
            self.k = Linear(c.width, keys, c.qkv_bias, rngs)
            self.v = Linear(c.width, keys, c.qkv_bias, rngs)
        self.out = Linear(queries, c.width, c.out_bias, rngs)
        if c.qk_norm:
            each = c.qk_norm == "head"
            self.q_norm = Norm(c.head_dim if each else queries, c.norm_eps, "float32")
            self.k_norm = Norm(c.head_dim if each else keys, c.norm_eps, "float32")

    def __call__(
        self, x: Float[Array, "b t d"], rope: Rope, mask: Array, past: Cache | None, position: Any
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        c, (rows, steps) = self.config, x.shape[:2]
        q, k, v = self._heads(x)
        q, k = rotate(q, rope).astype(self.dtype), rotate(k, rope).astype(self.dtype)
        v = v.astype(self.dtype)
        if past is not None:
            start = (0, position, 0, 0)
            k = jax.lax.dynamic_update_slice(past["key"], k, start)
            v = jax.lax.dynamic_update_slice(past["value"], v, start)
            past = {"key": k, "value": v}
        mixed = attend(
            q, k, v, mask, causal=past is None, scale=c.attention_scale, cap=c.attention_cap
        )
        return self.out(mixed.reshape(rows, steps, -1).astype(self.dtype)), past

    def _heads(self, x: Float[Array, "b t d"]) -> list[Float[Array, "b t h e"]]:
        """Queries, keys and values, normalized, `[b, t, heads, head_dim]`."""
        c = self.config
        if c.fused:
            ends = (c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim)
            parts = jnp.split(self.qkv(x), ends, axis=-1)
        else:
            parts = [self.q(x), self.k(x), self.v(x)]
        norms = (self.q_norm, self.k_norm) if c.qk_norm else ()
        if c.qk_norm == "all":
            parts = [*(norm(part) for norm, part in zip(norms, parts, strict=False)), parts[2]]
        parts = [part.reshape(*x.shape[:2], -1, c.head_dim) for part in parts]
        if c.qk_norm == "head":
            parts = [*(norm(part) for norm, part in zip(norms, parts, strict=False)), parts[2]]
        return parts


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, dtype: str, rngs: nnx.Rngs | None):
        self.dtype, self.activation = dtype, config.activation
        self.fused = config.fused
        if config.fused:
            self.gate_up = Linear(config.width, 2 * config.hidden, False, rngs)
        else:
            self.gate = Linear(config.width, config.hidden, False, rngs)
            self.up = Linear(config.width, config.hidden, False, rngs)
        self.down = Linear(config.hidden, config.width, False, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        if self.fused:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down((ACTIVATIONS[self.activation](gate) * up).astype(self.dtype))


class Block(nnx.Module):
    """One layer: attention, then the gated network, each with norms and added to its input."""

    def __init__(self, config: DecoderConfig, dtype: str, rngs: nnx.Rngs | None):
        c = config
        self.config, self.dtype = config, dtype
        before = {"pre": dtype, "both": dtype}.get(c.norms)
        after = {"post": "float32", "both": "float32"}.get(c.norms)
        self.attention_norm = Norm(c.width, c.norm_eps, before) if before else None
        self.attention = Attention(config, dtype, rngs)
        self.attention_post_norm = Norm(c.width, c.norm_eps, after) if after else None
        self.mlp_norm = Norm(c.width, c.norm_eps, before) if before else None
        self.mlp = (Experts if c.experts else MLP)(config, dtype, rngs)
        self.mlp_post_norm = Norm(c.width, c.norm_eps, after) if after else None

    def __call__(
        self, x: Float[Array, "b t d"], rope: Rope, mask: Array, past: Cache | None, position: Any
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        mixed, past = self.attention(
            self._enter(self.attention_norm, x), rope, mask, past, position
        )
        x = x + self._leave(self.attention_post_norm, mixed)
        y = self.mlp(self._enter(self.mlp_norm, x))
        return x + self._leave(self.mlp_post_norm, y), past

    def _enter(self, norm: Norm | None, x: Array) -> Array:
        return x.astype(self.dtype) if norm is None else norm(x)

    def _leave(self, norm: Norm | None, y: Array) -> Array:
        y = y if norm is None else norm(y)
        scale = self.config.residual_scale
        return y if scale == 1.0 else y * scale
