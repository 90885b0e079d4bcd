"""Hugging Face models by their own PyTorch code."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import ran, table


def architectures(result: dict[str, Any]) -> str:
    rows = [
        [
            f"`{name}`" if row["source"] == "random" else name,
            row["source"],
            f"{row['weights']} of {row['all']}",
            str(row["stages"]),
            f"{row['difference']:.0e}",
            f"{row['kl']:.4f}" if "kl" in row else "–",
            f"{row['error']:.3f}",
            f"{row['seconds']:.0f}",
        ]
        for name, row in result["rows"].items()
    ]
    head = ["model", "weights", "found", "stages", "off", "KL at W4 g64", "error", "seconds"]
    packages = ("torchax", "torch", "transformers")
    versions = ", ".join(f"{name} {result['machine']['versions'][name]}" for name in packages)
    return (
        "Random models have two layers of width 128; wheels are on PyPI. *found*: matrices of "
        "linear layers, convolutions and experts that are weights to jquant. *off*: the largest "
        "difference from PyTorch's output, relative to the largest output. Then 4 bits by GPTQ in "
        "groups of 64, embeddings kept: KL divergence and relative error of the output on held-out "
        "inputs (random weights suffer more than trained ones), and processor seconds of "
        "`jq.quantize`, compiling included. EfficientNet-lite0 sees smooth noise in place of "
        "pictures.\n\n" + table(head, rows) + f"\n{versions}; {ran(result)}.\n"
    )
