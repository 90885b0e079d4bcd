"""Exports through the engines that they are for."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import ran, table

_WAYS = {"compressed": "as it comes", "dequantized": "`dequantize=True`"}


def clients(result: dict[str, Any]) -> str:
    parts = []
    for client, rows in result["rows"].items():
        lines = [
            [
                name,
                ", ".join(row["held"]),
                _WAYS.get(row["way"], row["way"]) if client == "transformers" else "as it comes",
                _number(row, "largest_difference", row.get("largest_logit", 1.0)),
                _number(row, "kl"),
                row["error"] if "error" in row else row["note"] or "–",
            ]
            for name, row in rows.items()
        ]
        told = next((row["versions"] for row in rows.values() if "versions" in row), {})
        versions = ", ".join(f"{package} {version}" for package, version in told.items())
        head = [client, "held as", "loaded", "off", "KL", ""]
        parts.append(table(head, lines) + f"\n{versions}.")
    return (
        "A random Llama of two layers, exported in each flavour, loaded by the engine on a CPU and "
        "run in float32. *off*: the largest difference between its logits and those of `jq.apply`, "
        "relative to the largest logit; *KL*: nats per token between the two.\n\n"
        + "\n\n".join(parts)
        + f"\n\n{ran(result)}.\n"
    )


def _number(row: dict[str, Any], key: str, unit: float = 1.0) -> str:
    return f"{max(row[key], 0.0) / unit:.0e}" if key in row else "–"
