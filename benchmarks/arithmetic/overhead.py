"""What rounding every operation costs: the same program plain, emulated, and with pychop.

Lorenz ensembles and shallow water in float32, 10 bits. pychop rounds arrays, so what its user would
write by hand is done by a walk over the program: `chop(result)` after each operation that computes.
Its random state lives in the object and does not survive `jit`, so only its nearest rounding is
here. Medians of alternating runs in one process, compiling apart; processor time, all threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from benchmarks.arithmetic import lorenz, shallow_water
from jquant.arithmetic.operations import ARITHMETIC
from jquant.programs.walker import DESCENDED, Walker, bind, trace

BITS, ROUNDS = 10, 3


class _Chopper:
    """Client of the walker that rounds with pychop."""

    def __init__(self):
        from pychop.jx.lightchop import LightChop_  # pyright: ignore[reportMissingImports]

        self.chop = LightChop_(exp_bits=8, sig_bits=BITS, rmode=1)

    def special(self, value: Any) -> bool:
        return False

    def rule(self, eqn, values, walker):
        if eqn.primitive.name in DESCENDED:
            return None
        results = bind(eqn, values)
        if eqn.primitive.name not in ARITHMETIC:
            return results
        return [self.chop(r) if jnp.issubdtype(r.dtype, jnp.floating) else r for r in results]


def chopped(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @jax.jit
    def run(x):
        closed, structure = trace(fn, x)
        results = Walker(_Chopper(), every=True).run(closed, jax.tree.leaves(x))
        return jax.tree.unflatten(structure, results)

    return run


def programs() -> dict[str, tuple[Callable[[Any], Any], Any, int, bool]]:
    """Name → function, input, steps, and whether Threefry, which compiles for long, takes part."""
    members = lorenz.start(jax.random.key(0), 4096)
    steps = 500
    flow = jax.tree.map(lambda a: a.astype(jnp.float32), shallow_water.rest())

    def ensemble(s):
        return lorenz.integrate(lorenz.lorenz63, s, steps, steps)

    def water(flow):
        return shallow_water.integrate(flow, 1, 100)

    return {
        "Lorenz 63, 4096 members": (ensemble, members, steps, True),
        "shallow water": (water, flow, 100, False),
    }


def variants(fn: Callable[[Any], Any], threefry: bool) -> dict[str, Callable[[Any], Any]]:
    key = jax.random.key(0)
    found = {
        "plain": jax.jit(fn),
        "nearest": jq.emulate(fn, BITS),
        "nearest, float16's range": jq.emulate(fn, jnp.float16),
        "nearest, traced bits": jq.emulate(fn, jnp.int32(BITS)),
        "stochastic": lambda x: jq.emulate(fn, BITS, "stochastic")(key, x),
    }
    if threefry:
        strong = jq.emulate(fn, BITS, "stochastic", source="threefry")
        found["stochastic, threefry"] = lambda x: strong(key, x)
    try:
        import pychop  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found
    return found | {"pychop nearest": chopped(fn)}


def timed(run: Callable[[Any], Any], x: Any) -> float:
    begun = time.process_time()
    jax.block_until_ready(run(x))
    return time.process_time() - begun


def measure(name: str) -> dict[str, Any]:
    """All variants of one program."""
    with jax.enable_x64(False):
        return _measure(*programs()[name])


def _measure(fn: Callable[[Any], Any], x: Any, steps: int, threefry: bool) -> dict[str, Any]:
    runs, rows, failed = variants(fn, threefry), {}, {}
    for name, run in list(runs.items()):
        try:
            rows[name] = {"first_call_s": timed(run, x), "seconds": []}
            print(name, rows[name]["first_call_s"], flush=True)
        except Exception as error:  # whatever another tool says
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del runs[name]
    for _ in range(ROUNDS):
        for name, run in runs.items():
            rows[name]["seconds"].append(timed(run, x))
    plain = float(np.median(rows["plain"]["seconds"]))
    for row in rows.values():
        median = float(np.median(row.pop("seconds")))
        row |= {"us_per_step": median / steps * 1e6, "times_plain": median / plain}
    return {"steps": steps, "rows": rows, "failed": failed}
