"""Weights that engines multiply as one are told where they are of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_export import quantized

import jquant as jq
from jquant import exporters
from jquant.exporters.described import Described
from jquant.exporters.fused import notes_of
from jquant.grids import NV, Uniform
from jquant.models import Decoder, DecoderConfig

GROUPS = jq.Scheme(Uniform(4)).grouping
FOUR, EIGHT = (Described((32, 32), Uniform(bits), GROUPS) for bits in (4, 8))
NVFP4 = Described((32, 32), NV(), jq.Scheme(NV()).grouping, of_tensor=True)
FOURS, EIGHTS = (jq.Scheme(Uniform(bits), 16) for bits in (4, 8))
QKV = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
MLP = [f"layers/mlp/{part}/kernel[1][2]" for part in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (dict.fromkeys(QKV + MLP, FOUR), ""),
        (
            {QKV[0]: FOUR, QKV[1]: FOUR, QKV[2]: EIGHT},
            r"q_proj.weight', k and v .*bits=8.*by one scheme",
        ),
        ({QKV[0]: FOUR, QKV[1]: FOUR}, "Uniform.*, kept"),
        ({MLP[0]: FOUR, MLP[2]: EIGHT}, r"'layers/mlp/gate/kernel\[1\]\[2\]' and up as one"),
        ({MLP[2]: FOUR}, ""),
        (dict.fromkeys(QKV + MLP, NVFP4), "the largest of their tensors' scales.*and 1 more"),
        ({}, ""),
    ],
)
def test_what_is_told(weights: Any, message: str) -> None:
    notes = notes_of("compressed-tensors", QKV + MLP, weights)
    if not message:
        assert notes == ()
        return
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(*notes)
    assert notes_of("mlx", QKV + MLP, weights) == ()


def test_plans_and_exports_say_the_same(tmp_path: Path) -> None:
    fn = Decoder(DecoderConfig(48, 32, 32, 2, heads=4, kv_heads=4))
    params = fn.init(jax.random.key(0))
    plan = jq.plan(
        jq.find_weights(fn, params, jnp.zeros((1, 4), jnp.int32)),
        {".*/v/.*": EIGHTS, "layers.*": FOURS, ".*": jq.keep},
    )
    (note,) = exporters.need_held(fn, plan, "compressed-tensors")
    assert "'layers/0/attention/q/kernel', k and v" in note and "and 1 more such" in note
    qparams = quantized(params, FOURS)
    assert jq.export(fn, qparams, tmp_path / "one").notes == ()
    qparams = quantized(params, FOURS, "layers/.*/(?!v/)[a-z]+/kernel")
    qparams = quantized(qparams, EIGHTS, ".*/v/kernel")
    assert jq.export(fn, qparams, tmp_path / "two").notes == (note,)
