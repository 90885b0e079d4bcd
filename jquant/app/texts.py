"""The text that a command works with: a file's or Python's own help, a prompt; what it needs.

The first 80 % of its tokens calibrate, the rest is held out, both cut into windows of one length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from jquant import models
from jquant.app.documents import tokens_of
from jquant.app.named_inputs import taken
from jquant.models import smollm2

TOKENS = ("input_ids",)
LENGTH = 512  # tokens per window, where the model's context has so many


def windows_of(
    fn: Any, tokenizer: Any, length: int | None, text: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Windows `[N, length]` to calibrate and to measure with, of a file or of Python's help.

    Args:
        fn: the model.
        tokenizer: its tokenizer, or None if it has none.
        length: tokens per window; None is 512, or the model's context where that is shorter.
        text: the file, or None.

    Raises:
        ValueError: no tokenizer or another model's, a file that is not UTF-8, or a `length` that
            the text or the model's context has not.
    """
    need_tokenizer(tokenizer, "the model")
    context = limit_of(fn, "context")
    length = min(LENGTH, context or LENGTH) if length is None else length
    if context is not None and length > context:
        raise ValueError(
            f"--length {length}: the model's context has {context} tokens, and was not trained on "
            f"more; pass --length {context} or less"
        )
    if text is None:
        windows = smollm2.text_windows(tokenizer, length)
    else:
        windows = _of_file(tokenizer, length, text)
    for part in windows:
        need_known(fn, part)
    return windows


def _of_file(tokenizer: Any, length: int, text: Path) -> tuple[np.ndarray, np.ndarray]:
    tokens = tokens_of(tokenizer, text)
    split = len(tokens) * 8 // 10
    if not 2 <= length <= len(tokens) - split:
        raise ValueError(
            f"{text} has {len(tokens)} tokens, a fifth of which are held out; --length {length} "
            f"needs at least {5 * max(length, 2)}"
        )
    calibration, held_out = (
        part[: len(part) // length * length].reshape(-1, length)
        for part in (tokens[:split], tokens[split:])
    )
    return calibration, held_out


def some(items: Any, count: int, there: str = "the text has", what: str = "windows") -> Any:
    """The first `count` windows or batches. ValueError: there are not so many."""
    if not 1 <= count <= len(items):
        raise ValueError(f"--samples {count}: {there} 1 to {len(items)} {what} to take")
    return items[:count]


def need_tokenizer(tokenizer: Any, source: str) -> None:
    """ValueError: a model came without a tokenizer."""
    if tokenizer is None:
        raise ValueError(
            f"{source} has no tokenizer beside it; name one with --tokenizer: a folder, a GGUF "
            "file or a hub id"
        )


def as_loaded(fn: Any) -> dict[str, Any]:
    """What `models.load` is told for another checkpoint of the same function."""
    if isinstance(fn, models.TorchFunction):
        return {"backend": "torch", "architecture": fn.config.architecture}
    return {}


def need_text(fn: Any, source: str) -> None:
    """ValueError: a model takes other things than the tokens of one text."""
    if isinstance(fn, models.TorchFunction) and fn.inputs != TOKENS:
        raise ValueError(
            f"{source} takes {taken(fn)}, and text is none of these; pass them as --batches "
            "FILE.npz, in arrays of these names"
        )


def need_language_model(fn: Any, source: str) -> None:
    """ValueError: a model does not say how likely each next token is."""
    if isinstance(fn, models.TorchFunction) and not fn.config.is_causal:
        raise ValueError(
            f"{source} is a {fn.config.architecture}, and this command needs a language model that "
            "predicts each next token; jquant.evaluate.compare takes any function from Python"
        )
    need_text(fn, source)


def need_known(fn: Any, tokens: np.ndarray) -> None:
    """ValueError: there are tokens that a model does not have."""
    vocab = limit_of(fn, "vocab")
    if vocab is not None and tokens.size and (most := int(tokens.max())) >= vocab:
        raise ValueError(
            f"the tokenizer makes token {most}, the model has {vocab}: it is another "
            "model's; name the right one with --tokenizer"
        )


def limit_of(fn: Any, name: Literal["context", "vocab"]) -> int | None:
    """How many tokens a model's context or vocabulary has; None of a function that does not say."""
    return getattr(getattr(fn, "config", None), name, None)


def asked(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The tokens of a prompt, as a turn of a chat where that is wanted and the tokenizer can."""
    if not chat or tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
