"""compressed-tensors: what vLLM, llm-compressor, transformers and tpu-inference read.

Which of its formats a weight has follows from the weight, so whoever exports says no more than
"compressed-tensors":

    Uniform                                     pack-quantized   2 to 8 bits
    Uniform, inputs on Uniform(8)               int-quantized    inputs per token or call
    Float(4, 3), with inputs or without         float-quantized
    NV()                                        nvfp4-pack-quantized
    MX()                                        mxfp4-pack-quantized

Scales are of groups along the inputs, of channels, or of the whole weight. Weights of one kind are
one group of the configuration; where there are several, each is named. The tensor scale of `NV()`
is stored as its inverse, a float32 too, so weights are within a rounding of float32 what they were.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jquant.axes.groups import Groups
from jquant.errors import FormatError
from jquant.exporters.described import Described, Holding, alone, along_inputs, need_alone
from jquant.formats.base import Codec, formula
from jquant.formats.compressed_tensors import (
    SCALE_DTYPES,
    float_quantized,
    int_quantized,
    mxfp4_pack_quantized,
    nvfp4_pack_quantized,
    pack_quantized,
)
from jquant.grids import MX, NV, Float, Grid, MinMax, Uniform
from jquant.trees.lazy import read
from jquant.weights.activations import Activations
from jquant.weights.qtensor import QTensor

HOLDS = (
    "integers of 2 to 8 bits, E4M3, MXFP4 and NVFP4 numbers, in groups along the inputs that "
    "divide them, with inputs in 8 bits or in full precision"
)
_E4M3 = Float(4, 3, scale="float32")
_INPUT_GRIDS = (Uniform(8, symmetric=True), Uniform(8), _E4M3)
_FP4 = {formula(NV()): nvfp4_pack_quantized, formula(MX()): mxfp4_pack_quantized}


def hold(weight: Described) -> Holding:
    """How compressed-tensors holds a weight.

    Raises:
        FormatError: it cannot; says what stands in the way.
    """
    need_alone(weight)
    if weight.groups.axis != "in":
        raise FormatError("groups along the outputs")
    size, width = weight.groups.group(weight.shape[1]), weight.shape[1]
    if width % size:
        raise FormatError(f"groups of {size}, which do not divide {width} inputs")
    if formula(weight.grid) in _FP4:
        return _four_bit_floats(weight, _FP4[formula(weight.grid)]())
    strategy: dict[str, Any] = {"strategy": "tensor" if weight.whole else "channel", "group": None}
    if not weight.whole and weight.groups.size is not None and weight.groups.size <= width:
        strategy = {"strategy": "group", "group": weight.groups.size}
    if isinstance(weight.grid, Uniform):
        return _integers(weight, weight.grid, strategy)
    return _eight_bit_floats(weight, strategy)


def nearest(weight: Described) -> Described:
    """The weight as the nearest scheme that compressed-tensors holds would have it."""
    grid, inputs, groups = _grid(weight.grid), _nearest_inputs(weight), along_inputs(weight)
    fixed = getattr(grid, "group", None)
    if fixed is not None and weight.shape[1] % fixed:
        grid, fixed = Uniform(4, symmetric=True, scale_dtype="float16"), None
    if fixed is not None:
        return alone(weight, grid=grid, groups=Groups("in", fixed), inputs=None)
    if isinstance(grid, Float) and inputs is not None:
        inputs = replace(inputs, grid=_E4M3, compute="auto")
    if inputs is not None and inputs.compute == "integer" and not isinstance(grid, Uniform):
        inputs = replace(inputs, compute="auto")
    return alone(weight, grid=grid, groups=groups, inputs=inputs)


def config(held: Sequence[tuple[str, Holding]], ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of modules by name; `ignored` are linear ones left as they are."""
    kinds: dict[str, list[str]] = {}
    for name, holding in held:
        kinds.setdefault(holding.settings, []).append(name)
    groups = {}
    for number, (settings, names) in enumerate(kinds.items()):
        targets = ["Linear"] if len(kinds) == 1 else names
        groups[f"group_{number}"] = {"targets": targets, **json.loads(settings)}
    own = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": own.pop() if len(own) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def _integers(weight: Described, grid: Uniform, strategy: dict[str, Any]) -> Holding:
    if formula(grid) != formula(Uniform(grid.bits, grid.symmetric, scale_dtype=grid.scale_dtype)):
        raise FormatError(f"zero points that are no codes (convention {grid.convention})")
    inputs = _inputs(weight.inputs)
    by_int = inputs is not None and inputs["type"] == "int"
    make, kind = (int_quantized, "int-quantized") if by_int else (pack_quantized, "pack-quantized")
    codec = make(grid.bits, symmetric=grid.symmetric, scale_dtype=grid.scale_dtype, **strategy)
    of_weights = _weights(grid.bits, "int", strategy) | {"symmetric": grid.symmetric}
    return Holding(codec, _settings(kind, of_weights, inputs))


def _eight_bit_floats(weight: Described, strategy: dict[str, Any]) -> Holding:
    scale = getattr(weight.grid, "scale", None)
    if scale not in SCALE_DTYPES or formula(weight.grid) != formula(replace(_E4M3, scale=scale)):
        raise FormatError(f"the grid {weight.grid!r}")
    inputs = _inputs(weight.inputs)
    if inputs is not None and inputs["type"] != "float":
        raise FormatError("integer inputs of E4M3 weights")
    codec = float_quantized(scale_dtype=scale, **strategy)
    return Holding(codec, _settings("float-quantized", _weights(8, "float", strategy), inputs))


def _four_bit_floats(weight: Described, codec: Codec) -> Holding:
    if weight.inputs is not None:
        raise FormatError("quantized inputs of 4-bit floats")
    if weight.groups != codec.groups:
        raise FormatError(f"{weight.groups!r} in place of {codec.groups!r}")
    of_weights = _weights(4, "float", {"strategy": "group", "group": codec.groups.size})
    if codec.name == "nvfp4-pack-quantized":
        scales = {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        settings = _settings(codec.name, of_weights | scales, None)
        return Holding(codec, settings, _divided)
    settings = _settings(codec.name, of_weights | {"scale_dtype": "torch.uint8"}, None)
    return Holding(codec, settings)


def _divided(q: QTensor) -> QTensor:
    """An NVFP4 weight with the number that divides its scales in place of the one that multiplies.

    Example:
        >>> import jax.numpy as jnp
        >>> from jquant.axes import Layout
        >>> params = {"scale": jnp.ones((1, 1), "float8_e4m3fn"), "tensor": jnp.full((1, 1), 0.5)}
        >>> layout = Layout.of((1, 16), in_axes=(1,))
        >>> codes = jnp.zeros((1, 16), jnp.int4)
        >>> q = QTensor(codes, params, NV(), Groups("in", 16), layout, "float32")
        >>> _divided(q).params["divisor"].tolist()
        [[2.0]]
    """
    if "divisor" in q.params:
        return q
    if "tensor" not in q.params:  # there is none, which a file cannot say
        return replace(q, params={**q.params, "divisor": np.ones((1, 1), np.float32)})
    params = {name: value for name, value in q.params.items() if name != "tensor"}
    inverse = np.float32(1) / np.asarray(read(q.params["tensor"]), np.float32)
    return replace(q, params={**params, "divisor": inverse})


def _inputs(choice: Activations | None) -> dict[str, Any] | None:
    """What is said of a weight's inputs."""
    if choice is None:
        return None
    if choice.granularity == "static":
        raise FormatError("static ranges of inputs")
    grid = next((grid for grid in _INPUT_GRIDS if formula(grid) == formula(choice.grid)), None)
    if grid is None:
        raise FormatError(f"inputs on {choice.grid!r}")
    kind = {"type": "int", "symmetric": grid.symmetric} if isinstance(grid, Uniform) else {}
    told = {"num_bits": 8, "type": "float", "symmetric": True, **kind}
    return told | {"strategy": choice.granularity, "dynamic": True}


def _nearest_inputs(weight: Described) -> Activations | None:
    choice = weight.inputs
    if choice is None:
        return None
    granularity = "token" if choice.granularity == "static" else choice.granularity
    grid: Grid = choice.grid
    if formula(grid) not in map(formula, _INPUT_GRIDS):
        symmetric = bool(getattr(grid, "symmetric", True))
        grid = Uniform(8, symmetric=symmetric) if isinstance(grid, Uniform) else _E4M3
    return Activations(grid, granularity, compute=choice.compute)


def _grid(grid: Grid) -> Grid:
    """The nearest grid."""
    if isinstance(grid, Uniform):
        plain = Uniform(grid.bits, grid.symmetric, scale_dtype=grid.scale_dtype)
        return grid if formula(grid) == formula(plain) else plain
    if isinstance(grid, Float):
        if grid.bits <= 4:
            if grid.scale == "e8m0":
                return MX(scale_rule=grid.scale_rule, range=grid.range)
            return NV(four_six=grid.four_six, range=grid.range)
        scale = grid.scale if grid.scale in SCALE_DTYPES else "float32"
        return Float(4, 3, scale=scale, range=grid.range if grid.scale else MinMax())
    return Uniform(min(max(int(grid.bits), 2), 8), scale_dtype="float16")


def _weights(bits: int, kind: str, strategy: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy["strategy"],
        "group_size": strategy["group"],
        "dynamic": False,
    }


def _settings(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> str:
    """A group of the configuration but its targets, as a value that can be compared."""
    group = {"weights": weights, "input_activations": inputs, "output_activations": None}
    return json.dumps({**group, "format": kind})
