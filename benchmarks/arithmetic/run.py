"""The climate study with `jq.emulate`: heat column, Lorenz, shallow water; writes arithmetic.json.

    python -m benchmarks.arithmetic.run                 # all parts, ~15 minutes on one core
    python -m benchmarks.arithmetic.run heat lorenz     # some

Bits of significand are a traced number: one compiled program gives all precisions. Carried by
float64, but for shallow water's; overheads are in float32, beside pychop where it is installed.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

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
    bits = np.array([12, 10, 8, 6], np.int32)
    keys = jax.random.split(KEY, 4)

    def states(start):
        (records,) = lorenz.integrate(lorenz.lorenz96, start, 100 * units, 20)
        return records[len(records) // 3 :].reshape(-1)

    double = jax.jit(jax.vmap(lambda key: states(lorenz.start96(key, members))))(keys)
    start = lorenz.start96(keys[0], members)
    near, random = jax.jit(lambda: both(lambda: states(start), bits, keys[:1]))()
    distance = jax.jit(jq.distances.wasserstein)
    rows = {
        str(b): {
            "nearest": float(distance(near[k], double[1])),
            "stochastic": float(distance(random[k, 0], double[1])),
        }
        for k, b in enumerate(bits)
    }
    return {"band": list(jq.distances.band(list(double), distance)), "w1": rows}


def run_shallow_water(spin_up: int = 120, days: int = 48, runs: int = 3) -> dict[str, Any]:
    """W1 of u, v and η at every grid point over daily states, averaged over points.

    Carried by float32, which holds 12 bits with enough to spare; the band is float64's.
    """
    bits = np.array([12, 10, 8], np.int32)
    day = shallow_water.STEPS_PER_DAY
    spun = jax.jit(lambda: shallow_water.integrate(shallow_water.rest(), 1, spin_up * day))()
    spun = jax.tree.map(lambda a: a[-1], spun)

    def member(key):
        nudge = 1 + 1e-3 * jax.random.normal(key, spun.eta.shape, spun.eta.dtype)
        return spun._replace(eta=spun.eta * nudge)

    def later(start):  # apart by then, so that runs share nothing but their climate
        flow = shallow_water.integrate(start, days + days // 4)
        return jax.tree.map(lambda a: a[days // 4 :], flow)

    starts = [member(key) for key in jax.random.split(KEY, runs)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *starts)
    double = jax.jit(jax.vmap(later))(stacked)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), starts[0])
    near, random = jax.jit(lambda keys: both(lambda: later(single), bits, keys))(KEY[None])

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

    def of(tree, *at):
        return jax.tree.map(lambda a: a[at], tree)

    def named(flow):
        return {name: float(value) for name, value in flow._asdict().items()}

    pairs = [named(distance(of(double, a), of(double, b))) for a in range(runs) for b in range(a)]
    band = {name: sorted(pair[name] for pair in pairs) for name in pairs[0]}
    rows = {}
    for k, b in enumerate(bits):
        rows[str(b)] = {
            name: named(distance(run, of(double, 1)))
            for name, run in (("nearest", of(near, k)), ("stochastic", of(random, k, 0)))
        }
    spread = jax.tree.map(lambda a: float(jnp.std(a[0], 0).mean()), double)._asdict()
    return {"days": days, "band": band, "standard_deviation": spread, "w1": rows}


PARTS = {
    "heat": run_heat,
    "lorenz": run_lorenz,
    "lorenz96": run_lorenz96,
    "shallow_water": run_shallow_water,
    "overhead_lorenz": lambda: measure_overhead("Lorenz 63, 4096 members"),
    "overhead_shallow_water": lambda: measure_overhead("shallow water"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    for name in parser.parse_args().parts or PARTS:
        begun = time.perf_counter()
        found = PARTS[name]()
        found["seconds"] = time.perf_counter() - begun
        print(name, json.dumps(found, indent=1), flush=True)
        parts = json.loads(PATH.read_text())["parts"] if PATH.exists() else {}
        parts[name] = found
        RESULTS.mkdir(exist_ok=True)
        PATH.write_text(json.dumps({"machine": machine(), "parts": parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
