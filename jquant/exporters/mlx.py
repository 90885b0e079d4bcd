"""MLX: what mlx-lm reads on Apple's machines.

    Affine, Uniform              affine     groups along the inputs that 32 divides
    GGUF's types of 32 weights   affine
    MX(), MX("E4M3")             mxfp4, mxfp8
    NV(tensor_scale=False)       nvfp4

An affine weight is `scale * code + bias`. A zero point becomes `bias = -scale * zero`, a symmetric
grid's is its least code, so bias and scale are of one dtype and the numbers the same. Zero points
of narrow scales need a bias of more digits: both are float32 then, in which the product is exact.
Groups larger than MLX's have their scales repeated.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.axes.groups import Groups
from jquant.errors import FormatError
from jquant.exporters.described import Described, Holding, alone, along_inputs, need_alone
from jquant.formats.base import Codec, formula
from jquant.formats.mlx import BITS, GROUPS, in_stack, mlx
from jquant.grids import GGUF, MX, NV, Affine, Float, Uniform, code_dtype
from jquant.grids.base import spread
from jquant.trees.lazy import Lazy, Window, read
from jquant.weights.qtensor import QTensor

HOLDS = (
    "integers of 2, 3, 4, 5, 6 or 8 bits in groups along the inputs of a multiple of 32 that "
    "divide them, MXFP4 and MXFP8, and NVFP4 without a scale of the tensor"
)
_FLOATS = {formula(MX()): "mxfp4", formula(MX("E4M3")): "mxfp8", formula(NV()): "nvfp4"}


def hold(weight: Described) -> Holding:
    """How MLX holds a weight; see `Target`.

    Raises:
        FormatError: it cannot; says what stands in the way.
    """
    need_alone(weight)
    if weight.inputs is not None:
        raise FormatError("quantized inputs")
    if weight.groups.axis != "in":
        raise FormatError("groups along the outputs")
    mode = _FLOATS.get(formula(weight.grid))
    if mode is None:
        return _affine(weight)
    if weight.of_tensor:
        raise FormatError("a scale of the whole tensor beside those of groups")
    codec = mlx(mode)  # type: ignore[arg-type]
    width, size = weight.shape[1], codec.groups.size
    if weight.groups.size != size or width % codec.groups.group(width):
        raise FormatError(f"{weight.groups!r} of {width} inputs in place of groups of {size}")
    return Holding(codec, json.dumps({"group_size": size, "bits": codec.grid.bits, "mode": mode}))


def nearest(weight: Described) -> Described | None:
    """The weight as the nearest scheme that MLX holds would have it."""
    width, grid = weight.shape[1], weight.grid
    if width % GROUPS[0]:
        return None
    if formula(grid) == formula(NV()) and isinstance(grid, Float):
        alike = replace(grid, tensor_scale=False)
        groups = Groups("in", alike.group)
        return alone(weight, grid=alike, groups=groups, inputs=None, of_tensor=False)
    if isinstance(grid, Float) and grid.scale in ("e8m0", "e4m3"):
        kind = "E2M1" if grid.bits <= 4 else "E4M3"
        near = MX(kind, scale_rule=grid.scale_rule, range=grid.range)
        return alone(
            weight, grid=near, groups=Groups("in", near.group), inputs=None, of_tensor=False
        )
    bits = next(b for b in BITS if b >= min(int(grid.bits), BITS[-1]))
    own = isinstance(grid, Uniform | Affine)
    near = replace(grid, bits=bits) if own else Affine(bits, scale_dtype="float16")
    sizes = [size for size in GROUPS if width % size == 0]
    most = along_inputs(weight).group(width)
    size = max((size for size in sizes if size <= most), default=sizes[0])
    return alone(weight, grid=near, groups=Groups("in", size), inputs=None)


def config(held: Sequence[tuple[str, Holding]], ignored: Sequence[str]) -> dict[str, Any]:
    """What `config.json` says under `quantization`: what counts for most modules, and the others by
    name. Modules that are not quantized are told by their tensors."""
    del ignored
    settings = [holding.settings for _, holding in held]
    usual = max(dict.fromkeys(settings), key=settings.count)
    others = {in_stack(name): json.loads(h.settings) for name, h in held if h.settings != usual}
    return json.loads(usual) | others


def _affine(weight: Described) -> Holding:
    grid, width = weight.grid, weight.shape[1]
    if not isinstance(grid, Uniform | Affine | GGUF) or grid.bits not in BITS:
        raise FormatError(f"the grid {grid!r}")
    own = weight.groups.group(width)
    size = next((g for g in reversed(GROUPS) if own % g == 0 and width % own == 0), None)
    if size is None:
        raise FormatError(f"groups of {own}, of {width} inputs")
    codec = mlx(bits=grid.bits, group=size, scale_dtype=_dtype(grid))
    settings = json.dumps({"group_size": size, "bits": grid.bits})
    return Holding(codec, settings, functools.partial(_stored, codec))


def _dtype(grid: Uniform | Affine | GGUF) -> str:
    """The dtype in which the scale and the bias of a grid's groups are what they are."""
    if isinstance(grid, GGUF):
        return "float16" if grid.row.scale_codes is None else "float32"
    exact = isinstance(grid, Affine) or grid.symmetric
    return grid.scale_dtype if exact else "float32"


def _stored(codec: Codec, q: QTensor) -> QTensor:
    """A weight on MLX's grid, by arrays that are made when they are read."""
    out, width = q.codes.shape
    grid, low = codec.grid, q.grid.codes[0]
    assert isinstance(grid, Affine)
    dtype, count = np.dtype(grid.scale_dtype), codec.groups.count(width)

    def codes(window: Window) -> np.ndarray:
        values = np.asarray(read(q.codes))[window]
        return (values.astype(np.int16) - low).astype(code_dtype(grid))

    def parameter(name: str) -> Lazy:
        def values(window: Window) -> np.ndarray:
            pair = _scale_and_bias(q)
            with np.errstate(over="ignore"):
                whole = pair[name].astype(dtype)
            if not np.isfinite(whole).all():
                raise FormatError(f"a {name} of a group is beyond {dtype}; use float32 scales")
            rows = np.broadcast_to(whole, (out, whole.shape[1]))
            return np.repeat(rows, count // whole.shape[1], 1)[window]

        return Lazy((out, count), dtype, values, f"MLX's {name}")

    unsigned: Any = Lazy((out, width), np.dtype(code_dtype(grid)), codes, "MLX's codes")
    params: Any = {name: parameter(name) for name in ("scale", "bias")}
    return replace(q, codes=unsigned, params=params, grid=grid, groups=codec.groups)


def _scale_and_bias(q: QTensor) -> dict[str, np.ndarray]:
    """Of each group, float32: the step, and what its least code stands for."""
    grid, leaves = q.grid, {name: jnp.asarray(read(leaf)) for name, leaf in q.params.items()}
    params = {n: np.asarray(leaf, np.float32) for n, leaf in spread(grid, leaves).items()}
    scale = params["scale"]
    if isinstance(grid, Affine):
        return {"scale": scale, "bias": params["bias"]}
    if isinstance(grid, Uniform):
        zero = params.get("zero", np.float32(-grid.codes[0]))
        return {"scale": scale, "bias": -scale * zero}
    scale = scale * params.get("scale_code", np.float32(1))
    offset = params.get("offset", np.float32(0)) * params.get("offset_code", np.float32(1))
    return {"scale": scale, "bias": scale * np.float32(grid.codes[0]) - offset}
