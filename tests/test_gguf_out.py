"""GGUF files that jquant writes: read back to the bit, and by gguf's own reader."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import byte_tokenizer, piece_tokenizer, torch_model
from test_families import NETWORKS, NOT_IN_GGUF, network

import jquant as jq
from jquant import models
from jquant.errors import ExportError, FormatError
from jquant.exporters import gguf as writing
from jquant.exporters.gguf_metadata import describe
from jquant.grids import GGUF, Uniform
from jquant.models.config import DecoderConfig, from_hf
from jquant.models.tokenizing import tokenizer_from_gguf
from jquant.weights.qtensor import is_qtensor

SMALL = DecoderConfig(
    vocab=96, width=64, hidden=256, layers=2, heads=4, kv_heads=2, context=64, tied=True
)
TOKENS = np.arange(24, dtype=np.int32).reshape(1, 24)


def write_gguf(*args: Any, **options: Any) -> Path:
    return writing.write_gguf(*args, **options).path


def quantized(fn: models.Decoder, rules: dict[str, Any]) -> Any:
    params = fn.init(jax.random.key(0))
    plan = jq.plan(jq.find_weights(fn, params, TOKENS), rules)
    return jq.quantize(fn, params, plan)[0]


def assert_same(got: Any, expected: Any) -> None:
    """Equal trees, weights by their codes and scales, whatever their grid is called."""
    ours, theirs = (jax.tree.leaves_with_path(t, is_leaf=is_qtensor) for t in (got, expected))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        assert is_qtensor(one) == is_qtensor(other), path
        one, other = (jax.tree.leaves(leaf) for leaf in (one, other))
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("scan", [True])  # layers apart: `test_every_family_is_written_or_refused`
def test_codes_come_back_to_the_bit(scan: bool, tmp_path: Path) -> None:
    """Of several types at once, llama.cpp's order of rows of q and k included."""
    fn = models.Decoder(SMALL, scan_layers=scan)
    rules = {
        ".*down.*": jq.Scheme(GGUF("Q3_K")),
        ".*gate.*": jq.Scheme(Uniform(4, symmetric=True, scale_dtype="float16"), 32),
        "embed.*": jq.Scheme(GGUF("Q8_0")),
        ".*": jq.Scheme(GGUF("Q5_1")),
    }
    qparams = quantized(fn, rules)
    path = write_gguf(tmp_path / "m.gguf", fn, qparams, plain="F32")
    back, read, tokenizer = models.load(path, quantized="keep", scan_layers=scan)
    assert tokenizer is None and back.scan_layers == scan
    assert_same(read, qparams)
    logits = [np.asarray(jax.jit(jq.apply(f))(q, TOKENS)) for f, q in ((fn, qparams), (back, read))]
    np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits[0]).max())
    assert list(tmp_path.iterdir()) == [path]


def test_gguf_s_own_reader_sees_the_same(tmp_path: Path) -> None:
    fn = models.Decoder(SMALL)
    qparams = quantized(fn, {".*": jq.Scheme(GGUF("Q4_1"))})
    reader = gguf.GGUFReader(write_gguf(tmp_path / "m.gguf", fn, qparams))
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    up = qparams["layers"]["1"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(values.T, np.asarray(jq.dequantize(up)))
    assert reader.fields["general.file_type"].contents() == 3
    assert reader.fields["llama.attention.layer_norm_rms_epsilon"].contents() == np.float32(1e-5)


def test_scales_of_wider_groups_are_repeated(tmp_path: Path) -> None:
    fn = models.Decoder(SMALL)
    scheme = jq.Scheme(Uniform(4, symmetric=True, scale_dtype="float16"), 64)
    qparams = quantized(fn, {"embed.*": jq.keep, ".*": scheme})
    path = write_gguf(tmp_path / "m.gguf", fn, qparams)
    read = models.load(path, quantized="keep")[1]
    for part in ("q", "v"):
        ours, theirs = (p["layers"]["0"]["attention"][part]["kernel"] for p in (qparams, read))
        assert theirs.groups.size == 32
        np.testing.assert_array_equal(*(np.asarray(jq.dequantize(q)) for q in (ours, theirs)))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_is_written_or_refused(name: str, tmp_path: Path) -> None:
    fn = models.Decoder(from_hf(network(name).config.to_dict()))
    params = fn.init(jax.random.key(0))
    if name in NOT_IN_GGUF:
        with pytest.raises(FormatError, match="no architecture of GGUF"):
            write_gguf(tmp_path / "m.gguf", fn, params)
        assert not any(tmp_path.iterdir())
        return
    back, read, _ = models.load(write_gguf(tmp_path / "m.gguf", fn, params, plain="F32"))
    assert_same(read, params)
    assert describe(back.config).architecture == describe(fn.config).architecture


def test_llama_and_its_biases(tmp_path: Path) -> None:
    model = torch_model(attention_bias=True, tie_word_embeddings=True)
    fn = models.Decoder(from_hf(model.config.to_dict()))
    params = fn.init(jax.random.key(0))
    path = write_gguf(tmp_path / "m.gguf", fn, params, plain="F32", architecture="llama")
    assert_same(models.load(path)[1], params)


REFUSED = {
    "grid": (jq.Scheme(Uniform(4), 32), r"Uniform\(bits=4.*nearest that it holds: .*Q4_0"),
    "width": (jq.Scheme(GGUF("Q4_K")), r"64 inputs.*nearest that it holds: .*Q4_0"),
    "groups": (jq.Scheme(GGUF("Q4_0"), 16), r"size=16.*nearest that it holds: .*Q4_0"),
    "axis": (jq.Scheme(GGUF("Q4_0"), jq.Groups("out", 32)), r"blocks lie along the inputs"),
    "low rank": (
        jq.Scheme(GGUF("Q4_0"), compensation=jq.LoRC(2, metric="frobenius")),
        r"'layers/0/attention/q/kernel': gguf cannot hold parts .*LowRank",
    ),
}


@pytest.mark.parametrize(("scheme", "says"), REFUSED.values(), ids=REFUSED)
def test_what_no_type_holds_is_refused_before_writing(
    scheme: jq.Scheme, says: str, tmp_path: Path
) -> None:
    fn = models.Decoder(SMALL)
    qparams = quantized(fn, {"layers/0/attention/q.*": scheme, ".*": jq.keep})
    with pytest.raises(FormatError, match=says):
        write_gguf(tmp_path / "m.gguf", fn, qparams)
    assert not any(tmp_path.iterdir())


def test_numbers_beyond_float16_leave_nothing_behind(tmp_path: Path) -> None:
    fn = models.Decoder(SMALL)
    params = fn.init(jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"].at[3, 4].set(1e6)
    with pytest.raises(FormatError, match="'embed/embedding' has numbers beyond F16; pass plain="):
        write_gguf(tmp_path / "m.gguf", fn, params)
    assert not any(tmp_path.iterdir())
    path = write_gguf(tmp_path / "m.gguf", fn, params, plain="BF16")
    read = models.load(path)[1]["embed"]["embedding"]
    expected = params["embed"]["embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(read, np.asarray(expected))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_gguf(path, fn, params)


def metadata_of(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What gguf's writer makes of the fields of `checkpoints`."""
    names = {"token_list": "tokens", "token_types": "token_type", "token_merges": "merges",
             "token_scores": "scores"}  # fmt: skip
    return {
        f"tokenizer.ggml.{names.get(key, key.removeprefix('tokenizer_'))}": value
        for key, value in tokenizer.items()
    }


def without_own_pieces() -> dict[str, Any]:
    """SentencePiece's tables without pieces of a user's own."""
    made = piece_tokenizer("once upon a time", "a tom")
    kept = [i for i, kind in enumerate(made["token_types"]) if kind != 4]
    lists = ("token_list", "token_types", "token_scores")
    return made | {name: [made[name][i] for i in kept] for name in lists}


TEXT = "the 12 and the 3\nadd the"


@pytest.mark.parametrize("made", [byte_tokenizer(), without_own_pieces()])
def test_a_tokenizer_comes_back(made: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(metadata_of(made) | {"tokenizer.chat_template": "{{ x }}"})
    assert tokenizer is not None
    config = dataclasses.replace(SMALL, vocab=len(made["token_list"]) + 3)
    fn = models.Decoder(config)
    params = fn.init(jax.random.key(0))
    first = write_gguf(tmp_path / "one.gguf", fn, params, tokenizer)
    second = write_gguf(tmp_path / "two.gguf", fn, params, like=first)
    for path in (first, second):
        back = models.load(path, lazy=True)[2]
        for text in (TEXT, "once upon  a time, tom", "é <|go|> x"):
            assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert back.chat_template == "{{ x }}" and back.eos_token == tokenizer.eos_token


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tokenizer_from_gguf(metadata_of(byte_tokenizer()))
    assert tokenizer is not None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fn = models.Decoder(dataclasses.replace(SMALL, vocab=200))
    with pytest.raises(FormatError, match=r"no name here.*pass like="):
        write_gguf(tmp_path / "m.gguf", fn, fn.init(jax.random.key(0)), tokenizer)
    pieces = tokenizer_from_gguf(metadata_of(piece_tokenizer("once upon a time")))
    fn = models.Decoder(dataclasses.replace(SMALL, vocab=400))
    with pytest.raises(FormatError, match=r"would split .* into other tokens; pass like="):
        write_gguf(tmp_path / "m.gguf", fn, fn.init(jax.random.key(0)), pieces)
    fn = models.Decoder(dataclasses.replace(SMALL, vocab=20))
    with pytest.raises(FormatError, match="has 96 tokens, the network 20"):
        write_gguf(tmp_path / "m.gguf", fn, fn.init(jax.random.key(0)), tokenizer)


def test_export_writes_it_too(tmp_path: Path) -> None:
    fn = models.Decoder(SMALL)
    qparams = quantized(fn, {"embed.*": jq.keep, ".*": jq.Scheme(GGUF("Q5_0"))})
    done = jq.export(fn, qparams, tmp_path / "m.gguf", format="gguf")
    assert done.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert set(done.weights.values()) == {"Q5_0"} and "layers/1/mlp/up/kernel" in done.weights
    assert "token_embd.weight" in done.kept
    with pytest.raises(ExportError, match="there already; pass force=True"):
        jq.export(fn, qparams, tmp_path / "m.gguf", format="gguf")
    jq.export(fn, qparams, tmp_path / "m.gguf", format="gguf", force=True)
    with pytest.raises(ExportError, match="give another name, of a file"):
        jq.export(fn, qparams, tmp_path, format="gguf", force=True)
    with pytest.raises(FormatError, match="'embed/embedding': gguf cannot hold the grid"):
        weights = jq.find_weights(fn, fn.init(jax.random.key(0)), TOKENS)
        jq.exporters.need_held(fn, jq.plan(weights, {".*": jq.presets.nf4(32)}), "gguf")


def test_what_is_not_what_was_to_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn = models.Decoder(SMALL)
    params = fn.init(jax.random.key(0))
    original = writing._as_plain
    monkeypatch.setattr(writing, "_as_plain", lambda array, *more: original(array + 1, *more))
    with pytest.raises(ExportError, match="other values; this is a fault of jquant"):
        write_gguf(tmp_path / "m.gguf", fn, params)
    assert not any(tmp_path.iterdir())
