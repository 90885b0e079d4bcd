"""What an engine computes with an export: runs in the engine's own environment, as a script.

`clients.py` sends this text to an interpreter, with a call of `main` behind it. A job has `client`,
`path`, `packages`, `tokens` (a .npy, int32 `[windows, length]`) and `out`, a folder. Logits of
window k are left in `out` as `k.npy`, float32 `[length, vocab]`, and for each a line of JSON is
printed; the last line says the versions of `packages` and how the model was loaded, or `missing`, a
package, or `error`. Imports nothing of jquant, which that environment need not have: NumPy and the
engine only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]


def transformers(path: Path, length: int) -> tuple[Run, str]:
    """A folder by `from_pretrained`, on the CPU in float32."""
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("transformers")
    options, way = {}, "as it comes"
    if as_arrays(json.loads((path / "config.json").read_text("utf-8"))):
        way = "dequantize=True"
        options["quantization_config"] = library.CompressedTensorsConfig(dequantize=True)
    auto = library.AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float32, **options).eval()
    return torch_run(torch, model), way


def as_arrays(config: dict[str, Any]) -> bool:
    """Whether compressed-tensors is to make arrays of the weights while it loads: what it takes
    otherwise it refuses, or multiplies in bfloat16."""
    groups = (config.get("quantization_config") or {}).get("config_groups", {}).values()
    return any(
        group.get("format") in ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
        or (group.get("format") == "pack-quantized" and not group["weights"]["symmetric"])
        for group in groups
    )


def gptqmodel(path: Path, length: int) -> tuple[Run, str]:
    """A folder by GPTQModel's kernels in PyTorch, which multiply in float16."""
    torch: Any = importlib.import_module("torch")
    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(RuntimeError):  # a torchvision for CUDA describes these, and lacks
        for name in ("nms", "qnms"):  # them beside a torch for CPUs; the engine imports it in vain
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    engine: Any = importlib.import_module("gptqmodel")
    config = json.loads((path / "config.json").read_text("utf-8"))["quantization_config"]
    kinds = engine.BACKEND
    backend = kinds.AWQ_TORCH if config["quant_method"] == "awq" else kinds.GPTQ_TORCH
    loaded = engine.GPTQModel.load(str(path), device="cpu", backend=backend, dtype=torch.float16)
    return torch_run(torch, loaded.model.eval()), "float16"


def torch_run(torch: Any, model: Any) -> Run:
    def run(window: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            tokens = torch.as_tensor(window[None].astype(np.int64))
            return model(tokens).logits[0].float().numpy()

    return run


def llama_cpp(path: Path, length: int) -> tuple[Run, str]:
    """A file by llama.cpp on the CPU, which rounds the inputs of products to 8 bits."""
    engine: Any = importlib.import_module("llama_cpp")
    model = engine.Llama(
        str(path), n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, verbose=False
    )

    def run(window: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval(window.tolist())
        return np.array(model.scores[: len(window)], np.float32)

    return run, "as it comes"


def mlx(path: Path, length: int) -> tuple[Run, str]:
    """A folder by mlx-lm on the CPU, in the dtype of the scales of its table of tokens."""
    engine: Any = importlib.import_module("mlx.core")
    utils: Any = importlib.import_module("mlx_lm.utils")
    model, _ = utils.load_model(path)

    def run(window: np.ndarray) -> np.ndarray:
        return np.array(model(engine.array(window[None]))[0].astype(engine.float32))

    return run, "as it comes"


CLIENTS = {"transformers": transformers, "gptqmodel": gptqmodel, "llama-cpp": llama_cpp, "mlx": mlx}


def told(**line: Any) -> None:
    print("\n" + json.dumps(line), flush=True)  # whatever the engine printed before


def main(job: dict[str, Any]) -> None:
    versions = {}
    for package in job["packages"]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return told(missing=package)
    try:
        tokens = np.load(job["tokens"])
        run, way = CLIENTS[job["client"]](Path(job["path"]), tokens.shape[1])
        for k, window in enumerate(tokens):
            np.save(Path(job["out"], f"{k}.npy"), run(window))
            told(windows=k + 1)
    except Exception as error:  # of whatever kind: it is the engine's answer
        lines = str(error).splitlines() or [""]
        return told(error=f"{type(error).__name__}: {lines[0][:300]}")
    told(versions=versions, way=way)
