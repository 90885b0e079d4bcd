"""Tables of the README from `results/arithmetic.json`: a part of it → `(head, rows)`.

The `band` goes from the least to the largest distance of any two double-precision runs from other
starts. Lorenz 96 forgets its start at once, so distances are to such runs, and `double` is that of
the double run from the same start: what rounding nothing gives. Shallow water and a few days of
weather do not: there, distances are to the double run from the same start, beside the band.
"""

from __future__ import annotations

from typing import Any

Table = tuple[list[str], list[list[str]]]
ROUNDINGS = ("nearest", "stochastic")


def lorenz96(part: dict[str, Any]) -> Table:
    low, *_, high = part["band"]
    rows = [[b, *(f"{row[r]:.4f}" for r in ROUNDINGS)] for b, row in part["w1"].items()]
    rows.append(["double", f"{part['double']:.4f}", ""])
    return [f"Lorenz 96: W1, band {low:.4f} to {high:.4f}", *ROUNDINGS], rows


def shallow_water(part: dict[str, Any]) -> Table:
    units = {"u": "u (m/s)", "v": "v (m/s)", "eta": "η (m)"}
    name = f"shallow water, {part['days']} days: W1 per point to double, same start"
    return _climate(name, units, part, part["same_start"])


def atmosphere(part: dict[str, Any]) -> Table:
    """Of SPEEDY; a run that blew up has no distance."""
    units = {name: f"{name} ({unit})" for name, unit in part["units"].items()}
    rows = part["rows"].items()
    w1 = {b: {r: row[r].get("same_start") for r in ROUNDINGS} for b, row in rows}
    name = f"SPEEDY (jcm), days: {part['days']}, W1 per point to double, same start"
    return _climate(name, units, part, w1)


def about_atmosphere(part: dict[str, Any]) -> str:
    cost, used = part["seconds_per_day"], part["versions"]
    times = ", ".join(f"{r} {cost[r] / cost['double']:.1f}" for r in ROUNDINGS)
    rain = {
        r: run["mean"]["precipitation"] for r, run in part["rows"]["10"].items() if "mean" in run
    }
    wet = ", ".join(f"{r} {mm:.3f}" for r, mm in rain.items())
    full = part["double"]["means"][0]["precipitation"]
    return (
        f"SPEEDY is `jcm` {used['jcm']} as it comes, T31 with 8 levels, under `emulate` in float64 "
        f"with JAX {used['jax']}: six-hour means of precipitation, of the lowest layer's "
        f"temperature and of the eastward wind half-way up, on {part['days']} days after "
        f"{part['lead']}. That is weather; the paper's runs are ten years long. Mean precipitation "
        f"at 10 bits: {wet} mm/6 h, double {full:.3f}. Processor time over that of double: "
        f"{times} times.\n"
    )


def _climate(
    name: str,
    units: dict[str, str],
    part: dict[str, Any],
    w1: dict[str, dict[str, dict[str, float] | None]],
) -> Table:
    rows = []
    for bits, row in w1.items():
        found = [(row[rounding], variable) for variable in units for rounding in ROUNDINGS]
        rows.append([bits, *(f"{w1[v]:.4f}" if w1 else "blew up" for w1, v in found)])
    band = part["band"]
    rows.append(
        ["band", *(c for v in units for c in (f"{band[v][0]:.4f} to {band[v][-1]:.4f}", ""))]
    )
    return [name, *(f"{unit}, {r}" for unit in units.values() for r in ROUNDINGS)], rows
