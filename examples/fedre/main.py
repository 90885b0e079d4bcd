"""One entangled representation for a client's whole data: what it teaches, and what it gives away.

    python -m examples.fedre.main            # all, some minutes on two cores
    python -m examples.fedre.main --small    # seconds: whether it runs

Eight clients with networks of different widths and depths tell from the bytes of a window of source
code which package of the standard library it is of; each has a few packages more than others. In
every round a client sends one vector: a random convex combination of its classes' mean features,
with the same combination of their labels, in 32, 8, 4 or 2 bits. The server trains a head on what
it got and sends it back. Then it plays the curious: how much of the inputs can it recover from
features of single windows, and from entangled ones? See README.md for what came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jquant as jq
from jquant import exchange

RESULTS = Path(__file__).with_name("results.json")
PACKAGES = (
    "asyncio", "ctypes", "email", "http", "importlib", "json", "logging", "multiprocessing",
    "unittest", "xml",
)  # fmt: skip
WIDTHS = ((64,), (128,), (96, 48), (128, 96, 64))  # of hidden layers, client by client
FEATURES, BYTES = 64, 128  # entries of a representation; values of a byte that are counted
Networks = list[list[dict[str, jax.Array]]]


@dataclass(frozen=True)
class Setting:
    """One run; "fixed" sends one combination in all rounds, "means" every class's own mean."""

    sends: str = "entangled"
    bits: int = 32
    rounds: int = 30
    steps: int = 20  # local ones in a round, of all of a client's windows
    head_steps: int = 50
    clients: int = 8
    window: int = 512
    most: int = 240  # windows of a package
    skew: float = 0.3  # of the Dirichlet distribution of packages over clients
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """A client's windows as roots of byte frequencies `[n, BYTES]`, and their packages."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def windows(name: str, s: Setting) -> np.ndarray:
    """Roots of the frequencies of bytes in windows of a package's source code."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    text = np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8)
    rows = text[: len(text) // s.window * s.window].reshape(-1, s.window)
    rows = rows[np.linspace(0, len(rows) - 1, min(s.most, len(rows))).astype(int)]
    counts = np.stack([np.bincount(np.minimum(row, BYTES - 1), minlength=BYTES) for row in rows])
    return np.sqrt(counts / s.window).astype(np.float32)


def split(s: Setting) -> list[Data]:
    """The windows of all packages, dealt to clients by a skewed lot; a quarter of each to test."""
    random = np.random.default_rng(s.seed)
    parts: list[list[tuple[np.ndarray, int]]] = [[] for _ in range(s.clients)]
    for label, name in enumerate(PACKAGES):
        rows = random.permutation(windows(name, s))
        ends = (random.dirichlet([s.skew] * s.clients).cumsum() * len(rows)).astype(int)[:-1]
        for part, own in zip(parts, np.split(rows, ends), strict=True):
            part.append((own, label))
    clients = []
    for part in parts:
        x = np.concatenate([rows for rows, _ in part])
        y = np.concatenate([np.full(len(rows), label) for rows, label in part])
        order, cut = random.permutation(len(x)), len(x) // 4
        test, train = order[:cut], order[cut:]
        clients.append(Data(x[train], y[train], x[test], y[test]))
    return clients


def layers(sizes: tuple[int, ...], key: jax.Array) -> list[dict[str, jax.Array]]:
    """Random layers of these sizes."""
    return [
        {"w": jax.random.normal(k, (a, b), jnp.float32) * (2 / a) ** 0.5,
         "b": jnp.zeros(b, jnp.float32)}
        for a, b, k in zip(sizes, sizes[1:], jax.random.split(key, len(sizes)), strict=False)
    ]  # fmt: skip


def features(network: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The representation `[..., FEATURES]` of inputs `[..., BYTES]`."""
    x = (x - BYTES**-0.5) * 4.0
    for number, layer in enumerate(network):
        x = (x if number == 0 else jax.nn.relu(x)) @ layer["w"] + layer["b"]
    return jnp.tanh(x)


def logits(head: Any, z: jax.Array) -> jax.Array:
    return z @ head["w"] + head["b"]


@partial(jax.jit, static_argnames="steps")
def trained(network: Any, head: Any, x: jax.Array, y: jax.Array, steps: int) -> Any:
    """A client's network and head after some steps on its windows."""
    optimizer = optax.adam(2e-3)

    def loss(both: Any) -> jax.Array:
        return optax.softmax_cross_entropy(logits(both[1], features(both[0], x)), y).mean()

    def step(state: Any, _: None) -> tuple[Any, None]:
        change, moments = optimizer.update(jax.grad(loss)(state[0]), state[1])
        return (optax.apply_updates(state[0], change), moments), None

    start = (network, head)
    return jax.lax.scan(step, (start, optimizer.init(start)), None, steps)[0][0]


@partial(jax.jit, static_argnames="steps")
def head_of(head: Any, z: jax.Array, y: jax.Array, steps: int) -> Any:
    """The server's head after some steps on what clients sent, labels being mixtures."""
    optimizer = optax.adam(1e-2)

    def step(state: Any, _: None) -> tuple[Any, None]:
        loss = lambda h: optax.softmax_cross_entropy(logits(h, z), y).mean()  # noqa: E731
        change, moments = optimizer.update(jax.grad(loss)(state[0]), state[1])
        return (optax.apply_updates(state[0], change), moments), None

    return jax.lax.scan(step, (head, optimizer.init(head)), None, steps)[0][0]


def through(tree: Any, bits: int, key: jax.Array) -> tuple[Any, int]:
    """What arrives of what is sent, and its bytes; all goes through real packets."""
    if bits == 32:
        return tree, sum(leaf.size * 4 for leaf in jax.tree.leaves(tree))
    grid = jq.grids.Uniform(bits, symmetric=True, convention="S3", scale_dtype="float16")
    packet = jq.compress(tree, grid, key)
    data = exchange.to_bytes(packet)
    return jq.decompress(exchange.from_bytes(data, packet)), len(data)


def means(data: Data, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of values over each class that a client has, and these classes' labels."""
    labels = np.unique(data.y)
    rows = np.stack([values[data.y == label].mean(0) for label in labels])
    return rows, np.eye(len(PACKAGES), dtype=np.float32)[labels]


def message(s: Setting, data: Data, z: np.ndarray, random: np.random.Generator) -> Any:
    """What a client sends of its features, and the weights of its classes."""
    rows, labels = means(data, z)
    weights = random.uniform(size=(1, len(rows))).astype(np.float32)
    weights /= weights.sum()
    if s.sends == "means":
        weights = np.eye(len(rows), dtype=np.float32)
    return {"z": jnp.asarray(weights @ rows), "y": jnp.asarray(weights @ labels)}, weights


def accuracy(clients: list[Data], networks: Networks, heads: list[Any]) -> float:
    """The percentage of all held-out windows of which a client's own network tells the package."""
    right = []
    for data, network, head in zip(clients, networks, heads, strict=True):
        guess = logits(head, features(network, jnp.asarray(data.test_x))).argmax(-1)
        right.append(np.asarray(guess) == data.test_y)
    return round(100 * float(np.concatenate(right).mean()), 2)


def run(s: Setting) -> tuple[dict[str, Any], list[Data], Networks]:
    """Accuracy with the last head that came, and after local steps from there; bytes sent."""
    clients, key = split(s), jax.random.key(s.seed)
    keys = jax.random.split(key, s.clients + 1)
    sizes_of = [(BYTES, *WIDTHS[k % len(WIDTHS)], FEATURES) for k in range(s.clients)]
    networks = list(map(layers, sizes_of, keys))
    (head,) = layers((FEATURES, len(PACKAGES)), keys[-1])
    heads, sizes = [head] * s.clients, []
    eye = np.eye(len(PACKAGES), dtype=np.float32)
    pairs = [(jnp.asarray(data.x), jnp.asarray(eye[data.y])) for data in clients]
    for number in range(s.rounds):
        messages = []
        for k, data in enumerate(clients):
            networks[k], heads[k] = trained(networks[k], heads[k], *pairs[k], s.steps)
            if s.sends == "nothing":
                continue
            luck = (s.seed, k) if s.sends == "fixed" else (s.seed, k, number + 1)
            seen = np.asarray(features(networks[k], pairs[k][0]))
            tree, _ = message(s, data, seen, np.random.default_rng(luck))
            own = jax.random.fold_in(jax.random.fold_in(key, number), k)
            arrived, size = through(tree, s.bits, own)
            messages.append(arrived)
            sizes.append(size)
        if messages:
            z, y = (np.concatenate([m[name] for m in messages]) for name in "zy")
            head = head_of(head, jnp.asarray(z), jnp.asarray(np.maximum(y, 0)), s.head_steps)
            heads = [head] * s.clients
    scores = [accuracy(clients, networks, heads)]
    for k, pair in enumerate(pairs):
        networks[k], heads[k] = trained(networks[k], heads[k], *pair, s.steps)
    scores.append(accuracy(clients, networks, heads))
    row = {
        "sends": s.sends, "bits": s.bits, "seed": s.seed, "rounds": s.rounds,
        "bytes_per_client_and_round": round(float(np.mean(sizes)), 1) if sizes else 0,
        "accuracy": scores[0], "accuracy_after_local_steps": scores[1],
    }  # fmt: skip
    return row, clients, networks


@partial(jax.jit, static_argnames="steps")
def inverted(network: Any, target: jax.Array, start: jax.Array, steps: int = 500) -> jax.Array:
    """Inputs whose features come nearest to the targets `[n, FEATURES]`, by descent from one."""
    optimizer = optax.adam(5e-2)
    guess = jnp.broadcast_to(2 * jnp.log(start + 1e-3), (target.shape[0], start.size))

    def loss(guess: jax.Array) -> jax.Array:
        return ((features(network, jnp.sqrt(jax.nn.softmax(guess))) - target) ** 2).sum()

    def step(state: Any, _: None) -> tuple[Any, None]:
        change, moments = optimizer.update(jax.grad(loss)(state[0]), state[1])
        return (optax.apply_updates(state[0], change), moments), None

    end = jax.lax.scan(step, (guess, optimizer.init(guess)), None, steps)[0][0]
    return jnp.sqrt(jax.nn.softmax(end))


def alike(a: np.ndarray, b: np.ndarray, middle: np.ndarray) -> float:
    """The mean cosine of what is peculiar to inputs, each less the mean of all clients' inputs."""
    a, b = a - middle, b - middle
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / np.maximum(sizes, 1e-12)).mean())


def attack(s: Setting, clients: list[Data], networks: Networks, bits: int) -> dict[str, Any]:
    """What a server that has a client's network recovers: of single windows, and of a mixture."""
    middle = np.concatenate([d.x for d in clients]).mean(0)
    scores: dict[str, list[float]] = {"window": [], "mixture": [], "window_of_mixture": []}
    for k, data in enumerate(clients):
        random, key = np.random.default_rng((s.seed, k)), jax.random.key(1000 * s.seed + k)
        rows = data.x[random.permutation(len(data.x))[:16]]
        single = features(networks[k], jnp.asarray(rows))
        seen = [through(z, bits, jax.random.fold_in(key, n))[0] for n, z in enumerate(single)]
        guess = np.asarray(inverted(networks[k], jnp.stack(seen), jnp.asarray(middle)))
        scores["window"].append(alike(guess, rows, middle))
        z = features(networks[k], jnp.asarray(data.x))
        tree, weights = message(s, data, np.asarray(z), random)
        mixed, _ = through(tree, bits, key)
        guess = np.asarray(inverted(networks[k], mixed["z"], jnp.asarray(middle)))
        scores["mixture"].append(alike(guess, weights @ means(data, data.x)[0], middle))
        scores["window_of_mixture"].append(alike(guess, data.x, middle))
    cosines = {name: round(float(np.mean(score)), 3) for name, score in scores.items()}
    return {"bits": bits, "seed": s.seed, **cosines}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="seconds; writes nothing")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.small:
        s = Setting(bits=4, rounds=1, steps=1, head_steps=1, clients=2, most=8)
        row, clients, networks = run(s)
        print(json.dumps(row), json.dumps(attack(s, clients[:1], networks, 4)))
        return
    versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "optax", "numpy")}
    versions["python"], runs, attacks = platform.python_version(), [], []
    ways = [("entangled", bits) for bits in (32, 4, 8, 2)]
    ways += [(sends, 32) for sends in ("nothing", "fixed", "means")]
    for seed, (sends, bits) in itertools.product(range(options.seeds), ways):
        row, clients, networks = run(s := Setting(sends, bits, seed=seed))
        runs.append(row)
        print(json.dumps(row), flush=True)
        if (sends, bits) == ("entangled", 32):
            attacks += [attack(s, clients, networks, b) for b in (32, 8, 4, 2)]
            print(*map(json.dumps, attacks[-4:]), sep="\n", flush=True)
        setup = dataclasses.asdict(Setting()) | {"widths": WIDTHS, "packages": PACKAGES}
        result = {"versions": versions, "setting": setup, "runs": runs, "attacks": attacks}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
