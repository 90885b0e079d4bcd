"""The tokenizer of a checkpoint, from a GGUF file's metadata or a Hugging Face directory.

SentencePiece's tables are read in `pieces.py`. Of a byte-level BPE a GGUF file holds the vocabulary
and the merges, but of the pre-tokenizer (where text may never be joined) only the *name*; the table
below says what the names mean. It matters: the conversion inside `transformers` ignores the name,
so that SmolLM2, which keeps digits apart, got 113 108 tokens for a text that has 112 955. A name
that is not in the table is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jquant.errors import CheckpointError
from jquant.models.claims import only
from jquant.models.gguf_file import read_gguf
from jquant.models.pieces import CONTROL, UNKNOWN, USER_DEFINED, by_score

if TYPE_CHECKING:  # transformers takes a second to import, so only those who ask for one pay
    from transformers import PreTrainedTokenizerFast

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# name: the expression that cuts text before byte-level BPE; None is GPT-2's, with single digits
PRE: dict[str, str | None] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), None),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _CONTRACTIONS + r"\p{N}{1,3}" + _REST),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _CONTRACTIONS + r"\p{N}" + _REST),
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_GPT2, _MODEL, _PRE_KEY = "gpt-2", "tokenizer.ggml.model", "tokenizer.ggml.pre"
# llama.cpp's, where SentencePiece's tables name none
_USUAL = {"unknown": 0, "bos": 1, "eos": 2}
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_ANOTHER = (
    "pass another tokenizer: tokenizer= (--tokenizer on the command line) with a folder, a GGUF "
    "file or a hub id"
)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast | None:
    """Build the tokenizer a GGUF file describes; None where it describes none.

    Byte-level BPE ("gpt2") and SentencePiece's BPE by score ("llama"). A byte-level one that does
    not say how text is cut before merging is taken for GPT-2's, with a warning.

    Example: `tokenizer("some text")["input_ids"]`, `tokenizer.decode(ids)` and
    `tokenizer.apply_chat_template(messages)` are those of `transformers`.

    Raises:
        CheckpointError: the tokenizer's kind is not supported, or its tables contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "no_vocab":
        return None
    try:
        return _built(metadata, kind)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_ANOTHER}") from error


def _built(metadata: Mapping[str, Any], kind: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    only({_MODEL: kind}, _MODEL, ("gpt2", "llama"))
    by_bytes = kind == "gpt2"
    tokens, kinds = _tokens(metadata)
    usual = {} if by_bytes else {
        key: i for key, i in _USUAL.items() if np.isin(kinds[i : i + 1], (CONTROL, UNKNOWN)).any()
    }  # fmt: skip
    named = {
        role: _token(metadata, key, tokens, usual.get(key))
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    if by_bytes:
        tokenizer, begins = _byte_level(metadata, tokens)
        whole = np.isin(kinds, (CONTROL, USER_DEFINED))
    else:
        tokenizer, begins = by_score(metadata, tokens, kinds.tolist(), named["unk"]), True
        whole = kinds == CONTROL
    tokenizer.add_tokens(  # in one call: each rebuilds the search for all of them
        [
            AddedToken(tokens[i], special=bool(kinds[i] == CONTROL), normalized=False)
            for i in np.flatnonzero(whole)
            if tokens[i]
        ]
    )
    _put_around(tokenizer, metadata, named, begins)
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": token for role, token in named.items() if token is not None},
    )


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], np.ndarray]:
    """The tokens by id, and what kind each of them is."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError("tokenizer.ggml.tokens: expected a list of strings")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens: a token appears twice")
    kinds = np.asarray(metadata.get("tokenizer.ggml.token_type", ()))
    kinds = kinds if kinds.size else np.ones(len(tokens), int)
    if kinds.shape != (len(tokens),) or kinds.dtype.kind not in "iu":
        raise CheckpointError(
            f"tokenizer.ggml.token_type: {kinds.dtype} {kinds.shape}; {len(tokens)} tokens"
        )
    return tokens, kinds


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether texts begin with a token of their own unless the file tells."""
    pre = only(metadata, _PRE_KEY, tuple(sorted(PRE)), default=_GPT2)
    if _PRE_KEY not in metadata:
        warnings.warn(
            f"the file has no {_PRE_KEY}, so text is cut as {_GPT2} does, which is wrong for most "
            f"models; if this one was trained with another tokenizer, {_ANOTHER}",
            stacklevel=2,
        )
    bpe = models.BPE(
        {token: i for i, token in enumerate(tokens)}, _merges(metadata, tokens),
        ignore_merges=pre in _LLAMA3,
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(bpe)
    pattern = PRE[pre]
    cut = (
        pre_tokenizers.Digits(individual_digits=True)
        if pattern is None
        else pre_tokenizers.Split(Regex(pattern), "isolated")
    )
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if "qwen" in pre:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, pre in _LLAMA3


def _put_around(
    tokenizer: tokenizers.Tokenizer,
    metadata: Mapping[str, Any],
    named: Mapping[str, str | None],
    begins: bool,
) -> None:
    """Have every text begin and end with the tokens the file asks for."""
    sides = []
    for role, default in (("bos", begins), ("eos", False)):
        key = f"tokenizer.ggml.add_{role}_token"
        adds = only(metadata, key, (True, False), default=default)
        token = named[role]
        if adds and token is None and key in metadata:
            raise CheckpointError(f"{key} = True, and there is no tokenizer.ggml.{role}_token_id")
        sides.append([token] if adds and token is not None else [])
    (first, last), around = sides, [*sides[0], *sides[1]]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1"]
            + [f"{t}:1" for t in last],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in set(around)],
        )


def tokenizer_named(source: str | Path) -> Any:
    """The tokenizer that a caller names: a folder, a file of one, a GGUF file, or a hub id.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = Path(source)
    if path.is_file() and path.name not in _FILES:
        tokenizer = tokenizer_from_gguf(read_gguf(path).metadata)
    else:
        tokenizer = tokenizer_from_hf(path.parent if path.is_file() else source)
    if tokenizer is None:
        raise CheckpointError(
            f"{source}: there is no tokenizer; expected {', '.join(_FILES)}, or a GGUF file that "
            "has one"
        )
    return tokenizer


def tokenizer_from_hf(source: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory (None where it holds none) or of a hub id.

    Raises:
        CheckpointError: there are tokenizer files and `transformers` cannot read them.
    """
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{source}: the tokenizer cannot be read: {error}") from error


def _merges(metadata: Mapping[str, Any], tokens: list[str]) -> list[tuple[str, str]]:
    """The merges, checked: `tokenizers` raises untyped errors."""
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError("tokenizer.ggml.merges: expected a list of strings")
    vocabulary = set(tokens)
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary:
            raise CheckpointError(f"tokenizer.ggml.merges: {merge[:80]!r} joins unknown tokens")
        pairs.append((left, right))
    return pairs


def _token(
    metadata: Mapping[str, Any], key: str, tokens: list[str], usual: int | None
) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}_token_id", usual)
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise CheckpointError(f"tokenizer.ggml.{key}_token_id = {index}; {len(tokens)} tokens")
    return tokens[index]
