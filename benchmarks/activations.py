"""Quantized inputs of SmolLM2-135M: KL on held-out text, and the time of a prefill.

    python -m benchmarks.activations                       # what is not there yet, ~40 minutes
    python -m benchmarks.activations --only "W8A8 token"   # some, whether there or not
    python -m benchmarks.activations --speed               # times only, ~5 minutes
    python -m benchmarks.activations --tiny --no-write     # a try, on a random small network

Model and tokens are those of `quality`, the first 8 held-out windows; GPTQ and static ranges are
one pass over the same calibration windows, of the full model. 8-bit weights have one scale per
output, 4-bit ones groups of 64 or, "row", one. All linears of the blocks are quantized; the tied
embedding only where the name says "and head". Times are those of 4 windows of 512 tokens: float32,
bfloat16 and quantized programs take turns, and the least of each counts. "bfloat16 beside" is a
network whose attention and norms are in bfloat16. "LKD" is ZeroQuant's layer-by-layer distillation:
the weights of each block learn their rounding and ranges (by signs, 64 steps of a window) on the
block's outputs, from the inputs of the full model; ~15 minutes. Results are added to
`results/activations.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from benchmarks.harness import RESULTS, machine
from benchmarks.quality import LINEARS, digest
from jquant.grids import MSE, Float, Uniform
from jquant.learning.objectives import Reconstruction
from jquant.models import smollm2
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.rounding import GPTQ, Descent, SignRound

BYTES = Uniform(8, symmetric=True)
INPUTS = Uniform(8, symmetric=True, convention="S3")
FP8 = Float(4, 3, scale="float32")
TOKEN = jq.Activations(INPUTS)
FOUR = Uniform(4, scale_dtype="float16")
SIGNS = SignRound(descent=Descent(64, 1 / 64, "sign_sgd", "linear", checks=4))
SCHEMES: dict[str, jq.Scheme] = {
    "W8A16": jq.Scheme(BYTES),
    "W8A8 token": jq.Scheme(BYTES, activations=TOKEN),
    "W8A8 token, affine inputs": jq.Scheme(BYTES, activations=jq.Activations(Uniform(8))),
    "W8A8 tensor": jq.Scheme(BYTES, activations=jq.Activations(INPUTS, "tensor")),
    "W8A8 static": jq.Scheme(BYTES, activations=jq.Activations(INPUTS, "static")),
    "W8A8 static, percentile": jq.Scheme(
        BYTES, activations=jq.Activations(INPUTS, "static", jq.Percentile(99.99))
    ),
    "W8A8 static, searched": jq.Scheme(BYTES, activations=jq.Activations(INPUTS, "static", MSE())),
    "W4A16": jq.Scheme(FOUR, 64),
    "W4A8": jq.Scheme(FOUR, 64, activations=TOKEN),
    "W4A16 GPTQ": jq.Scheme(FOUR, 64, GPTQ()),
    "W4A8 GPTQ": jq.Scheme(FOUR, 64, GPTQ(), activations=TOKEN),
    "W4A8 LKD": jq.Scheme(FOUR, 64, SIGNS, activations=TOKEN),
    "W4A8 row": jq.Scheme(FOUR, activations=TOKEN),
    "W4A8 row GPTQ": jq.Scheme(FOUR, None, GPTQ(), activations=TOKEN),
    "FP8": jq.Scheme(FP8, activations=jq.Activations(FP8)),
    "FP8, W only": jq.Scheme(FP8),
    "W4 GPTQ, FP8 inputs": jq.Scheme(FOUR, 64, GPTQ(), activations=jq.Activations(FP8)),
}
# What is timed: scheme, whether the head is quantized too, and the dtype of all else.
TIMED: dict[str, tuple[jq.Scheme | None, bool, str]] = {
    "float32": (None, False, "float32"),
    "bfloat16": (None, False, "bfloat16"),
    "W8A8": (SCHEMES["W8A8 token"], False, "float32"),
    "W8A8 and head": (SCHEMES["W8A8 token"], True, "float32"),
    "W8A8 and head, bfloat16 beside": (SCHEMES["W8A8 token"], True, "bfloat16"),
    "W4A8 row and head": (SCHEMES["W4A8 row"], True, "float32"),
    "W4A8 g64": (SCHEMES["W4A8"], False, "float32"),
    "FP8 and head": (SCHEMES["FP8"], True, "float32"),
    "W8A16": (SCHEMES["W8A16"], False, "float32"),
}
AT_ONCE = 4  # models that are evaluated together, against one run of the full one


def rules(scheme: jq.Scheme, head: bool) -> dict[str, Any]:
    if not head:
        return {LINEARS: scheme, ".*": jq.keep}
    # The head has one scale per row, which is also what a token looks up.
    return {LINEARS: scheme, "embed.*": replace(SCHEMES["W8A8 token"]), ".*": jq.keep}


def measure(fn: Any, params: Any, tokens: Any, rounds: int) -> dict[str, Any]:
    """Seconds of a prefill, programs taking turns."""
    weights = jq.find_weights(fn, params, tokens)
    runs: dict[str, tuple[Any, Any]] = {}
    for name, (scheme, head, dtype) in TIMED.items():
        own = replace(fn, dtype=dtype)
        if scheme is None:
            cast = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)
            runs[name] = jax.jit(own), cast
        else:
            q, _ = jq.quantize(fn, params, jq.plan(weights, rules(scheme, head)))
            runs[name] = jq.apply(own), q
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first compiles
        for name, (run, values) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(values, tokens))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    best = {name: min(found) for name, found in seconds.items()}
    rows = {}
    for name in runs:
        # Turn by turn, so that other load weighs on both.
        ratios = np.array(seconds["float32"]) / np.array(seconds[name])
        rows[name] = {
            "seconds": best[name],
            "times_faster": best["float32"] / best[name],
            "median_times_faster": float(np.median(ratios)),
        }
        print(f"{name}: {best[name]:.3f} s, {rows[name]['times_faster']:.2f} times", flush=True)
    return {"tokens": list(tokens.shape), "rounds": rounds, "rows": rows}


def network(tiny: bool) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    if tiny:
        config = DecoderConfig(vocab=96, width=128, hidden=192, layers=2, heads=4, kv_heads=2)
        windows = np.asarray(jax.random.randint(jax.random.key(1), (24, 64), 0, 96), np.int32)
        fn = Decoder(config)
        return fn, fn.init(jax.random.key(0)), windows[:16], windows[16:]
    fn, params, tokenizer = jq.models.load(smollm2.fetch(progress=print))
    return fn, params, *smollm2.text_windows(tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=SCHEMES, action="append", help="schemes to measure")
    parser.add_argument("--speed", action="store_true", help="times only")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=8, help="windows to measure on")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--tiny", action="store_true", help="a random network")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    path = RESULTS / "activations.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    rows = written.get("rows", {})

    fn, params, calibration, evaluation = network(options.tiny)
    timed = jnp.asarray(evaluation[:4])
    calibration, evaluation = calibration[: options.windows], evaluation[: options.held_out]
    asked = options.only or options.no_write
    wanted = [name for name in options.only or SCHEMES if asked or name not in rows]
    wanted = [] if options.speed else wanted

    def write() -> None:
        written["rows"] = {name: rows[name] for name in SCHEMES if name in rows}
        if not options.no_write:
            path.write_text(json.dumps({"machine": machine(), **written}, indent=1) + "\n")

    written["tokens"] = {"calibration": digest(calibration), "evaluation": digest(evaluation)}
    if options.speed or "speed" not in written or options.no_write:
        written["speed"] = measure(fn, params, timed, options.rounds)
        write()
    if not wanted:
        return
    weights = jq.find_weights(fn, params, calibration[:1])
    linears = list(jq.plan(weights, {LINEARS: SCHEMES["W8A16"], ".*": jq.keep}))
    batches = list(calibration.reshape(-1, 4, calibration.shape[-1]))
    seen = any(SCHEMES[name].needs and SCHEMES[name].rounding != SIGNS for name in wanted)
    evidence = jq.capture(fn, params, batches, paths=linears, spread=True) if seen else None
    for few in (wanted[at : at + AT_ONCE] for at in range(0, len(wanted), AT_ONCE)):
        models: dict[str, Any] = {}
        for name in few:
            scheme = SCHEMES[name]
            plan = jq.plan(weights, rules(scheme, head=False))
            if scheme.rounding == SIGNS:
                models[name], report = jq.quantize(
                    fn, params, plan, list(calibration[:, None]),
                    objective=Reconstruction(inputs="full"), sequential="block",
                )  # fmt: skip
            else:
                data = evidence if scheme.needs else None
                models[name], report = jq.quantize(fn, params, plan, evidence=data)
            rows[name] = {"scheme": repr(scheme), "bits_per_weight": report.bits_per_weight}
        pairs = [evaluation[at : at + 2] for at in range(0, len(evaluation), 2)]
        found = jq.evaluate.compare_all(fn, params, models, pairs)
        for name in few:
            rows[name] |= vars(found[name])
            print(f"{name}: {rows[name]['bits_per_weight']:.3f} bits, {found[name]}", flush=True)
        write()


if __name__ == "__main__":
    main()
