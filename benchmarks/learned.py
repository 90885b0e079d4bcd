"""Roundings that are learned, on a small trained network: KL on text it has not seen.

    python -m benchmarks.learned                   # what is not there yet: hours on two cores
    python -m benchmarks.learned --only "W3 row" --method DiscQuant --seed 0

The network of the tests (1 M weights over bytes, `train_bytes`), all linears of its blocks on one
asymmetric grid, float16 scales. Calibration: 512 windows of 256 bytes of the text it was trained
on, another choice for every seed; evaluation: the 32 held-out windows of the tests. GPTQ takes all
windows; a learned rounding takes STEPS steps of 8 windows each. *alone*: each weight on the squared
error of its own outputs, stage by stage; *block*: the weights of a block on its outputs; *KL*: all
on the whole network. `+ scales`: `jq.tune_scales` afterwards, SCALE_STEPS steps. DiscQuant's
ablations leave out its linear term (through a ρ and κ that drown it) or its data (ρ = 0). Results
are added to `results/learned.json` as they come.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import numpy as np

import jquant as jq
from benchmarks.harness import RESULTS, machine
from benchmarks.train_bytes import WINDOW, split
from jquant.grids import Power, Uniform
from jquant.learning.objectives import KL, Reconstruction
from jquant.models import smollm2
from jquant.rounding import GPTQ, NUPES, AdaRound, Descent, DiscQuant, Nearest, SignRound
from tests import trained

PATH = RESULTS / "learned.json"
WINDOWS, ROWS, STEPS, SCALE_STEPS = 512, 8, 160, 60
SETTINGS: dict[str, tuple[int, int | None]] = {
    "W4 row": (4, None),
    "W3 row": (3, None),
    "W3 g32": (3, 32),
    "W2 row": (2, None),
    "W2 g32": (2, 32),
}
STEADY = Descent(STEPS, 0.05, schedule="constant")
SIGNS = Descent(STEPS, 1 / STEPS, "sign_sgd", "linear")
COSINE = Descent(STEPS, 0.1, warmup=STEPS // 8)
DISC = DiscQuant(rho=1.0, unit="nearest", descent=COSINE)

# Name: rounding, objective, what is one stage, whether on a power grid.
METHODS: dict[str, tuple[Any, Any, Any, bool]] = {
    "nearest": (Nearest(), None, "weight", False),
    "GPTQ, one pass": (GPTQ(), None, None, False),
    "GPTQ": (GPTQ(), None, "weight", False),
    "GPTQ + QEP": (GPTQ(correction="qep"), None, "weight", False),
    "AdaRound, alone": (AdaRound(), None, "weight", False),
    "AdaRound, block": (AdaRound(descent=STEADY), Reconstruction(), "block", False),
    "SignRound, block": (SignRound(descent=SIGNS), Reconstruction(), "block", False),
    "SignRound, KL": (SignRound(descent=SIGNS), KL(), "weight", False),
    "NUPES, KL": (NUPES(descent=STEADY), KL(), "weight", False),
    "DiscQuant": (DISC, KL(), "weight", False),
    "DiscQuant, ρ and κ as published": (DiscQuant(descent=COSINE), KL(), "weight", False),
    "DiscQuant, no linear term": (
        DiscQuant(rho=1e3, kappa=1e3, unit="nearest", descent=COSINE), KL(), "weight", False,
    ),
    "DiscQuant, no data": (DiscQuant(rho=0.0, descent=COSINE), KL(), "weight", False),
    "PowerQuant": (Nearest(), None, "weight", True),
    "power grid, GPTQ": (GPTQ(), None, "weight", True),
    "NUPES on a power grid, KL": (NUPES(descent=STEADY), KL(), "weight", True),
}  # fmt: skip

ALWAYS = [
    "nearest",
    "GPTQ, one pass",
    "GPTQ",
    "AdaRound, block",
    "SignRound, KL",
    "NUPES, KL",
    "DiscQuant",
]
POWERS = ["PowerQuant", "power grid, GPTQ", "NUPES on a power grid, KL"]
RUNS = {
    "W4 row": ["nearest", "NUPES, KL", *POWERS],
    "W3 row": list(METHODS),
    "W3 g32": ALWAYS, "W2 row": ALWAYS, "W2 g32": ALWAYS,
}  # fmt: skip


def windows_of(seed: int) -> np.ndarray:
    """Calibration windows `[WINDOWS, WINDOW]` of the text that the network was trained on."""
    text, _ = split(np.frombuffer(smollm2.text().encode(), np.uint8))
    starts = np.random.default_rng(seed).integers(0, len(text) - WINDOW, WINDOWS)
    return np.stack([text[start : start + WINDOW] for start in starts]).astype(np.int32)


def run(setting: str, method: str, seed: int) -> dict[str, Any]:
    fn, params, _, evaluation = trained.load()
    bits, group = SETTINGS[setting]
    rounding, objective, sequential, power = METHODS[method]
    grid = (Power if power else Uniform)(bits, scale_dtype="float16")
    batches = list(windows_of(seed).reshape(-1, ROWS, WINDOW))
    weights = jq.find_weights(fn, params, batches[0])
    scheme = jq.Scheme(grid, group, rounding)
    plan = jq.plan(weights, {trained.LINEARS: scheme, ".*": jq.keep})
    qparams, report = jq.quantize(
        fn, params, plan, batches if rounding.needs or objective else None,
        objective=objective, sequential=sequential, key=jax.random.key(seed),
    )  # fmt: skip

    def kl(q: Any) -> dict[str, float]:
        found = {"calibration": batches[:4], "evaluation": [evaluation]}
        return {name: jq.evaluate.kl(fn, params, q, data) for name, data in found.items()}

    result = {"kl": kl(qparams), "bits_per_weight": report.bits_per_weight}
    result["traces"] = report.to_json()["traces"]
    if len(result["traces"]) > 1:  # of all stages: what the looks at rounded weights found
        kept = ("looks", "kept_at", "stopped")
        result["traces"] = [{key: trace[key] for key in kept} for trace in result["traces"]]
    tuned, trace = jq.tune_scales(fn, params, qparams, batches, descent=Descent(SCALE_STEPS, 1e-3))
    result["scales"] = {"kl": kl(tuned), "kept_at": trace.kept_at}
    return result


def keep(setting: str, method: str, seed: int, result: dict[str, Any]) -> None:
    """Add a result to those that lie there now: two processes may run, each on its own core."""
    rows = rows_now()
    rows.setdefault(setting, {}).setdefault(method, {})[str(seed)] = result
    order = {name: {m: rows[name][m] for m in METHODS if m in rows[name]} for name in SETTINGS
             if name in rows}  # fmt: skip
    steps = {"windows": WINDOWS, "rows": ROWS, "steps": STEPS, "scales": SCALE_STEPS}
    written = {"machine": machine(), "settings": steps, "rows": order}
    PATH.write_text(json.dumps(written, indent=1) + "\n")


def rows_now() -> dict[str, Any]:
    return json.loads(PATH.read_text())["rows"] if PATH.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Roundings that are learned.")
    parser.add_argument("--only", choices=SETTINGS, action="append", help="settings to run")
    parser.add_argument("--method", choices=METHODS, action="append", help="methods to run")
    parser.add_argument("--seed", type=int, action="append", help="seeds to run (default: 0 1 2)")
    options = parser.parse_args()
    for setting in options.only or SETTINGS:
        for method in options.method or RUNS[setting]:
            for seed in options.seed or range(3):
                if str(seed) in rows_now().get(setting, {}).get(method, {}):
                    continue
                result = run(setting, method, seed)
                keep(setting, method, seed, result)
                said = {k: v for k, v in result.items() if k != "traces"}
                print(setting, method, seed, said, flush=True)


if __name__ == "__main__":
    main()
