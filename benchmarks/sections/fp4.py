"""FP4 with better scales."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.sections.text import ran, table


def fp4(result: dict[str, Any]) -> str:
    errors, bits = result["errors"], result["bits"]
    kinds = list(next(iter(errors.values())))
    blocks = "; QEP block by block" if any(key[:3] == "QEP" for key in result["kl"]) else ""
    first = [
        [
            name,
            f"{bits[name]:.2f}" if name in bits else "–",
            *(f"{-10 * math.log10(row[kind]):.2f}" for kind in kinds),
        ]
        for name, row in errors.items()
    ]
    return (
        '*OAS*: `scale_rule="oas"`; *MBS*: `macro=4`, its mantissa from the largest weight, or the '
        "best of 16 by squared error; *four over six*: `four_six=True`; *searched*: "
        '`MSE(norm=2.0)`, of MX from `scale_rule="ceil"`. A million weights, nearest: weights to '
        "error in dB; bits are those stored per weight in the network below.\n\n"
        + table(["grid", "bits", *kinds], first)
        + "\nKL of the small trained network of the tests on text it has not seen, from evidence "
        f"of one pass{blocks}. *H*: inputs rotated by `Hadamard()`, *H32*: by `Hadamard(32)`. The "
        "lowest of NV and of MX in bold.\n\n"
        + _kl(result["kl"], list(errors))
        + f"\n{ran(result)}.\n"
    )


def _kl(kl: dict[str, dict[str, float]], names: list[str]) -> str:
    heads = [key.replace("Hadamard 32", "H32").replace("Hadamard", "H") for key in kl]
    lowest = {
        (key, name[:2]): min(value for other, value in row.items() if other[:2] == name[:2])
        for key, row in kl.items()
        for name in row
    }
    lines = []
    for name in (name for name in names if any(name in row for row in kl.values())):
        cells = []
        for key, row in kl.items():
            value = row.get(name)
            cell = "–" if value is None else f"{value:.4f}"
            best = value is not None and value == lowest[key, name[:2]]
            cells.append(f"**{cell}**" if best else cell)
        lines.append([name, *cells])
    return table(["grid", *heads], lines)
