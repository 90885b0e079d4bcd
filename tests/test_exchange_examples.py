"""The examples run, and what is written of them is what they gave."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("fedpeft", "fedre")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_what_came_out(name: str) -> None:
    folder = EXAMPLES / name
    assert len((folder / "main.py").read_text("utf-8").splitlines()) <= 300
    assert {"versions", "setting", "runs"} <= set(json.loads((folder / "results.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_small(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (EXAMPLES / name / "results.json").read_bytes()
    monkeypatch.setattr(sys, "argv", [name, "--small"])
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam counts its steps in int32
        runpy.run_module(f"examples.{name}.main", run_name="__main__")
    assert '"accuracy"' in capsys.readouterr().out
    assert (EXAMPLES / name / "results.json").read_bytes() == before


def of_fedpeft(**choice: object) -> dict:
    rows = json.loads((EXAMPLES / "fedpeft" / "results.json").read_text("utf-8"))["runs"]
    (row,) = [r for r in rows if all(r[name] == value for name, value in choice.items())]
    return row


@pytest.mark.parametrize("tuning", ["adapter", "bias", "head"])
def test_four_bits_are_within_a_point_at_an_eighth_of_the_bytes(tuning: str) -> None:
    """The headline of the example, of what is recorded."""
    plain = of_fedpeft(tuning=tuning, bits=32, noise=0.0)
    small = of_fedpeft(tuning=tuning, bits=4, mode="chance", noise=0.0)
    assert plain["accuracy"] > plain["accuracy_before"] + 1
    assert small["accuracy"] > plain["accuracy"] - 1
    assert small["bytes_per_client_and_round"] < plain["bytes_per_client_and_round"] / 7.7
    text = (EXAMPLES / "fedpeft" / "README.md").read_text("utf-8")
    for row in (plain, small):
        assert f"{row['bytes_per_client_and_round']:,}" in text and f"{row['accuracy']} %" in text
