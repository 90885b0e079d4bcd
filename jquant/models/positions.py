"""What a layer sees of the positions: how its queries and keys turn, and which keys a query meets.

Layers differ in nothing but their window (and the base of their rotations, which goes with it), and
there are few different windows. So the tables are made once for each of them, and a layer picks its
own by number: a Python integer where layers are a list, data of the scan where they are a stack.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.models.config import DecoderConfig

Rope = tuple[Float[Array, "t r"], Float[Array, "t r"]]


class View(NamedTuple):
    """The cosines and sines of every pair of channels, and the keys that each query sees."""

    rope: Rope
    mask: Bool[Array, "t s"]

    def at(self, number: Int[Array, ""] | None) -> View:
        """One view of a stack of them; without a number there was but one."""
        return self if number is None else jax.tree.map(lambda table: table[number], self)


class Views(NamedTuple):
    """The views of a network, and for each layer the number of its own.

    Attributes:
        tables: one for each window that some layer has.
        numbers: one for each layer, or empty if all have the same view.
    """

    tables: tuple[View, ...]
    numbers: tuple[int, ...]

    def of(self, layer: int) -> View:
        """The view of a layer of a list."""
        return self.tables[self.numbers[layer] if self.numbers else 0]

    def stacked(self) -> tuple[View, Int[Array, " layers"] | None]:
        """For a scan over the layers: the views, and each layer's number for `View.at`."""
        if not self.numbers:
            return self.tables[0], None
        stack = jax.tree.map(lambda *tables: jnp.stack(tables), *self.tables)
        return stack, jnp.asarray(self.numbers, jnp.int32)


def views(config: DecoderConfig, steps: Int[Array, " t"], length: int) -> Views:
    """What layers see from positions `steps` of keys at 0 to `length`.

    Example:
        >>> import dataclasses
        >>> config = DecoderConfig(vocab=8, width=8, hidden=8, layers=3, heads=2, kv_heads=2)
        >>> seen = views(dataclasses.replace(config, windows=(2, 0, 2)), jnp.arange(3), 3)
        >>> seen.numbers, seen.of(0).mask.astype(int).tolist()
        ((1, 0, 1), [[1, 0, 0], [1, 1, 0], [0, 1, 1]])
    """
    sizes = sorted(set(config.windows)) or [0]
    tables = tuple(_view(config, size, steps, length) for size in sizes)
    numbers = tuple(map(sizes.index, config.windows)) if len(sizes) > 1 else ()
    return Views(tables, numbers)


def _view(config: DecoderConfig, window: int, steps: Int[Array, " t"], length: int) -> View:
    angles = steps[:, None].astype(jnp.float32) * config.rope_frequencies(window, length)
    rope = (jnp.cos(angles), jnp.sin(angles))
    if config.rope_scale != 1.0:
        rope = (rope[0] * config.rope_scale, rope[1] * config.rope_scale)
    keys: Any = jnp.arange(length, dtype=jnp.int32)
    mask = keys <= steps[:, None]
    return View(rope, mask & (keys > steps[:, None] - window) if window else mask)


def rotate(x: Float[Array, "b t h d"], rope: Rope) -> Float[Array, "b t h d"]:
    """Turn channel `i` with channel `i + r/2` by the angle of its position; the rest stay."""
    cos, sin = (part[:, None, :] for part in rope)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate((*turned, rest) if rest.shape[-1] else turned, axis=-1)
