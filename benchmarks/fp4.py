"""FP4 with better scales: squared errors of random weights, and KL of the small trained network.

    python -m benchmarks.fp4                     # what is not there yet: half an hour
    python -m benchmarks.fp4 --seconds 500       # as much of it as that takes

Errors: a million weights, normal and of Student's t with 5 degrees of freedom, rounded to nearest;
relative to their sum of squares. KL: the network of the tests (1 M weights over bytes,
`train_bytes`), all linears of its blocks, its own 64 calibration and 32 held-out windows. Nearest
and GPTQ read evidence of one pass, QEP goes block by block; each without and with a Hadamard
rotation of the inputs. Results are added to `results/fp4.json` one by one.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp

import jquant as jq
from benchmarks.harness import RESULTS, machine
from jquant.grids import MSE, MX, NV, Float
from jquant.grids.grouped import Grouped
from jquant.rounding import GPTQ, Nearest
from tests import trained

PATH = RESULTS / "fp4.json"
ONE = MSE(1, norm=2.0)  # no other range than the rule's, so that the mantissa alone is searched
SQUARED = MSE(norm=2.0)
OAS: dict[str, Any] = {"scale_rule": "oas"}
GRIDS: dict[str, Float] = {
    "NV": NV(),
    "NV, four over six": NV(four_six=True),
    "NV, searched": NV(range=SQUARED),
    "NV, four over six, searched": NV(four_six=True, range=SQUARED),
    "MX": MX(),
    "MX, OAS": MX(**OAS),
    "MX, MBS": MX(macro=4),
    "MX, MBS of 16": MX(macro=4, range=ONE),
    "MX, OAS, MBS": MX(**OAS, macro=4),
    "MX, OAS, MBS of 16": MX(**OAS, macro=4, range=ONE),
    "MX, searched": MX(scale_rule="ceil", range=SQUARED),
    "MX, MBS, searched": MX(scale_rule="ceil", macro=4, range=SQUARED),
}
ROUNDINGS = {"nearest": Nearest(), "GPTQ": GPTQ(), "QEP": GPTQ(correction="qep")}
TRANSFORMS: dict[str, tuple[Any, ...]] = {
    "": (),
    "Hadamard": (jq.Hadamard(),),
    "Hadamard 32": (jq.Hadamard(32),),  # as MR-GPTQ has it for MX: a rotation of each group
}
MEASURED = [name for name in GRIDS if name not in ("MX, MBS", "MX, OAS, MBS", "MX, searched")]
FEW = ["NV", "NV, four over six, searched", "MX", "MX, OAS", "MX, OAS, MBS of 16"]
OF_MX = FEW[2:]
SETTINGS: dict[tuple[str, str], list[str]] = {
    ("nearest", ""): MEASURED,
    ("GPTQ", ""): MEASURED,
    ("GPTQ", "Hadamard"): FEW,
    ("GPTQ", "Hadamard 32"): OF_MX,
    ("QEP", ""): FEW,
    ("QEP", "Hadamard"): FEW,
    ("QEP", "Hadamard 32"): OF_MX,
    ("nearest", "Hadamard"): FEW,
}


def errors() -> dict[str, dict[str, float]]:
    """Squared errors by grid and distribution, relative."""
    shape = (1024, 1024)
    drawn = {
        "normal": jax.random.normal(jax.random.key(0), shape),
        "Student's t": jax.random.t(jax.random.key(1), 5.0, shape),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, grid in GRIDS.items():
        groups = jq.Scheme(grid).groups
        for kind, w in drawn.items():
            result = Nearest()(w, grid, groups)
            back = Grouped(grid, groups).decode(result.codes, result.params)
            error = float(jnp.sum((w - back) ** 2) / jnp.sum(w**2))
            rows.setdefault(name, {})[kind] = error
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    until = time.monotonic() + parser.parse_args().seconds
    result: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {}
    if "errors" not in result:
        result["errors"] = errors()
    fn, params, calibration, evaluation = trained.load()
    batches = list(calibration.reshape(-1, 16, 256))
    weights = jq.find_weights(fn, params, batches[0])
    first = jq.Scheme(NV(), None, GPTQ())
    evidence = jq.capture(
        fn, params, batches, paths=list(jq.plan(weights, {trained.LINEARS: first, ".*": jq.keep}))
    )
    rows: dict[str, Any] = result.setdefault("kl", {})
    for (rounding, turned), names in SETTINGS.items():
        for name in names:
            key = ", ".join(filter(None, (rounding, turned)))
            if name in rows.get(key, {}) or time.monotonic() > until:
                continue
            way, turn = ROUNDINGS[rounding], TRANSFORMS[turned]
            scheme = jq.Scheme(GRIDS[name], None, way, transforms=turn)
            plan = jq.plan(weights, {trained.LINEARS: scheme, ".*": jq.keep})
            if rounding == "QEP":
                q, report = jq.quantize(fn, params, plan, batches, sequential="block")
            else:
                q, report = jq.quantize(fn, params, plan, evidence=evidence)
            # Of plain weights, so that one program measures them all.
            kl = float(jq.evaluate.kl(fn, params, jq.dequantize(q), [evaluation]))
            rows.setdefault(key, {})[name] = kl
            result.setdefault("bits", {})[name] = report.bits_per_weight
            result["machine"] = machine()
            print(key, name, kl, flush=True)
            PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
