"""tunix: its own classes, with the arrays, or as qwix's `quantize_model` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.clients.named_trees import (
    EXPERTS,
    FP8,
    GEMMA,
    INT4,
    INT8,
    QWEN,
    ZEROS,
    Case,
    all_layers,
    rows_of_trees,
)

NAME = "tunix"
PYTHON = "3.12"
PACKAGES = (
    "jax==0.12.0.1", "flax==0.12.12", "einops==0.8.2", "jaxtyping==0.3.11", "safetensors==0.8.0",
    "huggingface-hub==2.4.0", "orbax-checkpoint==0.12.8",
)  # fmt: skip
BARE = ("google-tunix==0.1.7", "qwix==0.1.8")
CHILD = Path(__file__).with_name("tunix_client.py")
_BASE = dict(rope_theta=1e6)  # of tunix's Llama and Qwen 3, whatever they are told
_FAR = dict(kv_heads=4, rope_divisors=(8.0,) * 8)
CASES = {
    "Llama 3, arrays": Case("tunix-arrays", _BASE, all_layers(ZEROS), scanned=True),
    "Llama 3, 4 bits, groups of 16": Case("tunix", _BASE, all_layers(INT4), "int4/16"),
    "Llama 3, tied, 8 bits, channels": Case(
        "tunix", _BASE | dict(tied=True), all_layers(INT8), "int8/all"
    ),
    "Llama 3, E4M3, channels": Case("tunix", _BASE, all_layers(FP8), "float8_e4m3fn/all"),
    "Llama 3, 4 bits, zero points": Case("tunix", _BASE, all_layers(ZEROS), "dequantize"),
    "Qwen2, arrays": Case("tunix-arrays", dict(qkv_bias=True), all_layers(INT4)),
    "Qwen2, tied, arrays": Case("tunix-arrays", dict(qkv_bias=True, tied=True), all_layers(INT8)),
    "Qwen3, arrays": Case("tunix-arrays", QWEN | _BASE, all_layers(INT4)),
    "Qwen3, tied, arrays": Case("tunix-arrays", QWEN | _BASE | dict(tied=True), all_layers(FP8)),
    "Qwen3, experts, arrays": Case("tunix-arrays", EXPERTS | _BASE, all_layers(INT4)),
    "Gemma 3, arrays": Case("tunix-arrays", GEMMA, all_layers(ZEROS)),
    "Gemma 3, 4 bits, groups of 16": Case("tunix", GEMMA, all_layers(INT4), "int4/16"),
    "Gemma 3, far, 4 bits": Case("tunix", GEMMA | _FAR, all_layers(INT4), "int4/16"),
}


def rows(python: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """A row for each case."""
    return rows_of_trees(NAME, CASES, CHILD, python, folder)
