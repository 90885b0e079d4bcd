"""Rotated inputs, on the small trained network: KL on text it has not seen.

    python -m benchmarks.rotation

GPTQ stage by stage with QEP's correction, ranges searched, all linears of the blocks; without and
with `Hadamard()`. Calibration: 64 windows of 256 bytes of the text it was trained on; evaluation:
its 32 held-out windows. Writes `results/rotation.json`.
"""

from __future__ import annotations

from typing import Any

import jquant as jq
from benchmarks.harness import write
from jquant.grids import MSE, MX, Uniform
from jquant.rounding import GPTQ
from tests import trained

QEP = GPTQ(correction="qep")
TRANSFORMS: dict[str, tuple[Any, ...]] = {"as it is": (), "Hadamard": (jq.Hadamard(),)}
ROWS: dict[str, tuple[Any, int | None, Any]] = {
    **{f"W{bits}, a scale per row": (Uniform(bits, range=MSE()), None, None) for bits in (4, 3, 2)},
    "W2, groups of 32": (Uniform(2, range=MSE()), 32, None),
    "MXFP4": (MX(), None, None),
    "W4, groups of 32, inputs of 4 bits": (
        Uniform(4, range=MSE()), 32, jq.Activations(Uniform(4)),
    ),
}  # fmt: skip


def main() -> None:
    fn, params, calibration, evaluation = trained.load()
    batches = [calibration[i : i + 16] for i in range(0, 64, 16)]
    weights = jq.find_weights(fn, params, batches[0])
    rows: dict[str, dict[str, float]] = {}
    for name, (grid, groups, inputs) in ROWS.items():
        for label, transforms in TRANSFORMS.items():
            scheme = jq.Scheme(grid, groups, QEP, activations=inputs, transforms=transforms)
            plan = jq.plan(weights, {trained.LINEARS: scheme, ".*": jq.keep})
            qparams, _ = jq.quantize(fn, params, plan, batches)
            measured = jq.evaluate.compare(fn, params, qparams, evaluation.reshape(-1, 8, 256))
            rows.setdefault(name, {})[label] = measured.kl
            print(f"{name}, {label}: {measured.kl:.4f}", flush=True)
    write("rotation", rows=rows)


if __name__ == "__main__":
    main()
