"""NUPES (Yvinec et al. 2023): codes learned over the whole grid, and the power exponent with them.

What is learned are real-valued codes v. A staircase that starts straight and ends hard leads to
values:

    x = ½ + tanh(T (t - ½)) / (2 tanh(T / 2)),    t = v - floor(v),    W = low + x * (high - low)

with low and high the values of the codes `floor(v)` and `floor(v) + 1`. As v moves on, the weight
climbs from one stair to the next: it may end at any code, not only at a neighbour of where it
began. A penalty `1 - |2t - 1|^β` presses v to whole numbers as T grows and β falls.

On a power grid with a fitted exponent (`Power(bits)`) the exponent is learned too, through values
of whole codes only: their derivative `-(m / a²) u^(1/a) ln u`, u = |q| / K, is 0 at u = 0 and at
u = 1 by its limits, and is computed so. Without data the exponent alone has something to learn.
Integer decoding (1/a whole) is kept by giving the exponent.

The paper's abstract states these aims; staircase, penalty and schedules are our reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, PRNGKeyArray

from jquant.grids.base import GridParams
from jquant.grids.exponents import SEARCHED
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


@jax.tree_util.register_static
@dataclass(frozen=True)
class NUPES:
    """Learn codes over the whole grid, and the exponent of a power grid that has one to learn.

    Args:
        weight: of the penalty, in the unit of nearest rounding's loss (10: heuristic).
        beta: from where to where the penalty's exponent falls (20, 2: AdaRound).
        steepness: T of the staircase, from where to where it grows (1, 6: heuristic; steeper
            stairs hold weights where they are too early).
        free: the share of the steps without penalty (0.2: AdaRound).
        exponent_rate: how much slower than codes the exponent moves; 0: it stays (0.1: heuristic).
        data_free: descend the error of the weight instead of its outputs; needs no evidence.
        descent: steps, learning rate and so on; a learning rate is in codes (heuristic).

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> from jquant.grids import Power
        >>> x = jax.random.normal(jax.random.key(0), (64, 32)) @ jnp.tri(32)
        >>> w = jax.random.normal(jax.random.key(1), (16, 32))
        >>> result = NUPES()(w, Power(3), evidence=x.T @ x)
        >>> bool(result.info["kept_at"] > 0)
        True

    References:
        Yvinec et al., NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search,
        2023, https://arxiv.org/abs/2308.05600
    """

    weight: float = 10.0
    beta: tuple[float, float] = (20.0, 2.0)
    steepness: tuple[float, float] = (1.0, 6.0)
    free: float = 0.2
    exponent_rate: float = 0.1
    data_free: bool = False
    descent: Descent = Descent(500, 0.02, schedule="constant")

    def __post_init__(self) -> None:
        for name in ("beta", "steepness"):
            ends = tuple(float(end) for end in getattr(self, name))
            object.__setattr__(self, name, ends)
            if len(ends) != 2 or not min(ends) > 0:
                raise ValueError(f"NUPES.{name} must be two positive numbers, got {ends}")
        if not self.weight >= 0 or not self.exponent_rate >= 0:
            raise ValueError(
                "NUPES needs weight >= 0 and exponent_rate >= 0, got "
                f"{self.weight} and {self.exponent_rate}"
            )
        if not 0 <= self.free < 1:
            raise ValueError(f"NUPES.free must be from 0 to below 1, got {self.free}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.data_free else frozenset({"moment"})

    @property
    def papers(self) -> tuple[str, ...]:
        return ("yvinec2023nupes",)

    __call__ = learn_alone

    def start(self, target: Target, key: PRNGKeyArray | None) -> Variables:
        del key
        cell = target.cell()
        variables = {"v": cell.lo.astype(jnp.float32) + jnp.where(cell.hi > cell.lo, cell.y, 0.0)}
        if "exponent" not in target.params or self.exponent_rate == 0:
            return variables
        part = (target.params["exponent"].astype(jnp.float32) - SEARCHED[0]) / (
            SEARCHED[1] - SEARCHED[0]
        )
        part = jnp.clip(part, 0.01, 0.99)  # where the sigmoid still moves
        # Optimizers move all variables by about the learning rate: a slower one is a longer one.
        return variables | {"a": (jnp.log(part) - jnp.log1p(-part)) / self.exponent_rate}

    def relax(self, variables: Variables, target: Target, progress: Any) -> Between:
        first, last = target.grid.codes
        lo = jax.lax.stop_gradient(jnp.clip(jnp.floor(variables["v"]), first, last - 1))
        steep = self.steepness[0] + (self.steepness[1] - self.steepness[0]) * progress
        stair = jnp.tanh(steep * (variables["v"] - lo - 0.5)) / jnp.tanh(steep / 2)
        params, codes = self._params(variables, target), lo.astype(jnp.int32)
        return Between(
            0.5 + 0.5 * stair, target.decode(codes, params), target.decode(codes + 1, params)
        )

    def direction(
        self, gradient: Variables, variables: Variables, target: Target, unit: Unit, progress: Any
    ) -> Variables:
        del target
        beta = beta_at(self.beta, self.free, progress)
        weight = jnp.where(progress < self.free, 0.0, self.weight)

        def penalty(v: Variables) -> Array:
            return corners(v["v"] - jax.lax.stop_gradient(jnp.floor(v["v"])), beta)

        return penalised(gradient, variables, penalty, weight, unit)

    def project(self, variables: Variables, target: Target) -> Variables:
        return {**variables, "v": jnp.clip(variables["v"], *target.grid.codes)}

    def harden(
        self, variables: Variables, target: Target
    ) -> tuple[Integer[Array, "*batch out in"], GridParams]:
        params = {
            name: leaf.astype(target.params[name].dtype)
            for name, leaf in self._params(variables, target).items()
        }
        return jnp.round(variables["v"]).astype(jnp.int32), params

    def _params(self, variables: Variables, target: Target) -> GridParams:
        """The group parameters, with the exponent as it is now."""
        if "a" not in variables:
            return target.params
        part = jax.nn.sigmoid(self.exponent_rate * variables["a"])
        return {**target.params, "exponent": SEARCHED[0] + (SEARCHED[1] - SEARCHED[0]) * part}
