"""Rules become a plan, or an error that says which rule and what is near."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import jquant as jq
from jquant.errors import PlanError
from jquant.grids import Uniform

PARAMS = {
    "embed": jnp.ones((7, 4)),
    "layers": {"0": {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}},
    "norm": jnp.ones(4),
    "position": jnp.ones((3, 4)),
}


def fn(params, tokens):
    x = params["embed"][tokens] * params["norm"] + params["position"]
    return x @ params["layers"]["0"]["up"] @ params["layers"]["0"]["down"]


WEIGHTS = jq.find_weights(fn, PARAMS, jnp.zeros(3, int))
A, B = jq.Scheme(Uniform(4), 4), jq.Scheme(Uniform(8), jq.Groups("out", 2))


def test_the_first_rule_that_matches_the_whole_path_wins() -> None:
    plan = jq.plan(WEIGHTS, {"embed": jq.keep, ".*/up": A, ".*": B})
    assert dict(plan) == {"layers/0/down": B, "layers/0/up": A}


def test_a_callable_sees_the_weight() -> None:
    plan = jq.plan(WEIGHTS, lambda weight: A if weight.shape[0] == 8 else None)
    assert dict(plan) == {"layers/0/down": A}


def test_a_catch_all_may_be_left_over() -> None:
    assert len(jq.plan(WEIGHTS, {"embed|layers/.*": A, ".*": B})) == 3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"layers/0/upp": A}, r"'layers/0/upp' matches no weight.*near paths: 'layers/0/up'"),
        ({"up": A}, r"'up' matches no weight \(it must match the whole path\)"),
        ({".*": A, "embed": B}, r"'embed' decides nothing: earlier rules \['\.\*'\]"),
        ({"norm": A}, r"'norm' matches 'norm', which is not a weight: it has 1 axis"),
        ({"position": A}, r"'position', which is not a weight: it is used by 'add' only"),
        ({"(": A}, r"'\(' is not a regular expression"),
        ({".*": "int4"}, r"expected a jq.Scheme or jq.keep, got 'int4'"),
    ],
)
def test_rules_that_decide_nothing_are_errors(rules, message) -> None:
    with pytest.raises(PlanError, match=message):
        jq.plan(WEIGHTS, rules)


def test_a_callable_that_returns_nonsense() -> None:
    with pytest.raises(PlanError, match=r"for 'embed': expected"):
        jq.plan(WEIGHTS, lambda weight: 4)  # type: ignore[arg-type, return-value]


def test_schemes_are_values() -> None:
    assert jq.Scheme(Uniform(4), 64) == jq.Scheme(Uniform(4), jq.Groups("in", 64))
    assert len({A, B, jq.Scheme(Uniform(4), 4)}) == 2
    with pytest.raises(ValueError, match=r"Groups.size must be a positive int or None, got 0"):
        jq.Scheme(Uniform(4), 0)
