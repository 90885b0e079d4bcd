"""Which of GGUF's block types holds a weight."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.errors import FormatError
from jquant.exporters.described import Described, Holding, alone, need_alone
from jquant.formats import gguf as codec_of
from jquant.formats.base import Codec, formula
from jquant.formats.block_types import KINDS
from jquant.grids import GGUF
from jquant.weights.qtensor import QTensor

HOLDS = (
    "grids GGUF(kind) and MXFP4, and symmetric integers of 4, 5 or 8 bits with float16 scales in "
    "groups of a multiple of 32 (Q4_0, Q5_0, Q8_0)"
)
# By the bits of a grid, the types that are nearest to it; and those of 32 weights instead.
_NEAREST = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}
_OF_32 = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q4_0", "Q5_K": "Q5_0", "Q6_K": "Q8_0"}


def hold(weight: Described) -> Holding:
    """How GGUF holds a weight; see `Target`. `settings` is the block type's name.

    Raises:
        FormatError: no type does.
    """
    need_alone(weight)
    if weight.inputs is not None:
        raise FormatError("quantized inputs, of which a GGUF file says nothing")
    width, groups = weight.shape[1], weight.groups
    if groups.axis != "in":
        raise FormatError(f"{groups}; GGUF's blocks lie along the inputs")
    for kind, row in KINDS.items():
        codec = codec_of(kind)
        size, own = codec.groups.group(width), groups.group(width)
        if formula(weight.grid) != formula(row.grid) or width % row.weights or own % size:
            continue
        if size == own or row.weights == size and width % own == 0:
            return Holding(codec, kind, functools.partial(_stored, codec, own // size))
    raise FormatError(f"the grid {weight.grid} in {groups}, {width} inputs")


def nearest(weight: Described) -> Described | None:
    """A weight that GGUF holds, of at least so many bits, whose blocks divide a row."""
    if weight.shape[1] % 32:
        return None
    kind = _NEAREST[min(max(weight.grid.bits, 2), 8)]
    if weight.shape[1] % KINDS[kind].weights:
        kind = _OF_32.get(kind, kind)
    return alone(weight, grid=GGUF(kind), groups=Groups(), inputs=None)


def _stored(codec: Codec, repeats: int, q: QTensor) -> QTensor:
    """One matrix in memory, as the codec has it: on its grid, a scale for each of its groups."""
    codes: np.ndarray = np.asarray(q.codes)
    params: dict[str, np.ndarray] = {name: np.asarray(leaf) for name, leaf in q.params.items()}
    if repeats > 1:
        params = {name: np.repeat(leaf, repeats, -1) for name, leaf in params.items()}
    layout = Layout.of((codes.shape[0], codes.shape[1]), in_axes=(1,))
    return replace(
        q.only(lambda part: False), codes=codes, params=params, grid=codec.grid,
        groups=codec.groups, layout=layout,
    )  # fmt: skip
