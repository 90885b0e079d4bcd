"""What checkpoints say of rotary positions: done as the formats ask, or refused by the key's name.

Keys of attention and of the whole network that change what it computes are here too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import torch_logits, torch_model, write_gguf

from jquant import models
from jquant.errors import CheckpointError
from jquant.models.config import from_gguf, from_hf

FACTOR = 3.0
HALF = 8  # pairs per head
CONFIG = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
SAID = {
    "general.architecture": "llama", "llama.embedding_length": 64, "llama.block_count": 2,
    "llama.attention.head_count": 4, "llama.feed_forward_length": 96, "llama.context_length": 128,
}  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)


def gguf(**keys: Any) -> models.DecoderConfig:
    """The decoder of a header that says `keys` of the network, in which `__` is a dot."""
    factors = keys.pop("factors", None)
    more = {f"llama.{key.replace('__', '.')}": value for key, value in keys.items()}
    tensors = {} if factors is None else {"rope_freqs.weight": factors}
    return from_gguf(SAID | more, {"token_embd.weight": (96, 64)}, tensors)


def test_an_old_linear_scale_computes_what_pytorch_computes(tmp_path: Path) -> None:
    tokens = np.arange(40, dtype=np.int32)[None] * 7 % 96
    rope = dict(rope_type="linear", factor=FACTOR, rope_theta=1e4)
    model = torch_model(rope_parameters=rope, num_hidden_layers=1)
    expected = torch_logits(model, tokens)
    path = write_gguf(tmp_path / "old.gguf", model, keys={"rope.scale_linear": FACTOR})
    fn, params, _ = models.load(path)
    got = np.asarray(jax.jit(fn)(params, tokens))
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    "keys",
    [
        dict(rope__scale_linear=FACTOR),
        dict(rope__scaling__factor=FACTOR),
        dict(rope__scaling__type="linear", rope__scaling__factor=FACTOR),
        dict(rope__scaling__type="linear", rope__scale_linear=FACTOR),
        dict(rope__scaling__factor=FACTOR, rope__scale_linear=FACTOR),
        dict(rope__scaling__factor=0.0, rope__scale_linear=FACTOR),
        dict(
            rope__scaling__factor=FACTOR, rope__scaling__original_context_length=64,
            rope__scaling__finetuned=True, rope__scaling__attn_factor=1.0,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_every_way_to_say_linear_is_one(keys: dict[str, Any]) -> None:
    assert gguf(**keys).rope_divisors == (FACTOR,) * HALF
    factors = np.linspace(
        1, 8, HALF, dtype=np.float32
    )  # what a file's own tensor says comes on top
    assert gguf(**keys, factors=factors).rope_divisors == tuple(FACTOR * factors)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        dict(rope__scaling__factor=1.0),
        dict(rope__scale_linear=0.0),
        dict(rope__scaling__type="linear"),
        dict(rope__scaling__type="none", rope__scaling__factor=FACTOR),
        dict(attention__sliding_window=128, attention__causal=True, logit_scale=1.0),
    ],
    ids=str,
)
def test_every_way_to_say_nothing_is_one(keys: dict[str, Any]) -> None:
    assert gguf(**keys) == gguf() and gguf().rope_divisors is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(rope__scaling__type="yarn", rope__scaling__factor=4.0), r"llama.rope.scaling.type"),
        (dict(rope__scaling__type="longrope"), r"llama.rope.scaling.type = 'longrope'"),
        (dict(rope__scaling__attn_factor=1.2), r"llama.rope.scaling.attn_factor = '1.2'"),
        (dict(rope__scaling__yarn_ext_factor=1.0), r"llama.rope.scaling.yarn_ext_factor"),
        (dict(rope__scaling__yarn_beta_fast=32.0), r"llama.rope.scaling.yarn_beta_fast"),
        (dict(rope__scaling__alpha=1000.0), r"llama.rope.scaling.alpha"),
        (dict(rope__dimension_sections=np.ones(4, np.int32)), r"llama.rope.dimension_sections"),
        (dict(rope__freq_base_swa=1e4), r"llama.rope.freq_base_swa"),
        (dict(rope__unheard_of=1), r"llama.rope.unheard_of"),
        (dict(rope__scaling__factor=2.0, rope__scale_linear=4.0), r"factor = 2.*scale_linear = 4"),
        (dict(rope__scaling__factor=-1.0), r"scaling.factor = -1.0; expected a positive"),
        (dict(rope__scale_linear=float("nan")), r"scale_linear = nan; expected a positive"),
        (dict(rope__scale_linear=np.ones(2, np.float32)), r"scale_linear.*expected a positive"),
        (dict(attention__sliding_window=16), r"llama.attention.sliding_window = '16'"),
        (dict(attention__scale=0.5), r"llama.attention.scale = '0.5'"),
        (dict(attention__causal=False), r"llama.attention.causal"),
        (dict(attention__temperature_scale=0.1), r"llama.attention.temperature_scale"),
        (dict(logit_scale=0.1), r"llama.logit_scale"),
        (dict(final_logit_softcapping=30.0), r"llama.final_logit_softcapping"),
    ],
    ids=str,
)
def test_gguf_refuses_what_it_would_have_to_ignore(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        gguf(**keys)


def hf(**changes: Any) -> models.DecoderConfig:
    return from_hf(json.loads(json.dumps(CONFIG | changes)))


@pytest.mark.parametrize(
    "settings",
    [
        dict(rope_type="linear", factor=FACTOR, rope_theta=500.0),
        dict(LLAMA3, rope_theta=500.0, original_max_position_embeddings=32),
        dict(rope_type="default", rope_theta=500.0),
    ],
    ids=lambda s: s["rope_type"],
)
def test_old_and_new_spellings_are_one(settings: dict[str, Any]) -> None:
    expected = hf(rope_parameters=settings)
    assert expected.rope_theta == 500.0
    inner = {key: value for key, value in settings.items() if key != "rope_theta"}
    kind = inner.pop("rope_type")
    for name in ("rope_scaling", "rope_parameters"):
        for spelling in (dict(type=kind), dict(rope_type=kind), dict(type=kind, rope_type=kind)):
            assert hf(rope_theta=500.0, **{name: inner | spelling}) == expected
        assert hf(rope_theta=500.0, **{name: inner | dict(type=kind, rope_type=None)}) == expected
    assert hf(rope_scaling=settings, rope_parameters=settings, rope_theta=500.0) == expected
    neutral = dict(partial_rotary_factor=1.0, attention_factor=1.0)
    assert hf(rope_parameters=settings | neutral, partial_rotary_factor=1) == expected


def test_the_trained_context_may_stand_outside() -> None:
    inside = hf(rope_parameters=dict(LLAMA3, original_max_position_embeddings=32))
    outside = hf(rope_parameters=LLAMA3, original_max_position_embeddings=32)
    assert inside == outside != hf(rope_parameters=LLAMA3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({name: {"rope_type": kind, "factor": 2.0}}, f"rope_type = '{kind}'")
            for name in ("rope_scaling", "rope_parameters")
            for kind in ("yarn", "dynamic", "longrope", "su", "mrope", "proportional")
        ],
        (dict(rope_scaling={"factor": 2.0}), r"factor = '2.0'"),  # of no type: transformers ignores
        (dict(rope_scaling={"type": "linear"}), r"factor = None"),
        (dict(rope_parameters=dict(LLAMA3, attention_factor=1.2)), r"attention_factor = '1.2'"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 32}), r"beta_fast"),
        (dict(rope_parameters={"mrope_section": [1, 2]}), r"mrope_section"),
        (dict(partial_rotary_factor=0.5), r"partial_rotary_factor = '0.5'"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), r"partial_rotary_factor = '0.5'"),
        (dict(rope_scaling={"type": "linear", "rope_type": "default"}), r"type = 'linear'"),
        (
            dict(rope_scaling=dict(type="linear", factor=2), rope_parameters=dict(factor=4)),
            r"rope_parameters: factor = '4' and rope_scaling: factor = '2' contradict",
        ),
        (dict(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), r"rope_theta.*contradict"),
        (dict(rope_scaling="linear"), r"rope_scaling = 'linear'"),
    ],
    ids=str,
)  # fmt: skip
def test_hf_refuses_what_it_would_have_to_ignore(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        hf(**changes)
