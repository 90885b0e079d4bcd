"""Schemes by name, for whoever wants a good one rather than a choice: `presets.int4_gptq()`.

Each is a function that returns a `Scheme`, so a preset can be printed, compared and changed with
`dataclasses.replace`. `named` finds one by the name the command line uses (`int4-gptq`). A preset
is a scheme for one weight; which weights get it is the plan's business.

Groups are of 64 along the input axis with float16 scales and zero points as narrow as the codes:
4.31 bits per weight at 4 bits. Groups of 128 would take 4.16. The GPTQ presets search each group's
range by the error its inputs weigh (`MSE`, an option of GPTQ's own code that is off there by
default): on SmolLM2 at 4 bits that takes KL from 0.108 to 0.073, see `benchmarks/quality.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jquant.errors import near
from jquant.grids import MSE, Uniform
from jquant.rounding import GPTQ, Nearest
from jquant.scheme import Scheme

__all__ = [
    "int3_gptq",
    "int4_gptq",
    "int4_nearest",
    "int8_nearest",
    "named",
]


def int4_gptq(group: int | None = 64) -> Scheme:
    """4-bit affine groups rounded by GPTQ in activation order, ranges searched: try this first.

    Example:
        >>> int4_gptq().grid.bits
        4
    """
    return Scheme(Uniform(4, range=MSE(), scale_dtype="float16"), group, GPTQ())


def int3_gptq(group: int | None = 64) -> Scheme:
    """As `int4_gptq`, with 3 bits: visibly worse text from small models, usable from large ones."""
    return Scheme(Uniform(3, range=MSE(), scale_dtype="float16"), group, GPTQ())


def int4_nearest(group: int | None = 64) -> Scheme:
    """4-bit affine groups rounded to nearest: needs no data, and is what others are measured by."""
    return Scheme(Uniform(4, scale_dtype="float16"), group, Nearest())


def int8_nearest(group: int | None = None) -> Scheme:
    """8-bit symmetric, one scale per output channel, rounded to nearest: near lossless, no data."""
    return Scheme(Uniform(8, symmetric=True), group, Nearest())


def presets() -> Mapping[str, Callable[..., Scheme]]:
    """Every preset by its command-line name."""
    return {name.replace("_", "-"): globals()[name] for name in __all__ if name != "named"}


def named(name: str, group: int | None = None) -> Scheme:
    """The preset of that name, `-` or `_` alike; `group` changes its group size.

    Raises:
        ValueError: there is no such preset; the message lists the nearest.

    Example:
        >>> named("int4-gptq", 128).blocks
        Blocks(axis='in', size=128)
    """
    known = presets()
    found = known.get(name.replace("_", "-"))
    if found is None:
        raise ValueError(f"no preset is called {name!r}; did you mean {near(name, known)}?")
    return found() if group is None else found(group)
