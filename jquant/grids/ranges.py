"""How wide a group's grid is: as wide as its weights, or narrower by the best of some factors.

A grid that scales with its group has one family of parameters, `at(factor)`, for a range `factor`
times that of the weights. Clipping the few largest weights buys all others a finer step;
`best_of` looks for the factor that gains most. Shared by all grids that have a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
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
    weight = jnp.float32(1.0) if importance is None else importance.astype(jnp.float32)

    def loss(factor: Float[Array, ""]) -> Float[Array, "*g"]:
        params = at(factor)
        error = w - grid.decode(nearest(grid, w, params), params)
        return jnp.sum(weight * powered(error, search.norm), axis=-1)

    def better(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        factor = 1.0 - jnp.float32(i) / search.resolution
        now = loss(factor)
        return jnp.where(now < best[0], now, best[0]), jnp.where(now < best[0], factor, best[1])

    one = jnp.ones(w.shape[:-1], jnp.float32)
    _, factor = lax.fori_loop(1, search.steps, better, (loss(jnp.float32(1.0)), one))
    return at(factor)
