"""Dictionaries of neighbours: states of nodes, kept in few bits, looked up by a hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jquant as jq

HASH = 2654435761  # Knuth's multiplier


class Held(NamedTuple):
    """States as they are kept: numbers, or codes with a scale for each state."""

    codes: jax.Array
    scale: jax.Array


class Cache(NamedTuple):
    """What is remembered of all nodes: their own states, and dictionaries from neighbours' ids to
    states, of those that were met (`near`) and of those that these had met (`far`)."""

    own: Held
    near: Held
    far: Held
    near_ids: jax.Array
    far_ids: jax.Array
    last: jax.Array


@dataclass(frozen=True)
class Keeper:
    """How states are kept: in `bits`, with a float16 scale each; None: as float32."""

    bits: int | None = None
    stochastic: bool = False

    def keep(self, x: jax.Array, key: jax.Array) -> Held:
        """States `[n, width]`."""
        if self.bits is None:
            return Held(x, jnp.ones(len(x)))
        grid = jq.grids.Uniform(self.bits, symmetric=True, convention="S3", scale_dtype="float16")
        rounding = jq.rounding.Stochastic() if self.stochastic else jq.rounding.Nearest()
        result = rounding(x, grid, jq.Groups(), key=key if self.stochastic else None)
        return Held(result.codes.astype(jnp.int8), result.params["scale"][:, 0])

    def read(self, held: Held) -> jax.Array:
        """The numbers that are kept."""
        return held.codes.astype(jnp.float32) * held.scale[..., None].astype(jnp.float32)

    def empty(self, shape: tuple[int, ...], width: int) -> Held:
        """States of zero."""
        kinds = (jnp.float32, jnp.float32) if self.bits is None else (jnp.int8, jnp.float16)
        return Held(jnp.zeros((*shape, width), kinds[0]), jnp.ones(shape, kinds[1]))

    def bytes_of(self, width: int) -> float:
        """What a state takes, codes packed."""
        return 4.0 * width if self.bits is None else width * self.bits / 8 + 2


def empty(nodes: int, slots: int, width: int, keeper: Keeper) -> Cache:
    """Nothing remembered."""
    table = (nodes, slots)
    none = jnp.full(table, -1, jnp.int32)
    near, far = (keeper.empty(table, width) for _ in range(2))
    last = jnp.zeros(nodes)
    return Cache(keeper.empty((nodes,), width), near, far, none, none, last)


def slot(ids: jax.Array, slots: int) -> jax.Array:
    """Where a neighbour lies in a dictionary."""
    mixed = ids.astype(jnp.uint32) * jnp.uint32(HASH)
    return ((mixed >> 16) % jnp.uint32(slots)).astype(jnp.int32)


def at(held: Held, *where: Any) -> Held:
    return Held(held.codes[where], held.scale[where])


def put(held: Held, new: Held, where: Any, keep: jax.Array) -> Held:
    """New states at places, but for those that are kept; of two at one place the later stays."""
    old = at(held, *where)
    codes = jnp.where(keep[:, None], old.codes, new.codes)
    scale = jnp.where(keep, old.scale, new.scale)
    return Held(held.codes.at[where].set(codes), held.scale.at[where].set(scale))
