"""A small Flax network with kernels of two and three axes; both sides of `qwix_client` build it."""

import flax.linen as nn
from jax import Array


class Network(nn.Module):
    """`[B, 64]` to `[B, 32]`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Dense(128)(x))
        x = nn.relu(nn.DenseGeneral((4, 16))(x))
        return nn.DenseGeneral(32, axis=(-2, -1))(x)
