"""What `benchmarks.zoo` does without a network: recipes are there, results are merged and told."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

pytest.importorskip("benchmarks.zoo.packages")  # not part of the source distribution
from benchmarks.environments import ROOT, reason  # noqa: E402
from benchmarks.sections.zoo import zoo  # noqa: E402
from benchmarks.zoo.packages import BASE, PACKAGES  # noqa: E402

RUNNER = importlib.import_module("benchmarks.zoo.__main__")
MEASURED = dict(
    package="tunix", name="Qwen3", date="2026-01-01", weights=3, matrices=4, in_weights=9,
    parameters=10, stages=2, nearest=0.2, gptq=0.1, apply=0.0, command="", refused="", kept=["e"],
    others={"scale": "it is used by 'mul' only"}, seconds=1.0, python="3.12.1",
    versions={"jax": "1", "flax": "2", "google-tunix": "3"},
)  # fmt: skip


def test_every_recipe_is_a_function_of_no_arguments_in_the_file_of_its_package() -> None:
    for package in PACKAGES:
        path = Path("benchmarks", "zoo", f"{package.name}.py")
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for recipe in package.recipes:
            module, _, function = recipe.maker.partition(":")
            assert Path(*module.split(".")).with_suffix(".py") == path
            assert not functions[function].args.args, recipe


def test_versions_are_pinned() -> None:
    every = [line for p in PACKAGES for line in (*p.requirements, *p.bare)]
    assert [line for line in (*BASE, *every) if "==" not in line] == []


def test_packages_and_recipes_are_asked_for_by_name() -> None:
    assert RUNNER.asked_for([]) == list(PACKAGES)
    (tunix, haiku) = RUNNER.asked_for(["haiku", "tunix:qwen3"])
    assert [recipe.name for recipe in tunix.recipes] == ["Qwen3"]
    assert haiku in PACKAGES
    with pytest.raises(ValueError, match="no tunix:qwen4; there are .*tunix:qwen3"):
        RUNNER.asked_for(["tunix:qwen4"])


def test_results_of_others_stay_and_those_of_no_recipe_go() -> None:
    one, two = PACKAGES[0].recipes[0].maker, PACKAGES[1].recipes[0].maker
    merged = RUNNER.merged({two: {"old": 2}, one: {"old": 1}, "gone": {}}, {two: {"new": 2}})
    assert list(merged.items()) == [(one, {"old": 1}), (two, {"new": 2})]


def test_the_reason_is_the_last_error_of_what_was_printed() -> None:
    assert reason("Traceback:\n  x\nValueError: no axis\n---\nframes removed") == (
        "ValueError: no axis"
    )
    assert reason("no luck\n") == "no luck"
    assert reason("") == ""


def test_failures_stand_beside_what_was_measured() -> None:
    machine = {"cores": 2, "processor": "chip"}
    failed = {"package": "haiku", "name": "ResNet", "date": "2026-01-02", "failed": "no Python 3.9"}
    page = zoo({"machine": machine, "rows": {"a": MEASURED, "b": failed}})
    assert "| tunix | Qwen3 | 3 of 4 | 90.0 % | 2 | 0.200 | 0.100 | 0 | yes | 1 |" in page
    assert "* haiku, ResNet: `no Python 3.9`" in page
    assert "* it is used by 'mul' only: tunix 1" in page
    assert "google-tunix 3; with JAX 1, Flax 2, Python 3.12.1" in page
    assert "none failed" in zoo({"machine": machine, "rows": {"a": MEASURED}})
    newer = {**MEASURED, "package": "maxtext", "versions": {"jax": "2", "flax": "2"}}
    page = zoo({"machine": machine, "rows": {"a": MEASURED, "b": newer}})
    assert "google-tunix 3; jax 2; with JAX 1, Flax 2" in page
