"""MaxText: its own decoder, with the parameters that its own loader restores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.clients.named_trees import (
    EXPERTS,
    INT4,
    QWEN,
    ZEROS,
    Case,
    all_layers,
    rows_of_trees,
)
from benchmarks.zoo.packages import PACKAGES as ZOO
from jquant.models.config import from_hf
from jquant.models.hf_config import to_hf

NAME = "maxtext"
PYTHON = "3.12"
_OWN = next(package for package in ZOO if package.name == "maxtext")
PACKAGES, BARE = (*_OWN.requirements, "cloudpickle==3.1.3", "jaxtyping==0.3.11"), _OWN.bare
CHILD = Path(__file__).with_name("maxtext_client.py")


def _llama31() -> dict[str, Any]:
    """Frequencies stretched as Llama 3.1's, and another base."""
    from benchmarks.clients.named_trees import network

    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 5e5,
    }  # fmt: skip
    plain = network(Case("maxtext", {}, {}))[0].config
    config = from_hf({**to_hf(plain), "rope_parameters": rope, "rope_theta": 5e5})
    return dict(rope_theta=5e5, rope_divisors=config.rope_divisors)


CASES = {
    "Llama 2, layers stacked": Case("maxtext", {}, all_layers(INT4), scanned=True),
    "Llama 2, tied, table in bfloat16": Case(
        "maxtext", dict(tied=True), all_layers(INT4), bfloat16=True
    ),
    "Llama 2, tied, table in float32": Case(
        "maxtext", dict(tied=True), all_layers(INT4), note="it rounds tied tables to bfloat16"
    ),
    "Llama 2, layers apart": Case("maxtext-unscanned", {}, all_layers(ZEROS)),
    "Llama 3.1, layers stacked": Case("maxtext", _llama31(), all_layers(INT4)),
    "Qwen2, layers stacked": Case("maxtext", dict(qkv_bias=True), all_layers(INT4)),
    "Qwen3, layers stacked": Case("maxtext", QWEN, all_layers(INT4)),
    "Qwen3, layers apart": Case("maxtext-unscanned", QWEN, all_layers(INT4)),
    "Qwen3, experts, layers stacked": Case("maxtext", EXPERTS, all_layers(INT4)),
    "Qwen3, experts, layers apart": Case("maxtext-unscanned", EXPERTS, all_layers(INT4)),
}


def rows(python: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """A row for each case."""
    return rows_of_trees(NAME, CASES, CHILD, python, folder)
