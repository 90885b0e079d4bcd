"""MaxText's decoder (Llama 2's and Qwen 3's blocks), small: layers scanned, stacked on axis 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import maxtext
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.models import models
from maxtext.utils import maxtext_utils

from benchmarks.zoo.data import LENGTH, VOCABULARY, WIDTH, tokens


def _decoder(block: str, **options: Any) -> tuple[Any, Any, list[Any]]:
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    config = pyconfig.initialize(
        ["", str(base)], decoder_block=block, run_name="zoo", hardware="cpu",
        skip_jax_distributed_system=True, enable_checkpointing=False, log_config=False,
        attention="dot_product", dtype="float32", weight_dtype="float32", per_device_batch_size=1,
        max_target_length=LENGTH, vocab_size=VOCABULARY, base_emb_dim=WIDTH, base_num_query_heads=4,
        base_num_kv_heads=2, base_mlp_dim=2 * WIDTH, head_dim=WIDTH // 4, base_num_decoder_layers=3,
        remat_policy="full", scan_layers=True, **options,
    )  # fmt: skip
    mesh = maxtext_utils.get_mesh_from_config(config)
    model = models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        network = nnx.merge(graph, params, rest)
        return network(tokens, positions, jnp.ones_like(positions), enable_dropout=False)

    return fn, params, tokens()


def make() -> tuple[Any, Any, list[Any]]:
    return _decoder("llama2")


def qwen3() -> tuple[Any, Any, list[Any]]:
    return _decoder("qwen3", use_qk_norm=True)
