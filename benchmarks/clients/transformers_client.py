"""Folders through `transformers`, in an environment of its own.

Called as `python FILE [FOLDER NPZ WAY] ...`, see `comparing`. WAY is "compressed" (as
`from_pretrained` loads it) or "dequantized": compressed-tensors makes arrays of the weights while
it loads.
"""

import sys
from typing import Any

import numpy as np
import torch
from comparing import told
from transformers import AutoModelForCausalLM


def run(folder: str, way: str, tokens: np.ndarray) -> np.ndarray:
    options: dict[str, Any] = {}
    if way == "dequantized":
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model.eval()(torch.as_tensor(tokens, dtype=torch.long)).logits.float().numpy()


if __name__ == "__main__":
    told(run, ("torch", "transformers", "compressed-tensors"), sys.argv[1:])
