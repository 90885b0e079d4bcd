"""GGUF files that jquant wrote, in llama.cpp: the same numbers, and less lost than by its own.

    python -m benchmarks.clients.llama_cpp --client VENV/bin/python [--network bytes|smollm2]

VENV has `llama-cpp-python`. *types*: every block type, rounded to nearest, llama.cpp's logits
against `apply`'s of the same codes (near, not equal: it rounds inputs to 8 bits on CPUs).
*calibrated*: K-quants by QEP and by llama.cpp's quantizer, with the same tokens' importances and
without, all as logits of llama.cpp against those of the network in float32; the table of tokens and
the head are Q8_0 in all of them. Types of 256 weights are of a `padded` network, whose width they
divide. *bytes* is the trained network of the tests (1 M weights), *smollm2* SmolLM2-135M, which
comes from a file of 4 bits: this is about what is lost besides.
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
from typing import Any, NamedTuple

import jax
import numpy as np

import jquant as jq
from benchmarks.clients.padded import padded
from jquant import models
from jquant.exporters.gguf import write_gguf
from jquant.grids import GGUF, MSE
from jquant.models import smollm2
from jquant.trees.lazy import realize

RESULTS = Path(__file__).parents[1] / "results" / "llama_cpp.json"
CHILD = Path(__file__).with_name("llama_cpp_child.py")
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
SEARCH = MSE(steps=20, resolution=40, norm=2.0)
NAMES = {
    "attention/q": "attn_q", "attention/k": "attn_k", "attention/v": "attn_v",
    "attention/out": "attn_output", "mlp/gate": "ffn_gate", "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}  # fmt: skip
TABLES = {"embed.*|head.*": jq.Scheme(GGUF("Q8_0"))}


class Subject(NamedTuple):
    """A network, texts for calibration in batches, and texts for evaluation."""

    fn: models.Decoder
    params: Any
    tokenizer: Any
    batches: list[np.ndarray]
    tokens: np.ndarray


def subject(name: str) -> Subject:
    if name == "bytes":
        from tests import trained

        fn, params, calibration, evaluation = trained.load()
        batches = [calibration[i : i + 16] for i in range(0, 64, 16)]
        return Subject(fn, params, None, batches, evaluation[:16])
    fn, params, tokenizer = models.load(smollm2.fetch(), lazy=True)
    calibration, evaluation = smollm2.text_windows(tokenizer)
    batches = [calibration[i : i + 4] for i in range(0, 8, 4)]
    return Subject(fn, realize(params), tokenizer, batches, evaluation[:2, :256])


def child(client: str, mode: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the other environment says of a job."""
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    out = folder / "out.json"
    command = [client, "-P", str(CHILD), mode, str(folder / "job.json"), str(out)]
    subprocess.run(command, check=True)
    return json.loads(out.read_text("utf-8"))


def say(*words: Any) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def types(one: Subject, kinds: list[str], folder: Path) -> dict[str, tuple[str, str]]:
    """Every type to nearest: the files, and `apply`'s logits of each."""
    files = {}
    for kind in kinds:
        file, logits = folder / f"{kind}.gguf", folder / f"{kind}.npy"
        files[kind] = str(file), str(logits)
        if logits.exists():
            continue
        fn, params = padded(one.fn, one.params) if kind.endswith("_K") else (one.fn, one.params)
        weights = jq.find_weights(fn, params, one.tokens)
        plan = jq.plan(weights, {**TABLES, ".*": jq.Scheme(GGUF(kind, SEARCH))})
        qparams, _ = jq.quantize(fn, params, plan)
        write_gguf(file, fn, qparams, one.tokenizer, overwrite=True)
        np.save(logits, np.asarray(jax.jit(jq.apply(fn))(qparams, one.tokens)))
        say(kind, file.stat().st_size)
    return files


def importances(fn: models.Decoder, params: Any, batches: list[np.ndarray]) -> dict[str, Any]:
    """The mean square of every input of every matrix: what llama.cpp calls an imatrix."""
    means = {}
    for path, evidence in jq.capture(fn, params, batches).items():
        if path.startswith("layers/"):
            _, layer, *part, _ = path.split("/")
            moment = np.diagonal(np.asarray(evidence.second_moment))
            tensor = f"blk.{layer}.{NAMES['/'.join(part)]}.weight"
            means[tensor] = moment / np.float32(evidence.count)
    return means


def calibrated(one: Subject, kinds: list[str], folder: Path) -> dict[str, tuple[str, str]]:
    """K-quants by QEP, and what llama.cpp needs to make its own: the files, and the full logits."""
    fn, params = padded(one.fn, one.params)
    full = str(folder / "full.npy")
    np.save(full, np.asarray(jax.jit(one.fn)(one.params, one.tokens)))
    write_gguf(folder / "full.gguf", fn, params, one.tokenizer, overwrite=True)
    np.savez(folder / "importance.npz", **importances(fn, params, one.batches))
    weights = jq.find_weights(fn, params, one.batches[0])
    files = {"F16": str(folder / "full.gguf")}
    for kind in kinds:
        for row, preset in {
            "QEP": getattr(jq.presets, f"{kind.lower()}_qep")(),
            "nearest": jq.Scheme(GGUF(kind, SEARCH)),
        }.items():
            file = folder / f"{kind}-{row}.gguf"
            files[f"{kind}: jquant, {row}"] = str(file)
            if file.exists():
                continue
            start = time.monotonic()
            plan = jq.plan(weights, {**TABLES, ".*": preset})
            told = None if row == "nearest" else one.batches
            write_gguf(file, fn, jq.quantize(fn, params, plan, told)[0], one.tokenizer)
            say(kind, row, f"{time.monotonic() - start:.0f} s")
        for row in ("plain", "imatrix"):
            files[f"{kind}: llama.cpp, {row}"] = str(folder / f"{kind}-{row}.gguf")
    return {name: (file, full) for name, file in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", required=True)
    parser.add_argument("--network", choices=("bytes", "smollm2"), default="bytes")
    parser.add_argument("--kinds", nargs="*", default=TYPES)
    parser.add_argument("--calibrated", nargs="*", default=("Q2_K", "Q3_K", "Q4_K"))
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    one = subject(args.network)
    np.save(folder / "tokens.npy", one.tokens)
    row: dict[str, Any] = {
        "evaluation": one.tokens.shape, "calibration": [len(one.batches), *one.batches[0].shape],
    }  # fmt: skip
    tables = {}
    if args.calibrated:
        tables["calibrated"] = calibrated(one, args.calibrated, folder)
        job = {
            "source": str(folder / "full.gguf"), "types": args.calibrated, "folder": str(folder),
            "importance": str(folder / "importance.npz"),
        }  # fmt: skip
        child(args.client, "quantize", job, folder)
    tables["types"] = types(one, args.kinds, folder)
    for name, files in tables.items():
        job = {"tokens": str(folder / "tokens.npy"), "files": files}
        row[name] = child(args.client, "measure", job, folder)
        for measured in row[name].values():
            if isinstance(measured, dict) and (ids := measured.pop("ids")):
                expected = one.tokenizer("The capital of France is\n\n  12345 'tis")["input_ids"]
                measured["tokenizes_alike"] = ids == expected
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results[args.network] = row
    results["versions"] = {
        "jax": jax.__version__, "gguf": importlib.metadata.version("gguf"),
        "python": platform.python_version(), "machine": platform.machine(),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
