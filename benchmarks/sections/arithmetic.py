"""Programs in low-precision arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.arithmetic import tables
from benchmarks.sections.text import ran, table

SHOWN = {
    "lorenz96": tables.lorenz96,
    "shallow_water": tables.shallow_water,
    "speedy": tables.atmosphere,
}


def arithmetic(result: dict[str, Any]) -> str:
    parts = result["parts"]
    said = [
        "The study of Paxton et al. (2022) with `jq.emulate`: bits of significand, "
        "every result rounded to nearest or at random (*stochastic*). Ranges are over keys and "
        "starts; the *band* is the distance between double-precision runs from other starts. "
        "Lorenz 96 is compared with several such runs; *double* is what no rounding gives.\n"
    ]
    if "heat" in parts:
        rows = []
        for bits, row in parts["heat"]["rmse"].items():
            last = row[f"{parts['heat']['years']} years"]
            low, high = min(last["stochastic"]), max(last["stochastic"])
            rows.append([bits, f"{last['nearest']:.2f} K", f"{low:.2g} to {high:.2g} K"])
        head = [f"heat column, {parts['heat']['years']} years: RMSE", "nearest", "stochastic"]
        said.append(table(head, rows))
    if "lorenz" in parts:
        rows, band = [], parts["lorenz"]["band"]["z"]
        for bits, row in parts["lorenz"]["rows"].items():
            cells = []
            for name in ("nearest", "stochastic"):
                unique, far = row[name]["unique"], row[name]["w1"]["z"]
                cells += [f"{middle(unique):,.0f}", f"{min(far):.3f} to {max(far):.3f}"]
            rows.append([bits, *cells])
        head = [
            f"Lorenz 63: of {parts['lorenz']['states']:,} states; W1 of z, "
            f"band {band[0]:.3f} to {band[2]:.3f}",
            "unique, nearest",
            "W1",
            "unique, stochastic",
            "W1",
        ]
        said.append(table(head, rows))
    for name, shown in SHOWN.items():
        if name in parts:
            said.append(table(*shown(parts[name])))
    if "speedy" in parts:
        said.append(tables.about_atmosphere(parts["speedy"]))
    cost = {
        name.removeprefix("overhead_").replace("_", " "): part
        for name, part in parts.items()
        if name.startswith("overhead")
    }
    if cost:
        names = list(next(iter(cost.values()))["rows"])
        rows = []
        for name in names:
            cells = []
            for row in cost.values():
                found = row["rows"].get(name)
                cells.append(
                    f"{found['us_per_step']:.0f} µs, {found['times_plain']:.1f} ×" if found else "–"
                )
            rows.append([name, *cells])
        said.append(table(["time per step and times plain, float32, 10 bits", *cost], rows))
    return "\n".join(said) + f"\n{ran(result)}; processor time, with other jobs beside.\n"


def middle(numbers: Sequence[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]
