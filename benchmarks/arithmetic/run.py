"""The climate study with `jq.emulate`: heat column, Lorenz, shallow water; writes arithmetic.json.

    python -m benchmarks.arithmetic.run                 # all parts, ~20 minutes of one core
    python -m benchmarks.arithmetic.run heat lorenz     # some
    python -m benchmarks.arithmetic.run speedy          # only when asked for: see speedy.py

Bits of significand are a traced number: one compiled program gives all precisions. Carried by
float64, but for shallow water's; overheads are in float32, beside pychop where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import time
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

import jquant as jq  # noqa: E402
from benchmarks.arithmetic import heat, lorenz, shallow_water  # noqa: E402
from benchmarks.arithmetic.overhead import measure as measure_overhead  # noqa: E402
from benchmarks.harness import RESULTS, machine  # noqa: E402

PATH = RESULTS / "arithmetic.json"
KEY = jax.random.key(0)


def both(fn, bits, keys):
    """A program's outputs for every number of bits: to nearest `[bits, ...]`, at random
    `[bits, keys, ...]`."""
    near = jax.vmap(lambda b: jq.emulate(fn, b)())(bits)
    each = jax.vmap(lambda b, key: jq.emulate(fn, b, "stochastic")(key), (None, 0))
    return near, jax.vmap(each, (0, None))(bits, keys)


def run_heat(years: int = 60, seeds: int = 8) -> dict[str, Any]:
    bits = np.array([23, 16, 10], np.int32)

    def column():
        return heat.integrate(heat.start(), years, heat.STEPS_PER_YEAR)

    double = np.asarray(jax.jit(column)())
    near, random = jax.jit(lambda keys: both(column, bits, keys))(jax.random.split(KEY, seeds))

    def rmse(column):
        return np.sqrt(np.mean((np.asarray(column) - double) ** 2, -1))

    rows = {}
    for k, b in enumerate(bits):
        for year in (10, years):
            rows.setdefault(str(b), {})[f"{year} years"] = {
                "nearest": rmse(near[k])[year - 1],
                "stochastic": [row[year - 1] for row in rmse(random[k])],
            }
    final = {"mean": double[-1].mean(), **{f"{m} m": double[-1, m] for m in (10, 30, 60)}}
    return {"years": years, "rmse": rows, "double": final}


def run_lorenz(members: int = 64, units: int = 400, seeds: int = 3) -> dict[str, Any]:
    """Second half of each run, every fifth step."""
    bits = np.array([12, 10, 9, 8], np.int32)
    keys = jax.random.split(KEY, seeds)

    def states(start):
        records = jnp.stack(lorenz.integrate(lorenz.lorenz63, start, 100 * units, 5), -1)
        return records[len(records) // 2 :].reshape(-1, 3)

    each = jax.vmap(lambda key: lorenz.start(key, members))
    starts = each(keys)
    others = each(jnp.concatenate([keys, jax.random.split(keys[0], seeds)]))
    double = jax.jit(jax.vmap(states))(others)

    def seeded(start, key):
        return both(lambda: states(start), bits, key[None])

    near, random = jax.jit(jax.vmap(seeded))(starts, keys)
    distance = jax.jit(jq.distances.wasserstein)

    def spread(one, two):  # of x, made symmetric as the attractor is, and of z
        pairs = (jnp.concatenate([s[:, 0], -s[:, 0]]) for s in (one, two))
        return {"x": float(distance(*pairs)), "z": float(distance(one[:, 2], two[:, 2]))}

    band = {
        name: list(jq.distances.band(list(double), lambda a, b, n=name: spread(a, b)[n]))
        for name in ("x", "z")
    }
    rows: dict[str, Any] = {}
    for k, b in enumerate(bits):
        for name, found in (("nearest", near[:, k]), ("stochastic", random[:, k, 0])):
            clouds = [np.asarray(found[s]) for s in range(seeds)]
            far = [spread(cloud, double[seeds + s]) for s, cloud in enumerate(clouds)]
            rows.setdefault(str(b), {})[name] = {
                "unique": [len(np.unique(cloud, axis=0)) for cloud in clouds],
                "w1": {v: [row[v] for row in far] for v in ("x", "z")},
            }
    return {"states": len(double[0]), "band": band, "rows": rows}


def run_lorenz96(members: int = 16, units: int = 60) -> dict[str, Any]:
    """Low precision starts as the first double run does, and is compared with the others."""
    bits = np.array([12, 10, 8, 6], np.int32)
    keys = jax.random.split(KEY, 4)

    def states(start):
        (records,) = lorenz.integrate(lorenz.lorenz96, start, 100 * units, 20)
        return records[len(records) // 3 :].reshape(-1)

    double = jax.jit(jax.vmap(lambda key: states(lorenz.start96(key, members))))(keys)
    start = lorenz.start96(keys[0], members)
    near, random = jax.jit(lambda: both(lambda: states(start), bits, keys[:1]))()
    distance = jax.jit(jq.distances.wasserstein)

    def far(run):
        return float(np.mean([distance(run, other) for other in double[1:]]))

    rows = {
        str(b): {"nearest": far(near[k]), "stochastic": far(random[k, 0])}
        for k, b in enumerate(bits)
    }
    band = list(jq.distances.band(list(double), distance))
    return {"band": band, "double": far(double[0]), "w1": rows}


def run_shallow_water(
    spin_up: int = 480, days: int = 24, lead: int = 8, apart: int = 40, runs: int = 4
) -> dict[str, Any]:
    """W1 of u, v and η at every grid point over daily states, averaged over points.

    A nudge grows e-fold in weeks only, so runs from nudged starts stay together. The band is of
    stretches of one long double run instead, which begin `apart` days from each other. Low
    precision, carried by float32, starts where the first does and is compared with the others.
    """
    bits = np.array([12, 10, 8], np.int32)
    day = shallow_water.STEPS_PER_DAY

    @jax.jit
    def spun(flow, days):
        return lax.fori_loop(0, days * day, lambda _, flow: shallow_water.step(flow), flow)

    def later(start):
        flow = shallow_water.integrate(start, lead + days)
        return jax.tree.map(lambda a: a[lead:], flow)

    starts = [spun(shallow_water.rest(), spin_up)]
    for _ in range(runs - 1):
        starts.append(spun(starts[-1], apart))
    # One run after the other is as fast as all at once, and one compiled program is for all bits.
    full = jax.jit(later)
    double = [full(start) for start in starts]
    single = jax.tree.map(lambda a: a.astype(jnp.float32), starts[0])
    found: dict[str, dict[str, Any]] = {}
    for b in bits:
        near = jq.emulate(later, jnp.int32(b))(single)
        random = jq.emulate(later, jnp.int32(b), "stochastic")(KEY, single)
        found[str(b)] = jax.block_until_ready({"nearest": near, "stochastic": random})
        print(f"shallow water: {b} bits", flush=True)

    @jax.jit
    def distance(one, two):
        return jax.tree.map(
            lambda a, b: jnp.mean(
                jax.vmap(jq.distances.wasserstein, (1, 1))(
                    a.reshape(len(a), -1).astype(float), b.reshape(len(b), -1).astype(float)
                )
            ),
            one,
            two,
        )

    def named(flow):
        return {name: float(value) for name, value in flow._asdict().items()}

    pairs = [named(distance(one, two)) for one, two in itertools.combinations(double, 2)]
    band = {name: sorted(pair[name] for pair in pairs) for name in pairs[0]}

    def far(run):
        each = [named(distance(run, other)) for other in double[1:]]
        return {name: float(np.mean([one[name] for one in each])) for name in band}

    rows = {b: {name: far(run) for name, run in row.items()} for b, row in found.items()}
    shadow = {
        b: {name: named(distance(run, double[0])) for name, run in row.items()}
        for b, row in found.items()
    }
    spread = jax.tree.map(lambda a: float(jnp.std(a, 0).mean()), double[0])._asdict()
    return {
        "days": days,
        "band": band,
        "double": far(double[0]),
        "standard_deviation": spread,
        "w1": rows,
        "same_start": shadow,
    }


def run_speedy() -> dict[str, Any]:
    """In an environment of its own, and so imported only when asked for."""
    from benchmarks.arithmetic import speedy

    own = {name: importlib.metadata.version(name) for name in ("jcm", "dinosaur", "jax", "numpy")}
    return speedy.run(partly=lambda found: store("speedy", found | {"versions": own})) | {
        "versions": own
    }


PARTS = {
    "heat": run_heat,
    "lorenz": run_lorenz,
    "lorenz96": run_lorenz96,
    "shallow_water": run_shallow_water,
    "overhead_lorenz": lambda: measure_overhead("Lorenz 63, 4096 members"),
    "overhead_shallow_water": lambda: measure_overhead("shallow water"),
}
ASKED = {"speedy": run_speedy}  # not among all parts


def store(name: str, found: dict[str, Any]) -> None:
    """Put a part beside the others."""
    kept = json.loads(PATH.read_text()) if PATH.exists() else {"parts": {}}
    about = kept.get("machine", machine()) if name in ASKED else machine()
    RESULTS.mkdir(exist_ok=True)
    whole = {"machine": about, "parts": kept["parts"] | {name: found}}
    PATH.write_text(json.dumps(whole, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, *ASKED, []])
    for name in parser.parse_args().parts or PARTS:
        begun = time.perf_counter()
        found = (PARTS | ASKED)[name]()
        found["seconds"] = time.perf_counter() - begun
        print(name, json.dumps(found, indent=1), flush=True)
        store(name, found)


if __name__ == "__main__":
    main()
