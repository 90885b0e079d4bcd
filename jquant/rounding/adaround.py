"""AdaRound (Nagel et al. 2020): a sigmoid's value decides up or down, and is pressed to its ends.

    x = clip(1.2 * sigmoid(V) - 0.1, 0, 1),       loss + λ * Σ (1 - |2x - 1|^β)

V starts where x is the weight's own position, so the first network is the original one. The sigmoid
is stretched beyond 0 and 1, so that x reaches both. During the first part of the steps only the
loss counts; then β falls from 20 to 2, and the penalty presses ever more of the weights to an end.

The paper sums squared errors of a layer's outputs and finds λ = 0.01; in other units of loss, and
other sizes of layer, that number says nothing. Here the loss is measured by that of nearest
rounding and the penalty by its mean, so λ is of order one for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, PRNGKeyArray

from jquant.grids.base import GridParams
from jquant.rounding.descent import Descent
from jquant.rounding.learned import learn_alone
from jquant.rounding.relaxed import (
    Between,
    Target,
    Unit,
    Variables,
    beta_at,
    corners,
    penalised,
)

_STRETCH, _SHIFT = 1.2, 0.1  # γ = -0.1 and ζ = 1.1 of Louizos et al. 2018


@jax.tree_util.register_static
@dataclass(frozen=True)
class AdaRound:
    """Learn up or down for every weight through a stretched sigmoid.

    Args:
        weight: λ, of the penalty (10: heuristic).
        beta: from where to where β falls (20, 2: the paper).
        free: the share of the steps without penalty (0.2: the published code).
        descent: steps, learning rate and so on (10 000 steps and 1e-3: the paper; fewer and longer
            steps come to the same: heuristic).

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> from jquant.grids import Uniform
        >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.tri(8)
        >>> w = jax.random.normal(jax.random.key(1), (4, 8))
        >>> result = AdaRound(descent=Descent(200, 0.05))(w, Uniform(3), evidence=x.T @ x)
        >>> bool(result.info["kept_at"] > 0)
        True

    References:
        Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020,
        https://arxiv.org/abs/2004.10568
    """

    weight: float = 10.0
    beta: tuple[float, float] = (20.0, 2.0)
    free: float = 0.2
    descent: Descent = Descent(500, 0.05, schedule="constant")

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", tuple(float(b) for b in self.beta))
        if not self.weight >= 0:
            raise ValueError(f"AdaRound.weight must not be negative, got {self.weight}")
        if len(self.beta) != 2 or not min(self.beta) > 0:
            raise ValueError(f"AdaRound.beta must be two positive numbers, got {self.beta}")
        if not 0 <= self.free < 1:
            raise ValueError(f"AdaRound.free must be from 0 to below 1, got {self.free}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"moment"})

    @property
    def papers(self) -> tuple[str, ...]:
        return ("nagel2020adaround",)

    __call__ = learn_alone

    def start(self, target: Target, key: PRNGKeyArray | None) -> Variables:
        del key
        part = (target.cell().y + _SHIFT) / _STRETCH  # within (0, 1), as y is within [0, 1]
        return {"v": jnp.log(part) - jnp.log1p(-part)}

    def relax(self, variables: Variables, target: Target, progress: Any) -> Between:
        del progress
        cell = target.cell()
        return Between(_position(variables["v"]), cell.low, cell.high)

    def direction(
        self, gradient: Variables, variables: Variables, target: Target, unit: Unit, progress: Any
    ) -> Variables:
        del target
        beta = beta_at(self.beta, self.free, progress)
        weight = jnp.where(progress < self.free, 0.0, self.weight)
        return penalised(
            gradient, variables, lambda v: corners(_position(v["v"]), beta), weight, unit
        )

    def project(self, variables: Variables, target: Target) -> Variables:
        del target
        return variables

    def harden(
        self, variables: Variables, target: Target
    ) -> tuple[Integer[Array, "*batch out in"], GridParams]:
        cell = target.cell()
        return jnp.where(_position(variables["v"]) >= 0.5, cell.hi, cell.lo), target.params


def _position(v: Array) -> Array:
    return jnp.clip(_STRETCH * jax.nn.sigmoid(v) - _SHIFT, 0.0, 1.0)
