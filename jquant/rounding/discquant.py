"""DiscQuant (Chee et al. 2025): positions x themselves are learned, a linear term rounds them.

    minimise over x in [0, 1]     <c, x> + ρ * loss(x) / δ²,      c = 1 - 2y

The grid is fixed; y is where the weight lies between its neighbours. For whole x,
`|x - y|² = <c, x> + |y|²`, so the linear term asks for closeness to the original weight, and being
linear it is least at corners: with m constraints from the data, all but about m of the weights end
there. Per weight, gradient steps follow

    -(2y - 1) + clip(ρ * ∂loss/∂x / δ², -κ, κ)

and x is clipped to [0, 1] after each; what is left between is rounded at the end. `ρ = 0` is
nearest rounding. δ² is the mean squared step of the grid (`unit="step"`, the paper's, whose ρ was
tuned for KL on models of billions of weights). The loss a weight sees shrinks with the number of
weights that
share it, so a ρ does not carry over from one network to another: `unit="nearest"` measures the loss
by what nearest rounding loses per weight, which makes both terms of one order everywhere.

Left out of the published code on purpose: AdamW's pull of x towards 0 (pass
`Descent(optimizer="adamw")` for it), and probabilities with 1e-10 added in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, PRNGKeyArray

from jquant.grids.base import GridParams
from jquant.rounding.descent import Descent
from jquant.rounding.learned import learn_alone
from jquant.rounding.relaxed import Between, Target, Unit, Variables


@jax.tree_util.register_static
@dataclass(frozen=True)
class DiscQuant:
    """Learn the position of every weight between its two neighbours; a linear term rounds them.

    Args:
        rho: ρ, the weight of the loss (200: the published code, for `unit="step"`).
        kappa: κ, the most a weight's scaled gradient counts (1: the published code tunes ½ and 1).
        unit: what the loss is divided by: `"step"`, δ² as in the paper, or `"nearest"`, what
            nearest rounding loses, times 12 over the number of weights.
        start_at: `"random"` positions, uniform in [0, 1] (the paper's), or the `"original"` y.
        descent: steps, learning rate and so on (1024, 0.1, 128 of warm-up: the published code).

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> from jquant.grids import Uniform
        >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.tri(8)
        >>> w = jax.random.normal(jax.random.key(1), (4, 8))
        >>> rounding = DiscQuant(rho=1.0, unit="nearest", descent=Descent(100, 0.1))
        >>> result = rounding(w, Uniform(3), evidence=x.T @ x, key=jax.random.key(2))
        >>> result.codes.shape, bool(result.info["kept_at"] > 0)
        ((4, 8), True)

    References:
        Chee et al., DiscQuant: A Quantization Method for Neural Networks Inspired by Discrepancy
        Theory, 2025, https://arxiv.org/abs/2501.06417
    """

    rho: float = 200.0
    kappa: float = 1.0
    unit: Literal["step", "nearest"] = "step"
    start_at: Literal["random", "original"] = "random"
    descent: Descent = Descent(1024, 0.1, warmup=128)

    def __post_init__(self) -> None:
        if not self.rho >= 0 or not self.kappa > 0:
            raise ValueError(
                f"DiscQuant needs rho >= 0 and kappa > 0, got {self.rho} and {self.kappa}"
            )
        if self.unit not in ("step", "nearest"):
            raise ValueError(f"DiscQuant.unit must be 'step' or 'nearest', got {self.unit!r}")
        if self.start_at not in ("random", "original"):
            raise ValueError(
                f"DiscQuant.start_at must be 'random' or 'original', got {self.start_at!r}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"moment", "key"} if self.start_at == "random" else {"moment"})

    @property
    def papers(self) -> tuple[str, ...]:
        return ("chee2025discquant",)

    __call__ = learn_alone

    def start(self, target: Target, key: PRNGKeyArray | None) -> Variables:
        if self.start_at == "original":
            return {"x": target.cell().y}
        if key is None:
            raise ValueError("DiscQuant starts at random: pass a key")
        return {"x": jax.random.uniform(key, target.w.shape, jnp.float32)}

    def relax(self, variables: Variables, target: Target, progress: Any) -> Between:
        del progress
        cell = target.cell()
        return Between(variables["x"], cell.low, cell.high)

    def direction(
        self, gradient: Variables, variables: Variables, target: Target, unit: Unit, progress: Any
    ) -> Variables:
        del variables, progress
        scale = 1 / unit.step if self.unit == "step" else unit.size / (12 * unit.nearest)
        pull = jnp.clip(self.rho * scale * gradient["x"], -self.kappa, self.kappa)
        return {"x": 1 - 2 * target.cell().y + pull}

    def project(self, variables: Variables, target: Target) -> Variables:
        del target
        return {"x": jnp.clip(variables["x"], 0.0, 1.0)}

    def harden(
        self, variables: Variables, target: Target
    ) -> tuple[Integer[Array, "*batch out in"], GridParams]:
        cell = target.cell()
        return jnp.where(jnp.round(variables["x"]) > 0, cell.hi, cell.lo), target.params
