"""Where the columns of a weight go in GPTQ's sweep: an order, and padding that every block divides.

The sweep is blocked by recursion (see `substitution`), so it takes as many places as nested block
sizes divide. Places that are left over are padding, and change nothing (see `factor`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

BLOCK = 128  # columns per matrix product (GPTQ §3.3, step 2)
LEAF = 16  # columns whose errors reach each other one by one; see docs/notes/gptq-solver.md


class Arrangement(NamedTuple):
    """Where columns go in the sweep: places, padded so that every block size divides."""

    source: Integer[Array, " n"]  # the column at each place
    real: Bool[Array, " n"]  # false for padding
    edge: Integer[Array, " n"]  # the place in its unit whose weight stands for it in a fit
    home: Integer[Array, " in"]  # the place of each column
    sizes: tuple[int, ...]  # nested block sizes


def by_power(power: Float[Array, " in"]) -> Integer[Array, " in"]:
    """Columns by falling `H_jj`: activation order."""
    return jnp.argsort(-power)


def split(length: int, limit: int) -> int:
    """The size of the fewest equal parts of at most `limit` that cover `length`."""
    return -(-length // -(-length // limit))


def arrange(width: int, run: int, order: Integer[Array, " in"] | np.ndarray) -> Arrangement:
    """Places for `width` columns in `order`, runs of `run` of them padded each by itself."""
    leaf = split(run, LEAF)
    block = -(-split(run, BLOCK) // leaf) * leaf
    padded = -(-run // block) * block
    runs = -(-width // run)
    within, which = np.tile(np.arange(padded), runs), np.repeat(np.arange(runs), padded)
    edge = np.minimum(within, np.minimum(run, width - which * run) - 1)
    real = within == edge
    return Arrangement(
        source=jnp.asarray(order, jnp.int32)[which * run + edge],
        real=jnp.asarray(real),
        edge=jnp.asarray(edge, jnp.int32),
        home=jnp.zeros(width, jnp.int32).at[order].set(np.flatnonzero(real).astype(np.int32)),
        sizes=tuple(dict.fromkeys([runs * padded, padded, block, leaf, 1])),
    )
