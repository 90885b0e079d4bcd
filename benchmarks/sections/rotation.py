"""Rotated inputs."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import ran, table


def rotation(result: dict[str, Any]) -> str:
    labels = list(next(iter(result["rows"].values())))
    lines = [
        [name, *(f"{row[label]:.4f}" for label in labels)] for name, row in result["rows"].items()
    ]
    return (
        "KL of the small trained network of the tests on text it has not seen, by GPTQ with QEP's "
        "correction, ranges searched. It has no large channels, so this is what a rotation costs "
        "where it is not needed as much as what it gains.\n\n"
        + table(["scheme", *labels], lines)
        + f"\n{ran(result)}.\n"
    )
