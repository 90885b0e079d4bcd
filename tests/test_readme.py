"""No figure in the README is typed by hand: it is what `benchmarks/results/` says."""

from __future__ import annotations

from benchmarks.readme import README, render


def test_the_readme_is_generated_from_the_results() -> None:
    assert README.read_text() == render(), "run: python -m benchmarks.readme"
