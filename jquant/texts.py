"""The text that a command calibrates and measures with: a file's, or Python's own help.

The first 80 % of its tokens calibrate, the rest is held out, both cut into windows of one length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jquant.models import smollm2


def windows_of(tokenizer: Any, length: int, text: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Windows `[N, length]` to calibrate and to measure with, of a file or of Python's help.

    Raises:
        ValueError: no tokenizer, a file that is not UTF-8, or too short for `length`.
    """
    need_tokenizer(tokenizer, "the model")
    if text is None:
        return smollm2.text_windows(tokenizer, length)
    try:
        content = text.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 text: {error}") from error
    tokens = np.asarray(tokenizer(content, add_special_tokens=False)["input_ids"], np.int32)
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


def some(windows: np.ndarray, count: int) -> np.ndarray:
    """The first `count` windows. ValueError: there are not so many."""
    if not 1 <= count <= len(windows):
        raise ValueError(f"--samples {count}: the text has 1 to {len(windows)} windows to take")
    return windows[:count]


def need_tokenizer(tokenizer: Any, source: str) -> None:
    """ValueError: a model came without a tokenizer."""
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer beside it")
