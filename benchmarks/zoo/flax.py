"""Flax's own layers: NNX (a transformer, one scanned over layers) and Linen (images, an RNN)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.data import LENGTH, VOCABULARY, WIDTH, images, tokens


class Block(nnx.Module):
    """Attention, a gated MLP by an einsum, and a convolution along time."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.before, self.between = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.gate_up = nnx.Einsum("btd,dgh->btgh", (WIDTH, 2, 2 * WIDTH), rngs=rngs)
        self.down = nnx.LinearGeneral(2 * WIDTH, WIDTH, rngs=rngs)
        self.mix = nnx.Conv(WIDTH, WIDTH, 3, padding="CAUSAL", feature_group_count=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.before(x), mask=mask)
        gate, up = jnp.moveaxis(self.gate_up(self.between(x)), 2, 0)
        return x + self.down(nnx.silu(gate) * up) + self.mix(x)


class Transformer(nnx.Module):
    """Tied embeddings around blocks."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.position = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class Scanned(nnx.Module):
    """The same blocks as one stack that `nnx.scan` walks, their parameters `[layers, ...]`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)
        stack = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = stack(rngs.fork(split=3))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def walk(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        return self.head(walk(self.embed(tokens), self.blocks))


class Images(nn.Module):
    """Convolutions with running statistics, attention over what they leave, and pooling."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(32, (3, 3), strides=2, name="stem")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = x + nn.Conv(32, (3, 3), feature_group_count=32, name="depthwise")(x)
        x = nn.relu(nn.Conv(WIDTH, (1, 1))(x))
        x = nn.avg_pool(x, (4, 4), (4, 4)).reshape(len(x), -1, WIDTH)
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return nn.Dense(10)(x.mean(1))


class Recurrent(nn.Module):
    """Tokens through an LSTM and a bidirectional GRU."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(WIDTH))(x)
        there, back = nn.RNN(nn.GRUCell(WIDTH)), nn.RNN(nn.GRUCell(WIDTH))
        return nn.Dense(VOCABULARY)(nn.Bidirectional(there, back)(x))


def _nnx(model: nnx.Module) -> tuple[Any, Any]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, *inputs: nnx.merge(graph, params, rest)(*inputs), params


def _linen(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    return model.apply, model.init(jax.random.key(0), batch)


def make() -> tuple[Any, Any, list[Any]]:
    return *_nnx(Transformer(nnx.Rngs(0))), tokens()


def scanned() -> tuple[Any, Any, list[Any]]:
    return *_nnx(Scanned(nnx.Rngs(0))), tokens()


def linen() -> tuple[Any, Any, list[Any]]:
    batches = images()
    return *_linen(Images(), batches[0]), batches


def recurrent() -> tuple[Any, Any, list[Any]]:
    batches = tokens()
    return *_linen(Recurrent(), batches[0]), batches
