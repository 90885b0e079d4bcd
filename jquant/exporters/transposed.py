"""GPTQ (versions 1 and 2) and AWQ: one width and one group size for all modules of a folder.

Both have a zero point for every group and float16 scales. A symmetric grid has none; its codes
`-8 .. 7` are written as `0 .. 15` with a zero point of 8, which are the same numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from jquant.errors import FormatError
from jquant.exporters.described import Described, Holding, alone, along_inputs, need_alone
from jquant.formats.base import Codec, formula
from jquant.formats.transposed import BITS, awq, gptq
from jquant.grids import Uniform, code_dtype
from jquant.trees.lazy import Lazy, Window, read
from jquant.weights.columns import Columns
from jquant.weights.qtensor import QTensor

GPTQ_HOLDS = (
    "integers of 2, 3, 4 or 8 bits with float16 scales, in groups along the inputs that divide "
    "them, all modules alike, outputs and inputs multiples of 32"
)
AWQ_HOLDS = (
    "integers of 4 bits with float16 scales, in groups along the inputs that divide them, all "
    "modules alike, outputs multiples of 8"
)


def hold_gptq(version: Literal[1, 2]) -> Callable[[Described], Holding]:
    """How GPTQ holds weights; see `Target`."""

    def hold(weight: Described) -> Holding:
        ordered = weight.parts == (Columns.__name__,)
        grid, group = _grid(alone(weight) if ordered else weight, BITS), _group(weight)
        if weight.shape[0] % 32 or weight.shape[1] % 32:
            raise FormatError(f"{weight.shape[0]} outputs and {weight.shape[1]} inputs")
        codec = gptq(grid.bits, group=group, version=version)
        settings = {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": -1 if group is None else group,
            "sym": grid.symmetric,
            "desc_act": ordered,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
            "pack_dtype": "int32",
        }
        return _holding(codec, settings, grid)

    return hold


def hold_awq(weight: Described) -> Holding:
    """How AWQ holds weights; see `Target`."""
    grid, group = _grid(weight, (4,)), _group(weight)
    if weight.shape[0] % 8:
        raise FormatError(f"{weight.shape[0]} outputs")
    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1 if group is None else group,
        "zero_point": True,
        "version": "gemm",
    }
    return _holding(awq(group=group), settings, grid)


def nearest_of(bits: Sequence[int], outputs: int, inputs: int) -> Callable[[Described], Any]:
    """The nearest scheme, where sizes are multiples of these; see `Target`."""

    def nearest(weight: Described) -> Described | None:
        if weight.shape[0] % outputs or weight.shape[1] % inputs:
            return None
        width = min(max(int(weight.grid.bits), 2), 8)
        width = next((b for b in bits if b >= width), bits[-1])
        symmetric = isinstance(weight.grid, Uniform) and weight.grid.symmetric
        grid = Uniform(width, symmetric, scale_dtype="float16")
        return alone(weight, grid=grid, groups=along_inputs(weight), inputs=None)

    return nearest


def gptq_config(held: Sequence[tuple[str, Holding]], ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config`; modules that are not quantized are rules of `dynamic`."""
    heads = [name for name, _ in held if name.endswith("lm_head")]
    left = {f"-:^{re.escape(name)}$": {} for name in ignored if not name.endswith("lm_head")}
    own = {"lm_head": bool(heads), **({"dynamic": left} if left else {})}
    return json.loads(held[0][1].settings) | own


def awq_config(held: Sequence[tuple[str, Holding]], ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config`, with the modules that are not quantized."""
    return json.loads(held[0][1].settings) | {"modules_to_not_convert": list(ignored)}


def _grid(weight: Described, bits: Sequence[int]) -> Uniform:
    need_alone(weight)
    if weight.inputs is not None:
        raise FormatError("quantized inputs")
    grid = weight.grid
    if not isinstance(grid, Uniform) or grid.bits not in bits:
        raise FormatError(f"the grid {grid!r}")
    if grid.scale_dtype != "float16":
        raise FormatError(f"scales in {grid.scale_dtype}")
    if formula(grid) != formula(Uniform(grid.bits, grid.symmetric, scale_dtype="float16")):
        raise FormatError(f"zero points that are no codes (convention {grid.convention})")
    return grid


def _group(weight: Described) -> int | None:
    """The size of groups; None: all inputs."""
    size, width = weight.groups.size, weight.shape[1]
    if weight.groups.axis != "in":
        raise FormatError("groups along the outputs")
    if weight.whole:
        raise FormatError("one scale for the whole weight")
    if size is not None and size <= width and width % size:
        raise FormatError(f"groups of {size}, which do not divide {width} inputs")
    return size if size is not None and size < width else None


def _holding(codec: Codec, settings: dict[str, Any], grid: Uniform) -> Holding:
    return Holding(codec, json.dumps(settings), _unsigned if grid.symmetric else lambda q: q)


def _unsigned(q: QTensor) -> QTensor:
    """A symmetric weight with unsigned codes and a zero point in their middle."""
    assert isinstance(q.grid, Uniform)
    half, scale = 1 << (q.grid.bits - 1), q.params["scale"]
    grid = Uniform(q.grid.bits, scale_dtype=q.grid.scale_dtype)
    dtype = np.dtype(code_dtype(grid))

    def raised(window: Window) -> np.ndarray:
        return (np.asarray(read(q.codes))[window].astype(np.int16) + half).astype(dtype)

    codes: Any = Lazy(tuple(q.codes.shape), dtype, raised, "unsigned")
    params: Any = {"scale": scale, "zero": np.full(scale.shape, half, np.uint8).astype(dtype)}
    return replace(q, codes=codes, params=params, grid=grid)
