"""Moments weighed by saliency: KL of the small trained network on text it has not seen.

    python -m benchmarks.guided                        # what is not there yet
    python -m benchmarks.guided --only "W2 row, GPTQ"  # one setting, whether there or not

The network of the tests (1 M weights over bytes, `train_bytes`), all linears of its blocks,
searched ranges, float16 scales, its own 64 calibration and 32 held-out windows. Saliency is of the
loss of next bytes in the network as it came: those of the text, or drawn from the network itself.
All jobs go weight by weight. Results are added to `results/guided.json` one by one.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax

import jquant as jq
from benchmarks.harness import RESULTS, machine
from jquant.grids import MSE, Uniform
from jquant.rounding import GPTQ, Guided, Polish, Rounding
from tests import trained

PATH = RESULTS / "guided.json"
# Bits, group, and the rounding.
SETTINGS: dict[str, tuple[int, int | None, Rounding]] = {
    f"W{bits} {'row' if group is None else f'g{group}'}, {name}": (bits, group, rounding)
    for bits, group in ((2, 32), (2, None), (3, 32), (4, 32))
    for name, rounding in {
        "GPTQ": GPTQ(),
        "QEP": GPTQ(correction="qep"),
        "QEP, polished": Polish(GPTQ(correction="qep")),
    }.items()
}
# Groups of output rows, whether labels are drawn from the network itself, and the power that the
# means of squares are raised to.
GUIDES: dict[str, tuple[int, bool, float] | None] = {
    "not guided": None,
    "1 group": (1, False, 1.0),
    "4 groups": (4, False, 1.0),
    "1 group, labels drawn": (1, True, 1.0),
    "4 groups, labels drawn": (4, True, 1.0),
    "4 groups, labels drawn, roots": (4, True, 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=SETTINGS, action="append", help="settings to run")
    parser.add_argument("--guide", choices=GUIDES, action="append", help="and guides")
    options = parser.parse_args()
    fn, params, calibration, evaluation = trained.load()
    batches = list(calibration.reshape(-1, 16, 256))
    weights = jq.find_weights(fn, params, batches[0])
    paths = [path for path in weights if path.startswith("layers/") and path.endswith("/kernel")]
    rows: dict[str, Any] = json.loads(PATH.read_text())["rows"] if PATH.exists() else {}
    saliency: dict[tuple[int, bool, float], jq.Saliency] = {}
    for setting in options.only or SETTINGS:
        bits, group, rounding = SETTINGS[setting]
        for name in options.guide or GUIDES:
            guide = GUIDES[name]
            if name in rows.get(setting, {}) and not options.only:
                continue
            if guide is not None and guide not in saliency:
                start = time.perf_counter()
                groups, drawn, power = guide
                seen = jq.saliency(
                    fn, params, batches, paths=paths, groups=groups,
                    key=jax.random.key(0) if drawn else None,
                )  # fmt: skip
                raised = [
                    {name: tuple(array**power for array in uses) for name, uses in batch.items()}
                    for batch in seen.batches
                ]
                saliency[guide] = jq.Saliency(raised, seen.kinds)
                print(f"saliency: {time.perf_counter() - start:.1f} s", flush=True)
            grid = Uniform(bits, scale_dtype="float16", range=MSE())
            scheme = jq.Scheme(grid, group, rounding if guide is None else Guided(rounding))
            plan = jq.plan(weights, {trained.LINEARS: scheme, ".*": jq.keep})
            own = None if guide is None else saliency[guide]
            q, report = jq.quantize(fn, params, plan, batches, saliency=own)
            rows.setdefault(setting, {})[name] = measured = {
                "kl": float(jq.evaluate.kl(fn, params, q, [evaluation])),
                "kl_calibration": float(jq.evaluate.kl(fn, params, q, [calibration[:32]])),
                "evidence_bytes": report.evidence_bytes,
            }
            print(setting, name, measured, flush=True)
            PATH.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
