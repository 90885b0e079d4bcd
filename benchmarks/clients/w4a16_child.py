"""llm-compressor's W4A16, and the logits that transformers computes of folders.

    python -m benchmarks.clients.w4a16_child quantize MODEL TOKENS.npy OUT GROUP
    python -m benchmarks.clients.w4a16_child logits MODEL TOKENS.npy OUT.npy

In the environment of the other tool; imports nothing of jquant. The versions of what ran are
printed last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.rivals.child import BATCH, versions
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


def logits(folder: str, tokens: np.ndarray, out: str) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [torch.from_numpy(row[None].astype("int64")) for row in tokens]
    with torch.no_grad():
        np.save(out, np.concatenate([model.eval()(row).logits.numpy() for row in rows]))


if __name__ == "__main__":
    mode, model, tokens, *rest = sys.argv[1:]
    torch.set_num_threads(2)
    {"quantize": quantize, "logits": logits}[mode](model, np.load(tokens), *rest)
    print(json.dumps(versions("llmcompressor", "compressed-tensors", "torch", "transformers")))
