"""What reading evidence costs beside a plain forward: SmolLM2-135M, one batch of 4 x 512 tokens.

    python -m benchmarks.capture

In one process, alternating: the forward, `capture` of all 210 block linears on the same batch, and
the second-moment products alone (`Evidence.of` on arrays of the same shapes). Medians. The figure
of merit is what capture costs beyond those products, relative to the forward. Also the evidence's
bytes against the arithmetic: each distinct input once, `4 * (in² + 2 in + 1)`.
Writes `results/capture.json`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import jquant as jq
from benchmarks.harness import write
from jquant.calibration import Evidence
from jquant.models import smollm2

REPEATS = 7


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(dtype: str) -> dict[str, Any]:
    fn, params, tokenizer = jq.models.load(smollm2.fetch(), dtype=dtype)
    batch = smollm2.text_windows(tokenizer)[0][:4]
    paths = [path for path in jq.find_weights(fn, params, batch) if path.endswith("kernel")]
    forward = jax.jit(fn)
    evidence = jq.capture(fn, params, [batch], paths=paths)
    distinct = list({id(e.second_moment): e for e in evidence.values()}.values())
    widths = [e.second_moment.shape[-1] for e in distinct]
    inputs = {n: jax.random.normal(jax.random.key(n), (batch.size, n), dtype) for n in set(widths)}
    gram = jax.jit(Evidence.of)

    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(params, batch),
        "capture": lambda: jq.capture(fn, params, [batch], paths=paths),
        "products": lambda: [gram(inputs[n]) for n in widths],
    }
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            times[name].append(timed(run))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    flops = {
        "forward": 2 * batch.size * sum(leaf.size for leaf in jax.tree.leaves(params)),
        "products": 2 * batch.size * sum(n * n for n in widths),
    }
    held = sum(leaf.nbytes for e in distinct for leaf in jax.tree.leaves(e))
    found = {
        "seconds": seconds,
        "beyond_products_vs_forward": (seconds["capture"] - seconds["products"])
        / seconds["forward"],
        "gflops_per_second": {name: flops[name] / seconds[name] / 1e9 for name in flops},
        "weights": len(paths),
        "distinct_inputs": len(distinct),
        "evidence_bytes": held,
        "evidence_bytes_by_arithmetic": sum(4 * (n * n + 2 * n + 1) for n in widths),
    }
    print(dtype, found)
    return found


def main() -> None:
    write("capture", rows={dtype: measure(dtype) for dtype in ("float32", "bfloat16")})


if __name__ == "__main__":
    main()
