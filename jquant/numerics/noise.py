"""Random words that cost as much as a cast: a keyed hash of every element's index.

Rounding at random needs one uniform number per element and nothing else of a generator, and there
it is the generator that takes the time: Threefry, JAX's own, takes ten times as long on a CPU as
the rounding it serves. `words` hashes the index instead: two rounds of multiply and xor-shift (the
constants are those of Wellons' and Ettinger's search for the least biased 32-bit mixers), between
which the key, drawn by Threefry, is added a second time. It fuses into the loop that uses it, is
the same on every device and for every sharding, and passes the tests one would ask of rounding
(bits even and independent, neighbours and keys uncorrelated; see `tests/test_noise.py`). Within
2^32 words of one key none comes twice, as from a cipher in counter mode; it is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, PRNGKeyArray, UInt32

Source = Literal["hash", "threefry"]
SOURCES = get_args(Source)

Seed = tuple[UInt32[Array, ""], UInt32[Array, ""]]

_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: multiples are far apart
_SILVER = 0x85EBCA6B  # odd, so that streams differ


def words(
    key: PRNGKeyArray, shape: Sequence[int], source: Source = "hash"
) -> UInt32[Array, "*shape"]:
    """Uniform 32-bit words, a function of the key and each element's place alone.

    Args:
        key: a JAX key.
        shape: of the array.
        source: `"hash"`, see above, or `"threefry"`: `jax.random.bits`, whatever the key's own
            generator is.

    Raises:
        ValueError: there is no such source.

    Example:
        >>> words(jax.random.key(0), (2, 3)).shape
        (2, 3)
    """
    if source == "threefry":
        return jax.random.bits(key, shape, jnp.uint32)
    if source != "hash":
        raise ValueError(f"source must be one of {SOURCES}, got {source!r}")
    return hashed(seed(key), shape)


def seed(key: PRNGKeyArray) -> Seed:
    """What a key is to `hashed`: two words."""
    one, two = jax.random.bits(key, (2,), jnp.uint32)
    return one, two


def fold(seed: Seed, number: UInt32[Array, ""]) -> Seed:
    """Another seed for every number, at the price of a few operations: for the steps of a loop.

    Different numbers give different seeds, which have nothing else in common; what
    `jax.random.fold_in` is to keys, as far as `hashed` is a generator.
    """
    one, two = seed
    spread = number * jnp.uint32(_GOLDEN)
    return _mixed(one + spread), _mixed(_mixed(spread ^ two) + one)


def hashed(seed: Seed, shape: Sequence[int], stream: int = 0) -> UInt32[Array, "*shape"]:
    """Uniform 32-bit words for a seed, a number of the stream, and each element's place.

    Streams of one seed share the first of the two rounds, which a compiler computes once: for the
    many operations of one step that need a word for every element.
    """
    one, two = seed
    # An index beyond 32 bits is that of a row, and one within it.
    split = next(k for k in range(len(shape) + 1) if math.prod(shape[k:]) <= 2**32)
    within = _index(shape, range(split, len(shape)))
    if split:
        one = _mixed(_index(shape, range(split)) + one)
    two = two + jnp.uint32(stream * _SILVER % 2**32)
    return _mixed(_mixed(within * jnp.uint32(_GOLDEN) + one) + two)


def uniform(
    key: PRNGKeyArray, shape: Sequence[int], source: Source = "hash"
) -> Float32[Array, "*shape"]:
    """Multiples of 2^-24 in `[0, 1)`, float32, all equally likely."""
    return (words(key, shape, source) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _index(shape: Sequence[int], axes: range) -> UInt32[Array, "*shape"]:
    """The place of every element along these axes together, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in axes:
        stride = math.prod(shape[axis + 1 : axes.stop]) % 2**32
        index += lax.broadcasted_iota(jnp.uint32, tuple(shape), axis) * jnp.uint32(stride)
    return index


def _mixed(x: UInt32[Array, ...]) -> UInt32[Array, ...]:
    """A permutation of the words in which every bit depends on every bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)
