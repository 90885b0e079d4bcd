"""`jquant verify`: what an export holds, what was done to it since, and what an engine computes."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_export import HALF, SMALL, quantized

import jquant as jq
from jquant import exporters
from jquant.app import cli
from jquant.errors import CheckpointError, ClientError
from jquant.exporters import client_child
from jquant.grids import Uniform
from jquant.models.decoder import Decoder


@pytest.fixture(scope="module")
def model() -> tuple[Decoder, Any]:
    fn = Decoder(SMALL)
    return fn, quantized(fn.init(jax.random.key(0)), jq.Scheme(Uniform(4, True, **HALF), 32))


FORMATS = ("compressed-tensors", "gptq", "awq", "gguf", "mlx", "safetensors")


@pytest.fixture(scope="module")
def exports(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for form in FORMATS:
        jq.export(*model, folder / form, format=form)
    return {form: folder / form for form in FORMATS}


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


# What it holds


HELD = {"compressed-tensors": "pack-quantized", "gptq": "GPTQ v1", "awq": "AWQ", "gguf": "Q4_0",
        "mlx": "MLX affine", "safetensors": "float32"}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_every_tensor_is_read_and_told(form: str, model: Any, exports: dict[str, Path]) -> None:
    told: list[tuple[int, int]] = []
    checked = exporters.check(exports[form], lambda *done: told.append(done))
    assert checked.edited == () and checked.has_checksums == (form != "gguf")
    kinds = [tensor.held for tensor in checked.tensors]
    assert kinds.count(HELD[form]) == (21 if form == "safetensors" else 14)
    assert told == [(k + 1, len(kinds)) for k in range(len(kinds))]
    down = next(t for t in checked.tensors if "down" in t.name)
    assert down.shape == (SMALL.width, SMALL.hidden)
    if form == "safetensors":
        size = (exports[form] / "model.safetensors").stat().st_size
        assert 0 < size - checked.nbytes < 4096  # a header


def test_every_array_of_a_checkpoint_is_read(model: Any, tmp_path: Path) -> None:
    jq.export(*model, tmp_path / "out", format="qwix")
    checked = exporters.check(tmp_path / "out")
    assert checked.edited == () and checked.has_checksums
    down = [t for t in checked.tensors if t.name.endswith("down/kernel/array/qvalue")]
    assert {(t.held, t.shape) for t in down} == {("int4", (SMALL.hidden, SMALL.width))}


def changed(source: Path, target: Path, name: str, value: Any) -> Path:
    """A copy of a folder with another tensor in it."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_what_is_no_number_is_told_by_name(exports: dict[str, Path], tmp_path: Path) -> None:
    source = exports["compressed-tensors"]
    scale = "model.layers.1.mlp.up_proj.weight_scale"
    folder = changed(source, tmp_path / "scale", scale, np.nan)
    with pytest.raises(CheckpointError, match="up_proj.weight': 'scale' holds NaN.*edited since"):
        exporters.check(folder)
    folder = changed(source, tmp_path / "norm", "model.norm.weight", np.inf)
    (folder / exporters.folder.SIDECAR).unlink()
    with pytest.raises(CheckpointError, match="'model.norm.weight': it holds NaN or infinity$"):
        exporters.check(folder)
    with pytest.raises(CheckpointError, match="there is no such folder or file"):
        exporters.check(tmp_path / "nowhere")


def test_the_command_tells_what_was_edited(
    exports: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    source = exports["compressed-tensors"]
    assert run("verify", source, "-q") == 0
    out = capsys.readouterr()
    assert "every file is as it was written" in out.out and out.err == ""
    assert "pack-quantized" in out.out and "64 × 96" in out.out and "q_proj" not in out.out
    assert run("verify", source, "--every", "-q") == 0
    assert "model.layers.0.self_attn.q_proj.weight" in capsys.readouterr().out
    assert run("verify", exports["gguf"]) == 0
    out = capsys.readouterr()
    assert "there are no checksums" in out.out and "reading: done" in out.err
    folder = changed(source, tmp_path / "edited", "model.norm.weight", 2.0)
    assert run("verify", folder, "-q") == 1
    out = capsys.readouterr()
    assert "1 files are not as written" in out.out
    assert "edited after it was written: model.safetensors; export it anew" in out.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "there is no such folder or file"),
        (["nowhere", "--client", "transformers"], 1, "there is no such folder or file"),
        (["gptq", "--client", "vllm"], 2, "vllm"),
        (["gptq", "--against", "other"], 1, "--against is for --client; name one: transformers"),
        (["gptq", "--python", "other"], 1, "--python is for --client"),
        (["gptq", "--client", "transformers"], 1, "is gptq; pass client='gptqmodel'"),
        (["gguf", "--client", "gptqmodel"], 1, "is gguf; pass client='llama-cpp'"),
        (["gguf", "--client", "llama-cpp", "--python", "nowhere/python"], 1, "nowhere/python"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_one_line(
    arguments: list[str], status: int, message: str, exports: dict[str, Path],
    capsys: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(exports["gguf"].parent)
    assert run("verify", *arguments, "-q") == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# What an engine computes


ENGINE = """
    import numpy as np

    class Llama:
        def __init__(self, path, n_ctx, **options):
            print("noise of the engine, without an end", end="")
            BODY

        def reset(self):
            pass

        def eval(self, tokens):
            self.scores = np.zeros((len(tokens), 48), np.float32)
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine that gives zeros, or does what it is told first, in place of llama-cpp-python."""

    def made(body: str = "pass") -> None:
        source = textwrap.dedent(ENGINE).replace("BODY", body)
        (tmp_path / "llama_cpp.py").write_text(source)
        (tmp_path / "llama_cpp_python-9.8.dist-info").mkdir(exist_ok=True)
        metadata = "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.8\n"
        (tmp_path / "llama_cpp_python-9.8.dist-info" / "METADATA").write_text(metadata)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return made


TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8)


def test_an_engine_is_asked_in_a_process_of_its_own(
    engine: Any, exports: dict[str, Path], tmp_path: Path
) -> None:
    engine()
    done: list[int] = []
    answer = exporters.ask("llama-cpp", exports["gguf"], TOKENS, tmp_path, progress=done.append)
    assert answer.versions == {"llama-cpp-python": "9.8"} and answer.way == "as it comes"
    assert done[-1] == 0 and max(done) == 2  # a line for each window, and one at the end
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(2, 8, 48)) * 3
    result = exporters.apart(iter(expected), answer.logits())
    p = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    np.testing.assert_allclose(result.kl, (p * np.log(p * 48)).sum(-1).mean())
    assert result.largest_difference == result.largest_logit == np.abs(expected).max()
    assert result.relative == 1 and result.same_token == (expected.argmax(-1) == 0).mean()
    with pytest.raises(ClientError, match=r"logits are \(8, 48\), expected \(8, 47\)"):
        exporters.apart(iter(expected[..., 1:]), answer.logits())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no such tensor\\nat all')", "RuntimeError: no such tensor$"),
        ("raise SystemExit('gone')", "gone$"),
        ("import os; os.abort()", "did not run"),
        ("import missing_package", "No module named 'missing_package'"),
    ],
)
def test_what_an_engine_says_is_told(
    body: str, message: str, engine: Any, exports: dict[str, Path], tmp_path: Path
) -> None:
    engine(body)
    with pytest.raises(ClientError, match=message):
        exporters.ask("llama-cpp", exports["gguf"], TOKENS, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="it is installed")
def test_an_engine_that_is_not_there_is_named(exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ClientError, match=r"llama-cpp-python is not installed.*'llama-cpp-python=="
    ):
        exporters.ask("llama-cpp", exports["gguf"], TOKENS, tmp_path)
    with pytest.raises(ClientError, match="client='vllm' is none of transformers, llama-cpp"):
        exporters.ask("vllm", exports["gguf"], TOKENS, tmp_path)


@pytest.mark.slow
def test_the_command_tells_how_far_an_engine_is_away(
    engine: Any, exports: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    engine()
    np.save(tmp_path / "tokens.npy", TOKENS)
    with_tokens = ("--batches", tmp_path / "tokens.npy")
    own = ("verify", exports["gguf"], "--client", "llama-cpp", "-q")
    assert run(*own, *with_tokens) == 0
    given = capsys.readouterr().out
    assert "llama-cpp on 16 tokens, beside jquant.apply of" in given
    assert "llama-cpp-python 9.8" in given and "KL, nats per token" in given
    assert run(*own, "--samples", 3, "--length", 5) == 0
    assert "on 15 random tokens" in capsys.readouterr().out
    other = exports["compressed-tensors"]
    assert run(*own, *with_tokens, "--against", other) == 0
    assert f"jquant.apply of {other}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.slow
def test_transformers_computes_the_same(
    model: Any, exports: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    fn, qparams = model
    answer = exporters.ask("transformers", exports["safetensors"], TOKENS, tmp_path)
    logits = np.asarray(jq.apply(fn)(qparams, TOKENS))
    result = exporters.apart(iter(logits), answer.logits())
    assert result.relative < 1e-5 and result.kl < 1e-9


def test_when_transformers_is_told_to_make_arrays() -> None:
    def told(kind: str, symmetric: bool) -> bool:
        group = {"format": kind, "weights": {"symmetric": symmetric}}
        config = {"quantization_config": {"config_groups": {"group_0": group}}}
        return client_child.as_arrays(json.loads(json.dumps(config)))

    assert told("pack-quantized", False) and told("mxfp4-pack-quantized", True)
    assert not told("pack-quantized", True) and not told("float-quantized", True)
    assert not client_child.as_arrays({}) and not client_child.as_arrays(
        {"quantization_config": None}
    )
