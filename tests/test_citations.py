"""Every choice names papers that exist, and every paper is named by some choice."""

import dataclasses
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from cases import GRIDS, ROUNDINGS

import jquant as jq
from jquant.schemes.cite import entries

SCORES = ("nanda2024cptquant", "raghu2017svcca", "dong2020hawq", "hannun2023mlx")
CHOICES = [*GRIDS.values(), *ROUNDINGS.values(), jq.Groups("out", 4)]
CHOICES += [jq.rounding.GPTQ(correction=c) for c in ("qep", "gptaq")]
CHOICES += [jq.LoRC(8), jq.LoRC(8, metric="hessian"), jq.LoRC(8, rounds=5)]
CHOICES += [  # what a score cites is data of its own, see test_sensitivity
    jq.allocation.Sensitivity("", "", "", {}, papers=SCORES)
]
CHOICES += [jq.emulate(jnp.sin, 8, "stochastic"), jq.distances]
CHOICES += [jq.Scheme(jq.grids.Uniform(4), transforms=(jq.Hadamard(),))]
CHOICES += [jq.LoRA(8), jq.LoRA(None), jq.LoRA(8, magnitude=True)]
CHOICES += [preset() for preset in jq.presets.presets().values()]


def keys(text):
    return re.findall(r"^@\w+\{(.+?),", text, re.MULTILINE)


def test_every_entry_is_whole():
    for key, body in entries().items():
        assert body.startswith("@") and body.endswith("}"), key
        assert body.count("{") == body.count("}"), key
        for field in ("title", "author", "year"):
            assert re.search(rf"^  {field} += {{.+}},$", body, re.MULTILINE), (key, field)


def test_papers_that_are_named_exist_and_others_do_not():
    named = {key for choice in CHOICES for key in keys(jq.cite(choice))}
    assert named == set(entries())


def test_a_plan_cites_what_is_in_it():
    fn = lambda p, x: x @ p["a"] @ p["b"]  # noqa: E731
    weights = jq.find_weights(fn, {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}, jnp.ones((1, 4)))
    scheme = jq.Scheme(jq.grids.Uniform(4, convention="A2"), jq.Groups("out", 2))
    better = dataclasses.replace(scheme, rounding=jq.rounding.GPTQ(correction="qep"))
    plan = jq.plan(weights, {"a": scheme, "b": better})
    assert keys(jq.cite(plan)) == [
        "jquant", "lin2024awq", "heo2024adadim", "frantar2022gptq", "arai2025qep",
    ]  # fmt: skip
    assert keys(jq.cite(jq.Scheme(jq.grids.Uniform(4)))) == ["jquant", "frantar2022gptq"]
    beside = jq.Scheme(jq.grids.NF4, compensation=jq.LoRC(8, better.grid, "hessian", rounds=2))
    assert keys(jq.cite(beside)) == [
        "jquant", "dettmers2023qlora", "yao2023zeroquantv2", "zhang2024qera", "liu2024eora",
        "li2023loftq", "lin2024awq",
    ]  # fmt: skip


def test_emulated_functions_cite_how_they_round():
    cut = ["jquant", "paxton2022climate", "dawson2017rpe"]
    assert keys(jq.cite(jq.emulate(jnp.sin, 8))) == cut
    assert keys(jq.cite(jq.emulate(jnp.sin, 8, "stochastic"))) == [*cut, "croci2022stochastic"]


@pytest.mark.parametrize("wrong", ["int4-gptq", None, {"a": 1}, jnp.sin])
def test_what_is_no_choice_is_refused(wrong):
    with pytest.raises(TypeError, match="a plan, a scheme"):
        jq.cite(wrong)


def test_the_file_is_part_of_what_is_installed():
    code = "import json, jquant.schemes.cite as c; print(json.dumps(list(c.entries())))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jquant" in json.loads(said.stdout)
