"""What quantizing costs SmolLM2-135M: nearest against GPTQ, held-out text, all block linears.

    python -m benchmarks.quality                  # everything, about half an hour on two cores
    python -m benchmarks.quality --only "W4 g64"  # one setting

Calibration: the first 64 windows of 512 tokens; evaluation: the first 16 held-out windows. The grid
is A1 (asymmetric, range extended to zero, integer zero point) with float32 scales, as in the other
tools' runs on the same tokens, listed in `others.py`. One pass: all second moments are read
from the full model. `searched range` is GPTQ's own option: per group the range that minimises
`Σ H_jj |error|^2.4`, where the others take minimum and maximum. Writes `results/quality.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from typing import Any

import jquant as jq
from benchmarks.harness import RESULTS, write
from benchmarks.others import OTHERS
from jquant.grids import MSE, MinMax, Uniform
from jquant.models import smollm2
from jquant.rounding import GPTQ, Nearest

SETTINGS: dict[str, tuple[int, int | None]] = {
    "W4 g64": (4, 64), "W3 g64": (3, 64), "W3 channel": (3, None), "W2 g64": (2, 64),
}  # fmt: skip
METHODS: dict[str, tuple[MinMax | MSE, Nearest | GPTQ]] = {
    "Nearest": (MinMax(), Nearest()),
    "GPTQ": (MinMax(), GPTQ()),
    "GPTQ, searched range": (MSE(), GPTQ()),
}
LINEARS = r"layers/.*/kernel"


def digest(windows: Any) -> str:
    return hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SETTINGS, action="append", help="settings to run")
    parser.add_argument("--method", choices=METHODS, action="append", help="methods to run")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()

    fn, params, tokenizer = jq.models.load(smollm2.fetch(progress=print))
    calibration, evaluation = smollm2.text_windows(tokenizer)
    calibration, evaluation = calibration[: options.windows], evaluation[:16]
    print("tokens", digest(calibration), digest(evaluation))
    weights = jq.find_weights(fn, params, calibration[:1])

    start = time.perf_counter()
    plan = jq.plan(weights, {LINEARS: jq.Scheme(Uniform(4), 64, GPTQ()), ".*": jq.keep})
    evidence = jq.capture(fn, params, calibration.reshape(-1, 4, 512), paths=list(plan))
    captured = time.perf_counter() - start
    print(f"captured {len(plan)} weights in {captured:.0f} s")

    rows: dict[str, Any] = {}
    for name in options.only or SETTINGS:
        bits, group = SETTINGS[name]
        rows[name] = {"elsewhere": OTHERS[name]}
        for label in options.method or METHODS:
            search, rounding = METHODS[label]
            scheme = jq.Scheme(Uniform(bits, range=search), group, rounding)
            start = time.perf_counter()
            q, report = jq.quantize(
                fn, params, jq.plan(weights, {LINEARS: scheme, ".*": jq.keep}), evidence=evidence
            )
            seconds = time.perf_counter() - start
            found = jq.evaluate.compare(fn, params, q, evaluation.reshape(-1, 2, 512))
            rows[name][label] = vars(found) | {
                "seconds": seconds,
                "bits_per_weight": report.bits_per_weight,
                "error_vs_nearest": report.ratio,
                "peak_bytes": report.peak_bytes,
            }
            print(f"{name} {label}: {found}, {seconds:.0f} s, {report.bits_per_weight:.3f} bits")
    if options.no_write:
        return
    tokens = {"calibration": digest(calibration), "evaluation": digest(evaluation)}
    path = RESULTS / "quality.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if {key: old.get(key) for key in tokens} == tokens:  # a part was run: keep the rest
        rows = {name: old["rows"].get(name, {}) | rows.get(name, {}) for name in SETTINGS}
    write("quality", **tokens, windows=options.windows, capture_seconds=captured,
          evidence_bytes=report.evidence_bytes, rows=rows)  # fmt: skip


if __name__ == "__main__":
    main()
