"""SentencePiece's byte-pair segmentation by score, from the tables of a GGUF file.

Llama 2, Mistral, Phi-3 and Gemma have scores and no merges: of all neighbours whose join
is a piece, the one of the highest score is joined first, the leftmost of equals. Every way to cut a
piece into two pieces, sorted by the piece's score, is a list of merges for `tokenizers`' BPE that
does the same. Spaces are `▁`, one more stands before the text (`add_space_prefix`), a character
without a piece becomes its UTF-8 bytes.

What kind a token is decides who may make it (as in SentencePiece): merges make normal pieces only;
user-defined ones are cut out of the text first and never joined; control tokens are those of
`transformers`, found in the text as they are written, with a new beginning after them.

Two things such a list cannot say. A stretch of text between user-defined pieces that reads like
the name of a byte (`<0x41>`) is that byte. And two ways to make the *same* piece that overlap have
no fixed order (`aa a aa` has `aa a` first, `a aa a` has `a aa`); the longer left part goes first,
which is right wherever a run is joined from its beginning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from jquant.errors import CheckpointError
from jquant.models.claims import only

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_LONGEST = 256  # characters; SentencePiece's default is 16, and every cut of a piece is looked up
_SPACE = "▁"
_NEVER = "\ufdd0"  # a code point that is no character: behind a name that no text may have


def by_score(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], unknown: str | None
) -> tokenizers.Tokenizer:
    """The segmentation that a GGUF file of `tokenizer.ggml.model = "llama"` describes.

    Args:
        metadata: the file's.
        tokens: the pieces by id, all different.
        kinds: what each of them is (`tokenizer.ggml.token_type`).
        unknown: the piece for what has no piece, or None.

    Raises:
        CheckpointError: scores or bytes are missing or contradict each other, or the file asks for
            what SentencePiece does to text before it (only spaces are done).
    """
    prefix = only(metadata, "tokenizer.ggml.add_space_prefix", (True, False), default=True)
    _check_text_is_left(metadata)
    tokens = _with_spaces(tokens, kinds)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    by_kind: dict[int, list[str]] = {}
    for token, kind in zip(tokens, kinds, strict=True):
        by_kind.setdefault(kind, []).append(token)
    has_bytes = _has_bytes(by_kind.get(BYTE, ()), unknown)
    merges = _merges(tokens, kinds, _scores(metadata, len(tokens)))
    given = sorted(filter(None, by_kind.get(USER_DEFINED, ())), key=len, reverse=True)
    if given:
        made = _by_merges_alone(vocabulary, kinds, merges)
        never = vocabulary.keys() - made.keys()
        merges = [p for p in merges if never.isdisjoint((*p, p[0] + p[1]))] if never else merges
        vocabulary = made
    bpe = models.BPE(
        vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes,
        ignore_merges=bool(given),
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(bpe)
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE)] * prefix + spaces)
    if given:
        pattern = "|".join(map(re.escape, given))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.Replace(_NEVER, ""), decoders.ByteFallback()]
        + [decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefix
    )
    return tokenizer


def _with_spaces(tokens: Sequence[str], kinds: Sequence[int]) -> list[str]:
    """The pieces as they stand in the changed text: converters write users' ones as before it."""
    pieces = [
        token.replace(" ", _SPACE) if kind == USER_DEFINED else token
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    if len(set(pieces)) != len(pieces):
        twice = next(piece for piece in pieces if _SPACE in piece and pieces.count(piece) > 1)
        raise CheckpointError(f"tokenizer.ggml.tokens: {twice!r} appears twice, once with spaces")
    return pieces


def _check_text_is_left(metadata: Mapping[str, Any]) -> None:
    """Refuse a file that asks for more than spaces to be changed, or does not tell kinds."""
    only(metadata, "tokenizer.ggml.remove_extra_whitespaces", (False,), default=False)
    if np.size(metadata.get("tokenizer.ggml.precompiled_charsmap", ())):
        raise CheckpointError("tokenizer.ggml.precompiled_charsmap is not supported")
    if "tokenizer.ggml.token_type" not in metadata:
        raise CheckpointError("tokenizer.ggml.token_type is missing; it tells bytes from pieces")


def _has_bytes(as_bytes: Collection[str], unknown: str | None) -> bool:
    """Whether every byte has a token; none may have one, if there is a token for the unknown."""
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(as_bytes)
    if missing and (unknown is None or as_bytes):
        raise CheckpointError(
            f"tokenizer.ggml.tokens: no byte token {min(missing)!r}, and no unknown one that might "
            "stand for all"
        )
    return not missing


def _scores(metadata: Mapping[str, Any], count: int) -> np.ndarray:
    scores = np.asarray(metadata.get("tokenizer.ggml.scores", ()))
    if scores.shape != (count,) or scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise CheckpointError(
            f"tokenizer.ggml.scores: {scores.dtype} {scores.shape}; expected a finite number for "
            f"each of {count} tokens"
        )
    return scores


def _merges(
    tokens: Sequence[str], kinds: Sequence[int], scores: np.ndarray
) -> list[tuple[str, str]]:
    """Every pair of pieces that may be joined, the one of the highest score first."""
    joined = {t: i for i, t in enumerate(tokens) if kinds[i] in (NORMAL, UNUSED) and t}
    merges: list[tuple[str, str]] = []
    before: dict[float, str] = {}
    for piece, i in sorted(joined.items(), key=lambda item: -scores[item[1]]):
        pairs = _cuts(piece, joined)
        if not pairs:
            continue
        if kinds[i] == UNUSED:
            raise CheckpointError(f"tokenizer.ggml.token_type: {piece!r} is unused, yet joins")
        other = before.setdefault(float(scores[i]), piece)
        if other != piece:
            raise CheckpointError(
                f"tokenizer.ggml.scores: {other!r} and {piece!r} have the same score "
                f"{scores[i]}, so that which is joined first is not known"
            )
        merges += pairs
    return merges


def _cuts(piece: str, joined: Collection[str]) -> list[tuple[str, str]]:
    """Every way to cut a piece into two that are pieces, the longest left part first."""
    if len(piece) > _LONGEST:
        raise CheckpointError(
            f"tokenizer.ggml.tokens: {piece[:80]!r} … has {len(piece)} characters; supported: "
            f"{_LONGEST}"
        )
    last = len(piece) - 1
    pairs = [
        (piece[:at], piece[at:])
        for at in range(last, 0, -1)
        if (at == 1 or piece[:at] in joined) and (at == last or piece[at:] in joined)
    ]
    alone = next((part for cut in pairs for part in cut if part not in joined), None)
    if alone is not None:
        raise CheckpointError(
            f"tokenizer.ggml.tokens: {piece!r} has the character {alone!r}, which is no token"
        )
    return pairs


def _by_merges_alone(
    vocabulary: Mapping[str, int], kinds: Sequence[int], merges: Sequence[tuple[str, str]]
) -> dict[str, int]:
    """The vocabulary, with pieces that no merges make under names that no text has.

    Beside user-defined pieces a stretch of text that is a token is looked up, not merged. (What no
    merges make of its own text is never made on the way to something longer either.)
    """
    plain = models.BPE(dict(vocabulary), list(merges), fuse_unk=True, byte_fallback=True)

    def name(piece: str, i: int) -> str:
        made = kinds[i] != NORMAL or [t.id for t in plain.tokenize(piece)] == [i]
        return piece if made else piece + _NEVER

    return {name(piece, i): i for piece, i in vocabulary.items()}
