"""Tables from `results/arithmetic.json`: a part of it → `(head, rows)`.

The `band` goes from the least to the largest distance of any two double-precision runs from other
starts. Lorenz 96 and the atmosphere forget their starts, so distances are to such runs, and
`double` is that of the double run from the same start: what rounding nothing gives. Shallow water
does not in its days: there, distances are to the double run from the same start, beside the band.
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
    w1 = {b: {r: row[r].get("w1") for r in ROUNDINGS} for b, row in part["rows"].items()}
    name = f"SPEEDY (jcm), {part['days']} days: W1 per point to double, other starts"
    head, rows = _climate(name, units, part, w1)
    double = (cell for v in units for cell in (f"{part['double']['w1'][v]:.4f}", ""))
    return head, [*rows, ["double", *double]]


def about_atmosphere(part: dict[str, Any]) -> str:
    cost, used = part["seconds_per_day"], part["versions"]
    times = ", ".join(f"{r} {cost[r] / cost['double']:.1f}" for r in ROUNDINGS)
    rain = "; ".join(
        f"{r} "
        + ", ".join(
            f"{row[r]['mean']['precipitation']:.3f}" if "mean" in row[r] else "blew up"
            for row in part["rows"].values()
        )
        for r in ROUNDINGS
    )
    full = sorted(run["precipitation"] for run in part["double"]["means"])
    return (
        f"SPEEDY is `jcm` {used['jcm']} as it comes, T31 with 8 levels, under `emulate` in float64 "
        f"with JAX {used['jax']}: six-hour means of precipitation, of the lowest layer's "
        f"temperature and of the eastward wind half-way up, on {part['days']} days after "
        f"{part['lead']}; the paper's runs are ten years long. Mean precipitation in mm/6 h, bits "
        f"as in the table: {rain}; double {full[0]:.3f} to {full[-1]:.3f}. Processor time over "
        f"that of double: {times} times.\n"
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
