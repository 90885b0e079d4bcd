"""Groups along the input axis, the output axis, or whichever AdaDim chooses: SmolLM2-135M, KL.

    python -m benchmarks.adadim                                     # what is not there yet
    python -m benchmarks.adadim --only "W3 g128" --method "GPTQ in"  # some, whether there or not

Model and tokens are those of `quality`, the first 8 held-out windows; the grid is A2 (the paper's:
asymmetric, zero need not lie inside the range), groups of 128, ragged where the axis is 576, 192 or
so. Nearest and GPTQ, the latter in one pass, all on the same second moments of 64 windows. Axes are
chosen on the first 16 of them, once per setting and level: by what a weight does to its attention
or MLP, or by its own product. `dynamic`: along the output axis GPTQ fits each column's groups when
it comes to it, as in the paper's code; elsewhere groups are those of the original weight. Choosing
runs in a process of its own; results are added to `results/adadim.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jquant as jq
from benchmarks.harness import RESULTS, machine
from benchmarks.quality import LINEARS
from jquant.grids import Uniform
from jquant.models import smollm2
from jquant.rounding import GPTQ, Nearest

PATH = RESULTS / "adadim.json"
SETTINGS = {"W3 g128": 3, "W4 g128": 4}
LEVELS = {"AdaDim": "residual", "AdaDim, own product": "weight"}
ROUNDINGS: dict[str, tuple[Any, Any]] = {  # along in, along out
    "nearest": (Nearest(), Nearest()),
    "GPTQ": (GPTQ(), GPTQ()),
    "GPTQ dynamic": (GPTQ(), GPTQ(groups="dynamic")),
}
METHODS = [
    f"{rounding} {axes}"
    for rounding in ROUNDINGS
    for axes in ("in", "out", *LEVELS)
    if not (rounding == "GPTQ dynamic" and axes in ("in", "AdaDim, own product"))
]
WINDOWS, CHOOSING, EVALUATION = 64, 16, 8
AT_ONCE = 6  # models that are evaluated together, against one run of the full one


def data() -> tuple[Any, Any, list[Any], list[Any]]:
    """The model, calibration batches, evaluation batches."""
    fn, params, tokenizer = jq.models.load(smollm2.fetch())
    calibration, evaluation = smollm2.text_windows(tokenizer)
    calibration, evaluation = calibration[:WINDOWS], evaluation[:EVALUATION]
    return fn, params, list(calibration.reshape(-1, 4, 512)), list(evaluation.reshape(-1, 2, 512))


def plan_for(fn: Any, params: Any, batch: Any, setting: str) -> jq.Plan:
    scheme = jq.Scheme(Uniform(SETTINGS[setting], convention="A2"), 128)
    return jq.plan(jq.find_weights(fn, params, batch), {LINEARS: scheme, ".*": jq.keep})


def choose(setting: str, level: Any) -> dict[str, Any]:
    """The weights that choose "out", by kind and by name."""
    fn, params, batches, _ = data()
    plan = plan_for(fn, params, batches[0], setting)
    start = time.perf_counter()
    _, choices = jq.allocation.adadim(fn, params, plan, batches[: CHOOSING // 4], level=level)
    seconds = time.perf_counter() - start
    kinds: dict[str, list[jq.allocation.Choice]] = {}
    for path, choice in choices.items():
        kinds.setdefault(path.split("/")[-2], []).append(choice)
    return {
        "seconds": seconds,
        "kinds": {
            kind: {
                "out": sum(choice.axis == "out" for choice in found),
                "of": len(found),
                "ratio": math.exp(sum(math.log(choice.ratio) for choice in found) / len(found)),
            }
            for kind, found in kinds.items()
        },
        "out": [path for path, choice in choices.items() if choice.axis == "out"],
    }


def plan_of(plan: jq.Plan, method: str, choices: Mapping[str, Any]) -> jq.Plan:
    """The plan with the axes and roundings of a method."""
    rounding = next(name for name in sorted(ROUNDINGS, reverse=True) if method.startswith(name))
    axes = method.removeprefix(rounding + " ")
    chosen = choices[LEVELS[axes]]["out"] if axes in LEVELS else plan if axes == "out" else ()
    schemes = {}
    for path, scheme in plan.items():
        axis = "out" if path in chosen else "in"
        schemes[path] = dataclasses.replace(
            scheme, groups=jq.Groups(axis, 128), rounding=ROUNDINGS[rounding][axis == "out"]
        )
    return jq.Plan(schemes, plan.weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SETTINGS, action="append", help="settings to run")
    parser.add_argument("--method", choices=METHODS, action="append", help="methods to run")
    parser.add_argument("--choose", choices=LEVELS.values(), action="append", help="levels to run")
    parser.add_argument("--here", action="store_true", help="run in this process and print JSON")
    options = parser.parse_args()
    found = json.loads(PATH.read_text()) if PATH.exists() else {"choices": {}, "rows": {}}
    settings = options.only or list(SETTINGS)
    if options.here:
        print(json.dumps(choose(settings[0], options.choose[0])))
        return
    asked = bool(options.choose or options.method)

    def keep(part: str, setting: str, name: str, result: dict[str, Any]) -> None:
        found[part][setting][name] = result
        print(setting, name, {k: v for k, v in result.items() if k != "out"}, flush=True)
        PATH.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")

    for setting in settings:
        done = found["choices"].setdefault(setting, {})
        for level in options.choose or ([] if asked else LEVELS.values()):
            if level in done and not asked:
                continue
            command = [sys.executable, "-m", "benchmarks.adadim", "--here"]
            command += ["--only", setting, "--choose", level]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            keep("choices", setting, level, json.loads(said.stdout.splitlines()[-1]))

    methods = options.method or ([] if asked else METHODS)
    wanted = {
        setting: [m for m in methods if asked or m not in found["rows"].get(setting, {})]
        for setting in settings
    }
    if not any(wanted.values()):
        return
    fn, params, batches, evaluation = data()
    plans = {setting: plan_for(fn, params, batches[0], setting) for setting in settings}
    evidence = jq.capture(fn, params, batches, paths=list(plans[settings[0]]))
    for setting, left in wanted.items():
        found["rows"].setdefault(setting, {})
        for few in (left[at : at + AT_ONCE] for at in range(0, len(left), AT_ONCE)):
            models, said = {}, {}
            for method in few:
                plan = plan_of(plans[setting], method, found["choices"][setting])
                known = None if method.startswith("nearest") else evidence
                models[method], report = jq.quantize(fn, params, plan, evidence=known)
                said[method] = {
                    "seconds": report.seconds["rounding"],
                    "bits_per_weight": report.bits_per_weight,
                    "error_vs_nearest": report.ratio,
                }
            compared = jq.evaluate.compare_all(fn, params, models, evaluation)
            for method in few:
                keep("rows", setting, method, vars(compared[method]) | said[method])


if __name__ == "__main__":
    main()
