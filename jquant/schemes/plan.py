"""From rules to a plan: ordered regular expressions, or a function of the weight.

The first rule whose expression matches a weight's whole path decides. A rule that decides nothing
is a mistake and an error: it matches no path (the nearest are listed), only leaves that are not
weights (the reason is given), or only what earlier rules have taken. A last `".*"` may be left
over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from jquant.calibration.find import Weight, Weights
from jquant.errors import PlanError, near
from jquant.schemes.scheme import Keep, Plan, Scheme

Choice = Scheme | Keep | None


def plan(
    weights: Mapping[str, Weight], rules: Mapping[str, Choice] | Callable[[Weight], Choice]
) -> Plan:
    """A scheme for every weight of a function, by rules.

    Args:
        weights: what `find_weights` returned.
        rules: ordered mapping from regular expressions (matched against the whole path) to a
            `Scheme` or `keep`, first match wins; or a function of the `Weight`. Weights that no
            rule matches, or for which the function returns None, are kept.

    Raises:
        PlanError: a rule decides nothing, is no valid expression, or its value is no scheme.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jquant.calibration import find_weights
        >>> from jquant.grids import Uniform
        >>> from jquant.schemes.scheme import keep
        >>> params = {"embed": jnp.ones((7, 4)), "up": jnp.ones((4, 8))}
        >>> fn = lambda p, t: p["embed"][t] @ p["up"]
        >>> weights = find_weights(fn, params, jnp.zeros(3, int))
        >>> list(plan(weights, {"embed": keep, ".*": Scheme(Uniform(4))}))
        ['up']
    """
    if callable(rules):
        chosen = {path: _choice(rules(weight), f"for {path!r}") for path, weight in weights.items()}
    else:
        chosen = _by_rules(weights, rules)
    schemes = {path: choice for path, choice in chosen.items() if isinstance(choice, Scheme)}
    return Plan(schemes, dict(weights))


def _choice(choice: object, where: str) -> Choice:
    if choice is None or isinstance(choice, Scheme | Keep):
        return choice
    raise PlanError(f"rule {where}: expected a jq.Scheme or jq.keep, got {choice!r}")


def _by_rules(weights: Mapping[str, Weight], rules: Mapping[str, Choice]) -> dict[str, Choice]:
    chosen: dict[str, Choice] = {}
    for at, (pattern, value) in enumerate(rules.items()):
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise PlanError(f"rule {pattern!r} is not a regular expression: {error}") from error
        choice = _choice(value, repr(pattern))
        matched = list(filter(expression.fullmatch, weights))
        fresh = dict.fromkeys((path for path in matched if path not in chosen), choice)
        left_over = pattern == ".*" and at == len(rules) - 1
        if not fresh and matched and not left_over:
            raise PlanError(_all_taken(pattern, list(rules)[:at], matched))
        if not matched:
            raise PlanError(_no_match(expression, weights))
        chosen |= fresh
    return chosen


def _all_taken(pattern: str, earlier: Sequence[str], matched: Sequence[str]) -> str:
    """Why a rule decides nothing whose weights other rules have taken."""
    takers = [rule for rule in earlier if any(re.fullmatch(rule, path) for path in matched)]
    return (
        f"rule {pattern!r} decides nothing: earlier rules {takers} already match all of "
        f"{matched[:3]}; put it before them or drop it"
    )


def _no_match(expression: re.Pattern[str], weights: Mapping[str, Weight]) -> str:
    """Why a rule decides nothing that matches no weight."""
    others = weights.others if isinstance(weights, Weights) else {}
    leaf = next(filter(expression.fullmatch, others), None)
    if leaf is not None:
        return (
            f"rule {expression.pattern!r} matches {leaf!r}, which is not a weight: {others[leaf]}"
        )
    return (
        f"rule {expression.pattern!r} matches no weight (it must match the whole path); "
        f"near paths: {near(expression.pattern, weights)}"
    )
