"""GPTQModel quantizes a folder, saves it, loads what it saved, and says what it computes with it.

    python -m benchmarks.clients.gptq_order_child JOB.json

In the environment of GPTQModel; imports nothing of jquant. JOB has `model`, `out`, `tokens` (a
.npy, int32 `[rows, length]`; the last two rows are not calibrated on), `settings` of
`QuantizeConfig`, and `said`, an .npz: the dequantized weights of its PyTorch layers, float16
`[in, out]` under their names, and `logits`. The versions of what ran are printed last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rivals.child import versions
from benchmarks.rivals.run_gptqmodel import engine


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(2)
    library = engine()
    settings = library.QuantizeConfig(**job["settings"], offload_to_disk=False, device="cpu")
    tokens = torch.from_numpy(np.load(job["tokens"]).astype("int64"))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
            for row in tokens[:-2]]  # fmt: skip
    model = library.GPTQModel.load(job["model"], settings, dtype=torch.float32)
    model.quantize(rows, batch_size=4)
    model.save(job["out"])
    backend = library.BACKEND.GPTQ_TORCH
    again: Any = library.GPTQModel.load(
        job["out"], device="cpu", backend=backend, dtype=torch.float16
    ).model.eval()
    said = {
        name: module.dequantize_weight().half().numpy()
        for name, module in again.named_modules()
        if hasattr(module, "qweight")
    }
    with torch.no_grad():
        said["logits"] = again(tokens[-2:]).logits.float().numpy()
    np.savez(job["said"], **said)
    print("\n" + json.dumps(versions("gptqmodel", "torch", "transformers")))


if __name__ == "__main__":
    main()
