"""Federated tuning of few parameters, exchanged in few bits: accuracy against bytes sent.

    python -m examples.fedpeft.main            # what results.json has not yet
    python -m examples.fedpeft.main --small    # seconds: whether it runs

A byte-level decoder of a million weights, trained on Python's help text, is to continue the source
code of the standard library. 16 clients hold a package of it each, so their data differ in kind. In
every round each client tunes biases, adapters or the head for a few steps and sends what changed,
in 32, 8, 4 or 2 bits; the server averages. See README.md for what came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import jquant as jq
from jquant import exchange
from jquant.models.decoder import Decoder
from jquant.rounding import Nearest, Stochastic
from tests import trained

RESULTS = Path(__file__).with_name("results.json")
PACKAGES = (
    "asyncio", "concurrent", "ctypes", "curses", "dbm", "email", "encodings", "html", "http",
    "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml",
)  # fmt: skip
RATES = {"bias": 1e-2, "adapter": 3e-3, "head": 1e-3, "full": 1e-3}  # of Adam; heuristic
RANK = 2
GROUP = 1024  # entries that share a scale: 4 bits take 4.016
MODES: dict[str, Any] = {  # how updates are rounded, and whether what is lost is sent later
    "chance": (Stochastic(), False),
    "feedback": (Nearest(), True),
    "chance, feedback": (Stochastic(), True),
}

Fn = Callable[[Any, jax.Array], jax.Array]


@dataclass(frozen=True)
class Setting:
    """One run. Rounds of `steps` local steps with `rows` windows of `window` bytes each."""

    tuning: str
    bits: int = 32
    mode: str = "chance"
    clip: float | None = None  # of the norm of a client's update, before noise
    noise: float = 0.0  # its standard deviation, as a part of the clip
    rounds: int = 20
    steps: int = 4
    rows: int = 2
    window: int = 64
    clients: int = 16
    held_out: int = 32  # windows of each client
    layers: int = 4
    seed: int = 0


def texts() -> list[np.ndarray]:
    """The source code of each package, uint8."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations
        files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
        found.append(np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8))
    return found


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Runs of `length + 1` bytes, int32 `[*starts, length + 1]`."""
    return text[starts[..., None] + np.arange(length + 1)].astype(np.int32)


@cache
def network(layers: int) -> tuple[Decoder, dict[str, jax.Array]]:
    """The trained network's first layers, stacked, with biases of zero in its attention."""
    fn, params, *_ = trained.load()
    config = dataclasses.replace(fn.config, qkv_bias=True, out_bias=True, layers=layers)
    flat = {p: x for p, x in flatten_dict(params, sep="/").items() if not p.startswith("layers/")}
    blocks = [flatten_dict(params["layers"][str(k)], sep="/") for k in range(layers)]
    for path in blocks[0]:
        flat[f"layers/{path}"] = jnp.stack([block[path] for block in blocks])
        if path.startswith("attention/"):
            shape = (layers, blocks[0][path].shape[1])
            flat[f"layers/{path.replace('kernel', 'bias')}"] = jnp.zeros(shape, jnp.float32)
    return Decoder(config, scan_layers=True), flat


@cache  # so that runs share their programs
def tuned(layers: int, tuning: str, seed: int) -> tuple[Fn, Any]:
    """A function of what is trained and tokens, and what is trained, at its start."""
    fn, base = network(layers)
    if tuning == "adapter":
        kernels = [p for p in base if p.startswith("layers/") and p.endswith("kernel")]
        start = {}
        keys = jax.random.split(jax.random.key(seed), len(kernels))
        for path, key in zip(kernels, keys, strict=True):
            _, inner, outer = base[path].shape
            a = jax.random.normal(key, (layers, inner, RANK), jnp.float32) * inner**-0.5
            start[path] = {"a": a, "b": jnp.zeros((layers, RANK, outer), jnp.float32)}

        def parts(trainable: Any) -> dict[str, jax.Array]:
            return {p: base[p] + part["a"] @ part["b"] for p, part in trainable.items()}

    else:
        is_tuned = {
            "bias": lambda p: p.endswith(("bias", "scale")),
            "head": lambda p: p == "head/kernel",
            "full": lambda p: True,
        }[tuning]
        start, parts = {p: leaf for p, leaf in base.items() if is_tuned(p)}, lambda t: t
    return lambda t, x: fn(unflatten_dict({**base, **parts(t)}, sep="/"), x), start


def loss(fn: Fn, trainable: Any, tokens: jax.Array) -> jax.Array:
    logits = fn(trainable, tokens[..., :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[..., 1:]).mean()


def private(update: Any, s: Setting, key: jax.Array) -> Any:
    """The update, no longer than the clip, with Gaussian noise; as it is without a clip."""
    if s.clip is None:
        return update
    factor = jnp.minimum(1.0, s.clip / (optax.tree.norm(update) + 1e-12))
    leaves, structure = jax.tree.flatten(update)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([
        leaf * factor + s.noise * s.clip * jax.random.normal(k, leaf.shape, jnp.float32)
        for leaf, k in zip(leaves, keys, strict=True)
    ])  # fmt: skip


def packet_of(update: Any, residual: Any, s: Setting, key: jax.Array) -> tuple[Any, Any]:
    """What a client sends, and what it keeps."""
    if s.bits == 32:
        return update, residual
    grid = jq.grids.Uniform(s.bits, symmetric=True, convention="S3", scale_dtype="bfloat16")
    rounding, keeps = MODES[s.mode]
    if keeps:
        return exchange.with_feedback(update, residual, grid, key, group=GROUP, rounding=rounding)
    return jq.compress(update, grid, key, group=GROUP, rounding=rounding), residual


@partial(jax.jit, static_argnames=("fn", "rate"))
def locally(fn: Fn, rate: float, trainable: Any, batches: Any) -> Any:
    """What each client's steps of Adam have changed, stacked."""
    optimizer = optax.adam(rate)

    def step(state: Any, tokens: jax.Array) -> tuple[Any, None]:
        here, moments = state
        gradient = jax.grad(partial(loss, fn))(here, tokens)
        change, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(here, change), moments), None

    def one(batch: jax.Array) -> Any:
        (here, _), _ = jax.lax.scan(step, (trainable, optimizer.init(trainable)), batch)
        return jax.tree.map(jnp.subtract, here, trainable)

    return jax.vmap(one)(batches)


@partial(jax.jit, static_argnames="s")
def packets_of(s: Setting, updates: Any, residuals: Any, key: jax.Array) -> Any:
    """The packets of all clients, stacked, and their residuals."""

    def one(update: Any, residual: Any, key: jax.Array) -> tuple[Any, Any]:
        luck, noise = jax.random.split(key)
        return packet_of(private(update, s, noise), residual, s, luck)

    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(s.clients, dtype=jnp.uint32))
    return jax.vmap(one)(updates, residuals, keys)


@partial(jax.jit, static_argnames="s")
def served(s: Setting, trainable: Any, packets: Any) -> Any:
    """What is trained, after the mean of all updates."""
    updates = packets if s.bits == 32 else jax.vmap(jq.decompress)(packets)
    return jax.tree.map(lambda t, u: t + u.mean(0), trainable, updates)


@partial(jax.jit, static_argnames="fn")
def accuracy(fn: Fn, trainable: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The share of bytes that are the likeliest, and nats per byte."""
    right = fn(trainable, tokens[..., :-1]).argmax(-1) == tokens[..., 1:]
    return right.mean(dtype=jnp.float32), loss(fn, trainable, tokens)


def sent(packets: Any, s: Setting) -> int:
    """Bytes that a client sends in a round; each client's packet is written and read once."""
    if s.bits == 32:
        return sum(leaf.size * 4 for leaf in jax.tree.leaves(packets)) // s.clients
    sizes = set()
    for client in range(s.clients):
        packet = jax.tree.map(lambda leaf, k=client: leaf[k], packets)
        data = exchange.to_bytes(packet)
        back = jq.decompress(exchange.from_bytes(data, packet))
        jax.tree.map(np.testing.assert_array_equal, back, jq.decompress(packet))
        sizes.add(len(data))
    (size,) = sizes
    return size


def run(s: Setting) -> dict[str, Any]:
    """Accuracy before and after, and the bytes that each client has sent."""
    random, key = np.random.default_rng(s.seed), jax.random.key(s.seed)
    fn, trainable = tuned(s.layers, s.tuning, s.seed)
    data = texts()[: s.clients]
    cuts = [len(text) * 9 // 10 for text in data]
    held_out = np.concatenate([
        windows(text, np.linspace(cut, len(text) - s.window - 1, s.held_out).astype(int), s.window)
        for text, cut in zip(data, cuts, strict=True)
    ])  # fmt: skip
    before = accuracy(fn, trainable, held_out)
    keeps = s.bits < 32 and MODES[s.mode][1]
    residuals = jax.tree.map(
        lambda leaf: jnp.zeros((s.clients, *leaf.shape), jnp.float32), trainable
    ) if keeps else None  # fmt: skip
    size = 0
    for number in range(s.rounds):
        batches = np.stack([
            windows(text, random.integers(0, cut - s.window, (s.steps, s.rows)), s.window)
            for text, cut in zip(data, cuts, strict=True)
        ])  # fmt: skip
        own = jax.random.fold_in(key, number + 1)
        updates = locally(fn, RATES[s.tuning], trainable, batches)
        packets, residuals = packets_of(s, updates, residuals, own)
        size = size or sent(packets, s)
        trainable = served(s, trainable, packets)
    after = accuracy(fn, trainable, held_out)
    return {
        "tuning": s.tuning, "bits": s.bits, "mode": s.mode if s.bits < 32 else "as it is",
        "clip": s.clip, "noise": s.noise, "seed": s.seed,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trainable)),
        "bytes_per_client_and_round": size, "rounds": s.rounds,
        "accuracy_before": round(100 * float(before[0]), 2),
        "accuracy": round(100 * float(after[0]), 2),
        "nats_per_byte": round(float(after[1]), 4),
    }  # fmt: skip


def settings(small: bool) -> list[Setting]:
    """All runs: every tuning and width, each way of rounding, and noise on the ends."""
    if small:
        tiny = {"rounds": 1, "steps": 1, "rows": 1, "window": 8, "clients": 2, "layers": 1}
        return [Setting("bias", 4, "feedback", clip=1.0, noise=0.1, held_out=1, **tiny)]
    ways = [(32, "chance"), (4, "chance"), (4, "feedback"), (2, "chance"), (2, "feedback")]
    ways += [(8, "chance"), (2, "chance, feedback")]
    runs = [Setting(t, *way) for way in ways for t in ("adapter", "bias", "head")]
    runs.insert(3, Setting("full"))
    noise = {"clip": 0.5, "noise": 0.02}
    runs += [Setting(tuning, **noise) for tuning in ("full", "bias", "adapter")]
    return [*runs, Setting("bias", 4, **noise), Setting("adapter", 4, **noise)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="seconds; writes nothing")
    parser.add_argument(
        "--to", type=Path, default=RESULTS, help="the results; what is there is kept"
    )
    options = parser.parse_args()
    versions = {
        p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "optax", "numpy")
    }
    versions["python"] = platform.python_version()
    keep = not options.small and options.to.exists()
    rows = json.loads(options.to.read_text("utf-8"))["runs"] if keep else []
    done = {(r["tuning"], r["bits"], r["mode"], r["noise"], r["seed"]) for r in rows}
    for s in settings(options.small):
        mode = s.mode if s.bits < 32 else "as it is"
        if (s.tuning, s.bits, mode, s.noise, s.seed) in done:
            continue
        rows.append(run(s))
        print(json.dumps(rows[-1]), flush=True)
        if not options.small:
            setup = dataclasses.asdict(Setting("")) | {"group": GROUP, "rank": RANK, "rates": RATES}
            result = {"versions": versions, "setting": setup, "clients": PACKAGES, "runs": rows}
            options.to.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
