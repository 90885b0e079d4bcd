"""Models whose weights are codes already are quantized anew only where that is asked for.

The laws: whatever holds codes is refused by name before anything is read or fetched, with the way
out; with `--requantize` the job is that of the arrays which the codes mean; numbers are no codes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import torch_model, write_gguf
from test_formats import FOLDERS, write_folder

import jquant as jq
from jquant import models
from jquant.app import cli
from jquant.models.config import from_hf
from jquant.models.loading import quantized_as

pytest.importorskip("gguf")

CONFIG = dict(
    model_type="llama", vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip
NEAREST = ("-r", "int4-nearest", "--group", 16, "-q")

MODULE = """
import jax.numpy as jnp
import jquant as jq

def fn(params, x):
    return x @ params["w"]

def quantized():
    params = {"w": jnp.linspace(-1.0, 1.0, 256).reshape(16, 16)}
    weights = jq.find_weights(fn, params, jnp.ones((2, 16)))
    plan = jq.plan(weights, {".*": jq.presets.int8_nearest(16)})
    return fn, jq.quantize(fn, params, plan)[0], [jnp.ones((2, 16))]
"""


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[str, Path]:
    np.save(tmp_path / "tokens.npy", np.arange(32, dtype=np.int32).reshape(4, 8))
    return "--batches", tmp_path / "tokens.npy"


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def saved(folder: Path, preset: Any) -> tuple[Any, Any]:
    """A quantized decoder in a folder, as `jquant quantize` writes it; `(fn, qparams)`."""
    fn = models.Decoder(from_hf(CONFIG))
    params = fn.init(jax.random.key(0))
    weights = jq.find_weights(fn, params, np.zeros((1, 4), np.int32))
    qparams, _ = jq.quantize(fn, params, jq.plan(weights, {"layers/.*": preset, ".*": jq.keep}))
    models.save_quantized(folder, fn, qparams)
    return fn, qparams


def refusal(source: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: Any) -> str:
    """What `jquant quantize` says of a source that it refuses."""
    assert run("quantize", source, "-o", tmp_path / "out", *NEAREST, *more) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert f"error: {source} is quantized already (" in line and not (tmp_path / "out").exists()
    assert "pass --requantize to" in line and "--quantized keep" in line
    return line.partition("already (")[2].partition(")")[0]


HELD = {
    "pack-quantized": "compressed-tensors pack-quantized",
    "mxfp4-pack-quantized": "compressed-tensors mxfp4-pack-quantized",
    "gptq": "gptq 4 bits",
    "awq": "awq 4 bits",
}


@pytest.mark.parametrize("name", HELD)
def test_folders_of_codes_are_refused(name: str, tmp_path: Path, capsys, monkeypatch) -> None:
    assert name in FOLDERS
    folder = tmp_path / "model"
    write_folder(folder, name)
    assert refusal(folder, tmp_path, capsys) == HELD[name]
    fetched: list[Any] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert refusal("someone/something", tmp_path, capsys) == HELD[name]
    assert fetched == [["config.json"]]  # and no weights


def test_files_of_blocks_are_refused_and_files_of_numbers_are_not(tmp_path: Path, capsys) -> None:
    network = torch_model()
    for kind in ("F32", "F16", "BF16"):
        assert not quantized_as(write_gguf(tmp_path / f"{kind}.gguf", network, types={"": kind}))
    types = {"blk.0.ffn_down": "Q8_0", "attn": "Q4_0", "": "F16"}
    path = write_gguf(tmp_path / "mixed.gguf", network, types=types)
    assert refusal(path, tmp_path, capsys) == "Q4_0, Q8_0"
    assert refusal(path, tmp_path, capsys, "--dry-run") == "Q4_0, Q8_0"


def test_codes_that_code_makes_are_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "coded.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert refusal("coded:quantized", tmp_path, capsys) == "Uniform of 8 bits"
    assert run("quantize", "coded:quantized", "-o", "out", *NEAREST, "--requantize") == 0
    assert jq.load(tmp_path / "out" / "jquant.safetensors")["w"].grid.bits == 4


@pytest.mark.parametrize("kind", ["Q8_0", pytest.param("Q4_0", marks=pytest.mark.slow)])
def test_blocks_are_quantized_anew_as_what_they_mean(
    kind: str, tokens: Any, tmp_path: Path, capsys
) -> None:
    path = write_gguf(tmp_path / "m.gguf", torch_model(num_hidden_layers=1), types={"": kind})
    fn, dense, _ = models.load(path)
    more = (*NEAREST[:-1], *tokens, "--requantize")
    assert run("quantize", path, "-o", tmp_path / "out", *more) == 0
    assert f"already ({kind}): its weights are decoded" in " ".join(capsys.readouterr().err.split())
    again, qparams, _ = models.load(tmp_path / "out")
    weights = jq.find_weights(fn, dense, np.zeros((1, 4), np.int32))
    plan = jq.plan(weights, {"layers/.*": jq.presets.int4_nearest(16), ".*": jq.keep})
    expected, _ = jq.quantize(fn, dense, plan)
    assert again == fn and jax.tree.structure(qparams) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(qparams), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_jquant_wrote_is_quantized_anew_terms_and_all(
    tokens: Any, tmp_path: Path, capsys
) -> None:
    """In place too: the old file is read until the new one takes its name."""
    scheme = jq.Scheme(jq.grids.Uniform(2), jq.Groups(size=16), compensation=jq.LoRC(4))
    fn, qparams = saved(tmp_path / "w2", scheme)
    kept = np.array(jq.dequantize(qparams)["embed"]["embedding"])
    assert refusal(tmp_path / "w2", tmp_path, capsys) == "Uniform of 2 bits"
    out = ("-o", tmp_path / "w2", "--force", "-r", "int8-nearest", "--group", 16, "-q")
    assert run("quantize", tmp_path / "w2", *out, *tokens, "--requantize") == 0
    _, anew, _ = models.load(tmp_path / "w2")
    q = anew["layers"]["0"]["mlp"]["down"]["kernel"]
    old = np.asarray(jq.dequantize(qparams["layers"]["0"]["mlp"]["down"]["kernel"]))
    assert q.grid.bits == 8 and q.compensation is None
    assert abs(np.asarray(jq.dequantize(q)) - old).max() < abs(old).max() / 100
    np.testing.assert_array_equal(anew["embed"]["embedding"], kept)


def test_a_saved_model_without_codes_is_not_quantized(tokens: Any, tmp_path: Path) -> None:
    fn = models.Decoder(from_hf(CONFIG))
    models.save_quantized(tmp_path / "full", fn, fn.init(jax.random.key(0)))
    assert not quantized_as(tmp_path / "full")
    assert run("quantize", tmp_path / "full", "-o", tmp_path / "w4", *NEAREST, *tokens) == 0


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (None, ()),
        ({"quant_method": "fp8"}, ("fp8",)),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ("modelopt NVFP4",)),
        ({}, ("no quant_method",)),
        ([4], ("quantization_config: [4]",)),
    ],
)
def test_what_a_config_calls_it(config: Any, kinds: tuple[str, ...], tmp_path: Path) -> None:
    claims = json.dumps({"quantization_config": config})
    (tmp_path / "config.json").write_text(claims)
    assert quantized_as(tmp_path) == kinds
