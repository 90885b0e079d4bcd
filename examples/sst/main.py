"""Sparse spectral training against LoRA and full training, from scratch, on a network over bytes.

python -m examples.sst.main           # minutes; goes on from results.json
python -m examples.sst.main --small   # seconds, nothing written
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

import jquant as jq
from examples.sst.hyperbolic import compared
from examples.sst.sst import factorised, matrix, sparse_spectral
from jquant.models.smollm2 import text
from tests.trained import LINEARS, load

HERE = Path(__file__).parent

Tree = Any


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    length: int = 128  # bytes of a window
    batch: int = 8
    steps: int = 148
    every: int = 37  # steps between two measurements
    rank: int = 8
    rate: float = 2e-3


SMALL = Size(length=32, batch=4, steps=6, every=2)


def path_of(keys: Any) -> str:
    return keystr(keys, simple=True, separator="/")


def is_linear(path: str) -> bool:
    return re.fullmatch(LINEARS, path) is not None


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Windows of 256 bytes of Python's help: the first nine tenths, and 32 of the last.

    A run of some hundred steps sees less than all of it, so that nothing is learned by heart.
    """
    data = np.frombuffer(text().encode(), np.uint8).astype(np.int32)
    windows = data[: len(data) // 256 * 256].reshape(-1, 256)
    cut = len(windows) * 9 // 10
    last = np.linspace(cut, len(windows) - 1, 32).astype(int)
    return windows[:cut], windows[last]


def cross_entropy(fn: Callable[..., Any], params: Tree, tokens: Any) -> jax.Array:
    """Mean nats per byte."""
    logits = fn(params, tokens)[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def full(fn: Any, params: Tree, size: Size) -> tuple[Tree, Callable[[Tree], Tree], Any]:
    """What is trained, the parameters that it stands for, and the optimizer: all weights."""
    del fn
    return params, lambda t: t, optax.adam(size.rate)


def lora(fn: Any, params: Tree, size: Size) -> tuple[Tree, Callable[[Tree], Tree], Any]:
    """The same, of low-rank terms beside the random weights, and all else whole."""
    weights = jq.find_weights(fn, params, np.zeros((1, size.length), np.int32))
    rules = {LINEARS: jq.LoRA(size.rank), ".*": jq.adapters.Whole()}
    frozen, trainable = jq.adapt(params, rules, key=jax.random.key(1), weights=weights)
    return trainable, lambda t: jq.merge(frozen, t), optax.adam(size.rate)


def sst(fn: Any, params: Tree, size: Size) -> tuple[Tree, Callable[[Tree], Tree], Any]:
    """The same, of all singular values and a few vectors at a time, and all else whole.

    Weights of one shape are one stack.
    """
    del fn
    pairs, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = {path_of(keys): leaf for keys, leaf in pairs}
    shapes: dict[tuple[int, ...], list[str]] = {}
    for path in filter(is_linear, leaves):
        shapes.setdefault(leaves[path].shape, []).append(path)
    groups = list(shapes.values())
    stacks = [factorised(jnp.stack([leaves[path] for path in group])) for group in groups]
    rest = {path: leaf for path, leaf in leaves.items() if not is_linear(path)}

    def joined(trainable: Tree) -> Tree:
        stacks, rest = trainable
        own = dict(rest)
        for group, stack in zip(groups, stacks, strict=True):
            own |= dict(zip(group, matrix(stack), strict=True))
        return jax.tree.unflatten(structure, [own[path] for path in leaves])

    spectral = sparse_spectral(size.rate, size.rank, jax.random.key(2))
    both = spectral, optax.adam(size.rate)

    def init(trainable: Tree) -> Any:
        return tuple(tx.init(own) for tx, own in zip(both, trainable, strict=True))

    def update(grads: Any, state: Any, trainable: Any = None) -> Any:
        each = [tx.update(*own) for tx, *own in zip(both, grads, state, trainable, strict=True)]
        return tuple(u for u, _ in each), tuple(s for _, s in each)

    return (stacks, rest), joined, optax.GradientTransformation(init, update)


WAYS = {"full": full, "LoRA": lora, "SST": sst}


def moving(way: str, params: Tree, rank: int) -> int:
    """How many numbers of the linear layers move in a step."""
    total = 0
    for keys, w in jax.tree_util.tree_flatten_with_path(params)[0]:
        if is_linear(path_of(keys)):
            low = rank * sum(w.shape)
            total += {"full": w.size, "LoRA": low, "SST": low + min(w.shape)}[way]
    return total


def train(
    way: str, fn: Any, params: Tree, size: Size, texts: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """The losses of one way."""
    trainable, joined, optimizer = WAYS[way](fn, params, size)
    state = optimizer.init(trainable)

    @jax.jit
    def step(trainable: Tree, state: Any, tokens: Any) -> Any:
        loss = lambda t: cross_entropy(fn, joined(t), tokens)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    measure = jax.jit(lambda t, tokens: cross_entropy(fn, joined(t), tokens))
    training, held_out = texts
    rng, seconds, curve = np.random.default_rng(0), [], {}
    for number in range(1, size.steps + 1):
        rows = rng.choice(len(training), size.batch)
        begin = rng.integers(0, training.shape[1] - size.length + 1)
        tokens = training[rows, begin : begin + size.length]
        began = time.perf_counter()
        trainable, state, value = step(trainable, state, tokens)
        jax.block_until_ready(value)
        seconds.append(time.perf_counter() - began)
        if number % size.every == 0 or number == size.steps:
            curve[str(number)] = float(measure(trainable, held_out[:, : size.length]))
            print(f"{way:5s} step {number:4d}: {curve[str(number)]:.4f} nats held out", flush=True)
    return {
        "curve": curve,
        "final": curve[str(size.steps)],
        "moving": moving(way, params, size.rank),
        "step_seconds": statistics.median(seconds[1:]),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="few steps, nothing written")
    parser.add_argument("--steps", type=int, help="of training")
    given = parser.parse_args(arguments)
    size = SMALL if given.small else Size()
    if given.steps:
        size = Size(**{**asdict(size), "steps": given.steps})
    fn, *_ = load()
    training, held_out = texts()
    params = fn.init(jax.random.key(0))
    file = None if given.small else HERE / "results.json"
    before = json.loads(file.read_text("utf-8")) if file and file.exists() else {}
    runs: dict[str, Any] = before["runs"] if before.get("size") == asdict(size) else {}
    for way in WAYS:
        if way in runs:
            continue
        runs[way] = train(way, fn, params, size, (training, held_out))
        if file is not None:
            file.write_text(json.dumps(told(size, runs), indent=1) + "\n", "utf-8")
    result = told(size, runs)
    print(f"gap to full training: {result['gap_to_full']}; SST closes {result['gap_closed']}")
    return result


def told(size: Size, runs: dict[str, Any]) -> dict[str, Any]:
    """What the runs say of each other, at the best of each curve, with versions."""
    best = {way: min(run["curve"].values()) for way, run in runs.items()}
    gap = {way: best[way] - best["full"] for way in ("LoRA", "SST") if {way, "full"} <= set(best)}
    return {
        "size": asdict(size),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
        },
        "runs": runs,
        "best": best,
        "gap_to_full": gap,
        "gap_closed": 1 - gap["SST"] / gap["LoRA"] if len(gap) == 2 and gap["LoRA"] else None,
        "hyperbolic": compared(),
    }


if __name__ == "__main__":
    main()
