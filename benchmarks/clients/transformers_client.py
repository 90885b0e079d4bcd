"""A folder through `transformers`, in an environment of its own: `python FILE FOLDER NPZ`.

NPZ holds `tokens [B, T]` and `logits [B, T, vocab]`, what jquant's `apply` computes. Printed is one
line of JSON: the largest difference of logits, the largest logit, the KL divergence per token in
nats, how often both find the same token likeliest, and the versions of what was used. Imports
nothing of jquant.
"""

import importlib.metadata
import json
import sys

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


def compared(logits: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far logits are from those expected, in float64."""
    one, other = (x.astype(np.float64) for x in (expected, logits))
    logs = [
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        for x in (one - one.max(-1, keepdims=True), other - other.max(-1, keepdims=True))
    ]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    return {
        "largest_difference": float(np.abs(one - other).max()),
        "largest_logit": float(np.abs(one).max()),
        "kl": float(kl.mean()),
        "same_token": float((one.argmax(-1) == other.argmax(-1)).mean()),
    }


def main(folder: str, arrays: str) -> None:
    held = np.load(arrays)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.as_tensor(held["tokens"], dtype=torch.long)).logits.float().numpy()
    names = ("torch", "transformers", "compressed-tensors", "gptqmodel")
    print(json.dumps({**compared(logits, held["logits"]), "versions": versions(*names)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
