"""What is refused before an objective is descended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jquant.calibration.data import Data
from jquant.calibration.evidence import Evidence
from jquant.errors import EvidenceError, PlanError
from jquant.learning.objectives import KL, Fisher, Reconstruction
from jquant.rounding.relaxed import Relaxation
from jquant.schemes.scheme import Plan, Scheme


def check_objective(
    plan: Plan, objective: Any, evidence: Mapping[str, Evidence], key: PRNGKeyArray | None
) -> None:
    """Refuse an objective that the weights of a plan cannot be learned by."""
    if not callable(objective):
        raise PlanError(
            "objective must be a function (outputs, reference, *inputs), such as objectives.KL(), "
            f"got {objective!r}"
        )
    learned = {path: s for path, s in plan.items() if isinstance(s.rounding, Relaxation)}
    if not learned:
        raise PlanError(
            f"objective={objective!r}, but no scheme of the plan has a rounding that is learned; "
            "pass DiscQuant, NUPES, AdaRound or SignRound, or no objective"
        )
    first = next(iter(learned))
    rounding = learned[first].rounding
    for path, scheme in learned.items():
        if scheme.rounding != rounding:
            raise PlanError(
                f"weights {first!r} and {path!r} are to be learned together, but by {rounding} and "
                f"{scheme.rounding}; pass one rounding for both"
            )
        if not isinstance(objective, Reconstruction) and path not in evidence:
            _check_inputs(path, scheme)
        _check_compensation(path, scheme)
    if "key" in rounding.needs and key is None:
        raise PlanError(
            f"weight {first!r}: {type(rounding).__name__} starts at random; pass "
            "key=jax.random.key(seed)"
        )


def _check_inputs(path: str, scheme: Scheme) -> None:
    """Refuse ranges of inputs where no inputs are read."""
    if "inputs" in scheme.needs:
        raise EvidenceError(
            f"weight {path!r} is learned on the whole network, where the ranges of its inputs "
            "are not read; pass evidence= for it, or Activations(granularity='token')"
        )


def _check_compensation(path: str, scheme: Scheme) -> None:
    """Refuse a compensation that would round the weight again."""
    choice = scheme.compensation
    if choice is not None and (choice.rounds > 1 or choice.needs):
        raise PlanError(
            f"weight {path!r} is learned together with others, so {choice} cannot round it "
            "again or ask for its inputs; pass LoRC(rank), or no objective"
        )


def check_weighable(objective: Any) -> None:
    """Refuse token weights beside an objective that does not take them."""
    if not isinstance(objective, KL | Fisher):
        raise PlanError(
            f"{objective!r} cannot be told what tokens count; beside token_weights pass "
            "objectives.KL() or objectives.Fisher(), or leave token_weights out and weigh tokens "
            "in an objective (outputs, reference, *inputs) of your own"
        )


def check_logits(fn: Callable[..., Any], params: PyTree, objective: Any, data: Data) -> None:
    """Refuse token weights that are not of the tokens of the function's logits."""

    def loss(params: PyTree, inputs: tuple[Any, ...], weights: Array) -> Array:
        outputs = fn(params, *inputs)
        return objective(outputs, outputs, token_weights=weights)

    for inputs, weights in data.pairs():
        if weights is not None:
            jax.eval_shape(loss, params, inputs, weights)
