"""Equinox: a transformer of `eqx.nn` layers under `vmap`, and a convolutional network."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.zoo.data import LENGTH, VOCABULARY, WIDTH, images, tokens


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    before: eqx.nn.RMSNorm
    between: eqx.nn.RMSNorm

    def __init__(self, key: jax.Array) -> None:
        one, two = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, WIDTH, key=one)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, jax.nn.gelu, key=two)
        self.before, self.between = eqx.nn.RMSNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.vmap(self.before)(x)
        x = x + self.attention(y, y, y, mask=jnp.tri(len(x), dtype=bool))
        return x + jax.vmap(self.mlp)(jax.vmap(self.between)(x))


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    rotary: eqx.nn.RotaryPositionalEmbedding
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        first, last, *keys = jax.random.split(key, 4)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=first)
        self.rotary = eqx.nn.RotaryPositionalEmbedding(WIDTH)
        self.blocks = [Block(k) for k in keys]
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=last)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.rotary(jax.vmap(self.embedding)(tokens))
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


class Convolutions(eqx.Module):
    layers: eqx.nn.Sequential

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        self.layers = eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(3, 32, 3, padding=1, key=keys[0]),
                eqx.nn.GroupNorm(4, 32),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2, key=keys[1]),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.ConvTranspose2d(64, 32, 2, stride=2, key=keys[2]),
                eqx.nn.AdaptiveAvgPool2d(4),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(512, 10, key=keys[3]),
            ]
        )

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.layers(jnp.moveaxis(image, -1, 0))


def split(model: eqx.Module) -> tuple[Any, Any]:
    """A module as `fn(params, batch)` and its arrays; what else it holds stays in the function."""
    params, static = eqx.partition(model, eqx.is_array)
    return lambda params, batch: jax.vmap(eqx.combine(params, static))(batch), params


def make() -> tuple[Any, Any, list[Any]]:
    return *split(Transformer(jax.random.key(0))), tokens(length=LENGTH)


def convolutions() -> tuple[Any, Any, list[Any]]:
    return *split(Convolutions(jax.random.key(0))), images()
