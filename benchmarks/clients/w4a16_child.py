"""llm-compressor's W4A16, and the logits that transformers computes of folders.

    python -P -m benchmarks.clients.w4a16_child quantize MODEL TOKENS.npy OUT GROUP
    python -P -m benchmarks.clients.w4a16_child measure MODEL TOKENS.npy OUT.json FOLDER ...

In the environment of the other tool; imports nothing of jquant. MODEL is the full model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.clients.transformers_client import compared, versions
from benchmarks.rivals.child import BATCH
from benchmarks.rivals.run_llmcompressor import prepared


def quantize(model: str, tokens: np.ndarray, out: str, group: str) -> None:
    batches = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": int(group),
    }  # fmt: skip
    tokenizer, run = prepared(Path(model), batches, weights)
    run().save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def logits(folder: str, tokens: np.ndarray) -> np.ndarray:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [torch.from_numpy(row[None].astype("int64")) for row in tokens]
    with torch.no_grad():
        return np.concatenate([model.eval()(row).logits.numpy() for row in rows])


def measure(model: str, tokens: np.ndarray, out: str, *folders: str) -> None:
    full = logits(model, tokens)
    rows = {folder: compared(logits(folder, tokens), full) for folder in folders}
    used = versions("llmcompressor", "compressed-tensors", "torch", "transformers")
    Path(out).write_text(json.dumps({"rows": rows, "versions": used}), "utf-8")


if __name__ == "__main__":
    mode, model, tokens, *rest = sys.argv[1:]
    torch.set_num_threads(2)
    {"quantize": quantize, "measure": measure}[mode](model, np.load(tokens), *rest)
