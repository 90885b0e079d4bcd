"""Many devices: costs on paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.text import table

_PARTS = {
    "device_bytes": ("GB of a device", 1e9),
    "host_bytes": ("GB of a host", 1e9),
    "flops": ("PFLOP of a device", 1e15),
    "sent_bytes": ("GB a device sends", 1e9),
    "hours": ("hours", 1.0),
}


def paper(result: dict[str, Any]) -> str:
    settings, rates = result["settings"], result["rates"]
    text = (
        f"Decoders of Llama 3's sizes, `{settings['recipe']}` on {settings['windows']} windows of "
        f"{settings['length']} tokens, mesh {settings['mesh']}, from `config.json` alone; rates "
        f"assumed, not measured: {rates['forward']:.0e} FLOP/s in forwards, {rates['solving']:.0e} "
        f"in rounding, {rates['link']:.0e} bytes/s sent.\n"
    )
    for name, row in result["rows"].items():
        lines = [["stages", f"{row['stages']}, of {row['weights']} weights", ""]]
        lines += [
            [words, f"{sum(row[key].values()) / unit:.3g}", _parts(row[key], unit)]
            for key, (words, unit) in _PARTS.items()
        ]
        text += "\n" + table([name, "", "of that"], lines)
    return text


def _parts(values: Mapping[str, float], unit: float) -> str:
    return ", ".join(f"{name} {value / unit:.3g}" for name, value in values.items())
