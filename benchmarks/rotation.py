"""Rotated inputs, on the small trained network: KL on text it has not seen.

    python -m benchmarks.rotation

GPTQ stage by stage with QEP's correction, ranges searched, all linears of the blocks; without and
with `Hadamard()`, for grids and groups, and with quantized inputs. Calibration: 64 windows of 256
bytes of the text it was trained on; evaluation: its 32 held-out windows. Writes
`results/rotation.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jquant as jq
from benchmarks.harness import write
from jquant.grids import MSE, MX, NV, Uniform
from jquant.rounding import GPTQ

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import trained  # noqa: E402

QEP = GPTQ(correction="qep")
TRANSFORMS: dict[str, tuple[Any, ...]] = {
    "as it is": (), "Hadamard": (jq.Hadamard(),), "Hadamard, blocks of 32": (jq.Hadamard(32),),
}  # fmt: skip


def schemes() -> dict[str, tuple[Any, int | None, Any]]:
    """Grid, groups and inputs of each row."""
    rows: dict[str, tuple[Any, int | None, Any]] = {}
    for bits in (4, 3, 2):
        rows[f"W{bits}, a scale per row"] = Uniform(bits, range=MSE()), None, None
        rows[f"W{bits}, groups of 32"] = Uniform(bits, range=MSE()), 32, None
    rows["MXFP4"], rows["NVFP4"] = (MX(), None, None), (NV(), None, None)
    for bits in (8, 4):
        inputs = jq.Activations(Uniform(bits))
        rows[f"W4, groups of 32, inputs of {bits} bits"] = Uniform(4, range=MSE()), 32, inputs
    return rows


def main() -> None:
    fn, params, calibration, evaluation = trained.load()
    batches = [calibration[i : i + 16] for i in range(0, 64, 16)]
    weights = jq.find_weights(fn, params, batches[0])
    rows: dict[str, dict[str, float]] = {}
    for name, (grid, groups, inputs) in schemes().items():
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
