"""A small job that can be killed: `python -m tests.kill_job FOLDER`, and what it is made of.

The process compiles all there is to compile in a job of its own, says `ready` and how many seconds
a job takes by then, and begins the job whose stages are kept in FOLDER.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from jquant.grids import Uniform
from jquant.rounding import GPTQ, Nearest, Rounded

STAGES = 8


@jax.tree_util.register_static
@dataclass(frozen=True)
class Dithered:
    """Nearest rounding of a weight with noise on it: it needs a key."""

    amount: float = 0.1

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"key"})

    def __call__(
        self, w: Any, grid: Any, groups: Any = jq.Groups(), *, evidence: Any = None, key: Any = None
    ) -> Rounded:
        noise = self.amount * jax.random.normal(key, w.shape, w.dtype)
        return Nearest()(w + noise, grid, groups, evidence=evidence)


def _normal(seed: int, *shape: int) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape) / shape[-2] ** 0.5
    return jnp.asarray(values.astype(np.float32))


PARAMS = {
    "enter": _normal(0, 6, 8),
    "blocks": {"up": _normal(1, 3, 8, 10), "down": _normal(2, 3, 10, 8), "bias": _normal(3, 3, 8)},
    "head": _normal(4, 8, 5),
}
BATCHES = [3 * _normal(5, 16, 6), 3 * _normal(6, 16, 6), 2 * _normal(7, 9, 6)]


def fn(params: Any, x: jax.Array) -> jax.Array:
    def block(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ p["up"] + 0.5) @ p["down"] + p["bias"], None

    x, _ = jax.lax.scan(block, x @ params["enter"], params["blocks"])
    return jnp.tanh(x) @ params["head"]


@functools.cache
def plan(bits: int = 3) -> jq.Plan:
    gptq = jq.Scheme(Uniform(bits), 4, GPTQ())
    dithered = jq.Scheme(Uniform(4), None, Dithered())
    rules = {".*down": dithered, ".*": gptq}
    return jq.plan(jq.find_weights(fn, PARAMS, BATCHES[0]), rules)


def job(work_dir: Any = None, **others: Any) -> tuple[Any, jq.Report]:
    """The job; what is given takes the place of what is usual."""
    given = {
        "fn": fn,
        "params": PARAMS,
        "plan": plan(),
        "batches": BATCHES,
        "key": jax.random.key(3),
        "work_dir": work_dir,
        **others,
    }
    return jq.quantize(**given)  # type: ignore[arg-type]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two", "three"):
            start = time.perf_counter()
            job(Path(folder) / name)
    print("ready", time.perf_counter() - start, flush=True)
    job(sys.argv[1])
    print("done", flush=True)


if __name__ == "__main__":
    main()
