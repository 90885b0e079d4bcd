"""Folders through `mlx-lm` on a CPU, in an environment of its own.

Called as `python FILE [FOLDER NPZ WAY] ...`, see `comparing`.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from comparing import told
from mlx_lm.utils import load_model


def run(folder: str, way: str, tokens: np.ndarray) -> np.ndarray:
    del way
    model, _ = load_model(Path(folder))
    return np.array(model(mx.array(tokens)).astype(mx.float32))


if __name__ == "__main__":
    told(run, ("mlx", "mlx-lm"), sys.argv[1:])
