"""Exports through the engines that they are for."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import ran, table


def clients(result: dict[str, Any]) -> str:
    parts = []
    for client, rows in result["rows"].items():
        lines = [
            [
                name,
                ", ".join(row["held"]),
                f"`{way}`" if "=" in (way := row.get("way", "–")) else way,
                _number(row, "largest_difference", row.get("largest_logit", 1.0)),
                _number(row, "kl"),
                row["note"] or row.get("error", "–"),
            ]
            for name, row in rows.items()
        ]
        told = next((row["versions"] for row in rows.values() if "versions" in row), {})
        versions = ", ".join(f"{package} {version}" for package, version in told.items())
        head = [client, "held as", "loaded", "off", "KL", ""]
        parts.append(table(head, lines) + f"\n{versions}.")
    return (
        "A random Llama of two layers, exported in each flavour, loaded by the engine on a CPU and "
        "run in float32, by GPTQModel in float16. *off*: the largest difference between its logits "
        "and those of `jq.apply`, relative to the largest logit; *KL*: nats per token between the "
        "two; –: it refuses. Of onnxruntime it is one weight as the operator `MatMulNBits`, and "
        "its products (`benchmarks/clients/matmul_nbits.py` packs it).\n\n"
        + "\n\n".join(parts)
        + f"\n\n{ran(result)}.\n"
    )


def _number(row: dict[str, Any], key: str, unit: float = 1.0) -> str:
    return f"{max(row[key], 0.0) / unit:.0e}" if key in row else "–"
