"""Exports: what is written is what was there, bit for bit, or nothing is written and it is told."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import kill_export
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jquant as jq
from jquant import exporters, models
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.errors import CheckpointError, ExportError, FormatError, TreeError
from jquant.exporters import beside, exporting, shards
from jquant.exporters.described import Described
from jquant.exporters.targets import TARGETS, held
from jquant.formats.base import Codec, formula
from jquant.grids import GGUF, HQQ, MX, NF4, NV, Float, Power, Uniform, code_dtype
from jquant.grids.grouped import Grouped
from jquant.models import hf_config
from jquant.models.config import DecoderConfig, from_hf
from jquant.models.decoder import Decoder
from jquant.models.families import HF
from jquant.models.hf_config import to_hf
from jquant.weights.inputs import Inputs
from jquant.weights.qtensor import LowRank, QTensor

SMALL = DecoderConfig(vocab=48, width=64, hidden=96, layers=2, heads=4, kv_heads=2)
EXPERTS = replace(SMALL, experts=3, experts_used=2, qk_norm="head", hidden=32)
INPUTS = jq.Activations(Uniform(8, symmetric=True))
FP8_INPUTS = jq.Activations(Float(4, 3, scale="float32"))
HALF = dict(scale_dtype="float16")

# Per format some of what it holds, and how it says so.
HELD: dict[str, tuple[str, jq.Scheme, str]] = {
    "w4a16": ("compressed-tensors", jq.Scheme(Uniform(4, True), 32), "pack-quantized"),
    "w4a16, zeros": ("compressed-tensors", jq.Scheme(Uniform(4, **HALF), 32), "pack-quantized"),
    "w8a16": ("compressed-tensors", jq.Scheme(Uniform(8, True)), "pack-quantized"),
    "w3a16": ("compressed-tensors", jq.Scheme(Uniform(3, **HALF), 16), "pack-quantized"),
    "signed": ("compressed-tensors", jq.Scheme(Uniform(4, True, "S4"), 32), "pack-quantized"),
    "w8a8": (
        "compressed-tensors", jq.Scheme(Uniform(8, True), activations=INPUTS), "int-quantized",
    ),
    "w4a8": (
        "compressed-tensors",
        jq.Scheme(Uniform(4, scale_dtype="bfloat16"), 32, activations=INPUTS), "int-quantized",
    ),
    "w4 fp8": (
        "compressed-tensors", jq.Scheme(Uniform(4, True), 32, activations=FP8_INPUTS),
        "pack-quantized",
    ),
    "fp8": ("compressed-tensors", jq.presets.fp8(), "float-quantized"),
    "fp8, groups": ("compressed-tensors", jq.presets.fp8(32), "float-quantized"),
    "w8a8 fp8": ("compressed-tensors", jq.presets.w8a8_fp8(), "float-quantized"),
    "nvfp4": ("compressed-tensors", jq.presets.nvfp4(), "nvfp4-pack-quantized"),
    "mxfp4": ("compressed-tensors", jq.presets.mxfp4(), "mxfp4-pack-quantized"),
    "gptq": ("gptq", jq.Scheme(Uniform(4, **HALF), 32), "GPTQ v1"),
    "gptq, 3 bits": ("gptq", jq.Scheme(Uniform(3, **HALF), 32), "GPTQ v1"),
    "gptq, symmetric": ("gptq", jq.Scheme(Uniform(8, True, **HALF)), "GPTQ v1"),
    "gptq, signed": ("gptq", jq.Scheme(Uniform(4, True, "S4", **HALF), 32), "GPTQ v1"),
    "gptq v2": ("gptq_v2", jq.Scheme(Uniform(2, **HALF), 16), "GPTQ v2"),
    "awq": ("awq", jq.Scheme(Uniform(4, convention="A2", **HALF), 32), "AWQ"),
    "awq, symmetric": ("awq", jq.Scheme(Uniform(4, True, **HALF), 32), "AWQ"),
    "arrays": ("safetensors", jq.Scheme(NF4, 64), "array"),
}  # fmt: skip
each = pytest.mark.parametrize("name", HELD)


def quantized(params: Any, scheme: jq.Scheme, pattern: str = r"layers/.*kernel") -> Any:
    """Parameters of a decoder with random codes and scales in place of kernels: no program is
    compiled for them."""
    grid, rng = Grouped(scheme.grid, scheme.grouping), np.random.default_rng(0)

    def parameter(name: str, like: Any) -> np.ndarray:
        if np.dtype(like.dtype).name[0] in "iu":
            return rng.integers(0, scheme.grid.codes[1] + 1, like.shape).astype(like.dtype)
        values = 2.0 ** rng.integers(-4, 4, like.shape) * (1 if name == "scale" else 0.3)
        return values.astype(like.dtype)

    def of(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not re.fullmatch(pattern, name) or "router" in name:
            return leaf
        at = leaf.ndim - 2
        inner = at if name.endswith("kernel") else at + 1
        layout = Layout.of(leaf.shape, batch_axes=range(at), in_axes=(inner,))
        w = jax.eval_shape(layout.canonical, leaf)
        kinds: Any = jax.eval_shape(grid.fit, w)
        own: Any = {name: parameter(name, kinds[name]) for name in sorted(kinds)}
        low, high = scheme.grid.codes
        codes: Any = rng.integers(low, high + 1, w.shape).astype(code_dtype(scheme.grid))
        inputs = None if scheme.activations is None else Inputs(scheme.activations)
        return QTensor(codes, own, scheme.grid, scheme.grouping, layout, leaf.dtype, None, inputs)

    return jax.tree_util.tree_map_with_path(of, params)


@pytest.fixture(scope="module")
def decoder() -> tuple[Decoder, Any]:
    fn = Decoder(SMALL)
    return fn, fn.init(jax.random.key(0))


def bits(array: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)


def weights_of(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, QTensor))
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}


# What is written is what was there


@each
def test_what_is_read_back_is_what_was_quantized(name: str, decoder: Any, tmp_path: Path) -> None:
    (fn, params), (target, scheme, kind) = decoder, HELD[name]
    qparams = quantized(params, scheme)
    done = jq.export(fn, qparams, tmp_path / "out", format=target)
    assert set(done.weights.values()) == {kind} and len(done.weights) == 14
    keep: Any = "dequantize" if target == "safetensors" else "keep"
    again, back, _ = models.load(tmp_path / "out", quantized=keep)
    assert again.config == fn.config
    before, after = weights_of(qparams), weights_of(back)
    assert set(before) == set(after)
    for path, q in before.items():
        other = after[path]
        if isinstance(q, QTensor) and isinstance(other, QTensor):
            same_codes(q, other)
        else:
            np.testing.assert_array_equal(bits(jq.dequantize(q)), bits(other))


def same_codes(q: QTensor, other: QTensor) -> None:
    """Two weights are the same: codes (from zero), scales, and the numbers they stand for."""
    low, least = q.grid.codes[0], other.grid.codes[0]
    np.testing.assert_array_equal(
        np.asarray(q.codes).astype(int) - (low if isinstance(q.grid, Uniform) else 0),
        np.asarray(other.codes).astype(int) - (least if isinstance(q.grid, Uniform) else 0),
    )
    np.testing.assert_array_equal(bits(q.params["scale"]), bits(other.params["scale"]))
    if "zero" in q.params or "zero" in other.params:
        zeros = [
            np.asarray(x.params.get("zero", 0)).astype(int) - x.grid.codes[0] for x in (q, other)
        ]
        assert (zeros[0] == zeros[1]).all()
    if "tensor" in q.params:  # NVFP4's is stored as its inverse
        inverse = 1 / np.asarray(q.params["tensor"])
        np.testing.assert_array_equal(bits(inverse), bits(other.params["divisor"]))
    assert q.layout == other.layout and q.shape == other.shape
    assert (q.activations is None) == (other.activations is None)
    if q.activations is not None and other.activations is not None:
        mine, theirs = q.activations.choice, other.activations.choice
        assert (formula(mine.grid), mine.granularity) == (formula(theirs.grid), theirs.granularity)


@pytest.mark.parametrize("scan", [False, True])
def test_stacks_of_layers_and_experts_are_taken_apart(scan: bool, tmp_path: Path) -> None:
    fn = Decoder(EXPERTS, scan_layers=scan)
    qparams = quantized(fn.init(jax.random.key(1)), jq.Scheme(Uniform(4, **HALF), 32))
    done = jq.export(fn, qparams, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert len(done.weights) == 2 * (4 + 3 * 3)
    first = "layers/mlp/down/kernel[1][2]" if scan else "layers/1/mlp/down/kernel[2]"
    assert first in done.weights
    ignored = config["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    _, back, _ = models.load(tmp_path / "out", scan_layers=scan, quantized="keep")
    for path, leaf in weights_of(qparams).items():
        other = weights_of(back)[path]
        if isinstance(leaf, QTensor):
            same_codes(leaf, other)
        else:
            np.testing.assert_array_equal(bits(leaf), bits(other))


def test_kinds_side_by_side_are_told_by_name(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.presets.fp8(), r"layers/0/.*kernel")
    qparams = quantized(qparams, jq.Scheme(Uniform(4, True), 32), r"layers/1/mlp/.*kernel")
    jq.export(fn, qparams, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    floats, integers = config["config_groups"].values()
    assert len(floats["targets"]) == 7 and floats["format"] == "float-quantized"
    assert "model.layers.1.mlp.down_proj" in integers["targets"]
    assert "model.layers.1.self_attn.q_proj" in config["ignore"]
    with pytest.raises(FormatError, match="float-quantized|gptq cannot hold"):
        jq.export(fn, qparams, tmp_path / "other", format="gptq")


def test_modules_that_gptq_and_awq_leave(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, **HALF), 32), r"layers/.*mlp/.*kernel")
    for target in ("gptq", "awq"):
        jq.export(fn, qparams, tmp_path / target, format=target)
    gptq, awq = (
        json.loads((tmp_path / target / "config.json").read_text())["quantization_config"]
        for target in ("gptq", "awq")
    )
    rule = next(iter(gptq["dynamic"]))
    assert rule.startswith("-:") and re.match(rule[2:], "model.layers.0.self_attn.q_proj")
    assert "model.layers.0.self_attn.q_proj" in awq["modules_to_not_convert"]


def test_a_network_as_its_file_has_it(tmp_path: Path) -> None:
    """Fused projections, offsets of norms, tied heads."""
    fused = replace(SMALL, fused=True, norm_eps=1e-5)
    gemma = replace(
        SMALL, norms="both", activation="gelu_tanh", embed_scale=8.0, attention_scale=0.25,
        tied=True, norm_eps=1e-6, attention_cap=50.0, logits_cap=30.0,
    )  # fmt: skip
    for config, tensor in ((fused, "self_attn.qkv_proj"), (gemma, "post_feedforward_layernorm")):
        fn = Decoder(config)
        params = fn.init(jax.random.key(2))
        done = jq.export(fn, quantized(params, jq.Scheme(Uniform(4, True), 32)), tmp_path / tensor)
        assert any(tensor in name for name in (*done.weights.values(), *done.kept)) or fused
        stored = load_file(tmp_path / tensor / "model.safetensors")
        assert any(tensor in name for name in stored)
    norm = np.asarray(params["norm"]["scale"]) - 1
    np.testing.assert_array_equal(stored["model.norm.weight"], norm)
    config = json.loads((tmp_path / tensor / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


# The original folder


CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16", "note": "is kept",
}  # fmt: skip


def original(folder: Path, decoder: Any) -> Path:
    """A folder of bfloat16 tensors."""
    fn, params = decoder
    jq.export(fn, params, folder / "plain", format="safetensors")
    tensors = load_file(folder / "plain" / "model.safetensors")
    (folder / "original").mkdir()
    path = folder / "original" / "model.safetensors"
    save_file({name: t.astype("bfloat16") for name, t in tensors.items()}, path)
    (folder / "original" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "original" / "generation_config.json").write_text('{"eos_token_id": 7}')
    return folder / "original"


def test_the_original_gives_its_config_and_its_dtypes(decoder: Any, tmp_path: Path) -> None:
    like = original(tmp_path, decoder)
    fn, params, _ = models.load(like, lazy=True)
    changed = {**params, "norm": {"scale": jnp.full(64, 1 / 3, jnp.float32)}}
    whole = {**jq.realize(changed)}
    qparams = quantized(whole, jq.Scheme(Uniform(4, True), 32))
    jq.export(fn, qparams, tmp_path / "out", like=like)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == "bfloat16"
    assert tensors["model.norm.weight"].dtype == np.float32  # bfloat16 has not these values
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["note"] == "is kept" and config["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": 7}'


def test_leaves_may_be_lazy(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True, **HALF), 32))
    models.save_quantized(tmp_path / "ours", fn, qparams)
    _, lazy, _ = models.load(tmp_path / "ours", lazy=True)
    for target in ("compressed-tensors", "gptq", "safetensors"):
        for name, tree in (("lazy", lazy), ("whole", qparams)):
            jq.export(fn, tree, tmp_path / name / target, format=target)
        one, other = (
            (tmp_path / name / target / "model.safetensors").read_bytes()
            for name in ("lazy", "whole")
        )
        assert one == other


def test_large_models_come_in_shards(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(3, True), 32))
    jq.export(fn, qparams, tmp_path / "one")
    done = jq.export(fn, qparams, tmp_path / "many", max_shard_bytes=10_000)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes
    joined = {k: v for file in files for k, v in load_file(tmp_path / "many" / file).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert set(joined) == set(whole) == set(index["weight_map"])
    assert all(np.array_equal(bits(joined[name]), bits(whole[name])) for name in whole)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"qkv_bias": True}, {"qkv_bias": True, "out_bias": True}, {"qk_norm": "head"},
        {"qk_norm": "all", "norms": "post"}, {"fused": True, "rotary": 8}, {"windows": (7, 7)},
        {"rope_divisors": (2.0,) * 8}, {"rope_theta": 5e5, "tied": True},
        {"embed_scale": 3.0, "residual_scale": 0.5, "logits_divisor": 2.0, "attention_scale": 0.3},
        {"qk_norm": "head", "experts": 4, "experts_used": 2, "renormalized": False},
        {"norms": "both", "activation": "gelu_tanh", "embed_scale": 8.0, "windows": (8, 0),
         "attention_scale": 24.0**-0.5},
        {"norms": "both", "activation": "gelu_tanh", "embed_scale": 8.0, "windows": (8, 0),
         "attention_scale": 0.25, "qk_norm": "head", "window_theta": 1e4, "rope_theta": 1e6},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_is_told_from_the_numbers(changes: dict[str, Any]) -> None:
    config = replace(SMALL, **changes)
    written = json.loads(json.dumps(to_hf(config)))
    assert from_hf(written) == config
    assert "intermediate_size" in written  # mlx-lm wants it of networks that are all experts too


def test_the_class_is_the_one_that_transformers_has() -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    for kind, family in HF.items():
        config = hf_config._written(family, SMALL)
        assert config["architectures"] == [auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]


def test_numbers_of_no_family_need_a_folder(tmp_path: Path) -> None:
    fn = Decoder(replace(SMALL, rope_divisors=(1.0, 2.0, *(3.0,) * 6)))
    with pytest.raises(CheckpointError, match="no config.json can be told.*pass like="):
        jq.export(fn, fn.init(jax.random.key(0)), tmp_path / "out", format="safetensors")


# What a format cannot hold


UNHELD = {
    "a codebook": jq.Scheme(NF4, 64),
    "powers": jq.Scheme(Power(4), 64),
    "a block type": jq.Scheme(GGUF("Q4_1"), 32),
    "zeros between codes": jq.Scheme(Uniform(4, range=HQQ(), **HALF), 32),
    "any zeros": jq.Scheme(Uniform(8, convention="A3", **HALF), 32),
    "odd levels": jq.Scheme(Uniform(4, True, "S5", **HALF), 32),
    "groups of outputs": jq.presets.int4_per_input(32),
    "a ragged group": jq.Scheme(Uniform(4, True, **HALF), 24),
    "E5M2": jq.Scheme(Float(5, 2, scale="float32")),
    "MXFP8": jq.Scheme(MX("E4M3")),
    "MXFP6": jq.Scheme(MX("E2M3")),
    "macro blocks": jq.Scheme(MX(macro=4)),
    "no scale": jq.Scheme(Float(4, 3)),
    "static inputs": jq.Scheme(
        Uniform(8, True), activations=jq.Activations(Uniform(8, True), "static")
    ),
    "narrow inputs": jq.Scheme(Uniform(8, True), activations=jq.Activations(Uniform(6, True))),
    "integer inputs of floats": jq.Scheme(Float(4, 3, scale="float32"), activations=INPUTS),
    "inputs of NVFP4": jq.Scheme(NV(), activations=FP8_INPUTS),
    "a low rank": jq.Scheme(Uniform(4, True, **HALF), 32, compensation=jq.LoRC(2)),
}
GRIDS = (
    *(Uniform(b, s, scale_dtype=d) for b in (2, 5, 8) for s in (True, False)
      for d in ("float16", "float32")),
    Float(4, 3, scale="bfloat16"), Float(5, 2, scale="float32"), MX(), NV(), MX("E5M2"), NF4,
    Float(2, 1, scale="float32"), Power(3), GGUF("Q6_K"),
)  # fmt: skip


EVERYTHING = ("safetensors", "orbax")  # hold whatever there is, or nearly


def described(scheme: jq.Scheme, shape: tuple[int, int] = (64, 96)) -> Described:
    parts = () if scheme.compensation is None else ("LoRC",)
    return Described(shape, scheme.grid, scheme.grouping, scheme.activations, parts)


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in EVERYTHING])
def test_what_is_advised_can_be_had(target: str) -> None:
    """Whatever a format refuses, it holds what it names in its place."""
    schemes = [described(scheme) for scheme in UNHELD.values()]
    sizes = (None, 24, 32, 50, 200)
    schemes += [
        Described((64, 96), grid, Groups(axis, size), inputs)
        for grid, size, axis, inputs in itertools.product(
            GRIDS, sizes, ("in", "out"), (None, INPUTS, FP8_INPUTS)
        )
    ]
    refused = 0
    for scheme in schemes:
        try:
            TARGETS[target].hold(scheme)
        except FormatError as error:
            refused += 1
            instead = TARGETS[target].nearest(scheme)
            assert instead is not None, error
            TARGETS[target].hold(instead)
    assert refused > len(UNHELD)


@pytest.mark.parametrize("scan", [False, True])
def test_a_plan_is_described_as_its_weights_are(scan: bool) -> None:
    fn = Decoder(SMALL, scan_layers=scan)
    params = fn.init(jax.random.key(0))
    weights = jq.find_weights(fn, params, jnp.zeros((1, 4), jnp.int32))
    scheme = jq.Scheme(Uniform(8, True, **HALF), 32, activations=INPUTS)
    plan = jq.plan(weights, {"layers/.*": scheme, ".*": jq.keep})
    after = weights_of(quantized(params, scheme))
    for path in plan:
        assert Described.planned(plan.weights[path], plan[path]) == Described.of(after[path])
    exporters.need_held(fn, plan, "compressed-tensors")
    with pytest.raises(FormatError, match="'layers/.*': gptq cannot hold quantized inputs"):
        exporters.need_held(fn, plan, "gptq")
    table = jq.plan(weights, {"embed.*": jq.Scheme(Uniform(8, True)), ".*": jq.keep})
    with pytest.raises(FormatError, match="'embed/embedding': .*linear layers alone"):
        exporters.need_held(fn, table, "compressed-tensors")


@pytest.mark.parametrize("name", UNHELD)
def test_what_no_format_holds_is_refused_before_anything_is_written(
    name: str, decoder: Any, tmp_path: Path
) -> None:
    fn, params = decoder
    scheme = UNHELD[name]
    plain = replace(scheme, compensation=None, activations=None)
    shape = (64, 64)
    for target in ("compressed-tensors", "gptq", "awq"):
        with pytest.raises(FormatError, match=r"'down': .* cannot hold .*(the nearest|keep)"):
            held(TARGETS[target], "down", described(scheme, shape))
    if scheme.grouping.axis == "out" or isinstance(scheme.grid, GGUF):
        return
    q = quantized(params, plain, "layers/1/attention/out/kernel")
    leaf = q["layers"]["1"]["attention"]["out"]["kernel"]
    if scheme.compensation is not None:
        leaf = replace(leaf, compensation=LowRank(jnp.ones((64, 1)), jnp.ones((1, 64))))
    if scheme.activations is not None:
        leaf = replace(leaf, activations=Inputs(scheme.activations))
    q["layers"]["1"]["attention"]["out"]["kernel"] = leaf
    with pytest.raises(FormatError, match=r"'layers/1/attention/out/kernel': .* cannot hold "):
        jq.export(fn, q, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"format": "gguf2"}, FormatError, "'gguf2' cannot be written; supported: compressed"),
        ({"like": "nowhere"}, CheckpointError, "there is no config.json"),
        ({"max_shard_bytes": 0}, ValueError, "max_shard_bytes must be"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], kind: Any, message: str, decoder: Any, tmp_path: Path
) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True), 32))
    with pytest.raises(kind, match=message):
        jq.export(fn, qparams, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_another_network_or_function_is_refused(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True), 32))
    like = original(tmp_path, decoder)
    (like / "config.json").write_text(json.dumps({**CONFIG, "rms_norm_eps": 1e-3}))

    def refused(kind: Any, message: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            jq.export(*arguments, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(CheckpointError, r"another network than fn \(norm_eps", fn, qparams, like=like)
    refused(ExportError, "only models that jquant.models.load gives", lambda p, x: x, qparams)
    refused(FormatError, "nothing is quantized", fn, params)
    refused(TreeError, "'norm/scale' is missing", fn, {**params, "norm": {}})
    refused(TreeError, "'more' is none of", fn, {**params, "more": jnp.ones(2)})
    refused(TreeError, "'norm/scale' has shape", fn, {**params, "norm": {"scale": jnp.ones(2)}})
    table = quantized(params, jq.Scheme(Uniform(4, True), 16), "embed/embedding")
    refused(FormatError, "'embed/embedding': .*linear layers alone; keep", fn, table)
    jq.export(fn, table, tmp_path / "table", format="safetensors")
    mixed = quantized(qparams, jq.Scheme(Uniform(4, True, **HALF), 16), "layers/0/.*kernel")
    mixed = quantized(params, jq.Scheme(Uniform(4, **HALF), 32), "layers/0/.*kernel")
    mixed = quantized(mixed, jq.Scheme(Uniform(4, **HALF), 16), "layers/1/.*kernel")
    refused(FormatError, "gptq holds all weights alike; .*layers/1", fn, mixed, format="gptq")


# The folder appears whole, or not at all


def written_at(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Writing a tensor fails at the `count`-th of them."""
    turns = itertools.count()

    def put(*arguments: Any) -> None:
        if next(turns) == count:
            raise error
        original_put(*arguments)

    original_put = shards._put
    monkeypatch.setattr(shards, "_put", put)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_full_disk_or_a_stop_leaves_what_was_there(
    error: BaseException, earlier: bool, decoder: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True), 32))
    if earlier:
        jq.export(fn, qparams, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes() if earlier else b""
    is_full = isinstance(error, OSError)
    for count in (0, 1, 9):
        with monkeypatch.context() as patch:
            written_at(patch, count, error)
            told = (ExportError, r"out: the disk is full .*; \d{5} bytes") if is_full else ()
            with pytest.raises(*(told[:1] or (type(error),)), match=told[1] if told else None):
                jq.export(fn, qparams, tmp_path / "out", force=True)
        assert [p.name for p in tmp_path.iterdir()] == (["out"] if earlier else [])
    if earlier:
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        assert exporters.edited(tmp_path / "out") == []


@pytest.mark.parametrize("place", ["config.json", "replace", "need_same"])
def test_errors_after_the_tensors_leave_nothing(
    place: str, decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn, params = decoder

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EIO, "gone")

    name = {"config.json": "pathlib.Path.write_text", "replace": "os.replace"}.get(place)
    monkeypatch.setattr(name or "jquant.exporters.load_back.need_same", fail)
    with pytest.raises(OSError, match="gone"):
        jq.export(fn, quantized(params, jq.Scheme(Uniform(4, True), 32)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_gguf_disk_and_one_with_less_room(
    decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True, **HALF), 32))

    def full(*arguments: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFWriter.write_tensor_data", full)
        with pytest.raises(ExportError, match=r"m.gguf: the disk is full \(Disk quota"):
            jq.export(fn, qparams, tmp_path / "m.gguf", format="gguf")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    for name, form in (("out", "compressed-tensors"), ("m.gguf", "gguf")):
        with pytest.raises(ExportError, match=rf"{name}: \d+ bytes are to be .* 1000 are free"):
            jq.export(fn, qparams, tmp_path / "new" / name, format=form)
    assert list(tmp_path.iterdir()) == []


# What a process that is killed leaves behind


posix = pytest.mark.skipif(os.name != "posix", reason="needs locks")


@posix
def test_what_was_left_behind_is_cleared_by_the_next_export(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True, **HALF), 32))
    left = [tmp_path / f".out.0123456{k}.tmp" for k in range(3)]
    others = [tmp_path / name for name in (".out.tmp", ".outer.01234567.tmp", ".out.0123.tmp")]
    for folder in (*left, *others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
    (tmp_path / ".m.gguf.01234567.part").write_bytes(b"half of it")
    with beside.locked(left[0]) as is_mine:  # as a process that still writes has it
        assert is_mine
        jq.export(fn, qparams, tmp_path / "out")
        jq.export(fn, qparams, tmp_path / "m.gguf", format="gguf")
    assert {p.name for p in tmp_path.iterdir()} == {
        "out", "m.gguf", left[0].name, *(other.name for other in others)
    }  # fmt: skip


@posix
def test_an_old_export_is_put_back(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True), 32))
    jq.export(fn, qparams, tmp_path / "out")
    os.replace(tmp_path / "out", tmp_path / ".out.01234567.old")
    with pytest.raises(ExportError, match="earlier export"):
        jq.export(fn, qparams, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert exporters.edited(tmp_path / "out") == []


@posix
def test_half_of_an_old_export_is_not_put_back(
    decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it deletes the export that it has replaced."""
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True), 32))
    jq.export(fn, qparams, tmp_path / "out")

    def half(path: Path, **options: Any) -> None:
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            jq.export(fn, qparams, tmp_path / "out", force=True)
    os.replace(tmp_path / "out", tmp_path / "away")
    beside.clear(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["away"]
    assert exporters.edited(tmp_path / "away") == []


def test_a_name_that_another_takes_away_is_not_used(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        if len(made) > 1:
            path.mkdir()

    with beside.beside(tmp_path / "out", "tmp", make) as path:
        assert path == made[1] and path.is_dir()


@pytest.mark.slow
@posix
@pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
def test_killed_while_writing(form: str, tmp_path: Path) -> None:
    """At moments spread over an export; `python tests/kill_export.py 50` does it fifty times."""
    command = [sys.executable, kill_export.__file__, "3", form, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == 0


def test_only_an_earlier_export_is_replaced(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True), 32))
    (tmp_path / "out").mkdir()
    jq.export(fn, qparams, tmp_path / "out")
    with pytest.raises(ExportError, match="earlier export; pass force=True"):
        jq.export(fn, qparams, tmp_path / "out")
    jq.export(fn, qparams, tmp_path / "out", format="safetensors", force=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="no export of jquant; give another name"):
        jq.export(fn, qparams, tmp_path / "theirs", force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is there already"):
        jq.export(fn, qparams, tmp_path / "file", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out", "theirs"]


def test_what_was_edited_is_told(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    jq.export(fn, quantized(params, jq.Scheme(Uniform(4, True), 32)), tmp_path / "out")
    assert exporters.edited(tmp_path / "out") == []
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (tmp_path / "out" / "config.json").unlink()
    assert exporters.edited(tmp_path / "out") == ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match="no export of jquant"):
        exporters.edited(tmp_path)
    for name in ("../away", "/etc/away", "default/../../away", ""):
        (tmp_path / "out" / "jquant_export.json").write_text(json.dumps({"files": {name: {}}}))
        with pytest.raises(CheckpointError, match="lists no files of this folder"):
            exporters.edited(tmp_path / "out")


@pytest.mark.parametrize("what", ["codes", "array", "config"])
def test_what_is_not_read_back_as_it_was_is_no_export(
    what: str, decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4, True), 32))
    if what == "codes":
        encode = Codec.encode

        def flipped(self: Codec, q: QTensor) -> dict[str, np.ndarray]:
            tensors = encode(self, q)
            tensors["weight_packed"].view(np.uint8)[0, 0] ^= 1
            return tensors

        monkeypatch.setattr(Codec, "encode", flipped)
    elif what == "array":
        put = shards._put

        def off(file: Any, piece: Any, places: Any) -> None:
            make = piece.make
            changed = {k: (lambda v=v: v)() for k, v in make().items()}
            if "model.norm.weight" in changed:
                changed["model.norm.weight"] = changed["model.norm.weight"] + np.float32(1e-6)
            put(file, piece._replace(make=lambda: changed), places)

        monkeypatch.setattr(shards, "_put", off)
    else:
        config = exporting._config
        monkeypatch.setattr(exporting, "_config", lambda *a: {**config(*a), "rms_norm_eps": 0.5})
    message = {"codes": "q_proj.weight' has other codes", "array": "norm.weight' has other values",
               "config": "config.json is of another network"}[what]  # fmt: skip
    with pytest.raises(ExportError, match=message):
        jq.export(fn, qparams, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    jq.export(fn, qparams, tmp_path / "out", verify=False)
