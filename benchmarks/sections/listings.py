"""Lists of what the library holds, made from the library itself."""

from __future__ import annotations

from benchmarks.sections.text import table
from jquant import presets
from jquant.layerwise.weight import stored_bits


def recipes() -> str:
    """The presets: stored bits of a 4096 × 4096 weight, whether they need data, what they are."""
    rows = []
    for name in presets.__all__:
        if name == "named":
            continue
        preset = getattr(presets, name)
        scheme = preset()
        bits = f"{stored_bits((4096, 4096), scheme):.2f}"
        first = " ".join(preset.__doc__.split("\n\n")[0].split())
        rows.append([f"`{name}`", bits, "yes" if scheme.needs else "no", first])
    return table(["preset", "bits", "data", ""], rows)
