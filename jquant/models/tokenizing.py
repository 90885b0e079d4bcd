"""The tokenizer of a checkpoint, from a GGUF file's metadata or a Hugging Face directory.

A GGUF file holds the vocabulary and the merges of a byte-level BPE, but of the pre-tokenizer (where
text may never be joined) only the *name*; the table below says what the names mean. It matters: the
conversion inside `transformers` ignores the name, so that SmolLM2, which keeps digits apart, got
113 108 tokens for a text that has 112 955. A name that is not in the table is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jquant.errors import CheckpointError

if TYPE_CHECKING:  # transformers takes a second to import, so only those who ask for one pay
    from transformers import PreTrainedTokenizerFast

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# name: the expression that cuts text before byte-level BPE; None is GPT-2's, with single digits
_PRE: dict[str, str | None] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), None),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _CONTRACTIONS + r"\p{N}{1,3}" + _REST),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _CONTRACTIONS + r"\p{N}" + _REST),
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_CONTROL, _USER_DEFINED = 3, 4
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast | None:
    """Build the tokenizer a GGUF file describes; None where it describes none.

    Example: `tokenizer("some text")["input_ids"]`, `tokenizer.decode(ids)` and
    `tokenizer.apply_chat_template(messages)` are those of `transformers`.

    Raises:
        CheckpointError: the tokenizer's kind is not supported, or its tables contradict each other.
    """
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "no_vocab":
        return None
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in _PRE:
        raise CheckpointError(
            f"tokenizer.ggml.model = {str(kind)[:80]!r} with tokenizer.ggml.pre = "
            f"{str(pre)[:80]!r} is not supported; supported: 'gpt2' with "
            f"{', '.join(sorted(_PRE))}; for another, pass "
            "tokenizer='<Hugging Face directory or hub id>'"
        )
    tokens, vocabulary, merges = _tables(metadata)
    bpe = models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3)
    tokenizer = tokenizers.Tokenizer(bpe)
    pattern = _PRE[pre]
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
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    if np.shape(kinds) not in ((0,), (len(tokens),)):
        raise CheckpointError(
            f"tokenizer.ggml.token_type has the shape {np.shape(kinds)}; {len(tokens)} tokens"
        )
    whole = [  # in one call: each rebuilds the search for all of them
        AddedToken(token, special=bool(which == _CONTROL), normalized=False)
        for token, which in zip(tokens, kinds, strict=False)
        if which in (_CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_tokens(whole)
    named = {
        f"{role}_token": _token(metadata, key, tokens)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    bos = named["bos_token"]
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", pre in _LLAMA3) is True:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B:1"],
            special_tokens=[(bos, vocabulary[bos])],
        )
    template = metadata.get("tokenizer.chat_template")
    given = {name: value for name, value in named.items() if value is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **given,
    )


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


def _tables(
    metadata: Mapping[str, Any],
) -> tuple[list[str], dict[str, int], list[tuple[str, str]]]:
    """The tokens, their ids, and the merges, checked: `tokenizers` raises untyped errors."""
    tokens, merges = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    if not isinstance(tokens, list) or not isinstance(merges, list) or not tokens:
        raise CheckpointError("tokenizer.ggml.tokens and .merges: expected two lists of strings")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens: a token appears twice")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise CheckpointError(f"tokenizer.ggml.merges: {merge[:80]!r} joins unknown tokens")
        pairs.append((left, right))
    return tokens, vocabulary, pairs


def _token(metadata: Mapping[str, Any], key: str, tokens: list[str]) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise CheckpointError(f"tokenizer.ggml.{key}_token_id = {index}; {len(tokens)} tokens")
    return tokens[index]
