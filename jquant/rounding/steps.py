"""One step of a learned rounding, for as many weights as are learned together.

Whatever is descended, a step is the same: relax what is learned to weights, take the gradient of a
loss of these, follow it in the direction that the rounding says, and project back; now and then
round. `Steps` has these parts as pure functions of lists over weights. `learned` loops over them
inside one program, for one weight alone, `learning/descend` over batches, for a whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jquant.grids.base import GridParams
from jquant.rounding.relaxed import Relaxation, Unit, Variables

Targets = Sequence[Any]  # what the relaxation takes of every weight
Loss = Callable[[list[Array]], Float[Array, ""]]  # of weights in the canonical view


class Moving(NamedTuple):
    """What a step changes."""

    variables: list[Variables]
    optimizer: Any  # its state


@dataclass(frozen=True)
class Steps:
    """The parts of a step; all lists run over weights.

    Args:
        relaxation: what is learned of a weight, and how it is descended.
        remat: keep only the results of products for the backward pass.
    """

    relaxation: Relaxation
    remat: bool = False

    def start(
        self, targets: Targets, keys: Sequence[PRNGKeyArray | None] | None
    ) -> list[Variables]:
        """What is learned, before the first step."""
        pairs = zip(targets, keys or [None] * len(targets), strict=True)
        return [self.relaxation.start(target, key) for target, key in pairs]

    def gradient(
        self, loss: Loss, variables: list[Variables], targets: Targets, progress: Any
    ) -> tuple[Float[Array, ""], list[Variables]]:
        """A loss of the weights as they are now, and its gradient in what is learned."""

        def of(variables: list[Variables]) -> Array:
            pairs = zip(variables, targets, strict=True)
            return loss([self.relaxation.relax(v, target, progress).value for v, target in pairs])

        if self.remat:
            of = jax.checkpoint(of, policy=jax.checkpoint_policies.dots_saveable)
        return jax.value_and_grad(of)(variables)

    def follow(
        self, gradient: list[Variables], moving: Moving, targets: Targets, unit: Unit, progress: Any
    ) -> Moving:
        """One step of the optimizer in the direction that the gradient gives."""
        import optax

        directions = [
            self.relaxation.direction(g, v, target, unit, progress)
            for g, v, target in zip(gradient, moving.variables, targets, strict=True)
        ]
        transformation = self.relaxation.descent.transformation()
        updates, optimizer = transformation.update(directions, moving.optimizer, moving.variables)
        moved: Any = optax.apply_updates(moving.variables, updates)
        pairs = zip(moved, targets, strict=True)
        return Moving([self.relaxation.project(v, target) for v, target in pairs], optimizer)

    def rounded(self, variables: list[Variables], targets: Targets) -> list[Float[Array, "*batch"]]:
        """For each weight, the share of it that is within 0.01 of a grid point at the end."""
        pairs = zip(variables, targets, strict=True)
        return [self.relaxation.relax(v, target, 1.0).rounded for v, target in pairs]

    def harden(
        self, variables: list[Variables], targets: Targets
    ) -> list[tuple[Integer[Array, "*batch out in"], GridParams]]:
        """Codes (int32) and the group parameters they refer to."""
        pairs = zip(variables, targets, strict=True)
        return [self.relaxation.harden(v, target) for v, target in pairs]
