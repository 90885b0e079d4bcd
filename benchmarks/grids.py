"""Grids at equal bits per weight: SmolLM2-135M, KL on held-out text, nearest and GPTQ.

    python -m benchmarks.grids                     # what is not there yet, ~20 minutes
    python -m benchmarks.grids --only NF --bits 4  # some, whether there or not

Model and tokens are those of `quality`, the first 8 held-out windows; GPTQ is one pass, all grids
on the same second moments, in activation order with static groups. About 4.25 and 3.25 bits with
all parameters counted: scales are float16 and groups of 64, unless the format fixes them or learns
a table per row. Ranges are the weights' own, but for HQQ. Results are added to
`results/grids.json`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import jquant as jq
from benchmarks.harness import RESULTS, machine
from benchmarks.quality import LINEARS, digest
from jquant.grids import HQQ, MX, NF4, NV, Codebook, Float, Grid, KMeans, Power, Uniform
from jquant.models import smollm2
from jquant.rounding import GPTQ, Nearest

HALF = {"scale_dtype": "float16"}
# Normal quantiles for 8 codes, made as NF4 is: three below zero, four above.
NF3 = Codebook((-1.0, -0.478629, -0.217142, 0.0, 0.16093, 0.337915, 0.562617, 1.0), **HALF)

# Name → for 4 and 3 bits: grid and group size, None for the whole row or what the format fixes.
GRIDS: dict[str, dict[int, tuple[Grid, int | None]]] = {
    "Uniform, symmetric": {b: (Uniform(b, symmetric=True, **HALF), 64) for b in (4, 3)},
    "Uniform": {b: (Uniform(b, **HALF), 64) for b in (4, 3)},
    "Uniform, HQQ": {b: (Uniform(b, range=HQQ(), **HALF), 64) for b in (4, 3)},
    "Power": {b: (Power(b, **HALF), 64) for b in (4, 3)},
    "NF": {4: (replace(NF4, **HALF), 64), 3: (NF3, 64)},
    "k-means": {b: (KMeans(b, table_dtype="float16"), None) for b in (4, 3)},
    "Float": {4: (Float(2, 1, scale="float16"), 64), 3: (Float(2, 0, scale="float16"), 64)},
    "MX": {4: (MX(), None), 3: (Float(2, 0, scale="e8m0", group=32), None)},
    "NV": {4: (NV(), None), 3: (Float(2, 0, scale="e4m3", group=16), None)},
}
AT_ONCE = 6  # models that are evaluated together, against one run of the full one
METHODS = {"nearest": Nearest(), "GPTQ": GPTQ()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=GRIDS, action="append", help="grids to run")
    parser.add_argument("--bits", type=int, choices=(4, 3), action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    options = parser.parse_args()
    path = RESULTS / "grids.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}

    fn, params, tokenizer = jq.models.load(smollm2.fetch(progress=print))
    calibration, evaluation = smollm2.text_windows(tokenizer)
    calibration, evaluation = calibration[:64], evaluation[:8]
    weights = jq.find_weights(fn, params, calibration[:1])
    linears = list(jq.plan(weights, {LINEARS: jq.presets.int4_gptq(), ".*": jq.keep}))
    evidence = jq.capture(fn, params, calibration.reshape(-1, 4, 512), paths=linears)

    asked = options.only or options.bits or options.method
    wanted = [
        (f"{bits} bits", name, method, jq.Scheme(*GRIDS[name][bits], METHODS[method]))
        for bits in options.bits or (4, 3)
        for name in options.only or GRIDS
        for method in options.method or METHODS
    ]
    wanted = [w for w in wanted if asked or w[2] not in rows.get(w[0], {}).get(w[1], {})]
    tokens = {"calibration": digest(calibration), "evaluation": digest(evaluation)}
    for few in (wanted[at : at + AT_ONCE] for at in range(0, len(wanted), AT_ONCE)):
        models: dict[str, Any] = {}
        for bits, name, method, scheme in few:
            plan = jq.plan(weights, {LINEARS: scheme, ".*": jq.keep})
            data = None if method == "nearest" else evidence
            label = f"{bits}, {name}, {method}"
            models[label], report = jq.quantize(fn, params, plan, evidence=data)
            rows.setdefault(bits, {}).setdefault(name, {})[method] = {
                "scheme": repr(scheme),
                "bits_per_weight": report.bits_per_weight,
                "seconds": report.seconds["rounding"],
            }
        found = jq.evaluate.compare_all(fn, params, models, list(evaluation.reshape(-1, 2, 512)))
        for bits, name, method, _ in few:
            result = found[f"{bits}, {name}, {method}"]
            row = rows[bits][name][method]
            row |= vars(result)
            said = f"{row['bits_per_weight']:.3f} bits, {result}"
            print(f"{bits}, {name}, {method}: {said}", flush=True)
        written = {"machine": machine(), "tokens": tokens, "rows": rows}
        path.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
