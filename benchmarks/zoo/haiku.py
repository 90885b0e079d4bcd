"""Haiku: a transformer of `hk.MultiHeadAttention`, a scanned one, and `hk.nets.ResNet`."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from benchmarks.zoo.data import VOCABULARY, WIDTH, images, tokens


def _block(x: jax.Array) -> jax.Array:
    def norm(x: jax.Array) -> jax.Array:
        return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    init, mask = hk.initializers.VarianceScaling(1.0), jnp.tri(x.shape[1], dtype=bool)[None, None]
    y = norm(x)
    x = x + hk.MultiHeadAttention(4, WIDTH // 4, w_init=init)(y, y, y, mask)
    return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(4 * WIDTH)(norm(x))))


def _transformer(tokens: jax.Array) -> jax.Array:
    x = hk.Embed(VOCABULARY, WIDTH)(tokens)
    for _ in range(2):
        x = _block(x)
    return hk.Linear(VOCABULARY)(x)


def _stack(tokens: jax.Array) -> jax.Array:
    x = hk.Embed(VOCABULARY, WIDTH)(tokens)
    return hk.Linear(VOCABULARY)(hk.experimental.layer_stack(3)(_block)(x))


def make() -> tuple[Any, Any, list[Any]]:
    return _split(_transformer, tokens())


def stack() -> tuple[Any, Any, list[Any]]:
    return _split(_stack, tokens())


def resnet() -> tuple[Any, Any, list[Any]]:
    """With its running statistics, which are no parameters, in the function."""

    def forward(images: jax.Array, is_training: bool) -> jax.Array:
        net = hk.nets.ResNet(
            (1, 1, 1, 1), 10, bottleneck=False, channels_per_group=(64, 64, 64, 64),
            use_projection=(False, False, True, True), strides=(1, 1, 2, 2),
        )  # fmt: skip
        return net(images, is_training)

    batches = images()
    network = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = network.init(jax.random.key(0), batches[0], True)
    # A last layer of zeros, as they begin, would leave nothing to compare.
    draw = jax.random.normal(jax.random.key(1), params["res_net/~/logits"]["w"].shape)
    params["res_net/~/logits"]["w"] = draw / 8
    return lambda params, x: network.apply(params, state, x, False)[0], params, batches


def _split(forward: Any, batches: list[Any]) -> tuple[Any, Any, list[Any]]:
    network = hk.without_apply_rng(hk.transform(forward))
    return network.apply, network.init(jax.random.key(0), batches[0]), batches
