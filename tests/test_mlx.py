"""MLX's folders: the bytes of MLX both ways, and what is refused, without MLX."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.compressed_tensors import Stored
from oracles.mlx import MLX
from safetensors.numpy import load_file, save_file
from test_export import bits, quantized, same_codes, weights_of

import jquant as jq
from jquant import exporters, formats, models
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.errors import CheckpointError, FormatError
from jquant.exporters.described import Described
from jquant.exporters.mlx import hold, nearest
from jquant.exporters.targets import TARGETS, held
from jquant.formats.config import claimed
from jquant.grids import GGUF, MX, NF4, NV, Affine, Float, Uniform
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.weights.qtensor import QTensor

SMALL = DecoderConfig(vocab=48, width=64, hidden=96, layers=2, heads=4, kv_heads=2)
EXPERTS = replace(SMALL, experts=3, experts_used=2, qk_norm="head", hidden=32)
HALF = dict(scale_dtype="float16")


@pytest.fixture(scope="module")
def decoder() -> tuple[Decoder, Any]:
    fn = Decoder(SMALL)
    return fn, fn.init(jax.random.key(0))


def array(stored: Stored) -> np.ndarray:
    dtype, shape, raw = stored
    return np.frombuffer(bytes.fromhex(raw), np.dtype(dtype)).reshape(shape)


def packed(codes: np.ndarray, width: int) -> np.ndarray:
    """uint32 words of unsigned codes, the first in the lowest bits, bit by bit."""
    each = (codes[..., None] >> np.arange(width)) & 1
    return np.packbits(each.reshape(len(codes), -1), -1, bitorder="little").view("<u4")


# The bytes


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 8])
def test_the_affine_mode_is_the_documented_layout(width: int) -> None:
    rng = np.random.default_rng(width)
    codes = rng.integers(0, 1 << width, (6, 64))
    scale, bias = rng.normal(size=(2, 6, 2)).astype(np.float32)  # of either sign
    tensors = {"weight": packed(codes, width), "scales": scale, "biases": bias}
    codec = formats.mlx(bits=width, group=32, scale_dtype="float32")
    q = codec.decode(tensors)
    expected = np.repeat(scale, 32, 1) * codes.astype(np.float32) + np.repeat(bias, 32, 1)
    np.testing.assert_allclose(np.asarray(jq.dequantize(q)), expected, rtol=1e-6, atol=1e-5)
    again = codec.encode(q)
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)


@pytest.mark.parametrize("name", MLX)
def test_what_mlx_made_means_what_it_says(name: str) -> None:
    stored, weight = MLX[name]
    tensors = {key: array(one) for key, one in stored.items()}
    codec = {
        "affine-3": formats.mlx(bits=3, group=32, **HALF),
        **{mode: formats.mlx(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")},
    }[name]
    q = codec.decode(tensors)
    close = {"rtol": 0, "atol": 2e-3 if name == "affine-3" else 0}  # it computes in float16 there
    np.testing.assert_allclose(np.asarray(jq.dequantize(q)), array(weight), **close)
    again = codec.encode(q)
    assert all(again[key].tobytes() == tensors[key].tobytes() for key in tensors)
    if name == "affine-3":
        assert (tensors["scales"] < 0).any()


# Folders

HELD: dict[str, tuple[jq.Scheme, str]] = {
    "affine": (jq.Scheme(Affine(5, scale_dtype="bfloat16"), 32), "MLX affine"),
    "zero points": (jq.Scheme(Uniform(4), 32), "MLX affine"),
    "zero points of narrow scales": (jq.Scheme(Uniform(8, **HALF), 32), "MLX affine"),
    "symmetric, channels": (jq.Scheme(Uniform(3, True, **HALF)), "MLX affine"),
    "zeros between codes": (jq.Scheme(Uniform(4, convention="A4", **HALF), 32), "MLX affine"),
    "Q4_1": (jq.Scheme(GGUF("Q4_1")), "MLX affine"),
    "Q5_0": (jq.Scheme(GGUF("Q5_0")), "MLX affine"),
    "mxfp4": (jq.presets.mxfp4(), "MLX mxfp4"),
    "mxfp8": (jq.Scheme(MX("E4M3")), "MLX mxfp8"),
    "nvfp4": (jq.Scheme(NV(tensor_scale=False)), "MLX nvfp4"),
}  # fmt: skip
NOT_EXACT = ("zero points", "zeros between codes")  # but for a rounding of float32
ALL = r"layers/.*kernel|embed.*"


@pytest.mark.parametrize("name", HELD)
def test_what_is_read_back_stands_for_the_same_numbers(
    name: str, decoder: Any, tmp_path: Path
) -> None:
    (fn, params), (scheme, kind) = decoder, HELD[name]
    qparams = quantized(params, scheme, ALL)
    done = jq.export(fn, qparams, tmp_path / "out", format="mlx")
    assert set(done.weights.values()) == {kind} and len(done.weights) == 15
    again, back, _ = models.load(tmp_path / "out", quantized="keep")
    assert again.config == fn.config
    before, after = weights_of(qparams), weights_of(back)
    for path, q in before.items():
        other = after[path]
        assert isinstance(q, QTensor) == isinstance(other, QTensor)
        mine, theirs = (np.asarray(jq.dequantize(leaf)) for leaf in (q, other))
        close = 2e-6 * np.abs(mine).max() if name in NOT_EXACT else 0
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=close)
        if isinstance(q, QTensor):
            low = [leaf.grid.codes[0] if kind == "MLX affine" else 0 for leaf in (q, other)]
            codes = [np.asarray(leaf.codes).astype(int) for leaf in (q, other)]
            np.testing.assert_array_equal(codes[0] - low[0], codes[1] - low[1])
    jq.export(fn, back, tmp_path / "again", format="mlx")
    one, other = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "again"))
    assert set(one) == set(other)
    assert all(np.array_equal(bits(one[key]), bits(other[key])) for key in one)


def test_what_a_config_says(decoder: Any, tmp_path: Path) -> None:
    """What counts for most modules comes first; others have their names."""
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(4), 64), r"layers/.*(q|k|v|out|gate|up)/kernel")
    qparams = quantized(qparams, jq.Scheme(Uniform(8), 32), r"layers/0/mlp/down/kernel")
    qparams = quantized(qparams, jq.presets.mxfp4(), r"layers/1/mlp/down/kernel")
    jq.export(fn, qparams, tmp_path / "out", format="mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["quantization"] == {
        "group_size": 64, "bits": 4,
        "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 8},
        "model.layers.1.mlp.down_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    }  # fmt: skip
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    shapes = {k: v.shape for k, v in tensors.items() if k.startswith("model.layers.0.mlp.down")}
    assert shapes == {
        "model.layers.0.mlp.down_proj.weight": (64, 24),
        "model.layers.0.mlp.down_proj.scales": (64, 3),
        "model.layers.0.mlp.down_proj.biases": (64, 3),
    }
    assert models.loading.quantized_as(tmp_path / "out") == ("mlx 4 bits",)
    jq.export(fn, qparams, tmp_path / "next", format="mlx", like=tmp_path / "out")


def test_lazy_leaves_and_stacks_of_layers(tmp_path: Path) -> None:
    fn = Decoder(SMALL, scan_layers=True)
    qparams = quantized(fn.init(jax.random.key(1)), jq.Scheme(Uniform(4, True, **HALF), 32))
    models.save_quantized(tmp_path / "ours", fn, qparams)
    _, lazy, _ = models.load(tmp_path / "ours", lazy=True)
    for name, tree in (("lazy", lazy), ("whole", qparams)):
        jq.export(fn, tree, tmp_path / name, format="mlx")
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("lazy", "whole"))
    assert one == other
    _, back, _ = models.load(tmp_path / "whole", scan_layers=True, quantized="keep")
    jq.export(fn, back, tmp_path / "again", format="mlx")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == one


def test_a_folder_as_mlx_lm_writes_it(decoder: Any, tmp_path: Path) -> None:
    """Scales of either sign, a copy of the settings, modules of the usual kind without a name."""
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Affine(4, scale_dtype="bfloat16"), 32))
    jq.export(fn, qparams, tmp_path / "out", format="mlx")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.scales"] = -tensors[f"{name}.scales"]
    save_file(tensors, path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = {"group_size": 32, "bits": 4, "mode": "affine"}
    config["quantization"] |= {"mode": "affine", name: entry, "lm_head": False}
    config["quantization_config"] = config["quantization"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    _, back, _ = models.load(tmp_path / "out", quantized="keep")
    q = back["layers"]["0"]["mlp"]["up"]["kernel"]
    assert isinstance(q.grid, Affine) and not isinstance(back["head"]["kernel"], QTensor)
    same_codes(replace(q, params={**q.params, "scale": -q.params["scale"]}),
               replace(qparams["layers"]["0"]["mlp"]["up"]["kernel"], dtype=q.dtype))  # fmt: skip
    with pytest.raises(CheckpointError, match="quantize_activations = 'True'"):
        claimed({**config, "quantize_activations": True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 16, "bits": 4}, r"'model.*_proj': group='16'"),
        ({"group_size": 32, "bits": 7}, "bits='7'"),
        ({"group_size": 32, "bits": 8}, "weight.* is uint32|scales"),
        ({"group_size": 64, "bits": 4}, "inputs; MLX affine has groups of 64|'scales' is"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "'scales' is float32"),
        ({"group_size": 32, "bits": 4, "mode": ["x"]}, "MLX has affine"),
        ({"group_size": [32], "bits": {}}, "bits="),
        (["bits"], "expected an object"),
        ("4 bits", "expected an object"),
    ],
)
def test_settings_that_are_not_of_the_tensors_are_refused(
    settings: Any, message: str, decoder: Any, tmp_path: Path
) -> None:
    fn, params = decoder
    jq.export(fn, quantized(params, jq.Scheme(Uniform(4), 32)), tmp_path / "out", format="mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization"] = settings
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        models.load(tmp_path / "out", quantized="keep")


# What MLX cannot hold


def described(grid: Any, groups: Any = None, width: int = 96, **more: Any) -> Described:
    scheme = jq.Scheme(grid, groups)
    return Described((64, width), scheme.grid, scheme.grouping, **more)


@pytest.mark.parametrize(
    ("weight", "message", "near"),
    [
        (described(Uniform(7), 32), "bits=7", "bits=8"),
        (described(Uniform(4), 16), "groups of 16", "32"),
        (described(Uniform(4), 40), "groups of 40", "32"),
        (described(Uniform(4), 32, 40), "groups of 32, of 40", "keep this weight"),
        (described(Uniform(4), Groups("out", 32)), "along the outputs", "Uniform"),
        (described(NF4, 64), "the grid", "Affine"),
        (described(Float(4, 3, scale="float32")), "the grid", "Affine"),
        (described(GGUF("Q6_K")), "groups of 16", "Affine"),
        (described(NV(), of_tensor=True), "scale of the whole tensor", "tensor_scale=False"),
        (described(MX(), 96), "in place of groups of 32", "32"),
        (described(Uniform(4), 32, parts=("LoRC",)), "parts besides the codes", "Uniform"),
        (
            described(Uniform(8, True), 32, inputs=jq.Activations(Uniform(8, True))),
            "quantized inputs", "Uniform",
        ),
    ],
)  # fmt: skip
def test_what_mlx_cannot_hold_is_refused_with_what_it_can(
    weight: Described, message: str, near: str
) -> None:
    with pytest.raises(FormatError, match=rf"'down': mlx cannot hold .*{message}.*{near}"):
        held(TARGETS["mlx"], "down", weight)
    if (instead := nearest(weight)) is not None:
        hold(instead)


def test_plans_are_refused_by_path(tmp_path: Path) -> None:
    fn = Decoder(EXPERTS)
    params = fn.init(jax.random.key(0))
    weights = jq.find_weights(fn, params, jnp.zeros((1, 4), jnp.int32))
    scheme = jq.Scheme(Uniform(7), 32)
    plan = jq.plan(weights, {"layers/.*mlp/down.*": scheme, ".*": jq.keep})
    message = "'layers/0/mlp/down/kernel.*: mlx cannot hold .*bits=7.*bits=8"
    with pytest.raises(FormatError, match=message):
        exporters.need_held(fn, plan, "mlx")
    with pytest.raises(FormatError, match=message):
        jq.export(fn, quantized(params, scheme, ".*mlp/down.*"), tmp_path / "out", format="mlx")
    fine = jq.plan(weights, {".*": jq.Scheme(NV(tensor_scale=False))})
    exporters.need_held(fn, fine, "mlx")
    nv = jq.plan(weights, {"layers/.*attention.*": jq.presets.nvfp4(), ".*": jq.keep})
    with pytest.raises(FormatError, match="'layers/0/attention/.*scale of the whole tensor"):
        exporters.need_held(fn, nv, "mlx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", ["layers/.*kernel", "layers/1/mlp/up/kernel"])
def test_experts_of_a_layer_are_one_tensor(pattern: str, tmp_path: Path) -> None:
    """Where one of their weights is quantized, the others are stacked too."""
    fn = Decoder(EXPERTS)
    qparams = quantized(
        fn.init(jax.random.key(0)), jq.Scheme(Uniform(4, True, **HALF), 32), pattern
    )
    done = jq.export(fn, qparams, tmp_path / "out", format="mlx")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    up, block = tensors["model.layers.1.mlp.switch_mlp.up_proj.weight"], "model.layers.{}.mlp."
    assert up.shape == (3, 32, 8) and up.dtype == np.uint32
    assert tensors["model.layers.1.mlp.switch_mlp.up_proj.scales"].shape == (3, 32, 2)
    whole = len(done.weights) > 3
    down = tensors["model.layers.1.mlp.switch_mlp.down_proj.weight"]
    assert down.shape == ((3, 64, 4) if whole else (3, 64, 32))
    assert (block.format(0) + "experts.2.up_proj.weight" in tensors) != whole
    assert ".experts." not in json.dumps(list(tensors)) or not whole
    _, back, _ = models.load(tmp_path / "out", quantized="keep", scan_layers=whole)
    before = jax.tree.map(np.asarray, jq.dequantize(qparams))["layers"]["1"]["mlp"]
    after = jax.tree.map(np.asarray, jq.dequantize(back))["layers"]
    after = jax.tree.map(lambda a: a[1], after) if whole else after["1"]
    jax.tree.map(np.testing.assert_array_equal, before, after["mlp"])
    assert exporters.check(tmp_path / "out").edited == ()


def test_settings_of_stacks_are_those_of_their_experts(tmp_path: Path) -> None:
    fn = Decoder(EXPERTS)
    all_but_one = r"layers/(?!1/mlp/down).*kernel"
    qparams = quantized(fn.init(jax.random.key(0)), jq.Scheme(Uniform(4), 32), all_but_one)
    qparams = quantized(qparams, jq.Scheme(NV(tensor_scale=False)), "layers/1/mlp/down/kernel")
    jq.export(fn, qparams, tmp_path / "out", format="mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    own = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert config == {
        "group_size": 32, "bits": 4, "model.layers.1.mlp.switch_mlp.down_proj": own,
    }  # fmt: skip
    _, back, _ = models.load(tmp_path / "out", quantized="keep")
    assert isinstance(back["layers"]["1"]["mlp"]["down"]["kernel"].grid, Float)


def test_a_table_whose_rows_are_its_inputs_is_refused(decoder: Any, tmp_path: Path) -> None:
    """Written as it lies, it would be another table."""
    fn, params = decoder
    layout = Layout.of((48, 64), in_axes=(0,))
    codes, scale = np.zeros((64, 48), np.int8), np.ones((64, 1), np.float16)
    grid = Uniform(8, True, **HALF)
    table = QTensor(codes, {"scale": scale}, grid, Groups(), layout, np.dtype("float32"))
    with pytest.raises(FormatError, match="'embed/embedding': its inputs are its rows"):
        jq.export(fn, {**params, "embed": {"embedding": table}}, tmp_path / "out", format="mlx")


def test_a_bias_beyond_its_dtype_is_refused(decoder: Any, tmp_path: Path) -> None:
    fn, params = decoder
    qparams = quantized(params, jq.Scheme(Uniform(8, True, **HALF), 32), "layers/0/mlp/up/kernel")
    q = qparams["layers"]["0"]["mlp"]["up"]["kernel"]
    scale = np.full_like(q.params["scale"], 600)  # 600 * 128 is no float16
    qparams["layers"]["0"]["mlp"]["up"]["kernel"] = replace(q, params={"scale": scale})
    with pytest.raises(FormatError, match="bias of a group is beyond float16"):
        jq.export(fn, qparams, tmp_path / "out", format="mlx")
    assert not any(tmp_path.iterdir())
