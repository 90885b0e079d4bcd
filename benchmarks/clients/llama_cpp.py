"""GGUF files that jquant wrote, in llama.cpp: every block type has the same numbers there.

    python -m benchmarks.clients.llama_cpp --client VENV/bin/python [--network bytes|smollm2]

VENV has `llama-cpp-python`. Rounded to nearest, llama.cpp's logits against `apply`'s of the same
codes (near, not equal: it rounds inputs to 8 bits on CPUs). Types of 256 weights are of a `padded`
network, whose width they divide. *bytes* is the trained network of the tests (1 M weights),
*smollm2* SmolLM2-135M. What quantizing loses, beside llama.cpp's own, is for `k_quants`.
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


def subject(name: str, windows: int = 8, length: int = 256) -> Subject:
    """The network of a name; of SmolLM2 `windows` of 512 tokens to calibrate, four of `length`."""
    if name == "bytes":
        from tests import trained

        fn, params, calibration, evaluation = trained.load()
        batches = [calibration[i : i + 16] for i in range(0, 64, 16)]
        return Subject(fn, params, None, batches, evaluation[:16])
    fn, params, tokenizer = models.load(smollm2.fetch(), lazy=True)
    calibration, evaluation = smollm2.text_windows(tokenizer)
    batches = [calibration[i : i + 4] for i in range(0, windows, 4)]
    return Subject(fn, realize(params), tokenizer, batches, evaluation[:4, :length])


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


def record(network: str, table: str, rows: dict[str, Any]) -> None:
    """Puts rows of a table of a network into the results, the others stay."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    old = results.setdefault(network, {}).setdefault(table, {})
    types = {**old.get("types", {}), **rows.get("types", {})}
    old.update(rows, **({"types": types} if types else {}))
    results["versions"] = {
        "jax": jax.__version__, "gguf": importlib.metadata.version("gguf"),
        "python": platform.python_version(), "machine": platform.machine(),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--client", required=True)
    parser.add_argument("--network", choices=("bytes", "smollm2"), default="bytes")
    parser.add_argument("--kinds", nargs="*", default=TYPES)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    one = subject(args.network)
    np.save(folder / "tokens.npy", one.tokens)
    job = {"tokens": str(folder / "tokens.npy"), "files": types(one, args.kinds, folder)}
    rows = child(args.client, "measure", job, folder)
    for measured in rows.values():
        if isinstance(measured, dict) and (ids := measured.pop("ids")):
            expected = one.tokenizer("The capital of France is\n\n  12345 'tis")["input_ids"]
            measured["tokenizes_alike"] = ids == expected
    record(args.network, "types", {"evaluation": list(one.tokens.shape), **rows})


if __name__ == "__main__":
    main()
