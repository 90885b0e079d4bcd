"""W4A16 as TPU and GPU engines serve it: jquant's file beside llm-compressor's, in transformers.

    python -m benchmarks.clients.w4a16 --client VENV/bin/python [--windows 32]

Symmetric integers of 4 bits in groups of 64 (128 do not divide SmolLM2's width of 576), all linears
of the blocks, the same calibration tokens; both folders are compressed-tensors', loaded by the same
transformers, and measured there against the full model on held-out windows. VENV has
`torch==2.13.0 llmcompressor==0.14.0.1`. Writes `results/w4a16.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

import jquant as jq
from benchmarks.harness import write
from benchmarks.total_time import prepare
from jquant.exporters import apart
from jquant.grids import MinMax, Uniform
from jquant.rounding import GPTQ

ROOT = Path(__file__).parents[2]
GROUP = 64
SCHEMES = {
    "jquant, preset `w4a16_qep`": jq.presets.w4a16_qep(GROUP),
    "jquant, plain GPTQ": jq.Scheme(Uniform(4, True, range=MinMax()), GROUP, GPTQ()),
    "jquant, nearest": jq.Scheme(Uniform(4, True, range=MinMax()), GROUP),
}


def child(client: str, *arguments: str | Path) -> dict[str, str]:
    """Runs a part in the other environment; the versions there."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
    command = [client, "-m", "benchmarks.clients.w4a16_child", *map(str, arguments)]
    kept["OMP_WAIT_POLICY"] = "PASSIVE"
    done = subprocess.run(command, cwd=ROOT, check=True, env=kept, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def own(scheme: jq.Scheme, model: Path, tokens: np.ndarray, out: Path) -> float:
    """Exports the model under a scheme; the seconds that quantizing took."""
    fn, params, _ = jq.models.load(model)
    batches = [tokens[i : i + 4] for i in range(0, len(tokens), 4)]
    weights = jq.find_weights(fn, params, batches[0])
    plan = jq.plan(weights, {r"layers/.*kernel": scheme, ".*": jq.keep})
    start = time.monotonic()
    qparams, _ = jq.quantize(fn, params, plan, batches)
    seconds = time.monotonic() - start
    jq.export(fn, qparams, out, format="compressed-tensors", like=model)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="W4A16: ours beside llm-compressor's.")
    parser.add_argument("--client", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "w4a16")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work, options.windows, None)
    tokens, model = np.load(work / "calibration.npy"), work / "model"
    folders, seconds = {}, {}
    for k, (name, scheme) in enumerate(SCHEMES.items()):
        folders[name] = work / f"own-{k}"
        if not folders[name].exists():
            seconds[name] = own(scheme, model, tokens, folders[name])
            print(name, seconds[name], flush=True)
    folders["llm-compressor, GPTQ"] = work / "llm-compressor"
    if not folders["llm-compressor, GPTQ"].exists():
        child(options.client, "quantize", model, work / "calibration.npy", work / "llm-compressor",
              str(GROUP))  # fmt: skip
    logits, versions = {}, {}
    for name, folder in {"full": model, **folders}.items():
        out = work / f"{folder.name}.npy"
        versions = child(options.client, "logits", folder, work / "evaluation.npy", out)
        logits[name] = np.load(out)
    rows = {
        name: asdict(apart(iter(logits["full"]), iter(logits[name])))
        | {"seconds": seconds.get(name)}
        for name in folders
    }
    print(json.dumps(rows, indent=1))
    write("w4a16", rows=rows, client=versions, windows=len(tokens), group=GROUP)


if __name__ == "__main__":
    main()
