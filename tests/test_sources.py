"""Models that the user's code makes, on the command line: where they come from, what they run on.

The laws: such a model goes the whole way (quantize, evaluate) with its parameters in memory or in
an Orbax checkpoint; whatever is wrong with a name, checkpoint or file is told before work starts.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import PreTrainedTokenizerFast

import jquant as jq
from jquant import io, models
from jquant.app import cli
from jquant.app.documents import tokens_of
from jquant.app.examples import count_examples, count_tokens, one_by_one, read_batches
from jquant.app.named_inputs import need_fitting
from jquant.app.sources import Model, names_maker, opened
from jquant.errors import TreeError
from jquant.trees.lazy import Lazy, realize

MODULE = """
import jax, jax.numpy as jnp

def fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]

def batches():
    return [jax.random.normal(jax.random.key(2), (32, 32))] * 2

def make():
    one, two = jax.random.split(jax.random.key(0))
    return fn, {"a": jax.random.normal(one, (32, 32)), "b": jax.random.normal(two, (32, 16))}

def complete():
    return (*make(), batches())

def shapes():
    return fn, jax.eval_shape(lambda: make()[1])

class Object:
    fn = staticmethod(fn)
    params = make()[1]
    batches = batches()

def three():
    return 3

def four():
    return fn, {}, [], None

def no_batches():
    return (*make(), [])

def fails():
    return {}["theirs"]

def narrow():
    return (*make(), [jax.numpy.ones((2, 31))])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the module `made`."""
    (tmp_path / "made.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made", raising=False)
    return tmp_path


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


# The whole way


@pytest.mark.slow
@pytest.mark.parametrize("name", ["complete", "Object"])
def test_a_model_that_code_makes_goes_the_whole_way(name: str, folder: Path, capsys) -> None:
    assert run("quantize", f"made:{name}", "-o", "out", "--group", 16, "-q") == 0
    assert "2 weights" in capsys.readouterr().out
    assert run("evaluate", "out", "--against", f"made:{name}", "-q") == 0
    assert "64 examples" in (shown := capsys.readouterr().out)
    error = float(shown.split("│")[2])
    assert 0 < error < 0.02
    assert run("evaluate", "out") == 1
    assert "--against" in capsys.readouterr().err


@pytest.mark.slow
def test_parameters_are_read_from_orbax(folder: Path, capsys) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    import made  # type: ignore

    fn, params = made.make()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "run", params)
    np.savez(folder / "x.npz", np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32))
    data = ["--batches", "x.npz", "--params", "run"]
    assert run("quantize", "made:shapes", "-o", "out", *data, "--bits", 4.6, "-q") == 0
    assert run("evaluate", "out", "--against", "made:shapes", *data, "-q") == 0
    out = capsys.readouterr().out
    assert "48 examples" in out
    assert fn is not None and jq.load(folder / "out" / "jquant.safetensors").keys() == {"a", "b"}


def test_made_models_are_opened_lazily(folder: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    import made  # type: ignore

    _, params = made.make()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "run", params)
    model = opened("made:shapes", params=folder / "run", lazy=True)
    assert all(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(model.params))
    np.testing.assert_array_equal(realize(model.params)["a"], params["a"])


# Names


@pytest.mark.parametrize(
    "source, is_name",
    {
        "pkg.mod:make": True, "mod:make": True, "mod:Class.make": True, "mod.py:make": True,
        "model.gguf": False, "org/model": False, "./mod:make": False, "C:\\model": False,
        "a/b:c": False, "mod:": False, ":make": False,
    }.items(),
)  # fmt: skip
def test_what_is_a_name(source: str, is_name: bool) -> None:
    assert names_maker(source) is is_name


def test_a_file_of_that_name_is_the_file(folder: Path) -> None:
    (folder / "made:make").write_text("")
    assert not names_maker("made:make")


WRONG = {
    "no module": ("nowhere:make", "no module 'nowhere'"),
    "no package": ("no.where:make", "no module 'no.where'"),
    "no attribute": ("made:mak", "no callable 'mak'; it has fn, batches, make"),
    "a number": ("made:three", "returned int; it must return"),
    "four things": ("made:four", "returned a tuple of 4"),
    "shapes": ("made:shapes", "pass --params FOLDER"),
    "an error": ("made:fails", "made:fails raised KeyError: 'theirs' ("),
    "a module that fails": ("broken:make", "broken.py, line 2; JQUANT_DEBUG=1"),
    "a package that is missing": ("lacking:make", "ModuleNotFoundError: No module named 'nowhere'"),
    "no Python": ("wrong:make", "raised SyntaxError: "),
    "other batches": ("made:narrow", "made:narrow cannot be run on float32 (2, 31): TypeError: "),
}
BROKEN = {"broken": "x = 1\nx.y", "lacking": "import nowhere.at_all", "wrong": "def make(:"}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_names_are_told(case: str, folder: Path, capsys) -> None:
    source, message = WRONG[case]
    for name, text in BROKEN.items():
        (folder / f"{name}.py").write_text(text)
    assert run("quantize", source, "-o", "out", "-q") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (folder / "out").exists()


def test_what_is_missing_is_told(folder: Path, capsys) -> None:
    for options, message in [
        (["made:make"], "nothing to run made:make on"),
        (["made:no_batches"], "made:no_batches: no batches"),
        (["made:complete", "--samples", 3], "--samples 3: there are 1 to 2 batches"),
        (["made:complete", "--params", "nowhere"], "no Orbax checkpoint"),
        (["made:complete", "--batches", "x.npz"], "x.npz: No such file"),
        (["made:complete", "--batches", "made:fn"], "made:fn is called without arguments: missing"),
        (["nowhere.gguf", "--params", "run"], "--params is for models that code makes"),
        (["made:make", "--architecture", "BertModel"], "--architecture is for Hugging Face fold"),
    ]:
        assert run("quantize", *options, "-o", "out", "-q") == 1
        assert message in capsys.readouterr().err


def test_a_package_that_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(sys.modules, "torchax", None)  # as if not installed
    assert run("quantize", tmp_path, "--backend", "torch", "-o", tmp_path / "out", "-q") == 1
    error = capsys.readouterr().err
    assert "pip install 'jquant-jax[torch]'" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tokens_that_a_decoder_lacks_are_told() -> None:
    fn = models.Decoder(
        models.DecoderConfig(vocab=9, width=8, hidden=8, layers=1, heads=2, kv_heads=2)
    )
    model = Model("it", fn, jax.eval_shape(fn.init, jax.random.key(0)))
    need_fitting(model, [np.array([[0, 8]])], "x.npz")
    for tokens, message in [
        ([[0, 9]], "token 9; it has"),
        ([[-1, 0]], "token -1; it has tokens 0 to 8"),
    ]:
        with pytest.raises(ValueError, match=f"x.npz: input_ids holds {message}"):
            need_fitting(model, [np.array([[1, 2]]), np.array(tokens)], "x.npz")
    with pytest.raises(ValueError, match=r"x.npz: it cannot be run on float64 \(1, 2\): "):
        need_fitting(model, [np.zeros((1, 2))], "x.npz")


def test_code_is_not_measured_against_a_file(folder: Path, capsys) -> None:
    assert run("evaluate", "made:complete", "--against", "x.gguf", "-q") == 1
    assert "--against made:complete" in capsys.readouterr().err


# Checkpoints in the places of a tree


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)


@pytest.mark.parametrize("stored", ["state", "pure dict"])
@pytest.mark.parametrize("like", ["state", "pure dict"])
def test_orbax_leaves_take_the_places_of_a_tree(stored: str, like: str, tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    state = nnx.state(Network(nnx.Rngs(0)))
    trees = {"state": state, "pure dict": nnx.to_pure_dict(state)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", trees[stored])
    places = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, "bfloat16"), trees[like])
    lazy = io.lazy_orbax(tmp_path / "x", like=places)
    assert jax.tree.structure(lazy) == jax.tree.structure(places)
    for leaf, value in zip(jax.tree.leaves(lazy), jax.tree.leaves(state), strict=True):
        assert isinstance(leaf, Lazy)
        np.testing.assert_array_equal(leaf[...], np.asarray(value).astype(leaf.dtype))
        assert leaf.dtype == "bfloat16"


def test_trees_that_do_not_fit_are_told(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            tmp_path / "x", {"a": np.zeros((2, 3), np.float32), "n": {"b": np.ones(2)}}
        )
    shape = jax.ShapeDtypeStruct
    for like, message in [
        ({"a": shape((2, 3), "float32")}, "like has no leaf at 'n/b'"),
        ({"a": shape((2, 3), "float32"), "n": {"c": shape((2,), "float32")}}, "no leaf at 'n/c'"),
        (
            {"a": shape((3, 2), "float32"), "n": {"b": shape((2,), "float32")}},
            r"\(3, 2\).*\(2, 3\)",
        ),
    ]:
        with pytest.raises(TreeError, match=message):
            io.lazy_orbax(tmp_path / "x", like=like)


# Batches


def test_files_of_arrays_are_cut_into_equal_batches(tmp_path: Path) -> None:
    x, y = np.arange(96.0).reshape(48, 2), np.arange(48)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "xy.npz", x=x, a=y)
    one, both = read_batches(str(tmp_path / "x.npy")), read_batches(str(tmp_path / "xy.npz"))
    assert [batch.shape for batch in one] == [(24, 2)] * 2
    assert [[array.shape for array in batch] for batch in both] == [[(24, 2), (24,)]] * 2
    np.testing.assert_array_equal(np.concatenate(one), x)
    assert count_examples(both) == 48 and count_tokens(both) == 0
    assert len(one_by_one(both)) == 48


@pytest.mark.parametrize(
    "case",
    ["lengths", "empty", "scalar", "bytes", "objects", "other", "nothing", "no zip", "damaged"],
)
def test_files_that_hold_no_examples_are_told(case: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.bin" if case == "other" else "x.npz")
    arrays = {
        "lengths": {"a": np.zeros((2, 3)), "b": np.zeros(3)},
        "empty": {"a": np.zeros((0, 3))},
        "scalar": {"a": np.zeros(())},
        "objects": {"a": np.array([None, 1], object)},
    }
    np.savez_compressed(tmp_path / "whole.npz", a=np.arange(300.0))
    whole = (tmp_path / "whole.npz").read_bytes()
    written = {
        "nothing": b"", "no zip": b"PK\x03\x04" + bytes(99),
        "damaged": whole[:60] + bytes(60) + whole[120:],
    }  # fmt: skip
    if case in arrays:
        np.savez(path, allow_pickle=True, **arrays[case])
    else:
        path.write_bytes(written.get(case, b"nothing of the kind"))
    with pytest.raises(ValueError, match="x\\.(npz|bin)"):
        read_batches(str(path))


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_a_file_that_is_damaged_anywhere_is_told(save: Any, tmp_path: Path) -> None:
    """Whatever NumPy and the readers below it raise; and many kinds of damage stay unseen."""
    path = tmp_path / ("x.npy" if save is np.save else "x.npz")
    save(path, np.arange(24.0).reshape(4, 6))
    whole, random, told = path.read_bytes(), np.random.default_rng(0), 0
    for k in range(300):
        damaged = bytearray(whole[: random.integers(len(whole))] if k % 10 == 0 else whole)
        for at in random.integers(max(len(damaged), 1), size=3 if damaged else 0):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_batches(str(path))
        except ValueError as error:
            assert "x.np" in str(error)
            told += 1
    assert told > 100


def test_a_name_tells_nothing_of_what_a_file_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones((4, 2)))
    np.save(tmp_path / "y.npy", np.ones((4, 2)))
    for name, other in (("x.npz", "z.npy"), ("y.npy", "z.npz")):
        (tmp_path / name).rename(tmp_path / other)
        (batch,) = read_batches(str(tmp_path / other))
        assert np.shape(batch[0] if isinstance(batch, tuple) else batch) == (4, 2)
    with pytest.raises(IsADirectoryError):
        (tmp_path / "folder.npz").mkdir()
        read_batches(str(tmp_path / "folder.npz"))


# Documents


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with a chat template."""
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["some text"], vocab_size=260, special_tokens=["<end>"])
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    words.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    return words


TURNS = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
RECORDS = [{"text": "one"}, {"messages": TURNS}]


def test_documents_of_lines(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n".join(map(json.dumps, RECORDS)) + "\n")
    text = tokenizer.decode(tokens_of(tokenizer, path))
    assert text == "one<end>[user] why?\n[assistant] so.\n<end>"


def test_documents_of_parquet(tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "x.parquet"
    table = pyarrow.Table.from_pylist([{"text": "one", "n": 1}, {"text": "two", "n": 2}])
    parquet.write_table(table, path)
    assert tokenizer.decode(tokens_of(tokenizer, path)) == "one<end>two<end>"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="not readable Parquet"):
        tokens_of(tokenizer, path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2: expected"),
        ('{"body": "x"}', "line 2: expected .* got the fields body"),
        ('{"text": 3}', "line 2: expected"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_bad_documents_are_told(line: str, message: str, tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        tokens_of(tokenizer, path)


def test_messages_without_a_template_are_told(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(RECORDS[1]))
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(
        ValueError, match="line 1: messages, and the tokenizer has no chat template"
    ):
        tokens_of(plain, path)
