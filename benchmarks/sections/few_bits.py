"""What ingredients give a real network at few bits."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import ran, table


def few_bits(result: dict[str, Any]) -> str:
    lines = []
    for setting, methods in result["rows"].items():
        for method, row in sorted(methods.items(), key=lambda pair: pair[1]["kl"]):
            other = row.get("kl_other")
            lines.append(
                [
                    f"{setting}, {row['bits_per_weight']:.2f}",
                    method,
                    f"{row['kl']:.3f}",
                    "–" if other is None else f"{other:.3f}",
                    f"{row['kl_calibration']:.3f}",
                    f"{row['perplexity_quantized']:.2f}",
                ]
            )
    full = next(iter(next(iter(result["rows"].values())).values()))["perplexity_full"]
    return (
        "SmolLM2-135M, 210 linears, stage by stage, 64 calibration windows of 512 tokens, float16 "
        "scales: KL to the full model on 16 held-out windows, on docstrings (another text), and on "
        "the first 16 windows of calibration, which tells how much of it was learned by heart; "
        f"perplexity (full: {full:.2f}).\n\n"
        + table(
            ["setting, bits", "rounding", "KL", "other text", "calibration", "perplexity"], lines
        )
        + f"\n{ran(result)}.\n"
    )
