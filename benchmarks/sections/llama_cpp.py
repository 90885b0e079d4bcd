"""Files of quantized models in llama.cpp."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import table


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
    own = [
        [kind, *(f"{value:.4f}" for value in values)]
        for kind, values in _calibrated(result["bytes"].get("calibrated", {})).items()
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
    if own:
        head = ["type", "llama.cpp", "with imatrix", "jquant, nearest", "jquant, QEP"]
        text += (
            "\nKL to the full network *bytes* of types that llama.cpp's own quantizer made and of "
            "those made here, all in llama.cpp's runtime; tables of tokens and heads are Q8_0. The "
            "imatrix is of the tokens that QEP saw.\n\n" + table(head, own)
        )
    return text + f"\nllama-cpp-python {version}, JAX {result['versions']['jax']}.\n"


def _calibrated(rows: dict[str, Any]) -> dict[str, list[float]]:
    """By type: plain, imatrix, nearest, QEP."""
    order = ("llama.cpp, plain", "llama.cpp, imatrix", "jquant, nearest", "jquant, QEP")
    kinds = dict.fromkeys(name.split(":")[0] for name in rows if ":" in name)
    return {kind: [rows[f"{kind}: {row}"]["kl"] for row in order] for kind in kinds}
