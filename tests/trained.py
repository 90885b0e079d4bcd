"""A small trained network: 1 M weights over bytes, held in `assets/bytes.safetensors`.

`benchmarks/train_bytes.py` made it and says how. Everything comes from the file, so that results do
not depend on the Python that runs the tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import safe_open

from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder

ASSET = Path(__file__).parent / "assets" / "bytes.safetensors"
LINEARS = r"layers/.*/kernel"


def load() -> tuple[Decoder, dict[str, Any], np.ndarray, np.ndarray]:
    """`(fn, params, calibration, evaluation)`: float32 parameters, int32 windows `[n, 256]`.

    `fn(params, tokens[B, T])` gives logits `[B, T, 256]`. The calibration windows are from the text
    it was trained on, the evaluation windows are not.
    """
    with safe_open(ASSET, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        config = DecoderConfig(**json.loads(file.metadata()["config"]))
    windows = [arrays.pop(name).astype(np.int32) for name in ("calibration", "evaluation")]
    params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in arrays.items()}
    return Decoder(config), unflatten_dict(params, sep="/"), *windows


def metadata() -> dict[str, Any]:
    """What the script wrote beside the weights: its hash, its text, versions and losses."""
    with safe_open(ASSET, framework="numpy") as file:
        said = file.metadata()
    as_written = ("script_sha256",)
    return {name: text if name in as_written else json.loads(text) for name, text in said.items()}
