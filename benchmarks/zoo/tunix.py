"""tunix: its Qwen3, Llama 3, Gemma 3 and Qwen3 mixture of experts, small.

`import tunix` brings trainers, data sets and samplers; the models alone need Flax, einops and qwix.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.zoo.data import VOCABULARY, WIDTH, tokens

SIZES = dict(
    num_layers=2, embed_dim=WIDTH, hidden_dim=2 * WIDTH, num_heads=4, num_kv_heads=2,
    head_dim=WIDTH // 4,
)  # fmt: skip


def _models(family: str) -> Any:
    """`tunix.models.FAMILY.model`, the package's own `__init__` being passed over."""
    if "tunix" not in sys.modules:
        package = types.ModuleType("tunix")
        package.__path__ = list(importlib.util.find_spec("tunix").submodule_search_locations)  # type: ignore
        sys.modules["tunix"] = package
    return importlib.import_module(f"tunix.models.{family}.model")


def _split(model: nnx.Module) -> tuple[Any, Any, list[Any]]:
    graph, params = nnx.split(model)

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        rows, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        mask = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
        return nnx.merge(graph, params)(tokens, positions, None, mask)[0]

    return fn, params, tokens()


def qwen3() -> tuple[Any, Any, list[Any]]:
    of = _models("qwen3")
    config = of.ModelConfig(vocab_size=VOCABULARY, rope_theta=10_000, norm_eps=1e-6, **SIZES)
    return _split(of.Qwen3(config, rngs=nnx.Rngs(0)))


def experts() -> tuple[Any, Any, list[Any]]:
    """Qwen3 with 4 experts, 2 to a token."""
    of = _models("qwen3")
    config = of.ModelConfig(
        vocab_size=VOCABULARY, rope_theta=10_000, norm_eps=1e-6, num_experts=4,
        num_experts_per_tok=2, **SIZES,
    )  # fmt: skip
    return _split(of.Qwen3(config, rngs=nnx.Rngs(0)))


def llama3() -> tuple[Any, Any, list[Any]]:
    of = _models("llama3")
    config = of.ModelConfig(vocab_size=VOCABULARY, rope_theta=10_000, norm_eps=1e-5, **SIZES)
    return _split(of.Llama3(config, rngs=nnx.Rngs(0)))


def gemma3() -> tuple[Any, Any, list[Any]]:
    """With windows of 16 tokens."""
    of = _models("gemma3")
    config = of.ModelConfig(
        num_embed=VOCABULARY, sliding_window_size=16, param_dtype=jnp.float32, **SIZES
    )
    return _split(of.Gemma3(config, rngs=nnx.Rngs(0)))


make = qwen3
