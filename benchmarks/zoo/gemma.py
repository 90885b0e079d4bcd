"""gemma, Google's own Flax Linen package: its Gemma 3, small, with windows of 16 tokens.

gemma 3.3.0 needs kauldron, which imports TensorFlow for the names of its types, and inherits from a
class that kauldron has no more. No model uses either, so stand-ins serve.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import jax

from benchmarks.zoo.data import VOCABULARY, WIDTH, tokens


def _imported() -> Any:
    """`gemma.gm`, for models alone."""
    if "tensorflow" not in sys.modules and importlib.util.find_spec("tensorflow") is None:
        stand_in = types.ModuleType("tensorflow")
        stand_in.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
        sys.modules["tensorflow"] = stand_in
    from gemma import gm
    from kauldron import kd

    if not hasattr(kd.ckpts, "AbstractPartialLoader"):
        kd.ckpts.AbstractPartialLoader = object
    return gm


def make() -> tuple[Any, Any, list[Any]]:
    gm = _imported()
    kinds = (gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL)
    config = gm.nn.config.TransformerConfig(
        num_embed=VOCABULARY, embed_dim=WIDTH, hidden_dim=2 * WIDTH, num_heads=4, head_dim=16,
        num_kv_heads=2, final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True,
        use_qk_norm=True, attention_types=kinds, sliding_window_size=16,
        transpose_gating_einsum=True,
    )  # fmt: skip
    model, batches = gm.nn.Transformer(config=config), tokens()
    params = model.init(jax.random.key(0), batches[0])
    return lambda params, tokens: model.apply(params, tokens).logits, params, batches
