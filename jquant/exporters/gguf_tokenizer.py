"""A `transformers` tokenizer as the metadata of a GGUF file: the inverse of `models.tokenizing`.

Of a byte-level BPE the vocabulary and the merges are written, and the *name* of the way in which
text is cut before merging, by the table that reading uses. SentencePiece's BPE has scores in GGUF;
its merges, in their order, say the same. In the end the tokenizer that a reader makes of the
metadata is compared with the given one on texts of many kinds, and refused if they differ: a
tokenizer that is a little wrong looks like a model that is a little worse.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jquant.errors import CheckpointError, FormatError
from jquant.models.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from jquant.models.tokenizing import PRE, tokenizer_from_gguf

_INSTEAD = "pass like= with a GGUF file of the same model, whose tokenizer is taken over"
_PROBES = (
    "The quick brown fox, 1234567 times; it's 3.14 o'clock.\n\n  def f(x):\n\treturn x**2  # ok",
    "Zürich, naïve café — 東京 и Москва, مرحبا! \u00a0 \u200b emoji 🙂🙂",
    "    indented\n\n\n\ttabs\tand   runs of     spaces \r\n  at both ends   ",
    "HTTP/1.1 200 OK {'a': [1, 22, 333]} <b>x</b> I'LL you'Ve can't 12ab34",
)


def tokenizer_metadata(tokenizer: Any, vocab: int) -> dict[str, Any]:
    """The keys `tokenizer.*` of a tokenizer, for a network of so many tokens.

    Raises:
        FormatError: GGUF has no words for it, or a reader would split texts otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError(f"{type(tokenizer).__name__} has no fast tokenizer inside; {_INSTEAD}")
    state = json.loads(backend.to_str())
    model, names = state["model"], _names(tokenizer, vocab)
    if model.get("type") != "BPE":
        raise FormatError(f"a tokenizer of the type {model.get('type')!r}; {_INSTEAD}")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds = _kinds(tokenizer, names, state["added_tokens"])
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": names}
    if model.get("byte_fallback"):
        metadata |= _by_score(names, kinds, merges, state)
    else:
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _cut(state.get("pre_tokenizer")),
            "tokenizer.ggml.merges": merges,
        }
    metadata["tokenizer.ggml.token_type"] = kinds
    metadata |= _special(tokenizer)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        metadata["tokenizer.chat_template"] = template
    _check(tokenizer, metadata)
    return metadata


def _names(tokenizer: Any, vocab: int) -> list[str]:
    """The tokens by id; ids that the network has and the tokenizer has not get names of their own.

    Raises:
        FormatError: the tokenizer has ids that the network has not.
    """
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab:
        raise FormatError(f"the tokenizer has {max(by_id) + 1} tokens, the network {vocab}")
    return [by_id.get(i, f"[PAD{i}]") for i in range(vocab)]


def _kinds(tokenizer: Any, names: Sequence[str], added: Sequence[Mapping[str, Any]]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    kinds = [NORMAL if name in vocabulary else UNUSED for name in names]
    for token in added:
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return kinds


def _cut(pre: Any) -> str:
    """The name of the way in which text is cut before merging.

    Raises:
        FormatError: it has none here.
    """
    steps = _steps(pre)
    for name, pattern in PRE.items():
        cut = {"type": "Digits", "individual_digits": True}
        if pattern is not None:
            cut = {
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": False,
            }  # fmt: skip
        as_bytes = {
            "type": "ByteLevel", "add_prefix_space": False, "use_regex": pattern is None
        }  # fmt: skip
        alone = name == "gpt-2" and steps == [as_bytes | {"use_regex": True}]
        if alone or steps == [cut, as_bytes]:
            return name
    raise FormatError(
        f"text is cut in a way that has no name here ({str(steps)[:200]}); {_INSTEAD}"
    )


def _steps(pre: Any) -> list[dict[str, Any]]:
    if pre is None:
        return []
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    return [{k: v for k, v in part.items() if k != "trim_offsets"} for part in parts]


def _by_score(
    names: Sequence[str], kinds: list[int], merges: Sequence[str], state: Mapping[str, Any]
) -> dict[str, Any]:
    """SentencePiece's tables: a piece's score is the place of the first merge that makes it."""
    scores = [0.0] * len(names)
    place: dict[str, int] = {}
    for i, merge in enumerate(merges):
        place.setdefault(merge.replace(" ", ""), i)
    for i, name in enumerate(names):
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            kinds[i] = BYTE
        elif kinds[i] == NORMAL:
            scores[i] = -float(place.get(name, len(merges)))
    if (unknown := state["model"].get("unk_token")) is not None:
        kinds[names.index(unknown)] = UNKNOWN
    prefix = '"Prepend"' in json.dumps(state.get("normalizer") or state.get("pre_tokenizer"))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _special(tokenizer: Any) -> dict[str, Any]:
    """Which tokens begin and end a text, and whether every text has them."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in keys}
    special: dict[str, Any] = {
        f"tokenizer.ggml.{keys[role]}_token_id": int(i) for role, i in ids.items() if i is not None
    }
    around = tokenizer("a")["input_ids"]
    special["tokenizer.ggml.add_bos_token"] = bool(around) and around[0] == ids["bos"]
    special["tokenizer.ggml.add_eos_token"] = bool(around) and around[-1] == ids["eos"]
    return special


def _check(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Refuse metadata of which a reader would make another tokenizer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = tokenizer_from_gguf(metadata)
    except CheckpointError as error:
        raise FormatError(f"the tokenizer has no place in GGUF: {error}; {_INSTEAD}") from error
    assert other is not None
    for text in _PROBES:
        if list(other(text)["input_ids"]) != list(tokenizer(text)["input_ids"]):
            raise FormatError(f"GGUF would split {text[:40]!r} into other tokens; {_INSTEAD}")
