"""What a client says of folders: how far its logits are from those that were expected.

Run within an engine's own environment, so NumPy is all it needs; imports nothing of jquant.
"""

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def told(
    run: Callable[[str, str, np.ndarray], np.ndarray], names: Sequence[str], triples: Sequence[str]
) -> None:
    """Print a line of JSON for each folder.

    Args:
        run: logits `[B, T, vocab]` of a folder, the way to load it, and `tokens [B, T]`.
        names: the packages whose versions are told.
        triples: FOLDER NPZ WAY, one after the other; NPZ holds `tokens` and the `logits` expected.
    """
    for folder, arrays, way in zip(triples[::3], triples[1::3], triples[2::3], strict=True):
        held = np.load(arrays)
        try:
            row: dict[str, Any] = compared(run(folder, way, held["tokens"]), held["logits"])
        except Exception as error:  # of whatever kind: it is the engine's answer
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps({**row, "versions": versions(*names)}), flush=True)


def compared(logits: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far logits are from those expected, in float64."""
    one, other = expected.astype(np.float64), logits.astype(np.float64)
    mine, theirs = log_probabilities(one), log_probabilities(other)
    return {
        "largest_difference": float(np.abs(one - other).max()),
        "largest_logit": float(np.abs(one).max()),
        "kl": float((np.exp(mine) * (mine - theirs)).sum(-1).mean()),
        "same_token": float((one.argmax(-1) == other.argmax(-1)).mean()),
    }


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def versions(*names: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
