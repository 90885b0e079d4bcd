"""SmolLM2-135M by its own PyTorch code (torchax) beside the reference decoder: one whole job each.

    python -m benchmarks.backends                                   # two rounds, ten minutes
    python -m benchmarks.backends --windows 2 --rounds 1 --no-write     # does it run?

Needs the extra `torch`. The Hugging Face folder is the one of `total_time` (`rivals/export_hf`, all
30 layers, checked against `transformers`), and so are the settings: W3 in groups of 64, asymmetric,
GPTQ with activation order and static groups, damping 0.01, windows of 512 tokens in batches of 4,
float32, two threads. A job is what a user writes: `jq.models.load(folder, backend=, lazy=True)`,
`find_weights`, `plan`, `jq.quantize`; timed from before loading to the last array, in a process of
its own with no compiled programs kept, backends alternating (A B A B), medians. Imports are outside
of the time, and inside of the memory (PyTorch's and transformers' too). *tracing* is
`find_weights`: the whole network traced and looked through once.

A run that lies in `--work` is not run again, unless `--fresh`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import write
from benchmarks.rivals.child import BATCH, BITS, DAMPING, GROUP, timed
from benchmarks.total_time import CORES, ROOT, call, prepare_apart

BACKENDS = {"jax": r"layers/.*/kernel", "torch": r"model\.layers\..*proj\.weight"}
RATIOS = ("seconds", "cpu_s", "peak_bytes")


def job(folder: Path, tokens: np.ndarray, backend: str) -> dict[str, Any]:
    """Load, find, plan and quantize; what it took."""
    import jax

    import jquant as jq
    from benchmarks.rivals.run_jquant import Compiling
    from jquant.grids import Uniform
    from jquant.rounding import GPTQ

    if backend == "torch":
        import torchax  # noqa: F401  # pyright: ignore[reportMissingImports]
        import transformers  # noqa: F401  # pyright: ignore[reportMissingImports]

    compiling, spent = Compiling(), {}
    batches = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
    scheme = jq.Scheme(Uniform(BITS), GROUP, GPTQ(damping=DAMPING))

    def run() -> Any:
        start = time.perf_counter()
        fn, params, _ = jq.models.load(folder, backend=backend, lazy=True)  # pyright: ignore
        spent["load_s"] = time.perf_counter() - start
        start = time.perf_counter()
        weights = jq.find_weights(fn, params, batches[0])
        spent["tracing_s"] = time.perf_counter() - start
        plan = jq.plan(weights, {BACKENDS[backend]: scheme, ".*": jq.keep})
        return jax.block_until_ready(jq.quantize(fn, params, plan, batches))

    (_, report), row = timed(run)
    spent |= dict(report.seconds) | {"compile_s": compiling.seconds}
    found = {"weights": len(report), "stages": len(report.stages), "error_vs_nearest": report.ratio}
    return row | {key: round(value, 2) for key, value in spent.items()} | found


def collect(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians of every figure by backend, and the ratios of torch to jax."""
    rows: dict[str, Any] = {}
    for backend in BACKENDS:
        runs = [one[backend] for one in rounds]
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows[backend] = median | {"others_cpu_s": max(run["others_cpu_s"] for run in runs)}
    ratios = {key: round(rows["torch"][key] / rows["jax"][key], 3) for key in RATIOS}
    return {"rows": rows, "torch_over_jax": ratios, "rounds": rounds}


def of_run(backend: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measured, now or before."""
    if out.exists() and not options.fresh:
        found = json.loads(out.read_text())
        if "failed" not in found:
            return found
    command = [sys.executable, "-m", "benchmarks.backends", "--here", backend, "--out", str(out)]
    command += ["--work", str(options.work.absolute()), "--windows", str(options.windows)]
    command += ["--layers", str(options.layers)] if options.layers else []
    return call(command, out, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--layers", type=int, help="only the first so many layers: a quick try")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "backends")
    parser.add_argument("--timeout", type=float, default=5400, help="seconds for one process")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    parser.add_argument("--here", choices=BACKENDS, help="run this one in this process")
    parser.add_argument("--out", type=Path, help="with --here: where its figures go")
    options = parser.parse_args()
    options.passive = False
    work = options.work.absolute() / f"{options.windows}-windows-{options.layers or 'all'}-layers"
    if options.here:
        found = job(work / "model", np.load(work / "calibration.npy"), options.here)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        return
    work.mkdir(parents=True, exist_ok=True)
    prepare_apart(work, options.windows, options.layers)
    rounds = []
    for number in range(options.rounds):
        rounds.append({})
        for name in BACKENDS:
            out = work / f"{name}-{number}.json"
            found = rounds[-1][name] = of_run(name, out, options)
            print(f"round {number} {name}:", found, flush=True)
            if "failed" in found:
                sys.exit(f"{name}: see {out.with_suffix('.log')}")
    result = collect(rounds)
    print(result["torch_over_jax"])
    if not options.no_write and options.layers is None:
        settings = {
            "bits": BITS, "group": GROUP, "damping": DAMPING, "windows": options.windows,
            "length": 512, "batch": BATCH, "threads": CORES, "layers": 30,
        }  # fmt: skip
        write("backends", settings=settings, **result)


if __name__ == "__main__":
    main()
