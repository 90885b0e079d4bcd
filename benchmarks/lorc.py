"""Low-rank terms of rank 8 against smaller groups: SmolLM2-135M, KL on held-out text.

    python -m benchmarks.lorc                                   # what is not there yet, ~40 minutes
    python -m benchmarks.lorc --only "W3 row" --method GPTQ     # some, whether there or not
    python -m benchmarks.lorc --windows 4 --held-out 1 --no-write   # a try

Model and tokens are those of `quality`, the first 8 held-out windows; GPTQ and the metric of the
inputs are one pass, all methods on the same second moments. Grids are A1 with float16 scales and
the weights' own ranges; factors have 8 bits. "smaller groups" is the alternative for the same
bytes: no term, and groups of the size that takes about the bits of the factors (counted in the
results). Results are added to `results/lorc.json`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jquant as jq
from benchmarks.harness import RESULTS, machine
from benchmarks.quality import LINEARS, digest
from jquant.grids import Uniform
from jquant.models import smollm2
from jquant.rounding import GPTQ, Nearest

RANK = 8
# Bits, group size, and the group size that stores as much more as the factors do.
SETTINGS: dict[str, tuple[int, int | None, int]] = {
    "W4 row": (4, None, 96),
    "W3 row": (3, None, 96),
    "W2 row": (2, None, 96),
    "W3 g64": (3, 64, 40),
}
BYTES = Uniform(8, symmetric=True)
PLAIN, WEIGHED = jq.LoRC(RANK, BYTES), jq.LoRC(RANK, BYTES, "hessian")
# Rounding, term, and whether groups are the smaller ones.
METHODS: dict[str, tuple[Nearest | GPTQ, jq.LoRC | None, bool]] = {
    "nearest": (Nearest(), None, False),
    "nearest, LoRC": (Nearest(), PLAIN, False),
    "nearest, QERA": (Nearest(), WEIGHED, False),
    "nearest, smaller groups": (Nearest(), None, True),
    "GPTQ": (GPTQ(), None, False),
    "GPTQ, LoRC": (GPTQ(), PLAIN, False),
    "GPTQ, QERA": (GPTQ(), WEIGHED, False),
    "GPTQ, smaller groups": (GPTQ(), None, True),
}
AT_ONCE = 4  # models that are evaluated together, against one run of the full one


def scheme_of(setting: str, method: str) -> jq.Scheme:
    bits, group, smaller = SETTINGS[setting]
    rounding, term, small = METHODS[method]
    grid = Uniform(bits, scale_dtype="float16")
    return jq.Scheme(grid, smaller if small else group, rounding, term)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SETTINGS, action="append", help="settings to run")
    parser.add_argument("--method", choices=METHODS, action="append", help="methods to run")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=8, help="windows to measure on")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    path = RESULTS / "lorc.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}

    asked = options.only or options.method or options.no_write
    wanted = [
        (setting, method)
        for setting in options.only or SETTINGS
        for method in options.method or METHODS
        if asked or method not in rows.get(setting, {})
    ]
    if not wanted:
        return
    fn, params, tokenizer = jq.models.load(smollm2.fetch(progress=print))
    calibration, evaluation = smollm2.text_windows(tokenizer)
    calibration, evaluation = calibration[: options.windows], evaluation[: options.held_out]
    weights = jq.find_weights(fn, params, calibration[:1])
    linears = list(jq.plan(weights, {LINEARS: jq.presets.int4_gptq(), ".*": jq.keep}))
    evidence = jq.capture(fn, params, list(calibration.reshape(-1, 4, 512)), paths=linears)

    tokens = {"calibration": digest(calibration), "evaluation": digest(evaluation)}
    for few in (wanted[at : at + AT_ONCE] for at in range(0, len(wanted), AT_ONCE)):
        models: dict[str, Any] = {}
        for setting, method in few:
            scheme = scheme_of(setting, method)
            plan = jq.plan(weights, {LINEARS: scheme, ".*": jq.keep})
            data = evidence if scheme.needs else None
            q, report = jq.quantize(fn, params, plan, evidence=data)
            models[f"{setting}, {method}"] = q
            rows.setdefault(setting, {})[method] = {
                "scheme": repr(scheme),
                "bits_per_weight": report.bits_per_weight,
                "error_vs_nearest": report.ratio,
                "seconds": report.seconds["rounding"],
            }
        batches = [evaluation[at : at + 2] for at in range(0, len(evaluation), 2)]
        found = jq.evaluate.compare_all(fn, params, models, batches)
        for setting, method in few:
            result, row = found[f"{setting}, {method}"], rows[setting][method]
            row |= vars(result)
            said = f"{row['bits_per_weight']:.3f} bits, {row['seconds']:.0f} s, {result}"
            print(f"{setting}, {method}: {said}", flush=True)
        if not options.no_write:
            written = {"machine": machine(), "tokens": tokens, "rows": rows}
            path.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
