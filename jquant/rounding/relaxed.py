"""Rounding made continuous, so that gradients can decide it: what all learned roundings share.

Between the two grid points around a weight lies a line, and a position x on it:

    W(x) = low + x * (high - low),        0 <= x <= 1

At x = 0 and 1 the weight is on the grid; at `y = (w - low) / (high - low)` it is the original. A
`Relaxation` says what is learned to get x (x itself, the argument of a sigmoid, a shift before
rounding), what pulls x to its ends, and how the result becomes codes. Where `low` itself follows
what is learned, as in NUPES, the weight may walk over the whole grid: the formula is the same.

Grid points are computed from the weight and its group parameters whenever they are needed, never
kept. A `Target` holds both; arrays are in the canonical view `[*batch, out, in]`. Static: the grid,
the groups, the relaxation. How the gradient steps are taken is `descent.py`'s, what they descend
`learning/objectives.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jquant.axes.groups import Groups
from jquant.grids.base import Grid, GridParams
from jquant.grids.grouped import Grouped
from jquant.rounding.descent import Descent

Variables = Mapping[str, Array]  # what is learned of one weight, by name


class Cell(NamedTuple):
    """The neighbours of every weight: codes `lo` and `hi`, their values, and where it lies."""

    lo: Integer[Array, "*batch out in"]
    hi: Integer[Array, "*batch out in"]
    low: Float[Array, "*batch out in"]
    high: Float[Array, "*batch out in"]
    y: Float[Array, "*batch out in"]  # ½ where the weight is clipped: both neighbours are one


class Between(NamedTuple):
    """A weight on its way: `low + x * (high - low)`."""

    x: Float[Array, "*batch out in"]
    low: Float[Array, "*batch out in"]
    high: Float[Array, "*batch out in"]

    @property
    def value(self) -> Float[Array, "*batch out in"]:
        return self.low + self.x * (self.high - self.low)

    @property
    def rounded(self) -> Float[Array, "*batch"]:
        """The share of weights within 0.01 of an end."""
        return jnp.mean(jnp.abs(self.x - jnp.round(self.x)) < 0.01, (-2, -1), dtype=jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Target:
    """A weight in the canonical view, and the grid it is to be rounded on."""

    w: Float[Array, "*batch out in"]
    params: GridParams
    grid: Grid = field(metadata={"static": True})
    groups: Groups = field(metadata={"static": True})

    @property
    def grouped(self) -> Grouped:
        """The grid, of whole weights."""
        return Grouped(self.grid, self.groups)

    def decode(
        self, codes: Array, params: GridParams | None = None
    ) -> Float[Array, "*batch out in"]:
        """Values of codes `[*batch, out, in]`; on other group parameters if given."""
        return self.grouped.decode(codes, self.params if params is None else params)

    def nearest(self) -> Integer[Array, "*batch out in"]:
        """The nearest codes, int32."""
        return self.grouped.nearest(self.w, self.params)

    def cell(self, params: GridParams | None = None) -> Cell:
        """The neighbours of the weights; differentiable in other group parameters, if given."""
        params, grid = self.params if params is None else params, self.grouped
        lo, hi = grid.bracket(self.w, jax.lax.stop_gradient(params))
        low, high = grid.decode(lo, params), grid.decode(hi, params)
        inside = (lo < hi) & (low != high)
        y = jnp.where(inside, (self.w - low) / jnp.where(inside, high - low, 1.0), 0.5)
        return Cell(lo, hi, low, high, jnp.clip(y, 0.0, 1.0))


class Unit(NamedTuple):
    """What losses and gradients are measured in, so that settings mean the same everywhere."""

    nearest: Float[Array, ""]  # the loss at nearest rounding
    size: float  # how many weights are learned together
    step: Float[Array, ""]  # the mean squared step of the grid, 12 · mean((w_nearest - w)²)


@runtime_checkable
class Relaxation(Protocol):
    """A rounding that is learned; all methods are pure and see one weight at a time.

    `target` is what `learn` was given for the weight, a `Target` for roundings. `progress` runs
    from 0 to 1.
    """

    @property
    def descent(self) -> Descent:
        """How it is learned."""
        ...

    def start(self, target: Any, key: PRNGKeyArray | None) -> Variables:
        """What is learned, before the first step."""
        ...

    def relax(self, variables: Variables, target: Any, progress: Any) -> Between:
        """The weight as it is now, differentiable in `variables`."""
        ...

    def direction(
        self, gradient: Variables, variables: Variables, target: Any, unit: Unit, progress: Any
    ) -> Variables:
        """The gradient to follow, of that of the objective and of what pulls to the grid."""
        ...

    def project(self, variables: Variables, target: Any) -> Variables:
        """Back to where variables may be, after each step."""
        ...

    def harden(
        self, variables: Variables, target: Any
    ) -> tuple[Integer[Array, "*batch out in"], GridParams]:
        """Codes (int32) and the group parameters they refer to."""
        ...


def penalised(
    gradient: Variables,
    variables: Variables,
    penalty: Callable[[Variables], Array],
    weight: Any,
    unit: Unit,
) -> Variables:
    """The gradient of `loss / nearest + weight * mean(penalty)`: both of order one everywhere.

    Args:
        gradient: of the loss.
        variables: where.
        penalty: variables → what each weight pays.
        weight: of the penalty; may be traced.
        unit: see `Unit`.
    """
    pull = jax.grad(lambda v: jnp.sum(penalty(v)))(variables)
    return jax.tree.map(lambda g, p: g / unit.nearest + weight * p / unit.size, gradient, pull)


def corners(x: Array, beta: Any) -> Array:
    """`1 - |2x - 1|^β`: 0 at both ends, 1 in the middle; flat in the middle if β is large."""
    away = jnp.abs(2 * x - 1)
    safe = jnp.where(away > 0, away, 1.0)  # the power's derivative is not finite at 0 for β < 1
    return 1 - jnp.where(away > 0, safe**beta, 0.0)


def beta_at(beta: tuple[float, float], free: float, progress: Any) -> Array:
    """β as it falls over the steps that are not free, along half a cosine, as published."""
    done = jnp.clip((progress - free) / (1 - free), 0.0, 1.0)
    return beta[1] + 0.5 * (beta[0] - beta[1]) * (1 + jnp.cos(jnp.pi * done))
