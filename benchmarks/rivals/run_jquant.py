"""jquant's parts: `weight` and `block` (quantize), `forwards`, `solver`, and `quality`.

* `weight`, `block`: `find_weights`, `plan` and `jq.quantize(..., sequential=...)`, compiling and
  all, timed to the last array; `compile_s` is XLA's share of it.
* `forwards`: two passes of `jax.jit(fn)` over all batches, logits to the last; compiled before.
* `solver`: `jq.quantize(..., evidence=...)` on moments read before; `seconds` once compiled (its
  programs, not the process), `first_seconds` with compiling.
* `quality`: not timed; TOKENS are held-out windows, `--save` the folder with the weights of all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from benchmarks.rivals import child
from jquant.grids import Uniform
from jquant.rounding import GPTQ


class Compiling:
    """Seconds that XLA spent compiling since this was made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs


def make_plan(fn: Any, params: Any, batch: np.ndarray) -> Any:
    scheme = jq.Scheme(Uniform(child.BITS), child.GROUP, GPTQ(damping=child.DAMPING))
    weights = jq.find_weights(fn, params, batch)
    return jq.plan(weights, {r"layers/.*/kernel": scheme, ".*": jq.keep})


def quantized(job: child.Job, fn: Any, params: Any, batches: list[np.ndarray]) -> dict[str, Any]:
    compiling = Compiling()

    def run() -> tuple[Any, Any]:
        plan = make_plan(fn, params, batches[0])
        return jax.block_until_ready(
            jq.quantize(fn, params, plan, batches, sequential=job.part)  # pyright: ignore
        )

    (qparams, report), found = child.timed(run)
    found |= {"compile_s": round(compiling.seconds, 3), "error_vs_nearest": report.ratio}
    if job.save is not None:
        from safetensors.numpy import save_file

        values = jax.tree_util.tree_flatten_with_path(jq.dequantize(qparams))[0]
        named = {"/".join(str(key.key) for key in keys): np.asarray(v) for keys, v in values}
        kernels = {path: v for path, v in named.items() if path.startswith("layers/")}
        save_file({p: v for p, v in kernels.items() if p.endswith("/kernel")}, job.save)
    return found


def forwards(fn: Any, params: Any, batches: list[np.ndarray]) -> dict[str, Any]:
    run = jax.jit(fn)
    for shape in {batch.shape: batch for batch in batches}.values():
        jax.block_until_ready(run(params, shape))

    def twice() -> None:
        for _ in range(2):
            for batch in batches:
                jax.block_until_ready(run(params, batch))

    return child.timed(twice)[1]


def solver(fn: Any, params: Any, batches: list[np.ndarray]) -> dict[str, Any]:
    plan = make_plan(fn, params, batches[0])
    evidence = jax.block_until_ready(jq.capture(fn, params, batches, paths=list(plan)))

    def run() -> Any:
        return jax.block_until_ready(jq.quantize(fn, params, plan, evidence=evidence)[0])

    first = child.timed(run)[1]["seconds"]
    compiling = Compiling()
    found = child.timed(run)[1]
    return found | {"first_seconds": first, "compile_s": round(compiling.seconds, 3)}


def quality(job: child.Job, fn: Any, params: Any) -> dict[str, Any]:
    from safetensors.numpy import load_file

    found: dict[str, Any] = {}
    for file in sorted(Path(str(job.save)).glob("*.safetensors")):
        kernels = load_file(file)
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        paths = ["/".join(str(key.key) for key in keys) for keys, _ in leaves]
        missing = [p for p in paths if p.endswith("/kernel") and p not in kernels]
        if missing:
            raise ValueError(f"{file.name} lacks {missing[0]}")
        changed = [kernels.get(p, leaf) for p, (_, leaf) in zip(paths, leaves, strict=True)]
        replaced = jax.tree.map(jax.numpy.asarray, structure.unflatten(changed))
        compared = jq.evaluate.compare(fn, params, replaced, np.split(job.tokens, len(job.tokens)))
        found[file.stem] = vars(compared)
        print(file.stem, compared, flush=True)
    return found


def run(job: child.Job) -> dict[str, Any]:
    fn, params, _ = jq.models.load(job.folder)
    params, batches = jax.block_until_ready(params), job.batches()
    parts = {
        "weight": lambda: quantized(job, fn, params, batches),
        "block": lambda: quantized(job, fn, params, batches),
        "forwards": lambda: forwards(fn, params, batches),
        "solver": lambda: solver(fn, params, batches),
        "quality": lambda: quality(job, fn, params),
    }
    return parts[job.part]()


if __name__ == "__main__":
    child.main(run)
