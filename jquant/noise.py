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
    one, two = jax.random.bits(key, (2,), jnp.uint32)
    # An index beyond 32 bits is that of a row, and one within it.
    split = next(k for k in range(len(shape) + 1) if math.prod(shape[k:]) <= 2**32)
    within = _index(shape, range(split, len(shape)))
    if split:
        one = _mixed(_index(shape, range(split)) + one)
    return _mixed(_mixed(within * jnp.uint32(0x9E3779B9) + one) + two)


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
