"""How long a step beside 4-bit codes takes, against the same step beside float32 weights.

python -m examples.qlora.timing                 # the byte network; writes timing.json
python -m examples.qlora.timing --small         # a few steps, nothing written

Steps are taken in turn, so that whatever else the machine does falls on all of them, and medians
are of pairs. Beside float32 weights there are two ways: `jq.adapt` adds term and weight, as for any
array, so its backward pass has a gradient of the weight's size; and the way LoRA is written by
hand, `x W + (x A) B`, which is what codes get. For the second, a float32 number is its own code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jquant as jq
from examples.qlora.main import SMALL, Size, Subject, compiled, subject
from jquant.axes.groups import Groups
from jquant.weights.arguments import by_path, replaced
from jquant.weights.qtensor import QTensor

HERE = Path(__file__).parent
WAYS = ("4-bit codes", "float32, sum", "float32, thin products")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Bits:
    """float32 numbers as a grid: a code is the number's bits."""

    bits: int = 32
    codes: tuple[int, int] = (-(2**31), 2**31 - 1)

    def fit(self, w: jax.Array, importance: Any = None) -> dict[str, jax.Array]:
        return {}

    def bracket(self, w: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        code = lax.bitcast_convert_type(w.astype(jnp.float32), jnp.int32)
        return code, code

    def decode(self, codes: jax.Array, params: Any) -> jax.Array:
        return lax.bitcast_convert_type(codes, jnp.float32)


def tree_of(way: str, task: Subject, weights: Any, plan: Any) -> Any:
    """The parameters that adapters are put beside."""
    if way == "4-bit codes":
        return jq.quantize(task.fn, task.params, plan)[0]
    if way == "float32, sum":
        return task.params
    leaves, news = by_path(task.params), {}
    for path in plan:
        layout = weights[path].layout
        codes, _ = Bits().bracket(layout.canonical(leaves[path]), {})
        news[path] = QTensor(codes, {}, Bits(), Groups(), layout, leaves[path].dtype)
    return replaced(task.params, news)


def run(size: Size, rounds: int) -> dict[str, Any]:
    """Medians of seconds, on the clock and of the processor, and how steps compare in pairs."""
    task = subject(True, size)
    weights = jq.find_weights(task.fn, task.params, task.calibration[:1])
    plan = jq.plan(weights, {task.linears: jq.presets.int4_nearest(64), ".*": jq.keep})
    rules = {path.replace(".", r"\."): jq.LoRA(size.rank) for path in plan}
    optimizer, tokens = optax.adam(size.rate), jnp.asarray(task.training[: size.batch])
    steps, spent, memory = {}, {way: ([], []) for way in WAYS}, {}
    for way in WAYS:
        tree = tree_of(way, task, weights, plan)
        frozen, trainable = jq.adapt(tree, rules, key=jax.random.key(0), weights=weights)
        program = compiled(task, frozen, trainable, optimizer, tokens)
        memory[way] = program.memory
        steps[way] = [program.step, trainable, optimizer.init(trainable), frozen]
    values: dict[str, float] = {}
    for _ in range(rounds + 1):
        for way, (step, trainable, state, frozen) in steps.items():
            began = time.perf_counter(), time.process_time()
            trainable, state, value = jax.block_until_ready(step(trainable, state, frozen, tokens))
            ended = time.perf_counter(), time.process_time()
            steps[way][1:3] = trainable, state
            values[way] = float(value)
            for kept, one, two in zip(spent[way], began, ended, strict=True):
                kept.append(two - one)
    clock, processor = ({w: s[k][1:] for w, s in spent.items()} for k in (0, 1))

    def pairs(spent: dict[str, list[float]], way: str) -> float:
        both = zip(spent[WAYS[0]], spent[way], strict=True)
        return statistics.median(one / two for one, two in both)

    return {
        "tokens": size.length * size.batch,
        "rounds": rounds,
        "seconds": {way: statistics.median(kept) for way, kept in clock.items()},
        "processor_seconds": {way: statistics.median(kept) for way, kept in processor.items()},
        "of_float32": {way: pairs(clock, way) for way in WAYS[1:]},
        "of_float32_processor": {way: pairs(processor, way) for way in WAYS[1:]},
        "losses": values,
        "bytes": memory,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few steps, nothing written")
    given = parser.parse_args(arguments)
    sizes = [SMALL] if given.small else [SMALL, replace(SMALL, length=256, batch=8)]
    result = {
        "runs": [run(size, 3 if given.small else 30) for size in sizes],
        "versions": {
            "python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__,
        },
        "machine": {"backend": jax.default_backend(), "cores": os.cpu_count()},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if not given.small:
        (HERE / "timing.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result


if __name__ == "__main__":
    main()
