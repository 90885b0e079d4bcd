"""GGUF files that jquant wrote, in llama.cpp: the same numbers, and less lost than by its own.

    python -m benchmarks.clients.llama_cpp --client VENV/bin/python [--only types|calibrated]

VENV has `llama-cpp-python`. *types*: SmolLM2 rounded to nearest in each block type, llama.cpp's
logits against `apply`'s of the same codes (it quantizes inputs to 8 bits on CPUs, so they are
near, not equal). *calibrated*: K-quants by QEP and by llama.cpp's quantizer, with the same tokens'
importances and without, all as logits of llama.cpp against those of the network in float32. Types
of 256 weights are of `padded` SmolLM2, whose width they divide. The network itself comes from a
file of 4 bits, so all of this is about what is lost besides.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from benchmarks.clients.padded import padded
from jquant import models
from jquant.exporters import write_gguf
from jquant.grids import GGUF, MSE
from jquant.models import smollm2
from jquant.trees.lazy import realize

RESULTS = Path(__file__).parents[1] / "results" / "llama_cpp.json"
CHILD = Path(__file__).with_name("llama_cpp_child.py")
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CALIBRATED = ("Q3_K", "Q2_K", "Q4_K")
SEARCH = MSE(steps=20, resolution=40, norm=2.0)
WINDOWS, LENGTH = 2, 256  # of evaluation
CALIBRATION = 8  # windows of 512 tokens
NAMES = {
    "attention/q": "attn_q", "attention/k": "attn_k", "attention/v": "attn_v",
    "attention/out": "attn_output", "mlp/gate": "ffn_gate", "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}  # fmt: skip


def child(client: str, mode: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the other environment says of a job."""
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    out = folder / "out.json"
    subprocess.run([client, str(CHILD), mode, str(folder / "job.json"), str(out)], check=True)
    return json.loads(out.read_text("utf-8"))


def say(*words: Any) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def types(client: str, folder: Path) -> dict[str, Any]:
    """Every type to nearest: llama.cpp against `apply`."""
    source = smollm2.fetch()
    fn, params, tokenizer = models.load(source, scan_layers=True, lazy=True)
    wide = padded(fn, params)
    tokens = smollm2.text_windows(tokenizer)[1][:WINDOWS, :LENGTH]
    np.save(folder / "tokens.npy", tokens)
    files = {}
    for kind in TYPES:
        network, values = wide if kind.endswith("_K") else (fn, realize(params))
        plan = jq.plan(
            jq.find_weights(network, values, tokens),
            {"embed.*": jq.Scheme(GGUF("Q8_0")), ".*": jq.Scheme(GGUF(kind, SEARCH))},
        )
        qparams, _ = jq.quantize(network, values, plan)
        file, logits = folder / f"{kind}.gguf", folder / f"{kind}.npy"
        write_gguf(file, network, qparams, tokenizer, overwrite=True)
        np.save(logits, np.asarray(jax.jit(jq.apply(network))(qparams, tokens)))
        files[kind] = str(file), str(logits)
        say(kind, file.stat().st_size)
    job = {"tokens": str(folder / "tokens.npy"), "files": files}
    results = child(client, "measure", job, folder)
    for row in results.values():
        if isinstance(row, dict):
            expected = tokenizer("The capital of France is\n\n  12345 'tis")["input_ids"]
            row["tokenizes_alike"] = row.pop("ids") == expected
    return results


def importances(fn: models.Decoder, params: Any, batches: list[np.ndarray]) -> dict[str, Any]:
    """The mean square of every input of every matrix: what llama.cpp calls an imatrix."""
    seen = jq.capture(fn, params, batches)
    means = {}
    for path, evidence in seen.items():
        if not path.startswith("layers/"):
            continue
        _, layer, *part, _ = path.split("/")
        moment = np.asarray(evidence.second_moment)
        tensor = f"blk.{layer}.{NAMES['/'.join(part)]}.weight"
        means[tensor] = np.diagonal(moment) / np.float32(evidence.count)
    return means


def calibrated(client: str, folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """K-quants by QEP against llama.cpp's own, in llama.cpp's runtime."""
    source = smollm2.fetch()
    small, lazy, tokenizer = models.load(source, lazy=True)
    fn, params = padded(small, lazy)
    calibration, evaluation = smollm2.text_windows(tokenizer)
    tokens = evaluation[:WINDOWS, :LENGTH]
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "full.npy", np.asarray(jax.jit(small)(realize(lazy), tokens)))
    batches = [calibration[i : i + 4] for i in range(0, CALIBRATION, 4)]
    write_gguf(folder / "full.gguf", fn, params, tokenizer, overwrite=True)
    np.savez(folder / "importance.npz", **importances(fn, params, batches))
    say("importances")
    files = {"F16": folder / "full.gguf"}
    weights = jq.find_weights(fn, params, batches[0])
    for kind in kinds:
        preset = getattr(jq.presets, f"{kind.lower()}_qep")()
        table = {"embed.*": jq.Scheme(GGUF("Q8_0"))}
        rows = {
            "jquant, QEP": jq.plan(weights, {**table, ".*": preset}),
            "jquant, nearest": jq.plan(weights, {**table, ".*": jq.Scheme(preset.grid)}),
        }
        for row, plan in rows.items():
            file = files[f"{kind}: {row}"] = folder / f"{kind}-{row.split()[-1]}.gguf"
            if file.exists():
                continue
            start = time.monotonic()
            told = batches if "QEP" in row else None
            qparams, _ = jq.quantize(fn, params, plan, told)
            write_gguf(file, fn, qparams, tokenizer)
            say(kind, row, f"{time.monotonic() - start:.0f} s")
        for row in ("plain", "imatrix"):
            files[f"{kind}: llama.cpp, {row}"] = folder / f"{kind}-{row}.gguf"
    job = {
        "source": str(folder / "full.gguf"), "types": kinds, "folder": str(folder),
        "importance": str(folder / "importance.npz"),
    }  # fmt: skip
    child(client, "quantize", job, folder)
    full = str(folder / "full.npy")
    pairs = {name: (str(file), full) for name, file in files.items()}
    results = child(
        client, "measure", {"tokens": str(folder / "tokens.npy"), "files": pairs}, folder
    )
    for row in results.values():
        if isinstance(row, dict):
            del row["ids"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", required=True)
    parser.add_argument("--only", choices=("types", "calibrated"))
    parser.add_argument("--kinds", nargs="*", default=CALIBRATED)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    if args.only != "calibrated":
        results["types"] = types(args.client, folder)
    if args.only != "types":
        results["calibrated"] = calibrated(args.client, folder, tuple(args.kinds))
    results["versions"] = {
        "jax": jax.__version__, "gguf": importlib.metadata.version("gguf"),
        "python": platform.python_version(), "machine": platform.machine(),
    }  # fmt: skip
    results["setting"] = {
        "evaluation": [WINDOWS, LENGTH], "calibration": [CALIBRATION, 512],
        "model": smollm2.REQUIREMENT,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
