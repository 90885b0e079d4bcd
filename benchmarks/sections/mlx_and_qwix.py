"""Exports through mlx-lm and qwix."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import ran, table

_WAYS = {"as it comes": "as it comes", "dequantize": "`qwix.dequantize`"}


def mlx_and_qwix(result: dict[str, Any]) -> str:
    parts = []
    for client, rows in result["rows"].items():
        lines = [
            [
                name,
                ", ".join(row["held"]),
                _WAYS.get(row["way"], f"`quantize_model`, {row['way']}"),
                _number(row, "largest_difference", row.get("largest_logit", 1.0)),
                _number(row, "kl"),
                row["error"] if "error" in row else row["note"] or "–",
            ]
            for name, row in rows.items()
        ]
        told = next((row["versions"] for row in rows.values() if "versions" in row), {})
        versions = ", ".join(f"{package} {version}" for package, version in told.items())
        parts.append(
            table([client, "held as", "loaded", "off", "KL", ""], lines) + f"\n{versions}."
        )
    return (
        "Likewise by mlx-lm, and by qwix a small Flax network "
        "(`python -m benchmarks.clients.mlx_and_qwix`).\n\n"
        + "\n\n".join(parts)
        + f"\n\n{ran(result)}.\n"
    )


def _number(row: dict[str, Any], key: str, unit: float = 1.0) -> str:
    value = max(row.get(key, 0.0), 0.0) / unit
    return "–" if key not in row else f"{value:.0e}" if value else "0"
