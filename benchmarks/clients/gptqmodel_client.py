"""A folder through GPTQModel on the CPU, in an environment of its own: `python FILE FOLDER NPZ`.

As `transformers_client.py`, whose comparison it takes. GPTQModel's kernel of plain PyTorch is used.
"""

import json
import sys

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from transformers_client import compared, versions


def main(folder: str, arrays: str, way: str = "") -> None:
    held = np.load(arrays)
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float32)
    with torch.no_grad():
        tokens = torch.as_tensor(held["tokens"], dtype=torch.long)
        logits = model.model(tokens).logits.float().numpy()
    told = versions("torch", "transformers", "gptqmodel")
    print(json.dumps({**compared(logits, held["logits"]), "versions": told}))


if __name__ == "__main__":
    main(*sys.argv[1:])
