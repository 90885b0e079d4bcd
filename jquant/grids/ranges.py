"""How wide a group's grid is: as wide as its weights, or narrower by the best of some factors.

A grid that scales with its group has one family of parameters, `at(factor)`, for a range `factor`
times that of the weights. Clipping the few largest weights buys all others a finer step;
`best_of` looks for the factor that gains most. Shared by all grids that have a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jquant.grids.base import Grid, GridParams, nearest
from jquant.numerics.powers import powered

# The least scale of each storable type: below, a scale would be flushed to zero. float16 keeps its
# subnormals, which are ordinary numbers in the float32 arithmetic that uses them.
LEAST_SCALE = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}


@jax.tree_util.register_static
@dataclass(frozen=True)
class MinMax:
    """The range of a group is that of its weights: nothing is clipped that need not be."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class MSE:
    """The range is the weights' own times the best of `steps` factors `1 - i / resolution`.

    Best by the sum of `importance * |error| ** norm` under nearest rounding; the factor 1 wins
    ties, so the result is never worse than `MinMax` in that measure. Defaults: GPTQ's own search.
    """

    steps: int = 80
    resolution: int = 100
    norm: float = 2.4

    def __post_init__(self) -> None:
        if not 0 < self.steps <= self.resolution or self.norm <= 0:
            raise ValueError(f"MSE needs 0 < steps <= resolution and norm > 0, got {self}")


def factors_of(search: MinMax | MSE) -> np.ndarray:
    """The factors of a range that are tried, float32, the first of them 1."""
    if isinstance(search, MinMax):
        return np.ones(1, np.float32)
    steps = np.arange(search.steps, dtype=np.float32)
    return np.float32(1.0) - steps / np.float32(search.resolution)


def best_of(
    search: MSE,
    grid: Grid,
    w: Float[Array, "*g b"],
    importance: Float[Array, "*#g #b"] | None,
    at: Callable[[Float[Array, "*#g"]], GridParams],
) -> GridParams:
    """`at(factor)` for the factor of each group that `search` finds best.

    Args:
        search: the factors, and the measure of error.
        grid: rounds to nearest and decodes with the parameters that `at` returns.
        w: float32 groups of weights.
        importance: weighs the errors; None for all alike.
        at: parameters of the groups whose range is `factor` (scalar or `[*g]`) times their own.
    """
    loss = loss_at(grid, w, importance, search.norm, at)
    return at(best_factor(factors_of(search), loss, w.shape[:-1])[0])


def loss_at(
    grid: Grid,
    w: Float[Array, "*g b"],
    importance: Float[Array, "*#g #b"] | None,
    norm: float,
    at: Callable[[Any], GridParams],
) -> Callable[[Any], Float[Array, "*g"]]:
    """The sum of `importance * |error| ** norm` of every group, a function of what `at` takes."""
    weight = jnp.float32(1.0) if importance is None else importance.astype(jnp.float32)

    def loss(choice: Any) -> Float[Array, "*g"]:
        params = at(choice)
        error = w - grid.decode(nearest(grid, w, params), params)
        return jnp.sum(weight * powered(error, norm), axis=-1)

    return loss


def best_factor(
    factors: np.ndarray, loss: Callable[[Any], Float[Array, "*g"]], shape: tuple[int, ...]
) -> tuple[Float[Array, "*g"], Float[Array, "*g"]]:
    """Of each group the factor that loses least, the earlier one in ties, and what it loses."""
    tried = jnp.asarray(factors)

    def better(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        now = loss(tried[i])
        return jnp.where(now < best[1], tried[i], best[0]), jnp.where(now < best[1], now, best[1])

    first = jnp.broadcast_to(tried[0], shape)
    return lax.fori_loop(1, len(factors), better, (first, loss(tried[0])))
