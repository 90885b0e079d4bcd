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
        "run in float32, by GPTQModel in float16; of qwix a small Flax network, of tunix and "
        "MaxText such networks of the families named. *off*: the largest difference between its "
        "logits and those of `jq.apply`, relative to the largest logit; "
        "*KL*: nats per token between the two; –: it refuses. Of onnxruntime it is one "
        "weight as the operator `MatMulNBits`, and its products "
        "(`benchmarks/clients/matmul_nbits.py` packs it).\n\n"
        + "\n\n".join(parts)
        + f"\n\n{ran(result)}.\n"
    )


def _number(row: dict[str, Any], key: str, unit: float = 1.0) -> str:
    value = max(row.get(key, 0.0), 0.0) / unit
    return "–" if key not in row else f"{value:.0e}" if value else "0"


def tpu_inference(result: dict[str, Any]) -> str:
    lines = [[name, f"{row['equal']} of {row['weights']}"] for name, row in result["rows"].items()]
    return (
        f"tpu-inference {result['version']}'s own function that unpacks such weights, run without "
        "a TPU on exports of a small network: weights whose codes, scales and values are those of "
        "jquant to the bit. Its layers need vLLM and a TPU and were not run.\n\n"
        + table(["export", "equal"], lines)
        + f"\n{ran(result)}.\n"
    )


def w4a16(result: dict[str, Any]) -> str:
    rows = result["rows"]
    rival = min(row["kl"] for name, row in rows.items() if name.startswith("llm-compressor"))
    lines = [
        [name, f"{row['kl']:.4f}", f"{row['kl'] / rival:.2f}", f"{100 * row['same_token']:.1f} %"]
        for name, row in rows.items()
    ]
    versions = ", ".join(f"{package} {version}" for package, version in result["client"].items())
    return (
        "SmolLM2-135M as W4A16, symmetric, in groups of 64 (128 do not divide its width), all "
        f"linears of its blocks; {result['windows']} calibration windows of 512 tokens, the same "
        "for all. Every folder is loaded by transformers with compressed-tensors and compared "
        "there with the full model on 4 held-out windows: KL in nats per token, its ratio to "
        "llm-compressor's, and how often the likeliest token is the same.\n\n"
        + table(["folder of", "KL", "ratio", "same token"], lines)
        + f"\n{versions}. {ran(result)}.\n"
    )
