"""Trains the small network of the tests: a byte-level decoder on Python's help text.

    python -m benchmarks.train_bytes                 # about 8 minutes on two cores
    python -m benchmarks.train_bytes --steps 20 --to try.safetensors

Methods that learn a rounding need a network whose weights mean something, and tests need one that
runs in seconds and comes with the repository. This one is the reference decoder with 1 M weights
over bytes. The first 90 % of the help text is trained on; of the rest, windows that repeat a run of
`RUN` bytes of the training text are dropped (topics quote each other), what remains is held out.

Everything a test needs goes into one safetensors file: the weights in float16, windows from the
training part for calibration and held-out ones for evaluation (the text differs between versions of
Python), and as metadata the configuration, the hash of this script, versions and losses. The losses
are those of the float16 weights. Equal seeds give equal weights on one machine with one JAX.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from benchmarks.harness import machine
from jquant import evaluate
from jquant.models import smollm2
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.trees.paths import path_of

ASSET = Path(__file__).parents[1] / "tests" / "assets" / "bytes.safetensors"
WINDOW = 256  # bytes
CONFIG = DecoderConfig(
    vocab=256, width=128, hidden=512, layers=4, heads=4, kv_heads=2, context=WINDOW
)
SEED, STEPS, ROWS = 0, 1200, 8
PEAK_RATE, WARMUP, DECAY = 3e-3, 100, 0.1
CALIBRATION, EVALUATION = 64, 32  # windows kept in the asset
RUN = 48


def split(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The training part of a text of bytes, and the held-out windows `[n, WINDOW]`."""
    cut = len(text) * 9 // 10
    train, tail = text[:cut], text[cut:]
    seen = {train[i : i + RUN].tobytes() for i in range(len(train) - RUN + 1)}
    windows = tail[: len(tail) // WINDOW * WINDOW].reshape(-1, WINDOW)
    fresh = [
        all(row[i : i + RUN].tobytes() not in seen for i in range(WINDOW - RUN + 1))
        for row in windows
    ]
    return train, windows[fresh]


def evenly(windows: np.ndarray, count: int) -> np.ndarray:
    """`count` of the windows, evenly spaced."""
    return windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]


def train(text: np.ndarray, held_out: np.ndarray, steps: int, fn: Decoder) -> tuple[Any, float]:
    """The parameters, and the mean training loss of the last 50 steps in nats per byte."""
    params = fn.init(jax.random.key(SEED))
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(WARMUP, steps // 4), steps)
    matrices = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.95, weight_decay=DECAY, mask=matrices),
    )
    state = optimizer.init(params)

    def loss(params: Any, row: jax.Array) -> jax.Array:
        logits = fn(params, row[None, :-1])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, row[1:]).mean() / ROWS

    @jax.jit
    def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any, jax.Array]:
        def add(total: Any, row: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, row)), None

        # Row by row: on CPUs the gradient of one batch takes a third more, it sums over two axes.
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (value, slope), _ = jax.lax.scan(add, zero, rows)
        updates, state = optimizer.update(slope, state, params)
        return optax.apply_updates(params, updates), state, value

    draw = np.random.default_rng(SEED)
    losses: list[float] = []
    start = time.perf_counter()
    for k in range(1, steps + 1):
        begin = draw.integers(len(text) - WINDOW, size=(ROWS, 1))
        rows = text[begin + np.arange(WINDOW + 1)].astype(np.int32)
        params, state, value = step(params, state, rows)
        losses.append(float(value))
        if k % 100 == 0 or k == steps:
            print(
                f"step {k}: train {np.mean(losses[-50:]):.3f}, held out "
                f"{nats(fn, params, held_out):.3f} nats/byte, "
                f"{time.perf_counter() - start:.0f} s", flush=True,
            )  # fmt: skip
    return params, float(np.mean(losses[-50:]))


def nats(fn: Decoder, params: Any, windows: np.ndarray) -> float:
    return math.log(evaluate.perplexity(fn, params, [windows]))


def unigram(text: np.ndarray, windows: np.ndarray) -> float:
    """Nats per byte of the windows under the frequencies of the text, each count plus one."""
    counts = np.bincount(text, minlength=256) + 1.0
    return float(-np.log(counts / counts.sum())[windows].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--to", type=Path, default=ASSET, help="the file to write")
    options = parser.parse_args()

    raw = smollm2.text().encode()
    text, held_out = split(np.frombuffer(raw, np.uint8))
    print(f"{len(text)} bytes to train on, {len(held_out)} windows held out")
    start = time.perf_counter()
    params, train_loss = train(text, held_out, options.steps, Decoder(CONFIG))
    seconds = time.perf_counter() - start

    fn = Decoder(CONFIG)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    stored = {path_of(keys): np.asarray(leaf, np.float16) for keys, leaf in leaves}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), params)
    whole = text[: len(text) // WINDOW * WINDOW].reshape(-1, WINDOW)
    windows = {
        "calibration": evenly(whole, CALIBRATION),
        "evaluation": evenly(held_out, EVALUATION),
    }
    found = {
        "train_last_50_steps": train_loss,
        "calibration": nats(fn, params, windows["calibration"]),
        "held_out": nats(fn, params, held_out),
        "evaluation": nats(fn, params, windows["evaluation"]),
        "held_out_unigram": unigram(text, held_out),
    }
    metadata = {
        "config": json.dumps(dataclasses.asdict(CONFIG)),
        "script_sha256": hashlib.sha256(Path(__file__).read_text("utf-8").encode()).hexdigest(),
        "text": json.dumps({"from": "pydoc_data.topics", "sha256": hashlib.sha256(raw).hexdigest(),
                            "train_bytes": len(text), "held_out_windows": len(held_out)}),
        "steps": str(options.steps),
        "nats_per_byte": json.dumps(found),
        "machine": json.dumps(machine()),
    }  # fmt: skip
    options.to.parent.mkdir(exist_ok=True)
    save_file({**stored, **windows}, options.to, metadata)
    weights = sum(leaf.size for leaf in stored.values())
    print(found, f"{weights} weights, {options.to.stat().st_size} bytes, {seconds:.0f} s")


if __name__ == "__main__":
    main()
