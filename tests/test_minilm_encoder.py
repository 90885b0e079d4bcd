"""The benchmark's sentence encoder: `transformers`' own agrees, padding leaves no evidence."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import jquant as jq

pytestmark = pytest.mark.optimized

encoder = pytest.importorskip("benchmarks.minilm_encoder")  # not part of the source distribution

LENGTHS = np.array([9, 4, 4])
MASK = np.arange(9) < LENGTHS[:, None]
TOKENS = np.where(MASK, np.random.default_rng(0).integers(1, 50, (3, 9)), 0).astype(np.int32)
ENCODE = partial(encoder.encode, heads=4)


@pytest.fixture(scope="module")
def model() -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=16, layer_norm_eps=1e-12,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = 0.3 * torch.randn(value.shape, generator=generator)
            value.copy_(1 + noise if name.endswith("LayerNorm.weight") else noise)
    return model


@pytest.fixture(scope="module")
def params(model: Any) -> dict[str, Any]:
    return encoder.from_bert({name: value.numpy() for name, value in model.state_dict().items()})


def test_equals_the_reference(model: Any, params: dict[str, Any]) -> None:
    vectors = jax.jit(ENCODE)(params, TOKENS, MASK)
    np.testing.assert_allclose(vectors, encoder.torch_vectors(model, TOKENS, MASK), atol=2e-6)


def test_a_row_of_padding_is_finite_and_changes_no_other(params: dict[str, Any]) -> None:
    wider = np.pad(TOKENS, ((0, 1), (0, 3))), np.pad(MASK, ((0, 1), (0, 3)))
    vectors = jax.jit(ENCODE)(params, *wider)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(vectors[:3], jax.jit(ENCODE)(params, TOKENS, MASK), atol=2e-6)


def test_evidence_is_of_real_tokens_only(params: dict[str, Any]) -> None:
    weights = jq.find_weights(ENCODE, params, TOKENS, MASK)
    linears = [path for path in weights if path.endswith("kernel")]
    assert len(linears) == 2 * 6
    padded = jq.capture(ENCODE, params, [(TOKENS, MASK)], paths=linears)
    rows = zip(TOKENS, MASK, LENGTHS, strict=True)
    trimmed = [(t[None, :n], m[None, :n]) for t, m, n in rows]
    alone = jq.capture(ENCODE, params, trimmed, paths=linears)
    for path in linears:
        moment = alone[path].second_moment
        np.testing.assert_allclose(padded[path].second_moment, moment, atol=1e-4 * moment.max())
        assert (float(alone[path].count), float(padded[path].count)) == (LENGTHS.sum(), MASK.size)
    for layer in "01":
        shared = {id(padded[f"layers/{layer}/{name}/kernel"].second_moment) for name in "qkv"}
        assert len(shared) == 1
