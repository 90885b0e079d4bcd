"""Files of quantized models in llama.cpp."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.sections.text import table

NETWORKS = ("bytes", "smollm2", "smollm2-768")


def llama_cpp(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            kind,
            f"{row['kl']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['reference_perplexity']:.3f}",
            f"{100 * row['agreement']:.1f} %",
        ]
        for name in ("bytes", "smollm2")
        for kind, row in result.get(name, {}).get("types", {}).items()
        if isinstance(row, dict)
    ]
    version = result["bytes"]["types"]["version"]
    head = ["network", "type", "KL to `apply`", "perplexity", "`apply`'s", "agreement"]
    text = (
        "llama.cpp's logits of files that jquant wrote against `apply`'s of the same codes; it "
        "rounds the inputs of products to 8 bits on CPUs. *bytes*: the trained network of the "
        "tests, 1 M weights, rounded to nearest with searched scales; types with a K of it with "
        "zeros to a width of 256. *smollm2*: SmolLM2-135M's own codes, written again.\n\n"
        + table(head, rows)
    )
    return (
        text
        + _calibrated(result)
        + f"\nllama-cpp-python {version}, JAX {result['versions']['jax']}.\n"
    )


def _calibrated(result: dict[str, Any]) -> str:
    """K-quants made here beside llama.cpp's own; nothing where none were measured."""
    order = ("llama.cpp, plain", "llama.cpp, imatrix", "jquant, nearest", "jquant, QEP")
    lines = []
    for name in NETWORKS:
        rows = result.get(name, {}).get("calibrated", {})
        for kind in dict.fromkeys(key.split(":")[0] for key in rows if ":" in key):
            each = [rows[f"{kind}: {row}"] for row in order]
            losses = [row["kl"] for row in each]
            held = rows["types"][kind]
            lines.append(
                [
                    name,
                    kind,
                    ", ".join(f"{n} {t}" for t, n in held.items()),
                    f"{max(row['bytes'] for row in each) / 1e6:.1f}",
                    *(f"{loss:.4f}" for loss in losses),
                    f"{losses[3] / losses[1]:.2f}",
                ]
            )
    if not lines:
        return ""
    sizes = "; ".join(
        f"*{name}* {_tokens(rows['calibration'])} and {_tokens(rows['evaluation'])}"
        for name in NETWORKS
        if (rows := result.get(name, {}).get("calibrated", {}))
    )
    wider = "; *smollm2-768* has zeros to a width that is" if "smollm2-768" in result else ""
    head = ["network", "type", "tensors", "MB", "llama.cpp", "with imatrix", "jquant, nearest"]
    head += ["jquant, QEP", "of imatrix"]
    return (
        "\nKL to the full network, in nats per token, all in llama.cpp's runtime, of files of one "
        "size: each tensor has the type that llama.cpp's own quantizer gives it (`--pure`, the "
        "table of tokens and the head Q8_0). 576 is no multiple of 256, so *smollm2* has K-quants "
        f"in `ffn_down` alone{wider}. The imatrix is of the tokens that QEP saw, KL of text held "
        "out. *of imatrix*: QEP's KL by that of the imatrix. "
        f"Tokens to calibrate and to measure: {sizes}.\n\n" + table(head, lines)
    )


def _tokens(shape: list[int]) -> str:
    return f"{math.prod(shape):,}".replace(",", " ")
