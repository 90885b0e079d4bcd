"""`--bits`: from a budget on the command line to a plan whose weights have different widths.

Every weight that no rule names may have 2 to 8 bits on the recipe's grid. What each width costs is
found by the diagonal Fisher information, from one backward pass for every window of text: of the
scores that need no more than that it came nearest to exact losses. It is measured on drafts:
rounded to nearest, with the weights' own ranges, where the recipe may search ranges and correct
errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import jax

from jquant.allocation import Allocation, Candidates, allocate, candidates, fisher
from jquant.allocation.bits import budget_bytes
from jquant.allocation.candidates import draft
from jquant.app.console import Narrator
from jquant.app.named_inputs import real_tokens
from jquant.app.sources import Model
from jquant.errors import PlanError
from jquant.grids import MSE, Joint, MinMax
from jquant.schemes.scheme import Plan, Scheme


def share_bits(
    model: Model,
    plan: Plan,
    rules: Iterable[str],
    examples: Sequence[Any],
    bits: float,
    narrator: Narrator,
) -> tuple[Plan, Allocation]:
    """The plan with a width for every weight, and what was chosen.

    Args:
        model: its lazy parameters are read, all of them.
        plan: the recipe for every weight, and the rules'.
        rules: expressions whose weights stay as they are.
        examples: batches of one example each.
        bits: stored bits per weight, over the whole plan.
        narrator: says how far it is.

    Raises:
        PlanError: a budget below the smallest possible, or a recipe of one width; before any work.
    """
    expressions = list(rules)
    paths = [path for path in plan if not any(re.fullmatch(rule, path) for rule in expressions)]
    if not paths:
        raise PlanError("--bits has nothing to choose: rules name every weight")
    real = candidates(plan, paths=paths)
    budget = budget_bytes(real, bits=bits)
    drafts = Candidates(
        {path: tuple(map(_cheap, schemes)) for path, schemes in real.items()}, real.weights
    )
    with narrator.stage("finding out who needs bits", len(examples)) as update:
        scores = fisher(
            model.fn, model.params, drafts, examples,
            token_weights=real_tokens(model, examples), key=jax.random.key(0),
            progress=lambda done, total: update(done),
        )  # fmt: skip
    plan, allocation = allocate(scores.losses(drafts), real, bytes=budget)
    return plan, replace(allocation, by=scores.name, papers=scores.papers)


def _cheap(scheme: Scheme) -> Scheme:
    """The same grid and size, rounded to nearest in the weights' own ranges."""
    grid: Any = scheme.grid
    searched = any(field.name == "range" for field in fields(grid)) and isinstance(
        grid.range, MSE | Joint
    )
    return draft(replace(scheme, grid=replace(grid, range=MinMax()) if searched else grid))
