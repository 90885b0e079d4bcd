"""Searched ranges and zero points: KL of the small trained network on text it has not seen.

    python -m benchmarks.ranges                        # what is not there yet: half an hour
    python -m benchmarks.ranges --only "W2 row, GPTQ"  # one setting, whether there or not

The network of the tests (1 M weights over bytes, `train_bytes`), all linears of its blocks, float16
scales, its own 64 calibration and 32 held-out windows. GPTQ reads evidence of one pass, QEP goes
block by block. Results are added to `results/ranges.json` one by one.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jquant as jq
from benchmarks.harness import RESULTS, machine
from jquant.grids import MSE, Joint, MinMax, Uniform
from jquant.rounding import GPTQ
from tests import trained

PATH = RESULTS / "ranges.json"
ODD: dict[str, Any] = {"symmetric": True, "convention": "S5"}
SIGNED: dict[str, Any] = {"symmetric": True, "convention": "S4"}
RANGES: dict[str, dict[str, Any]] = {
    "MSE()": {"range": MSE()},
    "MSE(norm=3)": {"range": MSE(norm=3.0)},
    "Joint()": {"range": Joint()},
    "Joint(2.5)": {"range": Joint(2.5)},
    "Joint(3)": {"range": Joint(3.0)},
    "Joint(4)": {"range": Joint(4.0)},
    "A4, Joint()": {"range": Joint(), "convention": "A4"},
    "A4, Joint(2.5)": {"range": Joint(2.5), "convention": "A4"},
    "A4, Joint(3)": {"range": Joint(3.0), "convention": "A4"},
    "S4, MinMax()": {"range": MinMax(), **SIGNED},
    "S4, Joint(3)": {"range": Joint(3.0), **SIGNED},
    "S5, Joint(3)": {"range": Joint(3.0), **ODD},
}
BEST = ["MSE()", "Joint(3)", "A4, Joint(3)", "S5, Joint(3)"]
# Bits, group, whether with QEP, and the ranges.
SETTINGS: dict[str, tuple[int, int | None, bool, list[str]]] = {
    "W2 g32, GPTQ": (2, 32, False, list(RANGES)),
    "W2 row, GPTQ": (2, None, False, [*BEST, "A4, Joint()"]),
    "W2 g32, QEP": (2, 32, True, BEST),
    "W3 g32, GPTQ": (3, 32, False, BEST),
    "W3 row, GPTQ": (3, None, False, BEST),
    "W4 g32, GPTQ": (4, 32, False, BEST[:3]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SETTINGS, action="append", help="settings to run")
    options = parser.parse_args()
    fn, params, calibration, evaluation = trained.load()
    batches = list(calibration.reshape(-1, 16, 256))
    weights = jq.find_weights(fn, params, batches[0])
    first = jq.Scheme(Uniform(4), 32, GPTQ())
    evidence = jq.capture(
        fn, params, batches, paths=list(jq.plan(weights, {trained.LINEARS: first, ".*": jq.keep}))
    )
    rows: dict[str, Any] = json.loads(PATH.read_text())["rows"] if PATH.exists() else {}
    for setting in options.only or SETTINGS:
        bits, group, qep, names = SETTINGS[setting]
        for name in names:
            if name in rows.get(setting, {}) and not options.only:
                continue
            grid = Uniform(bits, scale_dtype="float16", **RANGES[name])
            scheme = jq.Scheme(grid, group, GPTQ(correction="qep" if qep else None))
            plan = jq.plan(weights, {trained.LINEARS: scheme, ".*": jq.keep})
            if qep:
                q, report = jq.quantize(fn, params, plan, batches, sequential="block")
            else:
                q, report = jq.quantize(fn, params, plan, evidence=evidence)
            kl = jq.evaluate.kl(fn, params, q, [evaluation])
            found = {"kl": float(kl), "bits_per_weight": report.bits_per_weight}
            rows.setdefault(setting, {})[name] = found
            print(setting, name, found, flush=True)
            PATH.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
