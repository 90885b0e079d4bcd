"""Codes and scales as TPU serving unpacks them, without a TPU.

    python -m benchmarks.clients.tpu_inference

Installs tpu-inference without what it needs (vLLM, libtpu) into a temporary folder, and runs the
one file that unpacks `pack-quantized` weights and gives them values. Its layers cannot be
imported without vLLM, nor its kernels run without a TPU: what is compared is what a layer would be
given. Writes `results/tpu_inference.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

import jquant as jq
from benchmarks.clients.flavours import TRANSFORMERS
from benchmarks.harness import write
from jquant.grids import Uniform
from jquant.models import Decoder, DecoderConfig
from jquant.models.disassembly import disassemble
from jquant.weights.qtensor import QTensor, dequantize_weight

VERSION = "0.32.0"
UNPACKER = "tpu_inference/layers/common/quantization/__init__.py"
NETWORK = DecoderConfig(vocab=96, width=256, hidden=512, layers=2, heads=4, kv_heads=2)
FLAVOURS = {
    "W4A16, groups of 32": TRANSFORMERS["W4A16, groups of 32"].rules,
    "W4A16, groups of 128": {"layers/.*": jq.Scheme(Uniform(4, True, scale_dtype="bfloat16"), 128)},
    "W4A16, channels": TRANSFORMERS["W4A16, channels"].rules,
}


def unpacker(folder: Path) -> ModuleType:
    """The file of tpu-inference that unpacks weights, alone."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, f"tpu-inference=={VERSION}"], check=True)
    spec = importlib.util.spec_from_file_location("unpacker", folder / UNPACKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compared(module: ModuleType, rules: Any, folder: Path) -> dict[str, Any]:
    """How many weights of an export are unpacked to the codes and scales that jquant holds."""
    fn = Decoder(NETWORK)
    params = fn.init(jax.random.key(7))
    weights = jq.find_weights(fn, params, np.zeros((1, 8), np.int32))
    qparams, _ = jq.quantize(fn, params, jq.plan(weights, {**rules, ".*": jq.keep}))
    jq.export(fn, qparams, folder, format="compressed-tensors")
    mine = {
        tensor.name: tensor.leaf
        for tensor in disassemble(NETWORK, qparams, "hf")
        if isinstance(tensor.leaf, QTensor)
    }
    equal = 0
    with safe_open(folder / "model.safetensors", framework="flax") as file:
        for name, q in mine.items():
            packed, scale = (file.get_tensor(f"{name}_{part}") for part in ("packed", "scale"))
            codes, scales = module.unpack_wna16_linear_weight(packed, scale, q.shape[-1])
            same = np.array_equal(codes.T, q.codes) and np.array_equal(scales.T, q.params["scale"])
            values = module.dequantize_tensor(codes, scales, axis=0, out_dtype=jnp.float32)
            equal += same and np.array_equal(values.T, dequantize_weight(q))
    return {"weights": len(mine), "equal": equal}


def main() -> None:
    argparse.ArgumentParser(
        description="Codes and scales as TPU serving unpacks them."
    ).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        module = unpacker(Path(scratch) / "packages")
        rows = {
            name: compared(module, rules, Path(scratch) / f"model-{k}")
            for k, (name, rules) in enumerate(FLAVOURS.items())
        }
    print(json.dumps(rows, indent=1))
    write("tpu_inference", version=VERSION, rows=rows)


if __name__ == "__main__":
    main()
