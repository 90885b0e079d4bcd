"""llm-compressor: its `oneshot` with `GPTQModifier`, sequential pipeline, static activation order.

Timed: the one call, on a loaded model and a ready `DataLoader` of token batches; it traces the
model, calibrates block by block (inputs from blocks quantized already) and replaces the weights.
Nothing is saved or packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals import child


def prepared(folder: Path, tokens: Sequence[np.ndarray], weights: dict[str, Any]) -> Any:
    """A model, its tokenizer, and a function that quantizes it by `oneshot`, all in memory.

    `tokens` are batches, all alike; `weights` is the scheme, as compressed-tensors says it.
    """
    import torch
    import transformers
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.gptq import (  # pyright: ignore[reportMissingImports]
        GPTQModifier,
    )

    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = [torch.from_numpy(batch.astype("int64")) for batch in tokens]
    rows: Any = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches]
    loader = torch.utils.data.DataLoader(rows, batch_size=None, shuffle=False)
    modifier = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"], actorder="static", dampening_frac=child.DAMPING,
    )  # fmt: skip
    size, length = tokens[0].shape

    def quantize() -> Any:
        return oneshot(
            model=model, tokenizer=tokenizer, dataset=loader, recipe=[modifier],
            pipeline="sequential", max_seq_length=length,
            num_calibration_samples=size * len(tokens), batch_size=size,
            shuffle_calibration_samples=False,
        )  # fmt: skip

    return tokenizer, quantize


def run(job: child.Job) -> dict[str, Any]:
    import torch

    weights = {
        "num_bits": child.BITS, "type": "int", "symmetric": False, "strategy": "group",
        "group_size": child.GROUP,
    }  # fmt: skip
    _, quantize = prepared(job.folder, job.batches(), weights)
    model, found = child.timed(quantize)
    job.keep(
        lambda: {
            name: module.weight.detach().float().numpy()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "layers." in name
        }
    )
    used = child.versions("llmcompressor", "compressed-tensors", "torch", "transformers")
    return found | {"versions": used, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    child.main(run)
