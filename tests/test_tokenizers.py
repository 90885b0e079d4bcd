"""Tokenizers out of GGUF files against what made them; what is said where a file says too little.

SentencePiece's segmentation is compared with its definition, written below from its paper's words,
and with the library itself on a vocabulary that it trains here.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
from checkpoints import byte_tokenizer, torch_model, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from jquant import models
from jquant.errors import CheckpointError
from jquant.models.tokenizing import tokenizer_from_gguf, tokenizer_named

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
HEAD = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
KINDS = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
# Ways to make them overlap; no merge makes "xyz", and "ab" is made before "xabx" can be.
PIECES = "▁t he the ▁the er ▁▁ ▁▁▁▁ aa aaa aaaa aba ab ba ▁a re here xyz == ==== xa bx xabx".split()
CHARACTERS = [*"▁therabxyz="]
USERS = ["<|im_start|>", "▁▁▁", "foo", "a.b*c", "\n\n"]
ASKED = ["<|go|>", "he\n", "▁▁▁"]

TYPES = np.array([*KINDS[:-1], USER_DEFINED] + [NORMAL] * len(PIECES + CHARACTERS))


def tables(asked: list[str], **changes: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece tokenizer with the user-defined pieces `asked`."""
    normal = PIECES + CHARACTERS
    metadata = {
        "model": "llama",
        "tokens": [*HEAD, *asked, *normal],
        "token_type": np.array(KINDS + [USER_DEFINED] * len(asked) + [NORMAL] * len(normal)),
        "scores": np.array(
            [0.0] * (len(HEAD) + len(asked)) + [-float(i) for i in range(len(normal))]
        ),
        "add_bos_token": False,
    }
    metadata |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not ...}


def joined(text: str, metadata: dict[str, Any]) -> list[str]:
    """By definition: join the neighbours of the highest score, the leftmost of equals."""
    tokens, kinds, scores = (
        metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores")
    )
    score = {t: s for t, s, k in zip(tokens, scores, kinds, strict=True) if k == NORMAL}
    asked = [t for t, k in zip(tokens, kinds, strict=True) if k == USER_DEFINED]
    prefix = "▁" if metadata.get("tokenizer.ggml.add_space_prefix", True) and text else ""
    text = prefix + text.replace(" ", "▁")
    parts: list[tuple[str, bool]] = []  # a piece, and whether it is to stay as it is
    while text:
        whole = max((t for t in asked if text.startswith(t)), key=len, default="")
        parts.append((whole or text[0], bool(whole)))
        text = text[len(whole) or 1 :]
    while True:
        best = [
            (score[a + b], -i)
            for i, ((a, one), (b, other)) in enumerate(zip(parts, parts[1:], strict=False))
            if not one and not other and a + b in score
        ]
        if not best:
            break
        at = -max(best)[1]
        parts[at : at + 2] = [(parts[at][0] + parts[at + 1][0], False)]
    found = []
    for part, _ in parts:
        known = part in score or part in asked
        found += [part] if known else [f"<0x{byte:02X}>" for byte in part.encode()]
    return found


@pytest.mark.parametrize("asked", [[], ASKED], ids=["plain", "with pieces of the user's"])
@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_joined_by_score(asked: list[str], prefix: bool) -> None:
    metadata = tables(asked, add_space_prefix=prefix)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer is not None

    @given(st.lists(st.sampled_from([*PIECES, *CHARACTERS, *ASKED, "é", "\n", "日", "q"])))
    def law(parts: list[str]) -> None:
        text = "".join(parts).replace("▁", " ")
        ids = tokenizer(text)["input_ids"]
        assert [metadata["tokenizer.ggml.tokens"][i] for i in ids] == joined(text, metadata)
        assert tokenizer.decode(ids) == text

    law()


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(
    ("asked", "spaces"),
    [([], False), (USERS, False), (USERS, True)],
    ids=["plain", "pieces of a user's", "with spaces"],
)
def test_sentencepiece_segments_alike(
    prefix: bool, asked: list[str], spaces: bool, tmp_path: Path
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for key in sorted(topics.topics)[:30] for line in topics.topics[key].splitlines()]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(filter(None, lines)), model_writer=trained, vocab_size=500,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=prefix, user_defined_symbols=asked,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    kinds = [NORMAL] * theirs.get_piece_size()
    for i, _ in enumerate(kinds):
        for name, kind in (("unknown", UNKNOWN), ("control", CONTROL), ("byte", BYTE)):
            kinds[i] = kind if getattr(theirs, f"is_{name}")(i) else kinds[i]
    for piece in asked:
        kinds[theirs.piece_to_id(piece)] = USER_DEFINED
    pieces = [theirs.id_to_piece(i) for i in range(len(kinds))]
    # llama.cpp's converter writes spaces in the pieces of a user's own, which it looks for first
    written = [p.replace("▁", " ") if p in asked else p for p in pieces]
    settings = {
        "tokenizer_model": "llama", "token_list": written if spaces else pieces,
        "token_types": kinds,
        "token_scores": [theirs.get_score(i) for i in range(len(kinds))],
        "add_space_prefix": prefix, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = torch_model(vocab_size=len(kinds), num_hidden_layers=1)
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer=settings)
    fn, params, ours = models.load(path, lazy=True)
    models.save_quantized(tmp_path / "saved", fn, models.load(path)[1], ours)
    _, _, again = models.load(tmp_path / "saved", lazy=True)
    rng = np.random.default_rng(0)
    texts = [
        *lines[:200],
        "",
        " ",
        "  a   b    c\n\n\n",
        "日本 ☃ é",
        "foofoo <|im_start|>user\n",
        *pieces[3:],
    ]
    texts += ["".join(rng.choice(list("ab e\n-=0<|"), 20)) for _ in range(200)]
    texts += ["".join(rng.choice(pieces[259:], 6)).replace("▁", " ") for _ in range(200)]
    if asked and not prefix:  # a whole text of a byte's name: `pieces.py` tells
        texts = [text for text in texts if not text.startswith("<0x")]
    for text in texts:
        expected = theirs.encode(text)
        for tokenizer in (ours, again):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
            assert tokenizer(text)["input_ids"] == [1, *expected]
            assert tokenizer.decode(expected) == theirs.decode(expected)
    assert again.eos_token_id == 2 and again.bos_token == "<s>"


def test_tokens_around_a_text() -> None:
    def ids(**changes: Any) -> list[int]:
        tokenizer = tokenizer_from_gguf(tables([], **changes))
        assert tokenizer is not None
        return tokenizer("the")["input_ids"]

    (the,) = ids()
    assert ids(add_bos_token=...) == [1, the]  # SentencePiece's tables begin a text if none says
    assert ids(add_eos_token=True) == [the, 2]
    assert ids(add_bos_token=True, add_eos_token=True) == [1, the, 2]
    assert ids(add_bos_token=True, bos_token_id=2) == [2, the]
    tokenizer = tokenizer_from_gguf(tables([]))
    assert tokenizer is not None and tokenizer.unk_token == "<unk>"
    assert tokenizer("the</s>the")["input_ids"] == [the, 2, the]  # and a new beginning after it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="bert"), r"model = 'bert' is not supported; supported: gpt2, llama"),
        (dict(scores=...), r"tokenizer.ggml.scores.*expected a finite number"),
        (dict(scores=np.full(len(HEAD + PIECES + CHARACTERS), np.nan)), r"scores.*finite"),
        (dict(scores=np.zeros(len(HEAD + PIECES + CHARACTERS))), r"scores.*same score 0.0"),
        (dict(scores=np.zeros(3)), r"tokenizer.ggml.scores: float64 \(3,\)"),
        (dict(token_type=...), r"token_type is missing"),
        (dict(token_type=np.ones(9, np.int32)), r"token_type: int32 \(9,\)"),
        (dict(tokens=["a"] * 9), r"tokens: a token appears twice"),
        (dict(tokens=[*HEAD[:9], "B", *HEAD[10:], *PIECES, *CHARACTERS]), r"byte token '<0x06>'"),
        (dict(tokens=[*HEAD, *PIECES, *CHARACTERS[:-1], "i"]), r"'==' has the character '='"),
        (dict(tokens=[*HEAD, *PIECES[:-1], "=" * 999, *CHARACTERS]), r"has 999 characters"),
        (
            dict(tokens=[*HEAD[:-1], " t", *PIECES, *CHARACTERS], token_type=TYPES),
            r"'▁t' appears twice, once with spaces",
        ),
        (dict(precompiled_charsmap=np.ones(4, np.int8)), r"precompiled_charsmap"),
        (dict(remove_extra_whitespaces=True), r"remove_extra_whitespaces = 'True'"),
        (dict(add_space_prefix="yes"), r"add_space_prefix = 'yes'"),
        (dict(bos_token_id=10**6), r"bos_token_id = 1000000"),
        (dict(add_eos_token=1.5), r"add_eos_token = '1.5'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_contradictions_name_the_key_and_the_way_out(changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_from_gguf(tables([], **changes))
    assert "--tokenizer" in str(caught.value)


def test_any_character_may_be_a_piece_of_the_users() -> None:
    characters = [chr(i) for i in range(1, 128) if chr(i) not in " ".join(PIECES)]
    asked = [*characters, *(c + "q" for c in characters if c != "q"), "\\E", "(?", "日本", "[a"]
    tokenizer = tokenizer_from_gguf(tables(asked))
    assert tokenizer is not None
    for piece in asked:
        assert tokenizer.convert_ids_to_tokens(tokenizer(f"the{piece}")["input_ids"])[-1] == piece


def test_a_file_that_does_not_say_how_text_is_cut_is_told_of(tmp_path: Path) -> None:
    model = torch_model(tie_word_embeddings=True, num_hidden_layers=1)
    settings = byte_tokenizer()
    path = write_gguf(tmp_path / "said.gguf", model, tokenizer=settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert models.load(path, lazy=True)[2]("12")["input_ids"] == [17 + 2, 18 + 2]
    del settings["tokenizer_pre"]
    silent = write_gguf(tmp_path / "silent.gguf", model, tokenizer=settings)
    with pytest.warns(UserWarning, match=r"no tokenizer.ggml.pre.*gpt-2.*--tokenizer") as caught:
        joins = models.load(silent, lazy=True)[2]
    assert [entry.filename for entry in caught] == [tokenizer_from_gguf.__code__.co_filename]
    assert len(joins("12")["input_ids"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever names another is not told
        assert len(models.load(silent, tokenizer=path, lazy=True)[2]("12")["input_ids"]) == 2


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    model = torch_model(tie_word_embeddings=True, num_hidden_layers=1)
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer=byte_tokenizer())
    bare = write_gguf(tmp_path / "bare.gguf", model)
    expected = models.load(path, lazy=True)[2]
    folder = tmp_path / "folder"
    expected.save_pretrained(folder)
    model.save_pretrained(tmp_path / "hf")
    assert models.load(bare, lazy=True)[2] is None
    for source in (path, folder, folder / "tokenizer.json", str(folder)):
        for loaded in (bare, tmp_path / "hf"):
            found = models.load(loaded, tokenizer=source, lazy=True)[2]
            assert found("the 12 and") == expected("the 12 and")
            assert found.eos_token == "</s>"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("nothing of use in here, but longer than a header")
    for source, message in [
        (empty, "there is no tokenizer; expected tokenizer.json"),
        (bare, "there is no tokenizer"),
        (empty / "notes.txt", "starts with b'noth'"),
        (tmp_path / "nowhere", "the tokenizer cannot be read"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            tokenizer_named(source)
        with pytest.raises(CheckpointError, match=message):
            models.load(path, tokenizer=source)
