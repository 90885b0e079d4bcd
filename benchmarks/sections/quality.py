"""How far quantized language models are from the full ones."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.others import OTHERS
from benchmarks.sections.text import ran, table


def quality(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        others = {k: v for k, v in row["elsewhere"].items() if k not in ("nearest", "HQQ")}
        rows.append(
            [
                name,
                f"{row['Nearest']['bits_per_weight']:.2f}",
                *(f"{row[label]['kl']:.4f}" for label in ("Nearest", "GPTQ")),
                f"{row['GPTQ, searched range']['kl']:.4f}",
                str(row["elsewhere"]["nearest"]),
                str(row["elsewhere"]["HQQ"]),
                "; ".join(f"{k} {v}" for k, v in others.items()),
            ]
        )
    full = next(iter(result["rows"].values()))["GPTQ"]["perplexity_full"]
    return (
        "SmolLM2-135M (perplexity "
        f"{full:.2f}), 210 linears, asymmetric grid, {result['windows']} calibration windows of "
        "512 tokens, one pass: mean KL to the full model in nats per token on 16 held-out windows. "
        "*Searched range*: GPTQ's own option, off in the other rows; the GPTQ presets use it. "
        "*Elsewhere*: other tools on the same tokens, run by themselves, min-max ranges; those "
        "marked block by block calibrate each block on already quantized ones.\n\n"
        + table(
            [
                "",
                "bits",
                "nearest",
                "GPTQ",
                "GPTQ, searched range",
                "nearest elsewhere",
                "HQQ elsewhere",
                "GPTQ elsewhere",
            ],
            rows,
        )
        + f"\n{ran(result)}.\n"
    )


def times(result: dict[str, Any], method: str) -> str:
    """How many times the processor time of plain GPTQ a method takes, over the settings."""
    ratios = [
        row[method]["processor_seconds"] / row["weight"]["processor_seconds"]
        for row in result["rows"].values()
        if method in row
    ]
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


def headline(result: dict[str, Any]) -> str:
    """The README's table, of `stages.json`: four settings, other tools beside."""
    one_pass = json.loads((RESULTS / "quality.json").read_text())["rows"]
    rows, searched = [], []
    for name, row in result["rows"].items():
        nearest = one_pass[name]["Nearest"]
        kl, tool = min((kl, tool) for tool, kl in OTHERS[name].items())
        rows.append(
            [
                f"{name}, {nearest['bits_per_weight']:.2f}",
                f"{nearest['kl']:.3f}",
                f"{kl:.3f} ({tool})",
                f"{row['weight']['kl']:.3f}",
                f"**{row['weight + QEP']['kl']:.3f}**",
            ]
        )
        if best := row.get("weight + QEP, searched range"):
            searched.append(f"{best['kl']:.3f} at {name}")
    w3 = OTHERS["W3 g64"]
    took = json.loads((RESULTS / "total_time.json").read_text())["rows"]
    seconds = {tool: f"{row['median_s']:.0f}" for tool, row in took.items() if "median_s" in row}
    head = ["setting, stored bits", "nearest", "best elsewhere", "jquant, GPTQ", "jquant, QEP"]
    return (
        table(head, rows)
        + "\nKL to the full SmolLM2-135M in nats per token, on held-out text; the same tokens and "
        "grid in all columns, ranges by min-max. *Elsewhere* is the best of HQQ and GPTQ as others "
        "run them (*block by block*: the published loop); llm-compressor and GPTQModel were run at "
        f"W3 g64 only ({w3['llm-compressor 0.14']:.3f} and {w3['GPTQModel 7.2']:.3f}). *QEP* is "
        "GPTQ with a correction for inputs that have drifted, and what makes the difference: plain "
        "GPTQ is as good elsewhere. With searched ranges, as the presets have them, it comes to "
        f"{' and '.join(searched)}.\n\nTime for W3 g64 by plain GPTQ, on two cores: jquant "
        f"{seconds['jquant weight']} s, the published loop {seconds['reference']}, llm-compressor "
        f"{seconds['llm-compressor']}, GPTQModel {seconds['gptqmodel']}. QEP takes "
        f"{times(result, 'weight + QEP')} times the processor time, with searched ranges "
        f"{times(result, 'weight + QEP, searched range')}.\n"
    )


def steps(result: dict[str, Any]) -> str:
    """What data, stages, a correction and searched ranges gain one after the other."""
    one_pass = json.loads((RESULTS / "quality.json").read_text())["rows"]
    names = ["W4 g64", "W3 g64"]
    runs = {
        "nearest": [one_pass[name]["Nearest"] for name in names],
        "GPTQ, one pass": [one_pass[name]["GPTQ"] for name in names],
        "GPTQ, stage by stage": [result["rows"][name]["weight"] for name in names],
        "… with QEP": [result["rows"][name]["weight + QEP"] for name in names],
        "… and searched ranges, as in `int4_qep`, `int3_qep`": [
            result["rows"][name]["weight + QEP, searched range"] for name in names
        ],
    }
    rows = [[label, *(f"{run['kl']:.3f}" for run in some)] for label, some in runs.items()]
    return table(["KL of SmolLM2-135M", *names], rows)


def stages(result: dict[str, Any]) -> str:
    methods = ["all", "block", "weight", "weight + GPTAQ", "weight + QEP"]
    methods += ["weight, searched range", "weight + QEP, searched range"]
    head = ["", *methods, "best elsewhere"]
    one_pass = json.loads((RESULTS / "quality.json").read_text())["rows"]
    rows = []
    for name, row in result["rows"].items():
        runs = {"all": one_pass[name]["GPTQ"], **row}
        cells = [f"{runs[m]['kl']:.4f}" if m in runs else "–" for m in methods]
        rows.append([name, *cells, str(min(OTHERS[name].values()))])
    return (
        "The model, tokens and grids of the table above, every weight calibrated on what the "
        "quantized weights before it produce: KL by granularity (*all*: one pass), with "
        "corrections for inputs that have drifted, and with searched ranges, which the presets "
        "use. The default is *weight*.\n\n" + table(head, rows) + f"\n{ran(result)}.\n"
    )


def minilm(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        cosines = {key: row[key]["one_minus_cosine"]["mean"] for key in ("Nearest", "GPTQ")}
        rows.append([name, f"{cosines['Nearest']:.4f}", f"**{cosines['GPTQ']:.4f}**"])
    return (
        "MiniLM-L6 (float32) as a plain JAX function: mean 1 − cosine of "
        "sentence vectors to the full model's, on held-out sentences.\n\n"
        + table(["", "nearest", "GPTQ"], rows)
    )
