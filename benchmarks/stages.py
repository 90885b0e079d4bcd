"""One pass against stages: SmolLM2-135M, KL on held-out text, time and memory.

    python -m benchmarks.stages                                  # what is not there yet, ~1 hour
    python -m benchmarks.stages --only "W3 g64" --method weight  # some, whether there or not

Model, tokens, grid and evaluation are those of `quality`, whose one-pass figures stand beside.
Every run is a process of its own: seconds are those of `jq.quantize` with compiling, peak memory is
the process's. `+ QEP` and `+ GPTAQ` walk the full network beside the quantized one and correct each
weight for what its inputs have lost; `searched range` is what the GPTQ presets do. Results are
added to `results/stages.json` one by one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import jquant as jq
from benchmarks.harness import RESULTS, machine
from benchmarks.quality import LINEARS, SETTINGS
from jquant.grids import MSE, MinMax, Uniform
from jquant.models import smollm2
from jquant.rounding import GPTQ

METHODS: dict[str, tuple[Any, MinMax | MSE, GPTQ]] = {
    "weight": ("weight", MinMax(), GPTQ()),
    "block": ("block", MinMax(), GPTQ()),
    "weight + QEP": ("weight", MinMax(), GPTQ(correction="qep")),
    "weight + GPTAQ": ("weight", MinMax(), GPTQ(correction="gptaq")),
    "weight, searched range": ("weight", MSE(), GPTQ()),
    "weight + QEP, searched range": ("weight", MSE(), GPTQ(correction="qep")),
    "all, searched range": (None, MSE(), GPTQ()),
    "all": (None, MinMax(), GPTQ()),
}


def run(setting: str, method: str) -> dict[str, Any]:
    """One run, in this process."""
    bits, group = SETTINGS[setting]
    sequential, search, rounding = METHODS[method]
    fn, params, tokenizer = jq.models.load(smollm2.fetch())
    calibration, evaluation = smollm2.text_windows(tokenizer)
    batches = list(calibration[:64].reshape(-1, 4, 512))
    weights = jq.find_weights(fn, params, batches[0])
    scheme = jq.Scheme(Uniform(bits, range=search), group, rounding)
    plan = jq.plan(weights, {LINEARS: scheme, ".*": jq.keep})
    wall, processor = time.perf_counter(), time.process_time()
    q, report = jq.quantize(fn, params, plan, batches, sequential=sequential)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    found = jq.evaluate.compare(fn, params, q, evaluation[:16].reshape(-1, 2, 512))
    return vars(found) | {
        "seconds": wall,
        "processor_seconds": processor,
        "phases": dict(report.seconds),
        "stages": len(report.stages),
        "peak_bytes": report.peak_bytes,
        "evidence_bytes": report.evidence_bytes,
        "error_vs_nearest": report.ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SETTINGS, action="append", help="settings to run")
    parser.add_argument("--method", choices=METHODS, action="append", help="methods to run")
    parser.add_argument("--here", action="store_true", help="run in this process and print JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(run(options.only[0], options.method[0])))
        return
    path = RESULTS / "stages.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    asked = options.only or options.method
    for method in options.method or METHODS:
        for setting in options.only or SETTINGS:
            if method in rows.get(setting, {}) and not asked:
                continue
            command = [sys.executable, "-m", "benchmarks.stages", "--here"]
            command += ["--only", setting, "--method", method]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.setdefault(setting, {})[method] = json.loads(found.stdout.splitlines()[-1])
            print(setting, method, rows[setting][method], flush=True)
            path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
