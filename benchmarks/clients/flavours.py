"""What is exported: one row for each way in which a format holds weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jquant as jq
from jquant.grids import GGUF, MX, NV, Affine, Float, Uniform

_BF16, _F16 = {"scale_dtype": "bfloat16"}, {"scale_dtype": "float16"}
_INT8, _FP8 = Uniform(8, symmetric=True), Float(4, 3, scale="float32")
_LAYERS = "layers/.*"
_EXPERTS = {"experts": 4, "experts_used": 2, "qk_norm": "head"}  # as Qwen3's


class Flavour(NamedTuple):
    """A way to hold weights.

    Attributes:
        format: of the export.
        rules: of the plan; all other weights are kept.
        note: what is to be known of the result.
        network: what it has that the usual one has not.
    """

    format: str
    rules: Mapping[str, Any]
    note: str = ""
    network: Mapping[str, Any] = {}


def _all(format: str, scheme: jq.Scheme, note: str = "") -> Flavour:
    return Flavour(format, {_LAYERS: scheme}, note)


_CT = "compressed-tensors"
TRANSFORMERS: Mapping[str, Flavour] = {
    "W4A16, groups of 32": _all(_CT, jq.Scheme(Uniform(4, True, **_BF16), 32)),
    "W4A16, channels": _all(_CT, jq.Scheme(Uniform(4, True))),
    "W3A16, groups of 32": _all(_CT, jq.Scheme(Uniform(3, True, **_F16), 32)),
    "W8A16, channels": _all(_CT, jq.Scheme(Uniform(8, True))),
    "W4A16, zero points": _all(
        _CT, jq.Scheme(Uniform(4), 32),
        "its usual way makes room for zero points that are not packed, and refuses those in files",
    ),
    "W8A8, tokens": _all(
        _CT, jq.Scheme(_INT8, activations=jq.Activations(_INT8)),
        note="the largest input of a token lies half-way between two codes; the last bit of a sum "
        "decides",
    ),
    "W8A8, tokens, preset `w8a8`": _all(
        _CT, jq.presets.w8a8(), note="it takes `max / 127.5` for a step, the preset `max / 127`",
    ),
    "FP8, channels": _all(_CT, jq.presets.fp8()),
    "FP8, channels and tokens": _all(_CT, jq.presets.w8a8_fp8()),
    "W4, FP8 tokens": _all(
        _CT, jq.Scheme(Uniform(4, True, **_F16), 32, activations=jq.Activations(_FP8))
    ),
    "MXFP4": _all(
        _CT, jq.presets.mxfp4(), "its usual way multiplies in bfloat16 alone",
    ),
    "NVFP4": _all(
        _CT, jq.presets.nvfp4(), "it rounds the weights to bfloat16",
    ),
    "FP8, W8A16 and W4A16": Flavour(
        _CT,
        {
            ".*mlp/down.*": jq.presets.fp8(),
            "layers/0/.*": jq.presets.int8_nearest(),
            _LAYERS: jq.Scheme(Uniform(4, True, **_F16), 32),
        },
    ),
    "arrays": _all("safetensors", jq.presets.int4_nearest(32)),
}  # fmt: skip

_REFUSED = "version 1 with zero points it takes from GPTAQ and FOEM alone; `gptq_v2` holds the same"
GPTQMODEL: Mapping[str, Flavour] = {
    "GPTQ, 4 bits, groups of 32": _all("gptq", jq.Scheme(Uniform(4, True, **_F16), 32)),
    "GPTQ, 8 bits, channels": _all("gptq", jq.Scheme(Uniform(8, True, **_F16))),
    "GPTQ, 4 bits, zero points": _all("gptq", jq.Scheme(Uniform(4, **_F16), 32), _REFUSED),
    "GPTQ v2, 4 bits, zero points": _all("gptq_v2", jq.Scheme(Uniform(4, **_F16), 32)),
    "GPTQ v2, 3 bits, zero points": _all("gptq_v2", jq.Scheme(Uniform(3, **_F16), 32)),
    "GPTQ v2, 2 bits, zero points": _all("gptq_v2", jq.Scheme(Uniform(2, **_F16), 32)),
    "AWQ, 4 bits, zero points": _all("awq", jq.Scheme(Uniform(4, convention="A2", **_F16), 32)),
}
LLAMA_CPP: Mapping[str, Flavour] = {
    kind: _all("gguf", jq.Scheme(GGUF(kind))) for kind in ("Q4_0", "Q5_1", "Q8_0")
}
_TABLE_TOO = "embed/.*|layers/.*|head/.*"
MLX: Mapping[str, Flavour] = {
    **{
        f"{bits} bits, groups of 32": _all("mlx", jq.Scheme(Uniform(bits), 32))
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "4 bits, symmetric, bfloat16": _all("mlx", jq.Scheme(Uniform(4, True, **_BF16), 64)),
    "4 bits, zero points, float16": _all("mlx", jq.Scheme(Uniform(4, **_F16), 32)),
    "4 bits, `Affine`, bfloat16": _all("mlx", jq.Scheme(Affine(4, **_BF16), 64)),
    "8 bits, channels": _all("mlx", jq.Scheme(Uniform(8, True, **_F16))),
    "GGUF's Q4_1": _all("mlx", jq.Scheme(GGUF("Q4_1"))),
    "MXFP4": _all("mlx", jq.presets.mxfp4()),
    "MXFP8": _all("mlx", jq.Scheme(MX("E4M3"))),
    "NVFP4 without a scale of the tensor": _all("mlx", jq.Scheme(NV(tensor_scale=False))),
    "experts, 4 bits, groups of 32": Flavour(
        "mlx", {_LAYERS: jq.Scheme(Uniform(4), 32)}, network=_EXPERTS
    ),
    "experts, NVFP4 and 8 bits, others kept": Flavour(
        "mlx",
        {
            "layers/0/mlp/up.*": jq.Scheme(NV(tensor_scale=False)),
            "layers/1/mlp/down.*": jq.Scheme(Uniform(8, True, **_F16), 64),
        },
        network=_EXPERTS,
    ),
    "4 and 8 bits, table and head too": Flavour(
        "mlx",
        {
            ".*mlp/down.*": jq.Scheme(Uniform(8), 64),
            _TABLE_TOO: jq.Scheme(Uniform(4), 32),
        },
    ),
    "4 bits, table of bfloat16 scales": Flavour(
        "mlx", {_TABLE_TOO: jq.Scheme(Uniform(4, True, **_BF16), 64)},
        note="a table's rows are of the dtype of its scales, so all is computed in bfloat16",
    ),
}  # fmt: skip
FLAVOURS: Mapping[str, Mapping[str, Flavour]] = {
    "transformers": TRANSFORMERS, "llama-cpp": LLAMA_CPP, "gptqmodel": GPTQMODEL, "mlx": MLX,
}  # fmt: skip
# What is installed without what it asks for: GPTQModel wants CUDA's PyTorch and a compiler. Its own
# imports need the rest.
BARE: Mapping[str, tuple[str, ...]] = {
    "gptqmodel": (
        "GPTQModel==7.2.0", "torchvision==0.28.0", "threadpoolctl", "Device-SMI", "protobuf",
        "pillow", "PyPcre", "TokeNicer", "LogBar", "Jinja2", "datasets", "pyarrow", "dill",
        "torchao", "Defuser", "pandas", "xxhash", "multiprocess", "kernels", "MarkupSafe",
        "requests", "urllib3", "certifi", "charset-normalizer", "python-dateutil", "tzdata",
    ),
}  # fmt: skip
# Packages that compute nothing without an extra: MLX's backend for CPUs, on Linux.
EXTRAS: Mapping[str, str] = {"mlx": "cpu"}
# What takes two cores half an hour or more, since it is compiled, and what is put before the values
# of variables that its build reads: without what is for pictures it is a quarter less.
COMPILED: Mapping[str, Mapping[str, str]] = {"llama-cpp": {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}}
