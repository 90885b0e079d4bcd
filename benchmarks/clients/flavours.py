"""What is exported: one row for each way in which a format holds weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jquant as jq
from jquant.grids import Float, Uniform

_BF16, _F16 = {"scale_dtype": "bfloat16"}, {"scale_dtype": "float16"}
_INT8, _FP8 = Uniform(8, symmetric=True), Float(4, 3, scale="float32")
_LAYERS = "layers/.*"


class Flavour(NamedTuple):
    """A way to hold weights.

    Attributes:
        format: of the export.
        rules: of the plan; all other weights are kept.
        way: how the client is told to load it.
        note: what is to be known of the result.
    """

    format: str
    rules: Mapping[str, Any]
    way: str = "compressed"
    note: str = ""


def _all(format: str, scheme: jq.Scheme, way: str = "compressed", note: str = "") -> Flavour:
    return Flavour(format, {_LAYERS: scheme}, way, note)


_CT = "compressed-tensors"
TRANSFORMERS: Mapping[str, Flavour] = {
    "W4A16, groups of 32": _all(_CT, jq.Scheme(Uniform(4, True, **_BF16), 32)),
    "W4A16, channels": _all(_CT, jq.Scheme(Uniform(4, True))),
    "W3A16, groups of 32": _all(_CT, jq.Scheme(Uniform(3, True, **_F16), 32)),
    "W8A16, channels": _all(_CT, jq.Scheme(Uniform(8, True))),
    "W4A16, zero points": _all(
        _CT, jq.Scheme(Uniform(4), 32), "dequantized",
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
        _CT, jq.presets.mxfp4(), "dequantized", "its usual way multiplies in bfloat16 alone",
    ),
    "NVFP4": _all(
        _CT, jq.presets.nvfp4(), "dequantized", "it rounds the weights to bfloat16",
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
