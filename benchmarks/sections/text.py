"""What all sections are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def ran(result: dict[str, Any]) -> str:
    machine = result["machine"]
    many = "core" if machine["cores"] == 1 else "cores"
    return (
        f"{machine['cores']} {many} of {machine['processor']}, Python {machine['python']}, "
        f"JAX {machine['versions']['jax']}, {machine['date']}"
    )
