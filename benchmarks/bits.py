"""Who gets the bits: a uniform width against every score, SmolLM2-135M, KL on held-out text.

    python -m benchmarks.bits                                  # what is not there yet
    python -m benchmarks.bits --score fisher --score cmpq      # measure some, whether there or not
    python -m benchmarks.bits --only 3.5 --method "GPTQ"       # some rows, whether there or not
    python -m benchmarks.bits --plot                           # draw docs/images/bits-by-depth.svg

Mean widths of 4.5, 4.0, 3.5 and 3.0 bits of the block linears; groups of 64 with float16 scales and
zero points of the code's width, so that a mean width m takes m·65/64 + 1/4 stored bits per weight.
Every row spends at most that, to the byte. "uniform" is one width, where m is fractional two: the
wider for the first weights in the order of depth ("ends": for the first and last in turn, as the
paper would have it). The others are `allocation.allocate` with the scores named, by
its exact dynamic program, or by the paper's three clusters. Candidates are 2 to 8 bits.

Scores are measured on drafts, nearest rounding in the weights' own ranges. What is quantized in the
end: "GPTQ" with searched ranges, one pass on the second moments of 64 windows, and "nearest". As
nothing depends on the other weights there, each weight is rounded once per width, and a row is put
together of their values: one compiled program runs all rows. Model and tokens are those of
`quality`, the first 8 held-out windows.

Estimates on two idle cores: scores 10 minutes together, of which exact KL takes half (each weight
alone at 2, 3 and 4 bits on 256 tokens, wider ones scaled), GPTQ of seven widths 12 minutes, nearest
1, a row 8 seconds. Scores, choices and rows are added to `results/bits.json`,
the scores themselves to `.cache/bits`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from benchmarks.harness import RESULTS, machine
from benchmarks.pictures import save
from benchmarks.quality import LINEARS, digest
from jquant import allocation
from jquant.allocation import Allocation, Candidates, Sensitivity
from jquant.grids import MSE, Uniform
from jquant.models import smollm2
from jquant.rounding import GPTQ

PATH = RESULTS / "bits.json"
SCORES = Path(__file__).parent.parent / ".cache" / "bits"
MEANS = ("4.5", "4.0", "3.5", "3.0")
WIDTHS = tuple(range(2, 9))
DRAFT = jq.Scheme(Uniform(4, scale_dtype="float16"), 64)
FINAL: dict[str, Callable[[jq.Scheme], jq.Scheme]] = {
    "GPTQ": lambda s: replace(s, grid=replace(s.grid, range=MSE()), rounding=GPTQ()),
    "nearest": lambda s: s,
}
WINDOWS, EVALUATION = 64, 8
AT_ONCE = 6  # models that are evaluated together, against one run of the full one
KEY = jax.random.key(0)


class Model:
    """SmolLM2, its windows, and the candidates for its weights."""

    def __init__(self, windows: int, held_out: int):
        self.fn, self.params, tokenizer = jq.models.load(smollm2.fetch())
        calibration, evaluation = smollm2.text_windows(tokenizer)
        self.windows, self.evaluation = calibration[:windows], evaluation[:held_out]
        weights = jq.find_weights(self.fn, self.params, self.windows[:1])
        self.plan = jq.plan(weights, {LINEARS: DRAFT, ".*": jq.keep})
        self.drafts = allocation.candidates(self.plan, WIDTHS)

    def text(self, windows: int, length: int = 512, rows: int = 1) -> list[np.ndarray]:
        """The first windows of calibration, cut shorter, in batches."""
        short = self.windows[:windows].reshape(-1, length)
        return [short[at : at + rows] for at in range(0, len(short), rows)]


# Score → how it is measured. Seconds of two cores, estimated from a few trials on one: a forward of
# 256 tokens 0.5, of 512 0.8, a backward of 512 4; compiling 5 to 25, all errors of all weights 30.
MEASURES: dict[str, Callable[[Model], Sensitivity]] = {
    # one forward of 32 windows as 128 short ones, by stages: 40
    "CMPQ": lambda m: allocation.cmpq(m.fn, m.params, m.drafts, m.text(32, 128, 16)),
    # 30 blocks, 512 tokens: 40
    "PMPQ": lambda m: allocation.pmpq(m.fn, m.params, m.drafts, m.text(1)),
    # 210 weights, 128 tokens: 80, most of it sorting
    "PMPQ by weight": lambda m: allocation.pmpq(
        m.fn, m.params, m.drafts, m.text(1, 128)[:1], unit="weight"
    ),
    # 30 blocks, 512 tokens: 30
    "TDMPQ noise": lambda m: allocation.tdmpq(m.fn, m.params, m.drafts, m.text(1), key=KEY),
    # 2 windows, and all errors for each: 80
    "TDMPQ Taylor": lambda m: allocation.taylor(m.fn, m.params, m.drafts, m.text(2)),
    # 8 windows: 80
    "Fisher": lambda m: allocation.fisher(m.fn, m.params, m.drafts, m.text(8), key=KEY),
    # 4 windows: 70
    "KL gradient": lambda m: allocation.kl_gradient(m.fn, m.params, m.drafts, m.text(4), low=1),
    # 210 weights, 3 widths, 256 tokens: 320
    "exact KL": lambda m: allocation.exact_kl(
        m.fn, m.params, m.drafts, m.text(1, 256)[:1], only=(0, 1, 2)
    ),
}
# Row → score and method; without a score the widths go by depth.
ROWS: dict[str, tuple[str, Any]] = {
    "uniform": ("", "auto"),
    "ends": ("", "auto"),
    **{name: (name, "auto") for name in MEASURES},
    **{
        f"{name}, clusters": (name, "clusters")
        for name in ("CMPQ", "PMPQ", "TDMPQ noise", "TDMPQ Taylor")
    },
}


def score_of(model: Model, name: str, again: bool) -> tuple[Sensitivity, float]:
    """A score and the seconds it took, measured or read."""
    path = SCORES / f"{name.replace(' ', '-')}.json"
    if path.exists() and not again:
        said = json.loads(path.read_text())
        if said["tokens"] == digest(model.windows):
            return Sensitivity.from_json(said["score"]), said["seconds"]
    start = time.perf_counter()
    found = MEASURES[name](model)
    seconds = time.perf_counter() - start
    SCORES.mkdir(parents=True, exist_ok=True)
    said = {"tokens": digest(model.windows), "seconds": seconds, "score": found.to_json()}
    path.write_text(json.dumps(said))
    print(f"{name}: {seconds:.0f} s", flush=True)
    return found, seconds


def by_depth(drafts: Candidates, mean: float, row: str) -> dict[str, int]:
    """Widths of a mean width by the order of depth alone, as many bytes as it pays for."""
    paths, low = list(drafts), int(mean)
    at = WIDTHS.index(low)
    budget = budget_of(drafts, mean)
    chosen = dict.fromkeys(paths, at)
    left = budget - sum(drafts.bytes(path)[at] for path in paths)
    order = paths
    if row == "ends":  # the first, the last, the second, the last but one, …
        order = [p for pair in zip(paths, reversed(paths), strict=True) for p in pair]
        order = list(dict.fromkeys(order))
    for path in order:
        sizes = drafts.bytes(path)
        if at + 1 < len(sizes) and sizes[at + 1] - sizes[at] <= left:
            left -= sizes[at + 1] - sizes[at]
            chosen[path] = at + 1
    return chosen


def budget_of(drafts: Candidates, mean: float) -> int:
    """Bytes of a mean width: of its two neighbours, by their shares."""
    low, part = int(mean), mean - int(mean)
    size = [sum(drafts.bytes(path)[WIDTHS.index(low + k)] for path in drafts) for k in (0, 1)]
    return int((1 - part) * size[0] + part * size[1])


def positions(model: Model, row: str, mean: float, scores: dict[str, Sensitivity]) -> Any:
    """What a row chooses: path → position, and the allocation where there is one."""
    name, method = ROWS[row]
    if not name:
        return by_depth(model.drafts, mean, row), None
    _, found = allocation.allocate(
        scores[name], model.drafts, bytes=budget_of(model.drafts, mean), method=method
    )
    return found.positions, found


def all_widths(model: Model, method: str) -> list[dict[str, Any]]:
    """For every width the values of the weights rounded to it, by path; says how long it took."""
    evidence = None
    if method == "GPTQ":
        batches = list(model.windows.reshape(-1, min(4, len(model.windows)), 512))
        evidence = jq.capture(model.fn, model.params, batches, paths=list(model.plan))
    found = []
    for at, width in enumerate(WIDTHS):
        start = time.perf_counter()
        chosen = model.drafts.plan(dict.fromkeys(model.drafts, at))
        plan = jq.Plan({p: FINAL[method](s) for p, s in chosen.items()}, chosen.weights)
        q, _ = jq.quantize(model.fn, model.params, plan, evidence=evidence)
        leaves = jax.tree_util.tree_flatten_with_path(jq.dequantize(q))[0]
        found.append({name_of(k): leaf for k, leaf in leaves if name_of(k) in plan})
        print(f"{method}, {width} bits: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def name_of(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MEANS, action="append", help="mean widths to run")
    parser.add_argument("--row", choices=ROWS, action="append", help="rows to run")
    parser.add_argument("--method", choices=FINAL, action="append", help="roundings to run")
    parser.add_argument("--score", choices=MEASURES, action="append", help="measure these anew")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=EVALUATION, help="windows to measure on")
    parser.add_argument("--scores-only", action="store_true", help="measure, and stop")
    parser.add_argument("--plot", action="store_true", help="draw what the results say, and stop")
    options = parser.parse_args()
    found = json.loads(PATH.read_text()) if PATH.exists() else {}
    if options.plot:
        plot(found)
        return
    run(options, found)


def run(options: Any, found: dict[str, Any]) -> None:
    model = Model(options.windows, options.held_out)
    for part in ("scores", "choices", "rows"):
        found.setdefault(part, {})
    found |= {
        "machine": machine(),
        "names": list(ROWS),
        "tokens": {"calibration": digest(model.windows), "evaluation": digest(model.evaluation)},
    }

    def write() -> None:
        PATH.write_text(json.dumps(found, indent=1) + "\n")

    asked = options.only or options.row or options.method
    wanted = [
        (method, mean, row)
        for method in options.method or FINAL
        for mean in options.only or MEANS
        for row in options.row or ROWS
        if asked or row not in found["rows"].get(method, {}).get(mean, {})
    ]
    needed = dict.fromkeys([*(options.score or ()), *(ROWS[row][0] for *_, row in wanted)])
    scores: dict[str, Sensitivity] = {}
    for name in filter(None, needed):
        scores[name], seconds = score_of(model, name, name in (options.score or ()))
        found["scores"][name] = {
            "seconds": seconds, "units": scores[name].units, "how": scores[name].how,
            "by_block": scores[name].by_block(at=1),  # at 3 bits, where it knows of bits
        }  # fmt: skip
        write()
    if options.scores_only:
        return
    for method in dict.fromkeys(method for method, *_ in wanted):
        rounded = all_widths(model, method)
        left = [(mean, row) for m, mean, row in wanted if m == method]
        for few in (left[at : at + AT_ONCE] for at in range(0, len(left), AT_ONCE)):
            models: dict[str, Any] = {}
            said: dict[str, Any] = {}
            for mean, row in few:
                chosen, share = positions(model, row, float(mean), scores)
                models[f"{mean} {row}"] = put_together(model, rounded, chosen)
                said[f"{mean} {row}"] = told(model.drafts, chosen, share)
                widths = [WIDTHS[chosen[path]] for path in model.drafts]
                found["choices"].setdefault(mean, {})[row] = widths
            batches = [model.evaluation[at : at + 2] for at in range(0, len(model.evaluation), 2)]
            compared = jq.evaluate.compare_all(model.fn, model.params, models, batches)
            for mean, row in few:
                result = said[f"{mean} {row}"] | vars(compared[f"{mean} {row}"])
                found["rows"].setdefault(method, {}).setdefault(mean, {})[row] = result
                print(f"{method}, {mean} bits, {row}: {compared[f'{mean} {row}']}", flush=True)
            found["paths"] = list(model.drafts)
            write()


def put_together(model: Model, rounded: list[dict[str, Any]], chosen: dict[str, int]) -> Any:
    """The parameters with the values of each weight at its width."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(model.params)
    found = [
        rounded[chosen[name_of(k)]][name_of(k)] if name_of(k) in chosen else leaf
        for k, leaf in leaves
    ]
    return jax.tree.unflatten(structure, found)


def told(drafts: Candidates, chosen: dict[str, int], share: Allocation | None) -> dict[str, Any]:
    """What a choice takes, and how many weights have each width."""
    size = sum(drafts.bytes(path)[at] for path, at in chosen.items())
    widths = [WIDTHS[at] for at in chosen.values()]
    return {
        "bytes": size,
        "bits_per_weight": 8 * size / sum(map(drafts.size, drafts)),
        "widths": {str(width): widths.count(width) for width in sorted(set(widths))},
        "said_loss": None if share is None else share.loss,
    }


def plot(found: dict[str, Any]) -> None:
    """Mean code bits of a block against its depth, and of a kind, at 3.5 bits; scores beside."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    paths = found["paths"]
    blocks = [int(name.split("/")[1]) for name in paths]
    kinds = [name.split("/")[-2] for name in paths]
    order = ["q", "k", "v", "out", "gate", "up", "down"]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.3), layout="constrained",
                                   width_ratios=(3, 2, 3))  # fmt: skip
    left, middle, right = axes
    choices, drawn = found["choices"]["3.5"], ("exact KL", "Fisher", "PMPQ", "CMPQ")

    def means(bits: list[int], labels: list[Any], names: Any) -> list[float]:
        pairs = list(zip(bits, labels, strict=True))
        return [float(np.mean([bit for bit, label in pairs if label == name])) for name in names]

    for at, row in enumerate(drawn):
        style = {"color": f"C{at}", "label": row}
        left.plot(means(choices[row], blocks, range(max(blocks) + 1)), drawstyle="steps-mid",
                  **style)  # fmt: skip
        middle.plot(order, means(choices[row], kinds, order), "o", markersize=5, **style)
        score = found["scores"][row]["by_block"]
        value = np.array([score[f"layers/{k}"] for k in range(max(blocks) + 1)])
        right.plot(value / value.mean(), **style)
    left.set(xlabel="block", ylabel="mean bits of its codes", title="3.5 bits on average, by depth")
    middle.set(title="… and by the kind of weight", ylabel="mean bits of its codes")
    right.set(xlabel="block", ylabel="relative to its mean", title="score of a block")
    right.set_yscale("log")
    right.set_yticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"], minor=False)
    right.set_yticks([], minor=True)
    for axis in axes:
        axis.title.set_fontsize("medium")
        axis.spines[["top", "right"]].set_visible(False)
    right.legend(fontsize="small", frameon=False)
    save(figure, "bits-by-depth.svg", "bits.json")


if __name__ == "__main__":
    main()
