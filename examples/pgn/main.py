"""PGN and TPGN, two gated forecasting networks, trained in float32 and quantized to few bits.

pip install pmdarima                  # for the series that it ships
python -m examples.pgn.main           # minutes; goes on from results.json
python -m examples.pgn.main --small   # seconds, on a generated series, nothing written
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jquant as jq

DAY = 12  # steps of two hours
DAYS = 7  # of history, from which the next day is forecast
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """How large an experiment is."""

    width: int = 32
    steps: int = 600
    batch: int = 32
    rate: float = 3e-3
    networks: tuple[str, ...] = ("TPGN", "PGN", "GRU")
    schemes: tuple[str, ...] = ("W8A8", "W4 nearest", "W4", "W3")


class PGN(nnx.Module):
    """A layer that sees all history at once: a causal convolution of each channel, then one gate.

    `h_t` gathers what came before t; `y = h σ + (1 - σ) tanh(c)`, σ and c linear in `[x_t, h_t]`.
    """

    def __init__(self, width: int, history: int, rngs: nnx.Rngs):
        self.history = history
        self.gather = nnx.Conv(
            width, width, (history,), feature_group_count=width, padding="VALID", rngs=rngs
        )
        self.gate = nnx.Linear(2 * width, 2 * width, rngs=rngs)

    def __call__(self, x: jax.Array, last: int | None = None) -> jax.Array:
        """`[batch, time, width]` to the same, or to the last states alone."""
        before = jnp.pad(x, ((0, 0), (self.history, 0), (0, 0)))[:, :-1]
        if last is not None:
            before, x = before[:, -(self.history - 1 + last) :], x[:, -last:]
        h = self.gather(before)
        gate, candidate = jnp.split(self.gate(jnp.concatenate([x, h], -1)), 2, -1)
        gate = jax.nn.sigmoid(gate)
        return h * gate + (1 - gate) * jnp.tanh(candidate)


class Plain(nnx.Module):
    """PGN over all of history; the last state gives the forecast."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.embed = nnx.Linear(1, size.width, rngs=rngs)
        self.pgn = PGN(size.width, DAYS * DAY, rngs)
        self.head = nnx.Linear(size.width, DAY, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.pgn(self.embed(x[..., None]), last=1)[:, -1])


class Temporal(nnx.Module):
    """TPGN: history as days by hours. PGN runs down the days, for each hour of the day; beside it
    every day is a patch, and the patches are joined."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        width = size.width
        self.embed = nnx.Linear(1, width, rngs=rngs)
        self.down = PGN(width, DAYS, rngs)
        self.patch = nnx.Linear(DAY, width, rngs=rngs)
        self.join = nnx.Linear(DAYS * width, width, rngs=rngs)
        self.head = nnx.Linear(2 * width, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch = len(x)
        days = x.reshape(batch, DAYS, DAY)
        hours = days.swapaxes(1, 2).reshape(batch * DAY, DAYS, 1)
        long = self.down(self.embed(hours), last=1)[:, -1].reshape(batch, DAY, -1)
        short = self.join(jnp.tanh(self.patch(days)).reshape(batch, -1))
        short = jnp.broadcast_to(short[:, None], long.shape)
        return self.head(jnp.concatenate([long, short], -1))[..., 0]


class Recurrent(nnx.Module):
    """What PGN is to replace: a GRU, step by step."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.width = size.width
        self.embed = nnx.Linear(1, size.width, rngs=rngs)
        self.gru = nnx.RNN(nnx.GRUCell(size.width, size.width, rngs=rngs))
        self.head = nnx.Linear(size.width, DAY, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        start = jnp.zeros((len(x), self.width))
        return self.head(self.gru(self.embed(x[..., None]), initial_carry=start)[:, -1])


NETWORKS: dict[str, Callable[[Size, nnx.Rngs], Any]] = {
    "PGN": Plain, "TPGN": Temporal, "GRU": Recurrent,
}  # fmt: skip


def demand() -> np.ndarray:
    """Electricity demand of England and Wales, 12 weeks of 2000 (Taylor 2003), means of 2 hours."""
    try:
        from pmdarima.datasets import load_taylor
    except ImportError as error:
        raise SystemExit("the series is shipped by pmdarima: pip install pmdarima") from error
    return np.asarray(load_taylor(), np.float32).reshape(-1, 4).mean(-1)


def generated() -> np.ndarray:
    """Days, weeks and noise: stands for the series in quick runs."""
    hours, random = np.arange(40 * DAY), np.random.default_rng(0)
    day = np.sin(2 * np.pi * hours / DAY) + 0.4 * np.sin(4 * np.pi * hours / DAY)
    week = (hours // DAY % 7 >= 5).astype(np.float32)
    return (day - week + 0.1 * random.normal(size=len(hours))).astype(np.float32)


def windows(series: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Histories and what followed, of the first 60 %, of the next 20 % and of the rest.

    Forecasts begin at every step; mean and deviation are those of the first part.
    """
    first = series[: int(0.6 * len(series))]
    series = (series - first.mean()) / first.std()
    starts = np.arange(len(series) - (DAYS + 1) * DAY + 1)
    both = series[starts[:, None] + np.arange((DAYS + 1) * DAY)]
    ends = [0, int(0.6 * len(series)), int(0.8 * len(series)), len(series)]
    begins = starts + DAYS * DAY  # where the forecast begins
    parts = {}
    for name, low, high in zip(("train", "validate", "test"), ends[:-1], ends[1:], strict=True):
        inside = (begins >= low) & (begins + DAY <= high)
        parts[name] = both[inside, : DAYS * DAY], both[inside, DAYS * DAY :]
    return parts


def error(fn: Callable[..., Any], params: Any, part: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean squared error of forecasts, in units of the series' variance."""
    run = jax.jit(fn)
    total = sum(
        float(jnp.sum((run(params, x) - y) ** 2))
        for x, y in zip(_batches(part[0]), _batches(part[1]), strict=True)
    )
    return total / part[1].size


def _batches(x: np.ndarray) -> list[np.ndarray]:
    return np.array_split(x, -(-len(x) // 128))


def train(make: Any, parts: Any, size: Size) -> tuple[Callable[..., Any], Any, float]:
    """The network as a function, its best parameters by validation, and the seconds of a step."""
    graph, params, rest = nnx.split(make(size, nnx.Rngs(0)), nnx.Param, ...)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest)(x)

    optimizer = optax.adam(optax.cosine_decay_schedule(size.rate, size.steps))
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        gradient = jax.grad(lambda p: jnp.mean((fn(p, x) - y) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    random, (x, y) = np.random.default_rng(0), parts["train"]
    best, kept, spent = np.inf, params, []
    for i in range(size.steps):
        chosen = random.integers(0, len(x), size.batch)
        before = time.perf_counter()
        params, state = step(params, state, x[chosen], y[chosen])
        jax.block_until_ready(params)
        spent.append(time.perf_counter() - before)
        if (i + 1) % max(size.steps // 8, 1) == 0:
            now = error(fn, params, parts["validate"])
            if now < best:
                best, kept = now, params
    return fn, kept, float(np.median(spent))


def schemes() -> dict[str, jq.Scheme]:
    """Ways to fewer bits; what has no groups of 32 inputs gets one scale per output."""
    presets = jq.presets
    return {
        "W8A8": presets.w8a8(),
        "W4 nearest": presets.int4_nearest(32),
        "W4": presets.int4_qep(32),
        "W3": presets.int3_qep(32),
    }


def quantized(fn: Any, params: Any, parts: Any, scheme: jq.Scheme) -> tuple[Any, float]:
    """The parameters under a scheme, and the bits it stores per number of the whole network."""
    batches = _batches(parts["train"][0])[::4]
    weights = jq.find_weights(fn, params, batches[0])
    # A convolution of single channels has few inputs and no product of codes: nearest of its own.
    plain = replace(scheme, activations=None)
    plan = jq.plan(weights, {".*gather.*": plain, ".*embed.*": plain, ".*": scheme})
    qparams, report = jq.quantize(fn, params, plan, batches if scheme.needs else None)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    inside = sum(row.size for row in report.values())
    return qparams, (report.bits_per_weight * inside + 32 * (whole - inside)) / whole


def run(series: np.ndarray, size: Size, file: Path | None = None) -> dict[str, Any]:
    """Errors of all networks at all bits, and of forecasts that need no network.

    Networks that are in the file already are not run again; each is written when it is done.
    """
    parts = windows(series)
    x, y = parts["test"]
    result: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}
    result |= {
        "size": asdict(size),
        "windows": {name: len(part[0]) for name, part in parts.items()},
        "naive": {
            "the same hour yesterday": float(np.mean((x[:, -DAY:] - y) ** 2)),
            "the same hour a week ago": float(np.mean((x[:, :DAY] - y) ** 2)),
        },
    }
    for name in size.networks:
        if name in result:
            continue
        fn, params, seconds = train(NETWORKS[name], parts, size)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
        rows = {"float32": {"mse": error(fn, params, parts["test"]), "bits": 32.0}}
        for scheme in size.schemes if name != "GRU" else ():  # what they are compared with
            qparams, bits = quantized(fn, params, parts, schemes()[scheme])
            mse = error(jq.apply(fn), qparams, parts["test"])
            rows[scheme] = {"mse": mse, "bits": bits}
        result[name] = {"parameters": numbers, "step_seconds": seconds, "bits": rows}
        print(name, json.dumps(result[name], indent=1), flush=True)
        if file is not None:
            packages = ("jax", "flax", "optax", "numpy", "pmdarima")
            result["versions"] = {name: importlib.metadata.version(name) for name in packages}
            file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a quick run on a generated series")
    if parser.parse_args(arguments).small:
        short = Size(8, 10, 8, networks=("TPGN",), schemes=("W8A8", "W4 nearest"))
        return run(generated(), short)
    return run(demand(), Size(), HERE / "results.json")


if __name__ == "__main__":
    main()
