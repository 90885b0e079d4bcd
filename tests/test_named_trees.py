"""Decoders as the parameters of tunix's and MaxText's classes: names, axes, numbers, refusals.

That the classes compute the same: `./run clients tunix maxtext`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import mostly_slow
from test_export import quantized

import jquant as jq
from jquant import exporters
from jquant.errors import ExportError, FormatError, TreeError
from jquant.exporters import named_trees
from jquant.grids import NF4, Uniform
from jquant.models import Decoder, DecoderConfig, from_tree
from jquant.models.hf_config import to_hf
from jquant.models.tree_places import tree_of
from jquant.weights.arguments import by_path

SIZES = DecoderConfig(96, 32, 64, 2, heads=4, kv_heads=2, rope_theta=1e6)


def like(**changes: Any) -> DecoderConfig:
    return dataclasses.replace(SIZES, rotary=0, **changes)


GEMMA = like(
    layers=7, norms="both", activation="gelu_tanh", qk_norm="head", norm_eps=1e-6, tied=True,
    embed_scale=32**0.5, attention_scale=8**-0.5, windows=(8, 8, 8, 8, 8, 0, 8), window_theta=1e4,
)  # fmt: skip
LLAMA31 = tuple(
    1 / ((1 - s) / 8 + s)
    for s in np.clip((8192 / (2 * np.pi * 1e6 ** (np.arange(0, 8, 2) / 8)) - 1) / 3, 0, 1)
)
EXPERTS = like(qk_norm="head", experts=4, experts_used=2)
NETWORKS = {
    ("tunix", "llama"): SIZES,
    ("tunix", "qwen2"): like(qkv_bias=True, tied=True),
    ("tunix", "qwen3"): like(qk_norm="head"),
    ("tunix", "qwen3_moe"): EXPERTS,
    ("tunix", "gemma3_text"): GEMMA,
    ("tunix", "gemma3_text, all heads"): dataclasses.replace(GEMMA, kv_heads=4),
    ("maxtext", "llama"): like(rope_theta=1e4, tied=True),
    ("maxtext", "llama, stretched"): like(rope_divisors=LLAMA31),
    ("maxtext", "qwen2"): like(qkv_bias=True),
    ("maxtext", "qwen3"): like(qk_norm="head", head_dim=16),
    ("maxtext", "qwen3_moe"): EXPERTS,
}
SCHEME = jq.Scheme(Uniform(4, symmetric=True), 8)


def network(config: DecoderConfig, scan: bool = False) -> tuple[Decoder, Any]:
    """Random parameters, norms and biases too."""
    fn, rng = Decoder(config, scan_layers=scan), np.random.default_rng(0)
    shapes = jax.eval_shape(fn.init, jax.random.key(0))
    return fn, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def arrays(tree: Any) -> dict[str, np.ndarray]:
    leaves = by_path(jq.dequantize(tree))
    return {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}


def close(one: Any, other: Any, off: float = 0.0) -> None:
    mine, theirs = arrays(one), arrays(other)
    assert set(mine) == set(theirs)
    for path, array in mine.items():
        np.testing.assert_allclose(array, theirs[path], rtol=off, atol=off, err_msg=path)


@pytest.mark.parametrize(
    ("library", "name"),
    mostly_slow(
        NETWORKS, [("tunix", "gemma3_text"), ("maxtext", "llama")], map("-".join, NETWORKS)
    ),
)
def test_a_tree_there_and_back(library: str, name: str, tmp_path: Path) -> None:
    """Every parameter is in the tree once, and comes out of it as it was."""
    config = NETWORKS[library, name]
    assert to_hf(config)["model_type"] == name.partition(",")[0]
    scanned = name in ("llama", "qwen3_moe")
    fn, params = network(config, scanned)
    qparams = quantized(params, SCHEME)
    if library == "maxtext":
        form = "maxtext" if scanned else "maxtext-unscanned"
    else:
        form = "tunix-arrays" if "qwen" in name else "tunix"
    done = jq.export(fn, qparams, tmp_path / "out", format=form)
    assert len(done.weights) == config.layers * (4 + 3 * max(config.experts, 1))
    tree = jq.io.lazy_orbax(tmp_path / "out")
    exact = library == "tunix" and config.norms != "both"  # where files have scales less one
    close(from_tree(fn, tree, library), qparams, 0 if exact else 2e-6)
    assert exporters.edited(tmp_path / "out") == []
    told = json.loads((tmp_path / "out" / "settings.json").read_text())["config"]
    assert {config.layers, config.vocab, config.rope_theta} <= set(map(str_free, told.values()))
    assert exporters.check(tmp_path / "out").tensors


def str_free(value: Any) -> Any:
    """What can be in a set."""
    return str(value) if isinstance(value, list) else value


def test_axes_by_hand(tmp_path: Path) -> None:
    """Heads are apart; layers are the second axis; Llama's queries are divided by a root."""
    fn, params = network(SIZES, scan=True)
    block = jax.tree.map(np.asarray, params["layers"])
    q, k = (block["attention"][name]["kernel"].reshape(2, 32, -1, 8) for name in "qk")
    out = block["attention"]["out"]["kernel"].reshape(2, 4, 8, 32)
    qparams = quantized(params, SCHEME, "layers/mlp/up/kernel")
    jq.export(fn, qparams, tmp_path / "tunix", format="tunix")
    own = arrays(jq.io.lazy_orbax(tmp_path / "tunix"))
    np.testing.assert_array_equal(own["layers/1/attn/q_proj/w"], q[1])
    np.testing.assert_array_equal(own["layers/1/attn/o_proj/w"], out[1])
    assert own["layers/1/mlp/up_proj/kernel/array/qvalue"].shape == (32, 64)
    assert own["layers/1/mlp/up_proj/kernel/array/scale"].shape == (4, 64)
    jq.export(fn, qparams, tmp_path / "maxtext", format="maxtext")
    block = "params/params/decoder/layers/"
    own = arrays(jq.io.lazy_orbax(tmp_path / "maxtext"))
    query = own[block + "self_attention/query/kernel"]
    np.testing.assert_allclose(query, q.swapaxes(0, 1) * 8**-0.5, rtol=1e-6)
    np.testing.assert_array_equal(own[block + "self_attention/key/kernel"], k.swapaxes(0, 1))
    assert own[block + "pre_self_attention_layer_norm/scale"].shape == (32, 2)
    up = np.asarray(jq.dequantize(qparams["layers"]["mlp"]["up"]["kernel"]))
    np.testing.assert_array_equal(own[block + "mlp/wi_1/kernel"], up.swapaxes(0, 1))


def test_stretched_frequencies_turn_neighbours(tmp_path: Path) -> None:
    fn, params = network(NETWORKS["maxtext", "llama, stretched"])
    qparams = quantized(params, SCHEME, "layers/./mlp/up/kernel")
    jq.export(fn, qparams, tmp_path / "out", format="maxtext-unscanned")
    own = arrays(jq.io.lazy_orbax(tmp_path / "out"))
    k = np.asarray(params["layers"]["0"]["attention"]["k"]["kernel"]).reshape(32, 2, 2, 4)
    name = "params/params/decoder/layers_0/self_attention/key/kernel"
    np.testing.assert_array_equal(own[name], k.swapaxes(-1, -2).reshape(32, 2, 8))


def test_experts_and_slots_are_parts_of_one_array(tmp_path: Path) -> None:
    fn, params = network(EXPERTS)
    jq.export(fn, quantized(params, SCHEME), tmp_path / "moe", format="tunix-arrays")
    own = arrays(jq.io.lazy_orbax(tmp_path / "moe"))
    assert own["layers/0/mlp/gate_proj"].shape == (4, 32, 64)
    assert own["layers/0/mlp/down_proj"].shape == (4, 64, 32)
    fn, params = network(GEMMA)
    jq.export(fn, quantized(params, SCHEME), tmp_path / "gemma", format="tunix")
    own = arrays(jq.io.lazy_orbax(tmp_path / "gemma"))
    assert own["layers/5/attn/kv_einsum/w/array/qvalue"].shape == (2, 2, 32, 8)
    assert own["layers/5/attn/attn_vec_einsum/w/array/scale"].shape == (4, 1, 32)


# What is refused


@pytest.mark.parametrize(
    ("library", "config", "message"),
    [
        ("tunix", like(rope_theta=1e4), "Llama3 of tunix 0.1.7 .*rope_theta: 10000.0 and 1000000"),
        ("tunix", like(rope_theta=1e4, qk_norm="head"), "Qwen3 of tunix .*rope_theta: 10000.0"),
        ("tunix", like(windows=(4, 0), qk_norm="head"), "Qwen3 .*windows"),
        ("tunix", like(norms="post", qk_norm="all"), "no class for 'olmo2'; there are .*qwen3"),
        ("tunix", dataclasses.replace(EXPERTS, renormalized=False), "renormalized: False and True"),
        ("tunix", dataclasses.replace(GEMMA, attention_scale=1.0), "attention_scale"),
        ("tunix", dataclasses.replace(GEMMA, windows=(8, 8, 0, 8, 8, 8, 8)), "Gemma3 .*windows"),
        ("maxtext", like(rope_divisors=(2.0,) * 4), "llama2 of MaxText .*rope_divisors"),
        ("maxtext", like(qkv_bias=True, out_bias=True), "MaxText .*qkv_bias"),
        ("maxtext", dataclasses.replace(EXPERTS, renormalized=False), "renormalized: False and"),
        ("maxtext", GEMMA, "no class for 'gemma3_text'"),
    ],
)
def test_networks_that_a_class_would_compute_otherwise(
    library: str, config: DecoderConfig, message: str, tmp_path: Path
) -> None:
    fn, params = network(config)
    with pytest.raises(FormatError, match=message):
        jq.export(fn, quantized(params, SCHEME), tmp_path / "out", format=library)
    weights = jq.find_weights(fn, params, jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(FormatError, match=message):
        exporters.need_held(fn, jq.plan(weights, {".*q/.*": SCHEME, ".*": jq.keep}), library)
    with pytest.raises(FormatError, match=message):
        from_tree(fn, {}, library)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({".*/q/.*": jq.Scheme(NF4, 8)}, "'layers/0/attention/q/kernel': tunix cannot hold"),
        ({".*/out/.*": jq.Scheme(Uniform(4), 12)}, "'layers/0/attention/out/kernel': tunix .*12"),
        ({".*/k/.*": SCHEME}, "attention/k/kernel.*attention/v/kernel.*one array .*they are Sch"),
        ({".*/k/.*": SCHEME, ".*/v/.*": jq.Scheme(Uniform(4), 8)}, "kv_einsum/w.*by one scheme"),
        ({"embed.*": SCHEME}, "'embed/embedding': tunix quantizes linear layers alone"),
    ],
)
def test_plans_are_refused_by_path(rules: Any, message: str, tmp_path: Path) -> None:
    fn, params = network(GEMMA)
    weights = jq.find_weights(fn, params, jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(FormatError, match=message):
        exporters.need_held(fn, jq.plan(weights, {**rules, ".*": jq.keep}), "tunix")
    both = {".*/k/.*": SCHEME, ".*/v/.*": SCHEME, ".*/out/.*": SCHEME}
    exporters.need_held(fn, jq.plan(weights, {**both, ".*": jq.keep}), "tunix")
    for pattern, scheme in rules.items():
        if pattern != "embed.*":
            params = quantized(params, scheme, pattern)
            continue
        return
    with pytest.raises(FormatError, match=message):
        jq.export(fn, params, tmp_path / "out", format="tunix")
    assert not any(tmp_path.iterdir())


def test_classes_that_cast_their_weights_have_no_qarrays(tmp_path: Path) -> None:
    for name in ("qwen2", "qwen3", "qwen3_moe"):
        fn, params = network(NETWORKS["tunix", name])
        weights = jq.find_weights(fn, params, jnp.zeros((1, 4), jnp.int32))
        plan = jq.plan(weights, {".*q/.*": SCHEME, ".*": jq.keep})
        exporters.need_held(fn, plan, "tunix-arrays")
        with pytest.raises(FormatError, match="Qwen. .*QArrays.*tunix-arrays"):
            exporters.need_held(fn, plan, "tunix")
    with pytest.raises(FormatError, match="Qwen3 .*QArrays.*tunix-arrays"):
        jq.export(fn, quantized(params, SCHEME), tmp_path / "out", format="tunix")
    assert not any(tmp_path.iterdir())


def test_trees_that_are_not_the_decoders() -> None:
    fn, params = network(SIZES)
    places = tree_of("tunix", "llama", SIZES).places()
    tree: dict[str, Any] = {}
    for place in places:
        tree[place.path] = np.zeros(place.shape, np.float32)
    assert jax.tree.structure(from_tree(fn, tree, "tunix")) == jax.tree.structure(params)
    with pytest.raises(TreeError, match="'final_norm/w' is missing; near: "):
        from_tree(fn, {k: v for k, v in tree.items() if k != "final_norm/w"}, "tunix")
    with pytest.raises(TreeError, match="'more' is none of tunix"):
        from_tree(fn, {**tree, "more": np.zeros(1)}, "tunix")
    with pytest.raises(TreeError, match=r"'final_norm/w' has shape \(3,\); expected \(32,\)"):
        from_tree(fn, {**tree, "final_norm/w": np.zeros(3)}, "tunix")
    with pytest.raises(ValueError, match="one of tunix, maxtext, got 'flax'"):
        from_tree(fn, tree, "flax")


def test_functions_of_others_have_no_such_tree(tmp_path: Path) -> None:
    def other(params: Any, x: Any) -> Any:
        return x

    with pytest.raises(ExportError, match="--backend jax"):
        jq.export(other, {}, tmp_path / "out", format="maxtext")
    fn, params = network(SIZES)
    with pytest.raises(FormatError, match="nothing is quantized"):
        jq.export(fn, params, tmp_path / "out", format="maxtext")


def test_what_comes_back_otherwise_is_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn, params = network(SIZES)
    original = named_trees.part
    monkeypatch.setattr(named_trees, "part", lambda at, matrix: original(at, matrix)[::-1])
    with pytest.raises(ExportError, match="tensor 'model.embed_tokens.weight' comes back .* off"):
        jq.export(fn, quantized(params, SCHEME), tmp_path / "out", format="tunix-arrays")
    assert not any(tmp_path.iterdir())
