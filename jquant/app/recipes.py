"""From the words of a command line to a plan: a preset for most weights, rules for the others.

    int4-gptq                      the preset for every weight but embeddings and the output head
    .*mlp/down.*=int8-nearest:128  REGEX=RECIPE[:GROUP] or REGEX=keep, before the preset

A rule that decides nothing is refused by `plan`, as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from jquant.allocation import plan
from jquant.calibration import Weight
from jquant.grids import Uniform
from jquant.learning.objectives import KL, Objective, Reconstruction
from jquant.schemes.lorc import LoRC
from jquant.schemes.presets import named
from jquant.schemes.scheme import Keep, Plan, Scheme, keep

# What small models can least spare, and what decides where tokens go: the output head and the
# routers of experts, as the reference decoder and as Hugging Face call them.
SPARED = r"head.*|lm_head\..*|.*/router/.*|.*\.(gate|router)\.weight"

Rules = dict[str, Scheme | Keep]
Aim = Literal["own", "stage", "kl"]


def objective_of(aim: Aim) -> Objective | None:
    """What learned roundings descend, by its word."""
    return {"own": None, "stage": Reconstruction(), "kl": KL()}[aim]


def read_rules(given: Sequence[str]) -> Rules:
    """The rules of a plan, of words like `REGEX=RECIPE:GROUP`.

    Raises:
        ValueError: a word is of another form, names no preset, or repeats an expression.

    Example:
        >>> read_rules([".*down.*=int8-nearest", "embed.*=keep"])["embed.*"]
        Keep()
    """
    rules: Rules = {}
    for rule in given:
        pattern, equals, choice = rule.rpartition("=")
        recipe, colon, group = choice.partition(":")
        if not equals or not pattern or (colon and not group.isdecimal()):
            raise ValueError(
                f"rule {rule!r}: expected REGEX=RECIPE, REGEX=RECIPE:GROUP or REGEX=keep"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rule {rule!r}: not a regular expression: {error}") from error
        if pattern in rules:
            raise ValueError(f"rule {pattern!r} is given twice")
        rules[pattern] = keep if recipe == "keep" else named(recipe, int(group) if colon else None)
    return rules


def plan_of(
    weights: Mapping[str, Weight], default: Scheme, rules: Rules, lorc: int | None = None
) -> Plan:
    """`default` for every weight that no rule matches, except `SPARED` and lookup tables.

    With `lorc`, every scheme gets a compensation of that rank: in the metric of the inputs, or for
    weights that are only looked up in the Frobenius one; with factors of 8 bits.

    Raises:
        PlanError: a rule decides nothing.
        ValueError: `lorc` is no rank.
    """
    # Only the user's own rules can be mistakes, so ours are left out where they decide nothing.
    left = [path for path in weights if not any(re.fullmatch(rule, path) for rule in rules)]
    spared = [path for path in left if _is_spared(path, weights[path])]
    ours: Rules = {"|".join(map(re.escape, spared)): keep} if spared else {}
    if len(spared) < len(left):
        ours[".*"] = default
    chosen = plan(weights, {**rules, **ours})
    if lorc is None:
        return chosen
    informed = LoRC(lorc, Uniform(8, symmetric=True), metric="hessian")
    plain = replace(informed, metric="frobenius")
    schemes = {
        path: replace(scheme, compensation=informed if weights[path].has_inputs else plain)
        for path, scheme in chosen.items()
    }
    return Plan(schemes, chosen.weights)


def _is_spared(path: str, weight: Weight) -> bool:
    looked_up = any(use.kind == "lookup" for use in weight.uses)
    return looked_up or re.fullmatch(SPARED, path) is not None


def in_batches(windows: np.ndarray, most: int = 4) -> list[np.ndarray]:
    """Windows `[N, length]` in equal batches of at most `most`, so that one program serves all.

    Four windows of 512 tokens keep two CPU cores busy; more only take memory.

    Example:
        >>> [batch.shape for batch in in_batches(np.zeros((6, 512)))]
        [(3, 512), (3, 512)]
    """
    size = max(k for k in range(1, most + 1) if len(windows) % k == 0)
    return [windows[at : at + size] for at in range(0, len(windows), size)]
