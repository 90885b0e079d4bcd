"""Every family of decoders against `transformers`' own class, on random small configurations.

GGUF files are written under gguf-py's names and by the rules of llama.cpp's converters, see
`checkpoints.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import torch_logits, torch_model, transformers, write_gguf
from marks import EVERY_CASE, covering, mostly_slow

import jquant as jq
from jquant import models
from jquant.errors import CheckpointError
from jquant.models.assembly import sources
from jquant.models.config import from_hf
from jquant.models.families import GGUF, HF

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24)).astype(np.int32)
# What GGUF files of these networks say that no converter needs to write for the models there are.
IN_GGUF: dict[str, dict[str, Any]] = {
    "gemma3": {
        "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 1e2,
        "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
    },
}  # fmt: skip
BATCH = (
    np.random.default_rng(1).integers(0, 96, (16, 24)).astype(np.int32)
)  # tokens enough for GPTQ
THREE = dict(num_hidden_layers=3, hidden_size=32, intermediate_size=40)
SMALL_IDS = dict(pad_token_id=0, eos_token_id=1)
EXPERTS = dict(moe_intermediate_size=20)
LONG: dict[str, Any] = dict(
    rope_type="longrope", partial_rotary_factor=0.75, rope_theta=50.0,
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5], long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
)  # fmt: skip

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, a window": ("Mistral", dict(sliding_window=5)),
    "qwen2, late windows": (
        "Qwen2", THREE | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(head_dim=24)),
    "qwen3, all switches": (
        "Qwen3",
        THREE | dict(
            head_dim=6, attention_bias=True, tie_word_embeddings=True, use_sliding_window=True,
            sliding_window=7, max_window_layers=2,
        ),
    ),
    "gemma2": (
        "Gemma2",
        dict(
            head_dim=16, query_pre_attn_scalar=16, sliding_window=6, num_hidden_layers=3,
            attn_logit_softcapping=3.0, final_logit_softcapping=5.0,
        ),
    ),
    "gemma2, its own scale": (
        "Gemma2",
        THREE | dict(
            head_dim=8, query_pre_attn_scalar=20, sliding_window=5, attn_logit_softcapping=None,
            final_logit_softcapping=None,
            layer_types=["full_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            head_dim=16, query_pre_attn_scalar=16, sliding_window=4, num_hidden_layers=4,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e3},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "gemma3, its own scale": (
        "Gemma3Text",
        THREE | dict(
            head_dim=12, query_pre_attn_scalar=20, final_logit_softcapping=4.0, attention_bias=True,
        ),
    ),
    "phi3": ("Phi3", SMALL_IDS | dict(sliding_window=9)),
    "phi3, longrope": (
        "Phi3",
        THREE | SMALL_IDS | dict(
            num_attention_heads=2, num_key_value_heads=1, original_max_position_embeddings=18,
            rope_parameters=LONG,
        ),
    ),
    "olmo2": ("Olmo2", SMALL_IDS),
    "olmo2, biases": (
        "Olmo2", THREE | SMALL_IDS | dict(attention_bias=True, tie_word_embeddings=True),
    ),
    "granite": (
        "Granite",
        dict(
            attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.6,
            logits_scaling=2.5,
        ),
    ),
    "granite, plain": ("Granite", THREE | dict(attention_bias=True, tie_word_embeddings=True)),
    "qwen3 experts": (
        "Qwen3Moe",
        EXPERTS | dict(head_dim=16, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True),
    ),
    "qwen3 experts, unlike sums": (
        "Qwen3Moe",
        THREE | EXPERTS | dict(num_experts=4, num_experts_per_tok=3, attention_bias=True),
    ),
}  # fmt: skip
# What GGUF does not say, so that llama.cpp computes another network than `transformers`.
NOT_IN_GGUF = {
    "mistral, a window", "qwen2, late windows", "qwen3, all switches", "gemma2, its own scale",
    "gemma3, its own scale", "qwen3 experts, unlike sums",
}  # fmt: skip
QUANTIZED = [("gemma3", False), ("qwen3 experts", True)]
# What differs most from the others: normalisation and windows, fused projections, experts.
UNLIKE = ("gemma3", "phi3, longrope", "qwen3 experts")
CACHED = [("gemma3", True), ("qwen3 experts", True), ("phi3, longrope", False)]


def network(name: str, **more: Any) -> Any:
    kind, settings = NETWORKS[name]
    return torch_model(kind, **settings | more, attn_implementation="eager")


def close(got: Any, expected: Any, tolerance: float = 2e-5) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def single(fn: models.Decoder) -> models.Decoder:
    """The decoder with its numbers as GGUF can hold them."""

    def rounded(value: Any) -> Any:
        return float(np.float32(value)) if isinstance(value, float) else value

    fields: dict[str, Any] = {
        key: tuple(map(rounded, value)) if isinstance(value, tuple) else rounded(value)
        for key, value in vars(fn.config).items()
    }
    return dataclasses.replace(fn, config=models.DecoderConfig(**fields))


def random(fn: models.Decoder) -> Any:
    """Parameters whose norms and biases do something."""
    draw = np.random.default_rng(1)  # NumPy's, for which JAX compiles nothing
    return jax.tree.map(
        lambda x: jnp.asarray(x + (0.1 * draw.normal(size=x.shape)).astype(x.dtype)),
        jax.device_get(jax.jit(fn.init)(jax.random.key(0))),
    )


@pytest.mark.parametrize("name", mostly_slow(NETWORKS, UNLIKE))
def test_logits_are_those_of_pytorch(name: str, tmp_path: Path) -> None:
    model = network(name)
    model.save_pretrained(tmp_path / "hf")
    expected = torch_logits(model, TOKENS)
    for scan in (False, True) if name in UNLIKE or EVERY_CASE else (len(name) % 2 == 0,):
        fn, params, _ = models.load(tmp_path / "hf", scan_layers=scan)
        close(jax.jit(fn)(params, TOKENS), expected)
    if name in NOT_IN_GGUF:
        return
    path = write_gguf(tmp_path / "m.gguf", model, keys=IN_GGUF.get(name))
    other, values, _ = models.load(path, scan_layers=scan)
    assert single(other) == single(fn)
    jax.tree.map(np.testing.assert_array_equal, values, params)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in NOT_IN_GGUF])
def test_transformers_reads_the_same_of_our_gguf_files(name: str, tmp_path: Path) -> None:
    """That is, the files that the other tests load are what others take for such files."""
    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    if name.startswith(("olmo2", "granite")):
        pytest.skip("transformers does not know this architecture of GGUF")
    model = network(name)
    path = write_gguf(tmp_path / "m.gguf", model, keys=IN_GGUF.get(name))
    read = reader.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    state = model.state_dict()
    assert set(state) - set(read["tensors"]) <= {"lm_head.weight"}
    for key, value in read["tensors"].items():
        np.testing.assert_allclose(value, state[key], rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("name", "scan"),
    mostly_slow(dict.fromkeys([*CACHED, *covering(NETWORKS, (True, False))]), CACHED),
)
def test_cached_steps_equal_the_full_pass(name: str, scan: bool) -> None:
    fn = models.Decoder(from_hf(network(name).config.to_dict()), scan)
    params, step, cache, parts = random(fn), jax.jit(fn.step), fn.init_cache(2, 32), []
    for start, stop in ((0, 20), (20, 21), (21, 22)):
        logits, cache = step(params, cache, TOKENS[:, start:stop], jnp.int32(start))
        parts.append(logits)
    full = jax.jit(fn)(params, jnp.asarray(TOKENS[:, :22]))
    close(jnp.concatenate(parts, 1), full, 1e-5)


@pytest.mark.parametrize("name", mostly_slow(["gemma3", "olmo2", "granite"], ["gemma3"]))
def test_bfloat16_computes_near_float32(name: str) -> None:
    config = from_hf(network(name).config.to_dict())
    params = random(models.Decoder(config))
    low, high = (
        jax.jit(models.Decoder(config, dtype=dtype))(params, TOKENS)
        for dtype in ("bfloat16", "float32")
    )
    assert low.dtype == jnp.float32
    close(low, high, 0.05)


def kernels_of(params: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    return {path for path in paths if path.endswith("/kernel")}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_leaf_has_its_tensors_in_both_formats(name: str) -> None:
    config = from_hf(network(name).config.to_dict())
    tree = jax.eval_shape(models.Decoder(config).init, jax.random.key(0))
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for form in ("gguf", "hf"):
        stored: dict[str, int] = {}
        for source in sources(config, form):
            path = source.leaf.replace("layers/", f"layers/{source.layer}/")
            stored[path] = stored.get(path, 0) + int(np.prod(source.shape))
        assert stored == sizes


@pytest.mark.parametrize("name", NETWORKS)
def test_every_projection_is_found(name: str) -> None:
    fn = models.Decoder(from_hf(network(name).config.to_dict()))
    params = jax.eval_shape(fn.init, jax.random.key(0))
    weights = jq.find_weights(fn, params, TOKENS)
    assert kernels_of(params) == {path for path in weights if path.endswith("/kernel")}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scan"), QUANTIZED)
def test_every_projection_is_quantized_in_stages(name: str, scan: bool) -> None:
    small = network(
        name, hidden_size=32, intermediate_size=40, num_hidden_layers=2, layer_types=None
    )
    config = from_hf(small.config.to_dict() | dict(sliding_window_pattern=2))
    fn = models.Decoder(config, scan)
    params = random(fn)
    scheme = jq.Scheme(jq.grids.Uniform(4), None, jq.rounding.GPTQ())
    plan = jq.plan(jq.find_weights(fn, params, TOKENS), {"layers/.*kernel": scheme})
    stages = len(jq.estimate(fn, params, plan, [BATCH]).stages)
    assert stages >= 3 * config.layers
    qparams, report = jq.quantize(fn, params, plan, [BATCH])
    assert set(report) == {path for path in kernels_of(params) if path.startswith("layers/")}
    close(jax.jit(jq.apply(fn))(qparams, TOKENS), jax.jit(fn)(params, TOKENS), 0.5)


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    for name, family in HF.items():
        plain = transformers.AutoConfig.for_model(name).to_dict()
        for key, value in family.hf.defaults.items():
            assert plain.get(key, value) in (value, None), f"{name}: {key}"


def test_the_documents_name_every_family() -> None:
    cli = pytest.importorskip("jquant.app.cli")
    page = (Path(__file__).parents[1] / "docs" / "supported.md").read_text("utf-8")
    named = re.search(r"Families: ([^.]*)\.", cli.quantize_model.__doc__ or "")
    assert named is not None and set(named[1].split(", ")) == set(HF)
    rows = [line for line in page.splitlines() if line.startswith("|") and "`" in line]
    assert {row.split("`")[1] for row in rows if row.count("`") == 4 and "_type" not in row} == set(
        HF
    )
    assert {row.split("`")[3] for row in rows if row.count("`") == 4 and "_type" not in row} == set(
        GGUF
    )


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", dict(hidden_act="gelu"), r"hidden_act = 'gelu' is not supported; supported: silu"),
    ("qwen3, all switches", dict(layer_types=["full_attention"]), r"kinds of attention"),
    ("qwen3, all switches", dict(sliding_window="4"), r"sliding_window = 4; expected"),
    ("gemma2", dict(hidden_activation="gelu"), r"hidden_activation = 'gelu'.*gelu_pytorch_tanh"),
    ("gemma3", dict(use_bidirectional_attention=True), r"use_bidirectional_attention = 'True'"),
    ("gemma3", dict(sliding_window=None), r"sliding_window = None; expected an integer"),
    ("gemma3", dict(query_pre_attn_scalar=None), r"query_pre_attn_scalar = None"),
    ("gemma3", dict(attn_logit_softcapping=-1.0), r"attn_logit_softcapping = -1.0; expected a pos"),
    (
        "gemma3",
        dict(rope_parameters={"full_attention": {}, "sliding_attention": {"rope_type": "linear"}}),
        r"rope_type = 'linear' is not supported; supported: default",
    ),
    ("qwen3 experts", dict(mlp_only_layers=[1]), r"mlp_only_layers = '\[1\]'"),
    ("qwen3 experts", dict(decoder_sparse_step=2), r"decoder_sparse_step = '2'"),
    ("qwen3 experts", dict(num_experts=6), r"num_experts = 6 and num_local_experts = 5 contra"),
    ("qwen3 experts", dict(num_experts_per_tok=6), r"experts_used = 6; expected at most 5"),
    ("qwen3 experts", dict(norm_topk_prob="yes"), r"norm_topk_prob = 'yes'"),
    ("granite", dict(mlp_bias=True), r"mlp_bias = 'True'"),
    ("granite", dict(attention_multiplier=0), r"attention_multiplier = 0; expected a positive"),
    ("olmo2", dict(sliding_window=16), r"sliding_window = '16' is not supported"),
    ("phi3", dict(rope_parameters={"rope_type": "linear", "factor": 2}), r"'linear' is not.*long"),
    (
        "phi3, longrope",
        dict(rope_parameters=LONG | dict(short_factor=[1.0])),
        r"rope_divisors = \(1.0,\); expected 6 positive numbers",
    ),
    (
        "phi3, longrope",
        dict(rope_parameters=LONG | dict(long_factor="no")),
        r"long_factor = no; expected a list",
    ),
    (
        "phi3, longrope",
        dict(rope_parameters=LONG | dict(partial_rotary_factor=0.7)),
        r"rotary = 11; expected an even number",
    ),
    (
        "phi3",
        dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=1e200)),
        r"partial_rotary_factor = '1e.200' is not supported; supported: at most 1",
    ),
    ("qwen3, all switches", dict(layer_types=5), r"kinds of attention = '5'"),
    ("qwen3, all switches", dict(layer_types=[{}] * 3), r"kinds of attention"),
    ("qwen3, all switches", dict(max_window_layers="x", layer_types=None), r"window_layers = x"),
    ("gemma3", dict(rope_parameters={"full_attention": 5}), r"rope_parameters = '5'"),
    ("mistral, a window", dict(attention_bias=True), r"attention_bias = 'True'"),
    ("mistral, a window", dict(num_hidden_layers=10**7), r"10000000 layers"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=str)
def test_what_is_not_computed_is_refused(name: str, changes: dict, message: str) -> None:
    config = json.loads(json.dumps(network(name).config.to_dict()))
    with pytest.raises(CheckpointError, match=message):
        from_hf(config | changes)


def test_gguf_of_gemma_without_a_window_is_all_full_attention(tmp_path: Path) -> None:
    model = network("gemma3", layer_types=["full_attention"] * 4)
    path = write_gguf(
        tmp_path / "m.gguf", model,
        keys={"attention.sliding_window": None, "rope.scaling.factor": 8.0},
    )  # fmt: skip
    fn, params, _ = models.load(path)
    assert fn.config.windows == ()
    close(jax.jit(fn)(params, TOKENS), torch_logits(model, TOKENS))


def test_gguf_knows_the_largest_gemmas_by_their_depth(tmp_path: Path) -> None:
    for name, layers in (("gemma2", 46), ("gemma3", 62)):
        small = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, head_dim=6)
        config = models.load(
            write_gguf(
                tmp_path / "m.gguf",
                network(
                    name, num_hidden_layers=layers, num_key_value_heads=1, layer_types=None, **small
                ),
            ),
            lazy=True,
        )[0].config
        assert config.attention_scale == 4**-0.5 and len(config.windows) == layers


def test_longrope_is_of_the_longest_that_a_text_may_get(tmp_path: Path) -> None:
    model = network("phi3, longrope")
    fn, params, _ = models.load(write_gguf(tmp_path / "m.gguf", model))
    short = TOKENS[:, :18]
    close(jax.jit(fn)(params, short), torch_logits(model, short))
    # With a cache for more than it was trained on, its first tokens turn as later ones will.
    tokens = jnp.asarray(short)
    cached = [fn.step(params, fn.init_cache(2, n), tokens, 0)[0] for n in (18, 19)]
    close(cached[0], torch_logits(model, short))
    with pytest.raises(AssertionError):
        close(cached[1], torch_logits(model, short))


def test_an_expert_has_the_moment_of_the_tokens_sent_to_it(tmp_path: Path) -> None:
    model = network("qwen3 experts", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    block, kept = model.model.layers[0].mlp, []
    block.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0].detach()))
    torch_logits(model, TOKENS)
    rows = kept[0].reshape(-1, 64)
    chosen = block.gate(rows)[2].numpy()
    rows = rows.numpy().astype(np.float64)
    for scan in (False, True):
        fn, params, _ = models.load(tmp_path, scan_layers=scan)
        captured = jq.capture(fn, params, [TOKENS])
        for leaf in ("gate", "up"):
            path = f"layers/mlp/{leaf}/kernel" if scan else f"layers/0/mlp/{leaf}/kernel"
            evidence = captured[path]
            for expert in range(5):
                mine = rows[(chosen == expert).any(-1)]
                moment = np.asarray(evidence.second_moment).reshape(5, 64, 64)[expert]
                close(moment, mine.T @ mine, 1e-4)
                assert np.asarray(evidence.count).reshape(5)[expert] == len(mine)
