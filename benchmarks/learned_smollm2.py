"""Roundings that are learned, on SmolLM2-135M at 3 bits in groups of 64: KL on held-out text.

    python -m benchmarks.learned_smollm2                     # what is not there yet
    python -m benchmarks.learned_smollm2 --method DiscQuant  # one, whether there or not
    python -m benchmarks.learned_smollm2 --step              # the time and memory of a step

Model, tokens and evaluation are those of `quality`: 64 windows of 512 tokens, 16 held-out ones. One
static grid for all, the asymmetric one with minimum and maximum (SignRound moves its ranges unless
they are kept). GPTQ goes by activation order with static groups. Learned on the whole network's KL
are STEPS steps of one window (three times through the text: many small steps gain more than few
large ones), block by block BLOCK_STEPS. Every run is a process of its own; seconds are those of
`jq.quantize`, with compiling. Results go to `results/learned_smollm2.json` one by one.

A step's ideal is its products alone: those of the linears and the head, once in the original, once
in the network that learns and twice for its gradients, at the rate that the same products reach by
themselves, measured before and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import jquant as jq
from benchmarks.harness import RESULTS, machine
from benchmarks.quality import LINEARS
from jquant.grids import Uniform
from jquant.learning.objectives import KL, Reconstruction
from jquant.models import smollm2
from jquant.rounding import GPTQ, NUPES, Descent, DiscQuant, Nearest, SignRound

PATH = RESULTS / "learned_smollm2.json"
BITS, GROUP, ROWS, STEPS, BLOCK_STEPS = 3, 64, 1, 192, 192
SIGNS = Descent(BLOCK_STEPS, 1 / BLOCK_STEPS, "sign_sgd", "linear", checks=4)
DISC = DiscQuant(
    1.0,
    unit="nearest",
    start_at="original",
    descent=Descent(STEPS, 0.1, warmup=STEPS // 8, checks=4),
)

# A rate that falls: at a constant one, what 10^8 weights do at once is never settled.
CODES = Descent(STEPS, 0.02, warmup=STEPS // 8, checks=4)
ALL_SIGNS = Descent(STEPS, 1 / STEPS, "sign_sgd", "linear", checks=4)

# Name: rounding, objective, what is one stage.
METHODS: dict[str, tuple[Any, Any, Any]] = {
    "nearest": (Nearest(), None, "weight"),
    "GPTQ, one pass": (GPTQ(), None, None),
    "GPTQ": (GPTQ(), None, "weight"),
    "DiscQuant, KL": (DISC, KL(), "weight"),
    "SignRound, block": (SignRound(descent=SIGNS), Reconstruction(), "block"),
    "SignRound, block, ranges kept": (
        SignRound(descent=SIGNS, ranges=False), Reconstruction(), "block",
    ),  # fmt: skip
    "NUPES, KL": (NUPES(descent=CODES), KL(), "weight"),
    "SignRound, KL": (SignRound(descent=ALL_SIGNS), KL(), "weight"),
}  # fmt: skip


def load() -> tuple[Any, Any, list[Any], Any]:
    fn, params, tokenizer = jq.models.load(smollm2.fetch())
    calibration, evaluation = smollm2.text_windows(tokenizer)
    return fn, params, list(calibration[:64].reshape(-1, ROWS, 512)), evaluation[:16]


def quantize(method: str, fn: Any, params: Any, batches: list[Any], **options: Any) -> Any:
    rounding, objective, sequential = METHODS[method]
    weights = jq.find_weights(fn, params, batches[0])
    scheme = jq.Scheme(Uniform(BITS), GROUP, rounding)
    return jq.quantize(
        fn, params, jq.plan(weights, {LINEARS: scheme, ".*": jq.keep}),
        batches if rounding.needs or objective else None,
        objective=objective, sequential=sequential, key=jax.random.key(0), **options,
    )  # fmt: skip


def run(method: str) -> dict[str, Any]:
    fn, params, batches, evaluation = load()
    start = time.perf_counter()
    q, report = quantize(method, fn, params, batches)
    seconds = time.perf_counter() - start
    found = jq.evaluate.compare(fn, params, q, evaluation.reshape(-1, 2, 512))
    learned = jq.evaluate.kl(fn, params, q, batches[:16])
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    traces = report.to_json()["traces"]
    if len(traces) > 1:  # of all blocks: what the looks at rounded weights found is enough
        traces = [{k: trace[k] for k in ("looks", "kept_at", "stopped")} for trace in traces]
    return vars(found) | {
        "seconds": seconds,
        "calibration_kl": learned,
        "bits_per_weight": report.bits_per_weight,
        "peak_bytes": peak,
        "traces": traces,
    }


def products(params: Any, rows: int) -> tuple[float, float]:
    """Floating-point operations and seconds of all linears and the head, once, by themselves."""
    flat = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    flat = [leaf.T if leaf.shape[0] > 9999 else leaf for leaf in flat]
    dot = jax.jit(jnp.dot)
    total, spent = 0.0, 0.0
    for shape in sorted({leaf.shape for leaf in flat}):
        many = sum(leaf.shape == shape for leaf in flat)
        a, b = jnp.ones((rows, shape[0])), jnp.ones(shape)
        dot(a, b).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            dot(a, b).block_until_ready()
            times.append(time.perf_counter() - start)
        total += many * 2.0 * rows * shape[0] * shape[1]
        spent += many * statistics.median(times)
    return total, spent


def step() -> dict[str, Any]:
    """Seconds of a step of DiscQuant, its ideal, and the process's memory against its parts."""
    fn, params, batches, _ = load()
    rows = batches[0].size
    operations, before = products(params, rows)
    ticks: list[float] = []

    class Enough(Exception):
        pass

    def told(progress: Any) -> None:
        ticks.append(time.perf_counter())
        if len(ticks) == 8:
            raise Enough

    try:
        quantize("DiscQuant, KL", fn, params, batches, progress=told)
    except Enough:
        pass
    _, after = products(params, rows)
    learned = sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "kernel" in str(path[-1])
    )  # fmt: skip
    everything = sum(leaf.size for leaf in jax.tree.leaves(params))
    parts = {
        "parameters": 4 * everything,
        "positions, two moments, gradient": 16 * learned,
        "weights as they are now": 4 * learned,
        "logits: wanted, found, gradient": 12 * rows * max(params["embed"]["embedding"].shape),
    }
    return {
        "tokens": rows,
        "seconds": statistics.median(b - a for a, b in zip(ticks, ticks[1:], strict=False)),
        "ideal_seconds": 4 * (before + after) / 2,
        "product_gflops": [operations / spent / 1e9 for spent in (before, after)],
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "parts_bytes": parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Learned roundings of SmolLM2.")
    parser.add_argument("--method", choices=METHODS, action="append", help="methods to run")
    parser.add_argument("--step", action="store_true", help="the time and memory of a step")
    parser.add_argument("--here", action="store_true", help="run in this process and print JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(step() if options.step else run(options.method[0])))
        return
    written = json.loads(PATH.read_text()) if PATH.exists() else {"rows": {}}
    asked = (
        [] if options.step else options.method or [m for m in METHODS if m not in written["rows"]]
    )
    for method in ["step"] if options.step else asked:
        command = [sys.executable, "-m", "benchmarks.learned_smollm2", "--here"]
        command += ["--step"] if options.step else ["--method", method]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(found.stdout.splitlines()[-1])
        print(method, {k: v for k, v in result.items() if k != "traces"}, flush=True)
        written = json.loads(PATH.read_text()) if PATH.exists() else {"rows": {}}
        if options.step:
            written["step"] = result
        else:
            written["rows"][method] = result
        written["rows"] = {m: written["rows"][m] for m in METHODS if m in written["rows"]}
        written["machine"] = machine()
        written["settings"] = {"steps": STEPS, "block_steps": BLOCK_STEPS, "rows": ROWS}
        PATH.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
