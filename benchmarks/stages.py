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

import time
from typing import Any

import jquant as jq
from benchmarks import apart
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


if __name__ == "__main__":
    apart.main("stages", __doc__.splitlines()[0], SETTINGS, METHODS, run)
