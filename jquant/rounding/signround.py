"""SignRound, the algorithm of AutoRound (Cheng et al. 2023): a shift before rounding, by signs.

    code = round(w / s + v),   -½ <= v <= ½,   gradients pass through the rounding as if it were not

The loss is always that of rounded weights, so there is nothing to press to the grid and nothing to
round at the end. Steps follow the sign of the gradient only, from v = 0 (nearest rounding), with a
learning rate of 1 / steps that falls to 0: the sum of all steps is ½, just enough for any weight to
change sides. Two factors in [0, 1] per group shrink its range, learned in the same way through the
grid's own `fit`.

With y the weight's place between its neighbours, `round(w / s + v)` is the upper one if `y + v >
½`: in that form the rounding runs on any grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, PRNGKeyArray

from jquant.grids.base import GridParams
from jquant.grids.ranges import MinMax
from jquant.rounding.descent import Descent
from jquant.rounding.learned import learn_alone
from jquant.rounding.relaxed import Between, Cell, Target, Unit, Variables


@jax.tree_util.register_static
@dataclass(frozen=True)
class SignRound:
    """Learn a shift of every weight before it is rounded, and the ranges of the groups.

    Args:
        ranges: whether to learn how far each group's range reaches. Needs a grid whose range is
            that of its weights (`MinMax()`). False: only the rounding, on the grid as fitted.
        descent: steps, learning rate and so on (200 steps by signs, 1 / steps, falling linearly:
            the paper).

    Raises:
        ValueError: when called, if ranges are to be learned of a grid that searches for its own.

    Example:
        >>> from jquant.grids import Uniform
        >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.tri(8)
        >>> w = jax.random.normal(jax.random.key(1), (4, 8))
        >>> result = SignRound()(w, Uniform(3), evidence=x.T @ x)
        >>> bool(result.info["kept_at"] > 0)
        True

    References:
        Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
        LLMs, 2023, https://arxiv.org/abs/2309.05516
    """

    ranges: bool = True
    descent: Descent = Descent(200, 1 / 200, "sign_sgd", "linear")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"moment"})

    @property
    def papers(self) -> tuple[str, ...]:
        return ("cheng2023signround",)

    __call__ = learn_alone

    def start(self, target: Target, key: PRNGKeyArray | None) -> Variables:
        del key
        shift = {"v": jnp.zeros_like(target.w, jnp.float32)}
        if not self.ranges:
            return shift
        if getattr(target.grid, "range", None) != MinMax():
            raise ValueError(
                f"SignRound learns ranges that a grid takes from its weights, got {target.grid}; "
                "pass a grid with range=MinMax(), or SignRound(ranges=False)"
            )
        groups = target.grouped.cut(target.w).shape[:-1]
        return shift | dict.fromkeys(("bottom", "top"), jnp.ones(groups, jnp.float32))

    def relax(self, variables: Variables, target: Target, progress: Any) -> Between:
        del progress
        cell, _ = self._cell(variables, target)
        position = cell.y + variables["v"]
        up = (position > 0.5).astype(jnp.float32)
        return Between(position + jax.lax.stop_gradient(up - position), cell.low, cell.high)

    def direction(
        self, gradient: Variables, variables: Variables, target: Target, unit: Unit, progress: Any
    ) -> Variables:
        del variables, target, unit, progress
        return gradient

    def project(self, variables: Variables, target: Target) -> Variables:
        del target
        shift = {"v": jnp.clip(variables["v"], -0.5, 0.5)}
        factors = {name: variables[name] for name in variables if name != "v"}
        return shift | jax.tree.map(lambda f: jnp.clip(f, 0.0, 1.0), factors)

    def harden(
        self, variables: Variables, target: Target
    ) -> tuple[Integer[Array, "*batch out in"], GridParams]:
        cell, params = self._cell(variables, target)
        return jnp.where(cell.y + variables["v"] > 0.5, cell.hi, cell.lo), params

    def _cell(self, variables: Variables, target: Target) -> tuple[Cell, GridParams]:
        """The neighbours within the ranges as they are now."""
        if not self.ranges:
            return target.cell(), target.params
        groups = target.grouped.cut(target.w)
        bottom = jnp.min(groups, -1) * variables["bottom"]
        top = jnp.max(groups, -1) * variables["top"]
        params = target.grid.fit(jnp.clip(groups, bottom[..., None], top[..., None]))
        return target.cell(params), params
