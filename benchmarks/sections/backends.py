"""A network by its own PyTorch code beside the reference decoder, and folders of GPTQModel."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.text import ran, table

_NAMES = {"jax": "reference decoder", "torch": "torchax"}


def backends(result: dict[str, Any]) -> str:
    rows = [
        [
            _NAMES[name],
            f"{row['seconds']:.0f} s",
            f"{row['cpu_s']:.0f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{row['tracing_s']:.1f} s",
            f"{row['stages']:.0f}",
            f"{row['error_vs_nearest']:.4f}",
        ]
        for name, row in result["rows"].items()
    ]
    times = result["torch_over_jax"]
    rows.append(
        [
            "torchax / decoder",
            *(f"{times[key]:.2f}" for key in ("seconds", "cpu_s", "peak_bytes")),
            *("", "", ""),
        ]
    )
    settings = result["settings"]
    others = max(row["others_cpu_s"] / row["seconds"] for row in result["rows"].values())
    busy = (
        f" Other processes took up to {others:.1f} cores meanwhile, so that the processor's time "
        "says more than the clock."
        if others > 0.2
        else ""
    )
    rounds = len(result["rounds"])
    runs = (
        f"Medians of {rounds} alternating rounds, each run in a process of its own."
        if rounds > 1
        else "One run of each, in a process of its own."
    )
    packages = ("torchax", "torch", "transformers")
    versions = ", ".join(f"{name} {result['machine']['versions'][name]}" for name in packages)
    return (
        f"SmolLM2-135M, all {settings['layers']} layers, from a Hugging Face folder: "
        f"W{settings['bits']} g{settings['group']} by GPTQ on {settings['windows']} windows of "
        f"{settings['length']} tokens, float32; loading, tracing and compiling included. "
        f"{runs} "
        "*tracing* is `find_weights`; *error*: of the outputs of its products, relative to nearest "
        f"rounding.{busy}\n\n"
        + table(
            ["", "time", "processor", "peak memory", "tracing", "stages", "error"],
            rows,
        )
        + f"\n{versions}; {ran(result)}.\n"
    )


def gptq_order(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"`{row['format']}`",
            f"{row['out_of_order']} of {row['weights']}",
            f"{row['equal']} of {row['weights']}",
            f"{row['largest_difference']:.0e}",
            f"{row['written_the_same']} of {row['tensors']}",
        ]
        for name, row in result["rows"].items()
    ]
    head = ["GPTQModel's", "format", "out of order", "equal", "off", "the same again"]
    versions = ", ".join(f"{name} {version}" for name, version in result["client"].items())
    return (
        f"A random Llama of two layers, quantized in groups of {result['group']} by GPTQModel "
        'itself with `desc_act=True`, and read by `jq.models.load(..., quantized="keep")`. *out '
        "of order*: weights whose groups are no runs of inputs; *equal*: weights that are those of "
        "GPTQModel's own layers, to the bit of their float16; *off*: the largest difference "
        "between its logits, computed in float16, and those of `jq.apply`, relative to the largest "
        "logit; *the same again*: tensors that `jq.export` writes as GPTQModel did, to "
        "the byte.\n\n" + table(head, rows) + f"\n{versions}; {ran(result)}.\n"
    )
