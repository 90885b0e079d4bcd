"""From the `quantization_config` of a Hugging Face folder to the codec of each of its modules.

MLX calls it `quantization` and names no method: `claimed` takes either out of a `config.json`.

Which modules are quantized is told by their tensors (`qweight`, `weight_packed`, a `weight_scale`
beside `weight`), so that those a config ignores stay as they are; how, by the config. What would
change the numbers and is not done (rotations, sparsity, quantized caches, rules for single modules)
is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jquant.errors import CheckpointError, FormatError
from jquant.formats.base import Codec, Spec
from jquant.formats.compressed_tensors import (
    float_quantized,
    int_quantized,
    mxfp4_pack_quantized,
    nvfp4_pack_quantized,
    pack_quantized,
)
from jquant.formats.mlx import in_stack, mlx
from jquant.formats.transposed import awq, gptq
from jquant.grids import Float, Uniform
from jquant.weights.activations import Activations

_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")


class Module(NamedTuple):
    """A module with a quantized weight.

    Attributes:
        codec: of the weight.
        tensors: the codec's names of tensors to those in the file.
        inputs: how the inputs of its products are quantized; None: they are not.
        refusal: why `inputs` cannot say how they are; empty: it can.
        unused: tensors in the file that are of neither.
    """

    codec: Codec
    tensors: Mapping[str, str]
    inputs: Activations | None = None
    refusal: str = ""
    unused: tuple[str, ...] = ()


def claimed(claims: dict[str, Any]) -> Any:
    """What a `config.json` says of quantization, taken out of it; None: nothing.

    As in mlx-lm, `quantization` counts before `quantization_config`, which MLX's folders may have
    as a copy.

    Raises:
        CheckpointError: MLX is to quantize inputs too.

    Example:
        >>> claims = {"model_type": "llama", "quantization": {"bits": 4, "group_size": 64}}
        >>> claimed(claims), claims
        ({'bits': 4, 'group_size': 64, 'quant_method': 'mlx'}, {'model_type': 'llama'})
    """
    config, own = (claims.pop(key, None) for key in ("quantization_config", "quantization"))
    if own is None:
        return config
    _only(claims, "quantize_activations", (None, False))
    return {**own, "quant_method": "mlx"} if isinstance(own, Mapping) else own


def is_mlx(config: Any) -> bool:
    """Whether what `claimed` gave is MLX's."""
    return isinstance(config, Mapping) and config.get("quant_method") == "mlx"


def quantized_modules(config: Any, specs: Mapping[str, Spec]) -> dict[str, Module]:
    """The modules with quantized weights, by name.

    Args:
        config: the object `quantization_config` of a `config.json`.
        specs: shape and dtype of every tensor of the folder.

    Raises:
        CheckpointError: a method, a format or a setting that is not known, or a module without one.

    Example:
        >>> import numpy as np
        >>> names = {"qweight": ((4, 8), "int32"), "qzeros": ((1, 1), "int32"),
        ...          "scales": ((1, 8), "float16"), "bias": ((8,), "float16")}
        >>> specs = {f"fc.{n}": Spec(shape, np.dtype(d)) for n, (shape, d) in names.items()}
        >>> config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        >>> module = quantized_modules(config, specs)["fc"]
        >>> module.codec.name, sorted(module.tensors)
        ('GPTQ v1', ['qweight', 'qzeros', 'scales'])
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"quantization_config = {str(config)[:80]}; expected an object")
    method = str(config.get("quant_method"))
    if method not in _METHODS:
        raise CheckpointError(
            f"quantization_config.quant_method = {method[:80]!r} is not supported; supported: "
            f"{', '.join(_METHODS)}"
        )
    marks, read = _METHODS[method]
    by_module: dict[str, dict[str, Spec]] = {}
    for name, spec in specs.items():
        module, _, local = name.rpartition(".")
        by_module.setdefault(module, {})[local] = spec
    modules: dict[str, Module] = {}
    for name, tensors in by_module.items():
        if not any(mark in tensors for mark in marks):
            continue
        try:
            modules[name] = read(config, name, tensors)
        except (CheckpointError, FormatError) as error:
            raise CheckpointError(f"module {name!r}: {error}") from error
    return modules


def _module(name: str, tensors: Mapping[str, Spec], codec: Codec, inputs: Any = None) -> Module:
    unused = tuple(f"{name}.{local}" for local in _INPUTS if local in tensors)
    own = {local: f"{name}.{local}" for local in tensors if local not in ("bias", *_INPUTS)}
    return Module(codec, own, *_inputs(inputs), unused)


def _gptq(config: Mapping[str, Any], name: str, tensors: Mapping[str, Spec]) -> Module:
    rules = config.get("dynamic")
    leaves_out = isinstance(rules, Mapping) and all(str(rule).startswith("-:") for rule in rules)
    if not leaves_out:  # modules that rules leave out have no quantized tensors
        _only(config, "dynamic", (None,))
    _only(config, "pack_dtype", (None, "int32"))
    kind = _only(config, "checkpoint_format", (None, "gptq", "gptq_v2"))
    bits, group = config.get("bits"), config.get("group_size", 128)
    index, version = "g_idx" in tensors, 2 if kind == "gptq_v2" else 1
    group = None if group == -1 else group
    return _module(name, tensors, gptq(bits, group=group, version=version, index=index))  # type: ignore[arg-type]


def _awq(config: Mapping[str, Any], name: str, tensors: Mapping[str, Spec]) -> Module:
    _only(config, "version", (None, "gemm", "GEMM"))
    _only(config, "bits", (4,))
    _only(config, "zero_point", (None, True))
    group = config.get("group_size", 128)
    return _module(name, tensors, awq(group=None if group == -1 else group))


def _mlx(config: Mapping[str, Any], name: str, tensors: Mapping[str, Spec]) -> Module:
    """By the entry of the module, else by what counts for all."""
    own = config.get(name, config.get(in_stack(name)))
    settings = own if isinstance(own, Mapping) else config
    mode: Any = settings.get("mode", "affine")
    scales = tensors["scales"].dtype.name
    codec = mlx(
        mode, bits=settings.get("bits"), group=settings.get("group_size"),
        **({"scale_dtype": scales} if mode == "affine" else {}),
    )  # fmt: skip
    return _module(name, tensors, codec)


def _compressed_tensors(
    config: Mapping[str, Any], name: str, tensors: Mapping[str, Spec]
) -> Module:
    for key in ("kv_cache_scheme", "transform_config"):
        _only(config, key, (None, {}))
    sparsity = config.get("sparsity_config") or {}
    _only(sparsity if isinstance(sparsity, Mapping) else {}, "format", (None, "dense"))
    group = _group_of(config.get("config_groups"), name)
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"weights = {str(weights)[:80]}; expected an object")
    own = group.get("format") or config.get("format")
    kind = weights.get("type") if own == "naive-quantized" else own
    make = _FORMATS.get(str(kind))
    if make is None:
        raise CheckpointError(f"format {str(kind)[:80]!r} is none of {', '.join(_FORMATS)}")
    scale = tensors.get("weight_scale")
    if scale is None:
        raise CheckpointError("tensor 'weight_scale' is missing")
    codec = make(weights, scale.dtype.name, "weight_g_idx" in tensors)
    return _module(name, tensors, codec, group.get("input_activations"))


def _group_of(groups: Any, name: str) -> Mapping[str, Any]:
    """The group of a module: by its name, by an expression, by its class, in this order."""
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise CheckpointError(f"config_groups = {str(groups)[:80]}; expected objects by name")

    def matches(target: Any) -> tuple[bool, bool, bool]:
        expression = isinstance(target, str) and target.startswith("re:")
        try:
            by_expression = expression and re.match(target[3:], name) is not None
        except re.error as error:
            raise CheckpointError(f"target {target!r:.80}: {error}") from error
        return target == name, by_expression, target == "Linear"

    for way in range(3):
        for group in groups.values():
            targets = group.get("targets")
            if isinstance(targets, list) and any(matches(target)[way] for target in targets):
                return group
    raise CheckpointError("none of config_groups has it as a target, yet it has scales")


def _settings(weights: Mapping[str, Any]) -> dict[str, Any]:
    strategy = weights.get("strategy")
    group = weights.get("group_size") if strategy == "group" else None
    return {"strategy": strategy, "group": group}


def _integers(make: Callable[..., Codec]) -> Callable[..., Codec]:
    def codec(weights: Mapping[str, Any], scale: str, index: bool) -> Codec:
        _only(weights, "type", ("int",))
        more = {"index": True} if index else {}
        symmetric = weights.get("symmetric", True) is not False
        bits: Any = weights.get("num_bits")
        options = {**_settings(weights), **more}
        return make(bits, symmetric=symmetric, scale_dtype=scale, **options)

    return codec


def _floats(weights: Mapping[str, Any], scale: str, index: bool) -> Codec:
    del index
    _only(weights, "type", ("float",))
    _only(weights, "num_bits", (8,))
    _only(weights, "symmetric", (None, True))
    block = weights.get("block_structure") if weights.get("strategy") == "block" else None
    if block is not None and not (isinstance(block, list) and len(block) == 2):
        raise CheckpointError(f"block_structure = {str(block)[:80]}; expected two sizes")
    pair = None if block is None else (block[0], block[1])
    return float_quantized(**_settings(weights), block=pair, scale_dtype=scale)


def _fixed(make: Callable[[], Codec]) -> Callable[..., Codec]:
    def codec(weights: Mapping[str, Any], scale: str, index: bool) -> Codec:
        del scale, index
        _only(weights, "symmetric", (None, True))
        _only(weights, "group_size", (make().groups.size,))
        return make()

    return codec


def _inputs(inputs: Any) -> tuple[Activations | None, str]:
    """How inputs are quantized, and why a weight cannot say it if it cannot."""
    if inputs is None:
        return None, ""
    if not isinstance(inputs, Mapping):
        raise CheckpointError(f"input_activations = {str(inputs)[:80]}; expected an object")
    bits, kind = inputs.get("num_bits"), inputs.get("type")
    dynamic = inputs.get("dynamic") is True and inputs.get("strategy") in ("token", "tensor")
    symmetric = inputs.get("symmetric", True) is not False
    grids = {"8 int": Uniform(8, symmetric=symmetric), "8 float": Float(4, 3, scale="float32")}
    grid = grids.get(f"{bits} {kind}")
    if not dynamic or grid is None:
        strategy, when = inputs.get("strategy"), inputs.get("dynamic")
        how = f"{bits} bits, {kind}, strategy {strategy}, dynamic {when}"
        return None, (
            f"its inputs are quantized in a way that is not supported ({how}); supported: 8 bits, "
            "token or tensor, dynamic"
        )
    return Activations(grid, granularity=inputs["strategy"]), ""


def _only(values: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    """The value at `key`, which must be one of these."""
    got = values.get(key)
    if not any(type(got) is type(one) and got == one for one in allowed):
        words = ", ".join(map(str, allowed))
        raise CheckpointError(f"{key} = {str(got)[:80]!r} is not supported; supported: {words}")
    return got


_FORMATS: Mapping[str, Callable[..., Codec]] = {
    "pack-quantized": _integers(pack_quantized),
    "int-quantized": _integers(int_quantized),
    "float-quantized": _floats,
    "nvfp4-pack-quantized": _fixed(nvfp4_pack_quantized),
    "mxfp4-pack-quantized": _fixed(mxfp4_pack_quantized),
    "int": _integers(int_quantized),  # of naive-quantized
    "float": _floats,
}

# The tensors that tell a quantized module, and how its config is read.
_METHODS: Mapping[str, tuple[tuple[str, ...], Callable[..., Module]]] = {
    "compressed-tensors": (("weight_packed", "weight_scale"), _compressed_tensors),
    "gptq": (("qweight",), _gptq),
    "awq": (("qweight",), _awq),
    "mlx": (("scales",), _mlx),
}
