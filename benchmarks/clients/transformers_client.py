"""Folders through `transformers`, in an environment of its own.

Called as `python FILE [FOLDER NPZ WAY] ...`.

NPZ holds `tokens [B, T]` and `logits [B, T, vocab]`, what jquant's `apply` computes. For each
folder one line of JSON is printed: why it cannot be loaded, or the largest difference of logits,
the largest logit, the KL divergence per token in nats, and how often both find the same token
likeliest; and the versions of what was used. WAY is "compressed" (as `from_pretrained` loads it) or
"dequantized": compressed-tensors makes arrays of the weights while it loads. Imports nothing of
jquant.
"""

import importlib.metadata
import json
import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def versions(*names: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


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


def told(run: Any, *triples: str) -> None:
    """A line for each folder: what `run(folder, way, tokens)` gives beside what it should."""
    for folder, arrays, way in zip(triples[::3], triples[1::3], triples[2::3], strict=True):
        held = np.load(arrays)
        try:
            with torch.no_grad():
                logits = run(folder, way, torch.as_tensor(held["tokens"], dtype=torch.long))
            row: dict[str, Any] = compared(logits.float().numpy(), held["logits"])
        except Exception as error:  # of whatever kind: it is the engine's answer
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        names = ("torch", "transformers", "compressed-tensors")
        print(json.dumps({**row, "versions": versions(*names)}), flush=True)


def run(folder: str, way: str, tokens: torch.Tensor) -> torch.Tensor:
    options: dict[str, Any] = {}
    if way == "dequantized":
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()(tokens).logits


if __name__ == "__main__":
    told(run, *sys.argv[1:])
