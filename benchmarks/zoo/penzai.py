"""Penzai's own Llama and Gemma 2, small; parameters are its variables, by their labels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz
from penzai.models.transformer.variants import llamalike_common

from benchmarks.zoo.data import VOCABULARY, WIDTH, tokens


def _split(model: Any) -> tuple[Any, Any, list[Any]]:
    model, variables = pz.unbind_params(model, freeze=True)
    params = {value.label: value.value for value in variables}

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        bound = [pz.ParameterValue(label=label, value=value) for label, value in params.items()]
        named = pz.nx.wrap(tokens).tag("batch", "seq")
        positions = pz.nx.wrap(jnp.arange(tokens.shape[1])).tag("seq")
        output = pz.bind_variables(model, bound)(named, token_positions=positions)
        return output.untag("batch", "seq", "vocabulary").unwrap()

    return fn, params, tokens()


def _llamalike(**options: Any) -> tuple[Any, Any, list[Any]]:
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2, query_head_multiplier=2, embedding_dim=WIDTH, projection_dim=WIDTH // 4,
        mlp_hidden_dim=2 * WIDTH, num_decoder_blocks=2, vocab_size=VOCABULARY, **options,
    )  # fmt: skip
    return _split(llamalike_common.build_llamalike_transformer(config, jax.random.key(0)))


def make() -> tuple[Any, Any, list[Any]]:
    """Llama."""
    return _llamalike(mlp_variant="swiglu", tie_embedder_and_logits=False)


def gemma2() -> tuple[Any, Any, list[Any]]:
    """Gemma 2, its layers in one stack."""
    return _llamalike(
        mlp_variant="geglu_approx", tie_embedder_and_logits=True, use_post_attn_norm=True,
        use_post_ffw_norm=True, attn_logits_soft_cap=50.0, final_logit_softcap=30.0,
        use_layer_stack=True,
    )  # fmt: skip
