"""The command line from end to end on a tiny random model, and everything a user can get wrong."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from transformers import PreTrainedTokenizerFast

import jquant as jq
from jquant.app import cli
from jquant.app.console import Narrator, megabytes
from jquant.app.decoding import decoded_once
from jquant.app.demo import Sizes, run_demo
from jquant.models.assembly import sources
from jquant.models.config import from_hf

pytestmark = pytest.mark.slow

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random weights, and a byte-level tokenizer trained on `TEXT`."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    tensors = {
        source.name: (rng.normal(size=source.shape) * 0.3).astype(np.float32)
        for source in sources(from_hf(CONFIG), "hf")
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def options(model: Path) -> list[object]:
    return ["--text", model / "text.txt", "--length", 32, "--samples", 4]


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    target = model / "w4"
    status = run("quantize", model, "-o", target, "--group", 16, "--quiet", *options(model))
    assert status == 0
    return target


# The whole way


def test_quantize_says_what_it_did(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("jquant.app.console.EVERY", 0.0)
    status = run(
        "quantize", model, "--output", tmp_path / "out", "--report",
        "--rule", ".*mlp/down/kernel=int8-nearest", "--rule", ".*attention/v.*=int4-gptq:8",
        "--rule", ".*/1/attention/q/.*=keep", *options(model),
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert status == 0
    assert "quantizing: stage 1/8, reading layers/0/attention" in err
    assert "of nearest, about" in err and "quantizing: done" in err
    assert "13 weights" in out and "layers/1/attention/q/kernel" in out
    leaves = jq.io.read_header(tmp_path / "out" / "jquant.safetensors").leaves
    assert leaves["layers/0/mlp/down/kernel"].grid.bits == 8
    assert leaves["layers/0/attention/v/kernel"].groups.size == 8
    assert leaves["layers/0/mlp/up/kernel"].groups.size == 64
    assert leaves["layers/1/attention/q/kernel"].grid is None
    assert leaves["embed/embedding"].grid is None
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["weights"]) == 13


def test_what_is_worse_than_nearest_is_a_warning(
    model: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("jquant.jobs.stages.WORSE", 0.5)  # so that nearest rounding itself is
    assert run("quantize", model, "-o", tmp_path / "out", "-r", "int8-nearest", "-q") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert said == [
        f"jquant: warning: weight {path!r}: its error is 1.00 times that of nearest rounding"
        for path in report["weights"]
    ]


def test_the_embedding_can_be_quantized_too(model: Path, tmp_path: Path) -> None:
    arguments = ["-o", tmp_path / "out", "--rule", "embed.*=int8-nearest", "-r", "int4-nearest"]
    assert run("quantize", model, *arguments, "-q", *options(model)) == 0
    leaves = jq.io.read_header(tmp_path / "out" / "jquant.safetensors").leaves
    assert leaves["embed/embedding"].grid.bits == 8


def test_a_quantized_folder_loads_as_a_model(model: Path, quantized: Path) -> None:
    fn, qparams, tokenizer = jq.models.load(quantized)
    full_fn, params, full_tokenizer = jq.models.load(model)
    assert fn == full_fn and tokenizer("the dog") == full_tokenizer("the dog")
    tokens = np.arange(12, dtype=np.int32).reshape(1, 12)
    exact, near = jax.jit(full_fn)(params, tokens), jax.jit(jq.apply(fn))(qparams, tokens)
    assert 0 < float(abs(exact - near).mean()) < 0.5 * float(abs(exact).mean())


def test_inspect(quantized: Path, capsys) -> None:
    assert run("inspect", quantized) == 0
    out, _ = capsys.readouterr()
    assert "format 1" in out and "Uniform(bits=4" in out and "in 16" in out
    assert run("inspect", quantized / "jquant.safetensors", "--every") == 0
    out, _ = capsys.readouterr()
    assert "layers/1/mlp/gate/kernel" in out.replace("\n", "")


def test_evaluate(model: Path, quantized: Path, capsys) -> None:
    assert run("evaluate", quantized, *options(model), "-q") == 0
    alone, err = capsys.readouterr()
    assert "perplexity" in alone and not err
    assert run("evaluate", quantized, "--against", model, *options(model)) == 0
    out, err = capsys.readouterr()
    assert "KL, nats per token" in out and "same likeliest token" in out and "evaluating" in err
    assert run("evaluate", model, "--against", model, *options(model), "-q") == 0
    assert "0.00000" in capsys.readouterr().out


def test_generate(quantized: Path, capsys) -> None:
    assert run("generate", quantized, "--prompt", "The quick", "--tokens", 5) == 0
    first, err = capsys.readouterr()
    assert "decoding 14 weights once (" in err
    assert run("generate", quantized, "-p", "The quick", "--tokens", 5, "--no-chat") == 0
    assert capsys.readouterr().out == first and first.endswith("\n")
    assert run("generate", quantized, "-p", "The quick", "--tokens", 5, "--quantized", "keep") == 0
    kept, err = capsys.readouterr()
    assert kept == first and "decoding" not in err
    warm = ("generate", quantized, "-p", "The", "--tokens", 5, "--temperature", 1.5, "--seed")
    assert run(*warm, 1) == run(*warm, 1) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]


def test_weights_are_decoded_once_where_that_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    fn = lambda p, x: x @ p["a"] @ p["b"]  # noqa: E731
    params = {name: jnp.eye(8) for name in "ab"}
    inputs = jq.Activations(jq.grids.Uniform(8))
    rules = {
        "a": jq.Scheme(jq.grids.Uniform(4)),
        "b": jq.Scheme(jq.grids.Uniform(8), None, activations=inputs),
    }
    qparams, _ = jq.quantize(fn, params, jq.plan(jq.find_weights(fn, params, jnp.eye(8)), rules))
    once = decoded_once(qparams, Narrator(quiet=True))
    np.testing.assert_array_equal(once["a"], jq.dequantize(qparams["a"]))
    assert once["b"] is qparams["b"]  # an array would forget how its inputs are quantized
    monkeypatch.setattr("jquant.app.decoding._memory", lambda: 2 * 4 * 64 - 1)
    assert decoded_once(qparams, Narrator(quiet=True)) is qparams


def test_the_demo_runs_from_end_to_end(model: Path, tmp_path: Path, capsys) -> None:
    run_demo(Narrator(), Sizes(2, 2, 32, 4), output=tmp_path / "d", source=model)
    out, err = capsys.readouterr()
    assert "every bit came back" in err and "KL to full precision" in out and "Done in" in err


def test_what_is_quantized_is_not_quantized_again(quantized: Path, tmp_path: Path, capsys) -> None:
    for source in (quantized, quantized / "jquant.safetensors", f"{quantized}/"):
        assert run("quantize", source, "-o", tmp_path / "w3") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "is quantized already" in line and "the model it was made from" in line
        assert run("generate", source, "-p", "The quick", "--tokens", 2) == 0
        capsys.readouterr()
    assert not (tmp_path / "w3").exists()


def test_windows_are_no_longer_than_the_context(model: Path, capsys) -> None:
    assert run("evaluate", model, "--text", model / "text.txt", "--samples", 2, "-q") == 0
    assert "on 256 held-out tokens" in capsys.readouterr().out  # two of 128: its context


def test_a_tokenizer_beside_or_from_elsewhere(model: Path, tmp_path: Path, capsys) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    more = ["-r", "int4-nearest", *options(model)]
    for command in (
        ["quantize", bare, "-o", tmp_path / "out", *more],
        ["evaluate", bare, *options(model)],
        ["generate", bare, "-p", "The quick"],
    ):
        assert run(*command) == 1
        assert "no tokenizer beside it; name one with --tokenizer" in capsys.readouterr().err
    named = ["--tokenizer", model]
    assert run("quantize", bare, "-o", tmp_path / "out", *more, *named, "-q") == 0
    assert run("evaluate", tmp_path / "out", "--against", bare, *options(model), *named, "-q") == 0
    capsys.readouterr()
    written = []
    for source, tokenizer in ((bare, model), (bare, model / "tokenizer.json"), (model, model)):
        assert run("generate", source, "-p", "The", "--tokens", 4, "--tokenizer", tokenizer) == 0
        written.append(capsys.readouterr().out)
    assert len(set(written)) == 1
    small = json.loads((bare / "config.json").read_text()) | {"vocab_size": 20}
    (bare / "config.json").write_text(json.dumps(small))
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:20].copy()
    safetensors.numpy.save_file(tensors, bare / "model.safetensors")
    for command in (["evaluate", *options(model)], ["generate", "-p", "The quick"]):
        assert run(command[0], bare, *command[1:], *named) == 1
        assert "the model has 20: it is another model's" in capsys.readouterr().err


def pieces(folder: Path, width: int = 32, **options: Any) -> Path:
    """A GGUF file of one layer with a SentencePiece vocabulary, and `text.txt` beside it."""
    pytest.importorskip("torch")
    from checkpoints import piece_tokenizer, torch_model, write_gguf

    words = piece_tokenizer("The quick brown fox jumps over the lazy dog")
    network = torch_model(
        vocab_size=len(words["token_list"]), hidden_size=width,
        intermediate_size=width, num_hidden_layers=1, tie_word_embeddings=True,
    )  # fmt: skip
    (folder / "text.txt").write_text(TEXT)
    return write_gguf(folder / "model.gguf", network, tokenizer=words, **options)


def test_a_gguf_file_of_sentencepiece_goes_all_the_way(tmp_path: Path, capsys) -> None:
    path = pieces(tmp_path)
    text = ["--text", tmp_path / "text.txt", "--length", 32, "--samples", 2, "-q"]
    assert run("quantize", path, "-o", tmp_path / "w4", "-r", "int4-nearest", *text) == 0
    assert run("evaluate", tmp_path / "w4", "--against", path, *text) == 0
    said = []
    for tokenizer in ([], ["--tokenizer", path]):
        capsys.readouterr()
        assert run("generate", tmp_path / "w4", "-p", "The fox", "--tokens", 4, *tokenizer) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("kinds", "width"),
    [(["Q4_0"], 32), pytest.param(["Q4_K", "Q6_K"], 256, marks=pytest.mark.slow)],
)
def test_a_quantized_gguf_file_runs_on_its_codes(
    kinds: list[str], width: int, tmp_path: Path, capsys
) -> None:
    path = pieces(tmp_path, width, types={"ffn_down": kinds[-1], "": kinds[0]})
    text = ["--text", tmp_path / "text.txt", "--length", 32, "--samples", 2]
    shown = []
    for more in ([], ["--quantized", "keep"]):
        assert run("evaluate", path, *text, "-q", *more) == 0
        assert run("generate", path, "-p", "The fox", "--tokens", 4, *more) == 0
        shown.append(re.split(r"(\d+\.\d+)", capsys.readouterr().out))
    (title, dense, *rest), (same, kept, *others) = shown
    assert title == same and rest == others
    np.testing.assert_allclose(float(kept), float(dense), rtol=1e-5)  # perplexity
    command = ["quantize", path, "-o", tmp_path / "w4", "-r", "int4-nearest", *text]
    assert run(*command) == 1
    refusal = " ".join(capsys.readouterr().err.split())
    assert f"model.gguf is quantized already ({', '.join(kinds)})" in refusal
    assert run(*command, "--requantize") == 0
    assert "its weights are decoded" in " ".join(capsys.readouterr().err.split())


def test_a_model_leaves_in_the_formats_of_others(tmp_path: Path, capsys) -> None:
    path = pieces(tmp_path)
    text = ["--text", tmp_path / "text.txt", "--length", 32, "--samples", 2, "-q"]
    quantize = ["quantize", path, "-r", "q8-0-nearest", *text]
    assert run(*quantize, "-o", tmp_path / "w8.gguf", "--to", "gguf") == 0
    assert "weights" in json.loads((tmp_path / "w8.gguf.report.json").read_text())
    assert run(*quantize, "-o", tmp_path / "w8") == 0
    export = ["export", tmp_path / "w8", "--to", "gguf", "--like", path, "-o"]
    assert run(*export, tmp_path / "again.gguf") == 0
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "w8.gguf").read_bytes()
    assert run(*export, tmp_path / "again.gguf") == 1
    assert run(*quantize, "-o", tmp_path / "gptq", "--to", "gptq") == 1
    assert "gptq cannot hold the grid GGUF" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "gptq").exists()


# Help


COMMANDS = ["demo", "quantize", "export", "evaluate", "inspect", "generate"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys) -> None:
    assert run("--help") == 0
    assert command in capsys.readouterr().out
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert command == "demo" or f"jquant {command} " in out.split("Parameters")[0]


def test_help_lists_every_preset(capsys) -> None:
    run("quantize", "--help")
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(name in out for name in jq.presets.presets())


def test_recipes_are_listed_with_their_bits(capsys) -> None:
    assert run("recipes") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in jq.presets.presets())
    rows = {line.split("│")[1].strip(): line.split("│") for line in out.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["nvfp4"][2:4]] == ["4.50", "no"]
    assert [cell.strip() for cell in rows["int4-qep"][2:4]] == ["4.31", "yes"]


def test_axes_are_chosen_and_told(model: Path, tmp_path: Path, capsys) -> None:
    arguments = ["-r", "int4-nearest", "--group", 8, "--adadim", "--report", *options(model)]
    assert run("quantize", model, "-o", tmp_path / "out", *arguments) == 0
    out, err = capsys.readouterr()
    assert "choosing axes: done" in err and "axes of groups" in out
    leaves = jq.io.read_header(tmp_path / "out" / "jquant.safetensors").leaves
    outward = sum(leaf.grid is not None and leaf.groups.axis == "out" for leaf in leaves.values())
    assert 0 < outward < 14 and f"groups of {outward} weights along outputs" in out


def test_terms_beside_all_weights(model: Path, tmp_path: Path, capsys) -> None:
    """Of looked-up tables too; the model that is loaded back is the better for it."""
    rule = ["--rule", "embed.*=int8-nearest", "-r", "int2-qep", *options(model)]
    quality = {}
    for name, more in (("without", []), ("with", ["--lorc", 8, "--report"])):
        assert run("quantize", model, "-o", tmp_path / name, *more, *rule) == 0
        out = capsys.readouterr().out
        fn, qparams, _ = jq.models.load(tmp_path / name)
        full_fn, params, _ = jq.models.load(model)
        tokens = np.arange(12, dtype=np.int32).reshape(1, 12)
        near, full = jax.jit(jq.apply(fn))(qparams, tokens), jax.jit(full_fn)(params, tokens)
        quality[name] = float(abs(near - full).mean())
    assert "LoRC 8" in out and quality["with"] < 0.8 * quality["without"]
    assert run("inspect", tmp_path / "with") == 0
    assert "rank 8" in capsys.readouterr().out
    leaves = jq.io.read_header(tmp_path / "with" / "jquant.safetensors").leaves
    assert sum(leaf.rank == 8 for leaf in leaves.values()) == 15


def test_a_budget_gives_each_weight_its_width(model: Path, tmp_path: Path, capsys) -> None:
    command = [
        "quantize", model, "--recipe", "int4-gptq", "--group", "16", "--bits", "4.5",
        "--rule", ".*/1/mlp/up.*=int8-nearest:32", *options(model),
    ]  # fmt: skip
    assert run(*command, "-o", tmp_path / "dry", "--dry-run") == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "dry").exists() and "peak memory" in planned
    assert run(*command, "-o", tmp_path / "out", "--report") == 0
    out = capsys.readouterr().out
    (said,) = (line for line in out.splitlines() if line.startswith("bits: "))
    assert said in planned and "by Fisher" in said and "who gets the bits" in out
    shares = json.loads((tmp_path / "out" / "report.json").read_text())["allocation"]
    leaves = jq.io.read_header(tmp_path / "out" / "jquant.safetensors").leaves
    stored = {path: leaves[path].bytes for path in shares["weights"]}
    assert stored == {path: share["bytes"] for path, share in shares["weights"].items()}
    numbers = sum(int(np.prod(leaves[path].shape)) for path in stored)
    assert sum(stored.values()) <= shares["budget_bytes"] == int(4.5 * numbers / 8)
    assert len({leaves[path].grid.bits for path in stored}) > 2
    ruled = leaves["layers/1/mlp/up/kernel"]
    assert ruled.grid.bits == 8 and ruled.groups.size == 32


def test_weights_are_learned_on_an_objective(model: Path, tmp_path: Path, capsys) -> None:
    status = run(
        "quantize", model, "-o", tmp_path / "out", "--recipe", "int4-signround", "--group", "8",
        "--objective", "kl", *options(model),
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert status == 0 and "learning" in err and "objective" in out
    (trace,) = json.loads((tmp_path / "out" / "report.json").read_text())["traces"]
    assert len(trace["loss"]) == 200
    assert min(trace["looks"].values()) < 0.9 * trace["looks"]["0"]


def test_version(capsys) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.strip()


# What a user can get wrong


WRONG = {
    "no such model": (("quantize", "nope", "-o", "OUT"), 1, "'nope': no such file"),
    "no such hub id": (("generate", "no/such/thing", "-p", "x"), 1, "no such file"),
    "no output": (("quantize", "MODEL"), 2, "--output"),
    "no prompt": (("generate", "MODEL"), 2, "--prompt"),
    "no such command": (("quantise", "MODEL"), 2, "quantise"),
    "no such option": (("quantize", "MODEL", "-o", "OUT", "--widths", "4"), 2, "--widths"),
    "not a number": (("quantize", "MODEL", "-o", "OUT", "--samples", "x"), 2, "samples"),
    "no such recipe": (("quantize", "nope", "-o", "OUT", "-r", "int5"), 1, "'int4-qep'"),
    "group of a format": (
        ("quantize", "nope", "-o", "OUT", "-r", "nvfp4", "--group", "8"), 1, "groups of 16",
    ),
    "correction in one pass": (
        ("quantize", "MODEL", "-o", "OUT", "--sequential", "none"), 1, "correction needs the drift",
    ),
    "no rank": (("quantize", "MODEL", "-o", "OUT", "--lorc", "0"), 1, "LoRC.rank must be"),
    "too high a rank": (("quantize", "MODEL", "-o", "OUT", "--lorc", "17"), 1, "at most 16"),
    "group of none": (("quantize", "nope", "-o", "OUT", "--group", "0"), 1, "Groups.size"),
    "nothing to learn": (
        ("quantize", "MODEL", "-o", "OUT", "--objective", "kl", "--text", "MODEL/text.txt",
         "--length", "16"), 1, "a rounding that is learned",
    ),
    "no such objective": (("quantize", "MODEL", "-o", "OUT", "--objective", "x"), 2, "own"),
    "a dry run of a learning": (
        ("quantize", "MODEL", "-o", "OUT", "--objective", "kl", "--dry-run", "--text",
         "MODEL/text.txt", "--length", "16"), 1, "--dry-run cannot tell",
    ),
    "a budget below the smallest": (
        ("quantize", "MODEL", "-o", "OUT", "--bits", "2.2", "--group", "16", "--text",
         "MODEL/text.txt", "--length", "32"), 1, "smallest possible: 6000 bytes, 3.125 bits",
    ),
    "a budget that is none": (
        ("quantize", "MODEL", "-o", "OUT", "--bits", "nan", "--text", "MODEL/text.txt",
         "--length", "32"), 1, "bits must be a number above 0, got nan",
    ),
    "a budget for one width": (
        ("quantize", "MODEL", "-o", "OUT", "--bits", "4.5", "-r", "nf4", "--text",
         "MODEL/text.txt", "--length", "32"), 1, "Codebook grid has no width to choose",
    ),
    "a budget for nothing": (
        ("quantize", "MODEL", "-o", "OUT", "--bits", "4.5", "--rule", ".*=int4-gptq", "--text",
         "MODEL/text.txt", "--length", "32"), 1, "rules name every weight",
    ),
    "rule without =": (("quantize", "MODEL", "-o", "OUT", "--rule", "x"), 1, "REGEX=RECIPE"),
    "rule of no recipe": (("quantize", "MODEL", "-o", "OUT", "--rule", ".*=x"), 1, "no preset"),
    "rule of no regex": (("quantize", "MODEL", "-o", "OUT", "--rule", "(=keep"), 1, "regular"),
    "rule of no weight": (
        ("quantize", "MODEL", "-o", "OUT", "--rule", "layer=keep"), 1, "'layer'",
    ),
    "output taken": (("quantize", "MODEL", "-o", "MODEL"), 1, "--force"),
    "no such text": (("evaluate", "MODEL", "--text", "nope.txt"), 1, "nope.txt: No such file"),
    "text too short": (
        ("evaluate", "MODEL", "--text", "MODEL/text.txt", "--length", "100000"), 1, "tokens",
    ),
    "binary text": (("evaluate", "MODEL", "--text", "MODEL/model.safetensors"), 1, "not UTF-8"),
    "too many samples": (("evaluate", "MODEL", "--samples", "9999999"), 1, "--samples 9999999"),
    "no checkpoint": (("inspect", "MODEL"), 1, "jquant.safetensors: No such file"),
    "another checkpoint": (("inspect", "MODEL/model.safetensors"), 1, "jquant did not write"),
    "windows longer than the context": (
        ("evaluate", "MODEL", "--length", "129"), 1, "--length 129: the model's context has 128",
    ),
    "calibration longer than the context": (
        ("quantize", "MODEL", "-o", "OUT", "--length", "512"), 1, "context has 128",
    ),
    "no such tokenizer": (
        ("generate", "MODEL", "-p", "x", "--tokenizer", "MODEL/nope"), 1, "cannot be read",
    ),
    "a tokenizer that is none": (
        ("evaluate", "MODEL", "--tokenizer", "MODEL/text.txt"), 1, "a GGUF file starts with",
    ),
    "a file of a folder": (("generate", "MODEL/config.json", "-p", "x"), 1, "pass its folder"),
    "an empty folder": (("evaluate", "EMPTY"), 1, "config.json is missing"),
    "a folder of something else": (("quantize", "EMPTY", "-o", "OUT"), 1, "config.json is missing"),
    "prompt too long": (("generate", "MODEL", "-p", "x", "--tokens", "9999"), 1, "9999"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line(name: str, model: Path, tmp_path: Path, capsys) -> None:
    arguments, status, message = WRONG[name]
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}
    for word, place in places.items():
        arguments = tuple(argument.replace(word, place) for argument in arguments)
    assert run(*arguments) == status
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("jquant: error: ")]
    assert len(errors) == 1 and message in errors[0] and errors[0] == err.splitlines()[-1]
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_another_network_is_refused(model: Path, quantized: Path, tmp_path: Path, capsys) -> None:
    fn = jq.models.Decoder(from_hf({**CONFIG, "num_hidden_layers": 1}))
    _, _, tokenizer = jq.models.load(quantized)
    jq.models.save_quantized(tmp_path, fn, fn.init(jax.random.key(0)), tokenizer)
    assert run("evaluate", tmp_path, "--against", model, *options(model)) == 1
    assert "is another network" in capsys.readouterr().err


def test_parameters_of_another_network_are_refused(quantized: Path, tmp_path: Path) -> None:
    fn, _, _ = jq.models.load(quantized)
    other = jq.models.Decoder(from_hf({**CONFIG, "hidden_size": 16}))
    jq.models.save_quantized(tmp_path, fn, other.init(jax.random.key(0)))
    with pytest.raises(jq.errors.CheckpointError, match="do not fit the decoder at 'embed"):
        jq.models.load(tmp_path)
    for decoder in ("[]", "{", '{"config": {"vocab": "x"}}', '{"config": {"layers": 1e99}}'):
        path = tmp_path / "jquant.safetensors"
        jq.save(path, {"w": np.ones(2, np.float32)}, metadata={"decoder": decoder})
        with pytest.raises(jq.errors.CheckpointError, match="malformed decoder"):
            jq.models.load(tmp_path)
    jq.save(path, {"w": np.ones(2, np.float32)})
    with pytest.raises(jq.errors.CheckpointError, match="without a decoder"):
        jq.models.load(tmp_path)


def test_ctrl_c_is_a_line_and_130(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "quantize", interrupted)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored
    try:
        assert run("quantize", model, "-o", tmp_path / "out", *options(model)) == 130
    finally:
        signal.signal(signal.SIGINT, old)
    assert capsys.readouterr().err.endswith("jquant: stopped\n")
    assert not (tmp_path / "out").exists()


def test_errors_can_be_debugged(monkeypatch) -> None:
    monkeypatch.setenv("JQUANT_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("inspect", "nope")


def test_the_installed_command_is_the_module(quantized: Path) -> None:
    command = [sys.executable, "-m", "jquant", "inspect", str(quantized / "nope")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_plain_lines_where_there_is_no_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr("jquant.app.console.EVERY", 0.0)
    with Narrator().stage("one", 2) as update:
        update(1)
        update(2)
    with Narrator().job("two") as move:
        move(jq.Progress(0, 2, "w", "rounding", 1, 2))
        move(jq.Progress(1, 2, "v", "advancing", 1, 2, ratio=0.25))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["one ...", "one", "one"] + [
        "two ...", "two", "two", "two"
    ]  # fmt: skip
    assert "1/2, about" in lines[1] and "done in" in lines[2]
    assert "stage 1/2, rounding w, about" in lines[4]
    assert "stage 2/2, advancing v, error 0.25 of nearest, about" in lines[5]
    assert megabytes(2.5e6) == "2.5 MB"


def test_dry_run_says_what_a_job_takes_and_writes_nothing(
    model: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    assert run("quantize", model, "--output", output, "--dry-run", *options(model)) == 0
    out = capsys.readouterr().out
    assert "8, 14 weights" in out and "peak memory" in out and "time" in out
    assert not output.exists()


def test_a_work_directory_resumes(model: Path, tmp_path: Path, capsys) -> None:
    work = tmp_path / "work"
    command = ["quantize", model, "--work-dir", work, *options(model)]
    assert run(*command, "-o", tmp_path / "a") == 0
    records = sorted(path.name for path in work.glob("stage-*"))
    assert len(records) == 8
    (work / records[-1]).unlink()
    assert run(*command, "-o", tmp_path / "b") == 0
    a, b = ((tmp_path / name / "jquant.safetensors").read_bytes() for name in "ab")
    assert a == b
    capsys.readouterr()
    assert run(*command, "--recipe", "int3-gptq", "-o", tmp_path / "c") == 1
    assert "the plan changed" in capsys.readouterr().err


# Other engines' formats


def test_a_quantized_model_is_exported(
    model: Path, quantized: Path, tmp_path: Path, capsys
) -> None:
    for number, more in enumerate(((), ("--like", model, "--quiet"))):
        out = tmp_path / str(number)
        assert run("export", quantized, "--to", "compressed-tensors", "-o", out, *more) == 0
        assert "14 weights as pack-quantized" in " ".join(capsys.readouterr().out.split())
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["format"] == "pack-quantized"
        assert run("generate", out, "-p", "The fox", "--tokens", 4, "--quantized", "keep") == 0
        capsys.readouterr()
    assert run("export", quantized, "--to", "compressed-tensors", "-o", out) == 1
    assert "earlier export" in capsys.readouterr().err
    assert run("export", quantized, "--to", "awq", "-o", out, "--force", "--no-verify") == 0


def test_quantized_into_another_format_in_one_go(model: Path, tmp_path: Path, capsys) -> None:
    out, text = tmp_path / "out", ("--text", model / "text.txt", "--length", 32)
    options = ("-r", "int4-nearest", "--group", 16, "--to", "awq", *text)
    assert run("quantize", model, "-o", out, *options) == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert (out / "report.json").exists() and (out / "tokenizer.json").exists()
    capsys.readouterr()
    other = tmp_path / "other"
    assert run("quantize", model, "-o", other, "-r", "nf4", "--to", "gptq", *text) == 1
    assert "gptq cannot hold the grid Codebook" in capsys.readouterr().err
    assert not other.exists()
