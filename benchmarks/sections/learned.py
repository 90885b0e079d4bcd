"""Roundings that are learned."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.sections.text import ran, table


def learned_smollm2(result: dict[str, Any]) -> str:
    settings, lines = result["settings"], []
    for name, row in result["rows"].items():
        cells = [f"{row[key]:.4f}" for key in ("calibration_kl", "kl")]
        lines.append([name, *cells, f"{row['seconds'] / 60:.1f}"])
    said = ""
    if step := result.get("step"):
        parts = sum(step["parts_bytes"].values())
        said = (
            f" A step of DiscQuant on {step['tokens']} tokens takes {step['seconds']:.1f} s, its "
            f"products alone {step['ideal_seconds']:.1f} s; the process's memory peaks at "
            f"{step['peak_bytes'] / 1e9:.1f} GB, of which parameters, positions, moments, gradient "
            f"and logits are {parts / 1e9:.1f} GB."
        )
    return (
        "3 bits in groups of 64, one static grid, 64 windows of 512 "
        f"tokens; {settings['steps']} steps of {settings['rows']} window(s) on the whole network's "
        f"KL, or {settings['block_steps']} for every block: KL on text it learned from, on 16 "
        "held-out windows, and minutes. SignRound learns ranges too where they are not kept."
        f"{said}\n\n"
        + table(["rounding", "calibration text", "held-out text", "minutes"], lines)
        + f"\n{ran(result)}{result.get('note', '')}.\n"
    )


def learned(result: dict[str, Any]) -> str:
    rows, settings = result["rows"], result["settings"]

    def cell(seeds: dict[str, Any]) -> str:
        if not seeds:
            return "–"
        found = [run["kl"]["evaluation"] for run in seeds.values()]
        tuned = [run["scales"]["kl"]["evaluation"] for run in seeds.values()]
        spread = f" ± {statistics.stdev(found):.4f}" if len(set(found)) > 1 else ""
        return f"{statistics.mean(found):.4f}{spread}, {statistics.mean(tuned):.4f}"

    most = sorted(rows.values(), key=len, reverse=True)  # the fullest column says the order
    methods = list(dict.fromkeys(method for found in most for method in found))
    lines = [[m, *(cell(rows[name].get(m, {})) for name in rows)] for m in methods]
    return (
        "A byte-level network of a million weights, trained; one "
        f"asymmetric grid for all but the power grids; {settings['windows']} windows of 256 bytes, "
        f"{settings['steps']} steps of {settings['rows']} windows where there are steps. KL on "
        "held-out text in nats per byte: mean ± deviation over up to 3 seeds (of the data, and of "
        f"random starts), then the mean after {settings['scales']} steps of `tune_scales`. "
        "SignRound learns ranges too; *block* learns blocks on their outputs, *KL* and DiscQuant "
        "all weights on the network's.\n\n"
        + table(["rounding", *rows], lines)
        + f"\n{ran(result)}{result.get('note', '')}.\n"
    )
