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
        "correction, ranges searched: a rotation is for inputs of few bits; of weights alone it "
        "gains little here, and at 3 bits and more nothing.\n\n"
        + table(["scheme", *labels], lines)
        + f"\n{ran(result)}.\n"
    )
