"""Exports of models that run their own PyTorch code: names as the original folder has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import torch_model

import jquant as jq
from jquant import models
from jquant.errors import CheckpointError, ExportError, FormatError
from jquant.grids import Uniform

pytest.importorskip("torchax")
TOKENS = jnp.zeros((1, 4), jnp.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original")
    torch_model(tie_word_embeddings=True).save_pretrained(path)
    return path


def quantized(fn: Any, params: Any, *rules: str) -> Any:
    scheme = jq.Scheme(Uniform(4, scale_dtype="float16"), 32)
    plan = {**dict.fromkeys(rules, scheme), ".*": jq.keep}
    return jq.quantize(fn, params, jq.plan(jq.find_weights(fn, params, TOKENS), plan))[0]


@pytest.mark.slow
def test_the_same_folder_by_either_way(folder: Path, tmp_path: Path) -> None:
    """The decoder and PyTorch's code have the same weights, and so have their exports."""
    bytes_of = []
    for backend, rule in (("jax", "layers/.*kernel"), ("torch", ".*proj.weight")):
        fn, params, _ = models.load(folder, backend=backend)
        out = tmp_path / backend
        done = jq.export(fn, quantized(fn, params, rule), out, format="gptq", like=folder)
        assert len(done.weights) == 14
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        tensors = models.load(out, quantized="keep")[1]
        bytes_of.append(tensors["layers"]["1"]["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(bytes_of[0].codes, bytes_of[1].codes)
    np.testing.assert_array_equal(bytes_of[0].params["scale"], bytes_of[1].params["scale"])


def test_linear_layers_that_are_left_are_told(folder: Path, tmp_path: Path) -> None:
    fn, params, _ = models.load(folder, backend="torch")
    qparams = quantized(fn, params, ".*mlp.*proj.weight")
    jq.export(fn, qparams, tmp_path / "out", like=folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert len(ignored) == 9 and {"lm_head", "model.layers.1.self_attn.q_proj"} <= set(ignored)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM by its own code: pass like="):
        jq.export(fn, qparams, tmp_path / "other")
    table = quantized(fn, params, "model.embed_tokens.weight")
    with pytest.raises(FormatError, match="'model.embed_tokens.weight': .*linear layers alone"):
        jq.export(fn, table, tmp_path / "other", like=folder)


@pytest.mark.slow
def test_experts_that_were_put_together_are_not_taken_apart(tmp_path: Path) -> None:
    sizes = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    torch_model("Qwen3Moe", **sizes).save_pretrained(tmp_path / "original")
    fn, params, _ = models.load(tmp_path / "original", backend="torch")
    with pytest.raises(ExportError, match="experts.* is made of several tensors"):
        jq.export(fn, params, tmp_path / "out", format="safetensors", like=tmp_path / "original")
    assert not (tmp_path / "out").exists()
