"""MLX's formats: `weight` (a dense stream of bits in uint32 words), `scales`, and for affine ones
`biases`.

    affine   scale * code + bias   2, 3, 4, 5, 6, 8 bits   groups of 32, 64, 128
    mxfp4    E2M1                  a power of two per 32
    mxfp8    E4M3                  a power of two per 32
    nvfp4    E2M1                  an E4M3 scale per 16, and no scale of the tensor

The experts of a layer are one tensor of mlx-lm's (`switch_mlp`), theirs along its first axis.

MLX calls scale and bias by the plural, and the bias of a layer "bias". Scales of a file may be
negative, and are when MLX has made it. Checked against mlx 0.32.4.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal, get_args

from jquant.axes.groups import Groups
from jquant.errors import FormatError
from jquant.formats.base import Codec
from jquant.formats.by_tensor import ByTensor, Row
from jquant.formats.compressed_tensors import SCALE_DTYPES
from jquant.formats.steps import Patterns, Stream, Viewed
from jquant.grids import MX, NV, Affine, Float, code_dtype

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_FLOATS: dict[str, Float] = {
    "mxfp4": MX(), "mxfp8": MX("E4M3"), "nvfp4": NV(tensor_scale=False),
}  # fmt: skip
STACK = ".switch_mlp."
_STORED = {"e8m0": "float8_e8m0fnu", "e4m3": "float8_e4m3fn"}


def mlx(
    mode: Mode = "affine",
    *,
    bits: int | None = None,
    group: int | None = None,
    scale_dtype: str = "bfloat16",
) -> Codec:
    """The codec of a mode of MLX.

    Args:
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        bits: 2, 3, 4, 5, 6 or 8; of the modes of floats their own. None: 4, or their own.
        group: 32, 64 or 128 inputs that share a scale; likewise. None: 64, or their own.
        scale_dtype: of affine scales and biases: "float32", "float16" or "bfloat16".

    Raises:
        FormatError: an argument is out of its set, or is not the mode's.

    Example:
        >>> {name: str(spec) for name, spec in mlx(bits=3).storage.tensors((8, 64)).items()}
        {'weight': 'uint32 (8, 6)', 'scales': 'bfloat16 (8, 1)', 'biases': 'bfloat16 (8, 1)'}
    """
    if mode not in get_args(Mode):
        raise FormatError(f"mode={str(mode)[:40]!r}; MLX has {', '.join(get_args(Mode))}")
    if mode != "affine":
        return _of_floats(mode, bits, group)
    bits, group = 4 if bits is None else bits, 64 if group is None else group
    for name, value, allowed in (
        ("bits", bits, BITS), ("group", group, GROUPS), ("scale_dtype", scale_dtype, SCALE_DTYPES),
    ):  # fmt: skip
        if isinstance(value, bool) or value not in allowed:
            raise FormatError(f"{name}={str(value)[:40]!r}; MLX's affine mode has {allowed}")
    grid, groups = Affine(bits, scale_dtype=scale_dtype), Groups("in", group)
    rows = (
        Row("codes", "weight", ("out", "in"), code_dtype(grid).name, (Stream(bits, "uint32"),)),
        Row("scale", "scales", ("out", "groups"), scale_dtype),
        Row("bias", "biases", ("out", "groups"), scale_dtype),
    )
    return Codec("MLX affine", grid, groups, ByTensor(rows, groups))


def _of_floats(mode: str, bits: int | None, group: int | None) -> Codec:
    grid = replace(_FLOATS[mode], negative_zero=True)
    if bits not in (None, grid.bits) or group not in (None, grid.group):
        raise FormatError(
            f"bits={str(bits)[:40]}, group={str(group)[:40]}; MLX's {mode} has {grid.bits} bits in "
            f"groups of {grid.group}"
        )
    groups = Groups("in", grid.group)
    steps = (Stream(grid.bits, "uint32"), Patterns(grid))
    rows = (
        Row("codes", "weight", ("out", "in"), code_dtype(grid).name, steps),
        Row("scale", "scales", ("out", "groups"), _STORED[str(grid.scale)], (Viewed("uint8"),)),
    )
    return Codec(f"MLX {mode}", grid, groups, ByTensor(rows, groups))


def in_stack(name: str) -> str:
    """The name of mlx-lm's tensor, or module, with all experts of a layer; others stay.

    Example:
        >>> in_stack("model.layers.0.mlp.experts.3.up_proj.weight")
        'model.layers.0.mlp.switch_mlp.up_proj.weight'
    """
    return re.sub(r"\.experts\.\d+\.", STACK, name)


def of_expert(name: str, expert: int) -> str:
    """The inverse: what a tensor with all experts is called for one of them."""
    return name.replace(STACK, f".experts.{expert}.")
