"""What is refused before an objective is descended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jquant.calibration.evidence import Evidence
from jquant.errors import EvidenceError, PlanError
from jquant.learning.objectives import KL, Fisher, Stagewise
from jquant.rounding.relaxed import Relaxation
from jquant.schemes.scheme import Plan


def check_objective(
    plan: Plan,
    objective: Any,
    evidence: Mapping[str, Evidence],
    key: PRNGKeyArray | None,
    *,
    batches: bool,
    granularity: str,
    weighed: bool = False,
) -> None:
    """Refuse an objective that cannot be descended."""
    if not callable(objective):
        raise PlanError(
            "objective must be a function (found, wanted, *inputs), such as objectives.KL(), got "
            f"{objective!r}"
        )
    learned = {path: s for path, s in plan.items() if isinstance(s.rounding, Relaxation)}
    if not learned:
        raise PlanError(
            f"objective={objective!r}, but no scheme of the plan has a rounding that is learned; "
            "pass DiscQuant, NUPES, AdaRound or SignRound, or no objective"
        )
    first = next(iter(learned))
    for path, scheme in learned.items():
        if scheme.rounding != learned[first].rounding:
            raise PlanError(
                f"weights {first!r} and {path!r} are to be learned together, but by "
                f"{learned[first].rounding} and {scheme.rounding}; pass one rounding for both"
            )
        if (
            "inputs" in scheme.needs
            and path not in evidence
            and not isinstance(objective, Stagewise)
        ):
            raise EvidenceError(
                f"weight {path!r} is learned on the whole network, where the ranges of its inputs "
                "are not read; pass evidence= for it, or Activations(granularity='token')"
            )
        choice = scheme.compensation
        if choice is not None and (choice.rounds > 1 or choice.needs):
            raise PlanError(
                f"weight {path!r} is learned together with others, so {choice} cannot round it "
                "again or ask for its inputs; pass LoRC(rank), or no objective"
            )
    if "key" in learned[first].rounding.needs and key is None:
        raise PlanError(
            f"weight {first!r}: {type(learned[first].rounding).__name__} starts at random; pass "
            "key=jax.random.key(seed)"
        )
    if not batches:
        raise EvidenceError("an objective is descended on batches; pass calibration batches")
    if weighed and not isinstance(objective, KL | Fisher):
        raise PlanError(
            f"{objective!r} cannot be told what tokens count; beside token_weights pass "
            "objectives.KL() or objectives.Fisher(), or leave token_weights out and weigh tokens "
            "in an objective (found, wanted, *inputs) of your own"
        )
    if isinstance(objective, Stagewise) and granularity == "all":
        raise PlanError(
            "objectives.Stagewise() needs stages: pass granularity='weight' or 'block', or descend "
            "its objective on the whole network"
        )


def check_logits(
    fn: Callable[..., Any],
    params: PyTree,
    objective: Any,
    batches: Sequence[tuple[Any, ...]],
    weights: Sequence[Any] | None,
) -> None:
    """Refuse token weights that are not of the tokens of the function's logits."""

    def loss(params: PyTree, inputs: tuple[Any, ...], weights: Array) -> Array:
        found = fn(params, *inputs)
        return objective(found, found, token_weights=weights)

    for inputs, own in zip(batches, weights or (), strict=False):
        jax.eval_shape(loss, params, inputs, own)
