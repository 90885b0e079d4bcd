"""The GPTQ solver against others, given the same W, H, grid and damping: time, loss, codes.

    python -m benchmarks.gptq_solver [--quick]

One process, two threads, methods alternating (A B A B …), medians. Settings: 4 bits, the asymmetric
grid A1, groups of 64 fitted to the original weights, columns as they lie, damping 0.01. The time of
jquant includes the loss of nearest rounding, which it reports; the rivals compute none. Compiling
is not in the time but beside it. Rivals:

* `torch`: the published column loop, transcribed (`gptq_torch.py`);
* `llm-compressor`: its own `gptq_quantize.quantize_weight`, where installed (PyPI `llmcompressor`
  and `compressed-tensors`, `loguru`; `--no-deps` is enough, anywhere on PYTHONPATH);
* `gptqmodel`: its `GPTQ.quantize`, where installed. It fits groups on the way, to the weights as
  updated, so its codes lie on another grid: `equal_codes` says nothing there, its own loss does;
* `qwix`: `contrib.gptq_core.quantize_weight`, smallest shape only: it unrolls every column. It
  knows no static groups, so both sides use one symmetric group per row there.

Writes `results/gptq_solver.json`, losses and wins alike.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from jquant.axes.groups import Groups, from_groups, to_groups
from jquant.grids import Uniform
from jquant.rounding import GPTQ

BITS, GROUP, DAMPING = 4, 64, 0.01
SHAPES = {(576, 576): 9, (1536, 576): 9, (2048, 2048): 7, (4096, 4096): 5}
QUICK = {(576, 576): 5, (1536, 576): 5, (2048, 2048): 3}

Array = np.ndarray
Solver = Callable[[], Array]  # codes [out, in], or values if they are not on the common grid


def problem(out: int, width: int) -> tuple[Array, Array]:
    """Gaussian weights, and the second moment of correlated inputs of uneven power."""
    random = np.random.default_rng(out + width)
    x = random.standard_normal((2 * width, width), np.float32)
    x = x + 0.5 * np.roll(x, 1, axis=1) + 0.3 * random.standard_normal((2 * width, 1), np.float32)
    x *= np.exp(0.5 * random.standard_normal(width, np.float32))
    return random.standard_normal((out, width), np.float32), x.T @ x


def ours(w: Array, h: Array, grid: Uniform, blocks: Groups) -> tuple[Solver, dict[str, Any]]:
    """The compiled solver, and what compiling took."""
    choice = GPTQ(order="natural", damping=DAMPING)
    arrays = jax.block_until_ready((jnp.asarray(w), jnp.asarray(h)))
    start = time.perf_counter()
    program = jax.jit(lambda w, h: choice(w, grid, blocks, evidence=h)).lower(*arrays).compile()
    seconds = time.perf_counter() - start
    lines = re.findall(r"^ *(?:ROOT )?%\S+ = .*$", program.as_text(), re.MULTILINE)
    count = sum(" constant(" not in line for line in lines)

    def solve() -> Array:
        return np.asarray(jax.block_until_ready(program(*arrays)).codes)

    return solve, {"compile_s": round(seconds, 2), "instructions": count}


def torch_loop(w: Array, h: Array) -> Solver:
    import torch

    from benchmarks import gptq_torch

    tensors = torch.from_numpy(w), torch.from_numpy(h)
    return lambda: gptq_torch.gptq(*tensors, bits=BITS, group=GROUP, damping=DAMPING)[0].numpy()


def llm_compressor(w: Array, h: Array) -> Solver:
    """Its function, loaded without its package, which imports a training stack."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs

    from benchmarks import gptq_torch

    name = "llmcompressor.modifiers.gptq.gptq_quantize"
    if name not in sys.modules:
        found = importlib.metadata.distribution("llmcompressor").locate_file("llmcompressor")
        for parent in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"):
            module = types.ModuleType(parent)
            module.__path__ = [str(Path(str(found), *parent.split(".")[1:]))]
            sys.modules.setdefault(parent, module)
    quantize = importlib.import_module(name).quantize_weight
    settings = QuantizationArgs(
        num_bits=BITS, symmetric=False, strategy="group", group_size=GROUP, actorder=None
    )
    weight, moment = torch.from_numpy(w), torch.from_numpy(h)
    scale, zero = gptq_torch.group_params(weight, 2**BITS - 1, GROUP)
    per_group = scale[None, :, ::GROUP], zero[None, :, ::GROUP]
    shift = 2 ** (BITS - 1)  # its codes are signed

    def solve() -> Array:
        scales, zeros = per_group
        values, _, _ = quantize(
            weight[None].clone(), moment[None].clone(), scales, zeros - shift, None, settings,
            percdamp=DAMPING,
        )  # fmt: skip
        return (torch.round(values[0] / scale) + zero).to(torch.uint8).numpy()

    return solve


def gptqmodel(w: Array, h: Array) -> Solver:
    """Its solver class, on a linear layer with the Hessian put in."""
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ as Theirs

    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    settings = QuantizeConfig(
        bits=BITS, group_size=GROUP, sym=False, desc_act=False, act_group_aware=False,
        damp_percent=DAMPING,
    )  # fmt: skip
    weight, moment = torch.from_numpy(w), torch.from_numpy(h)

    def solve() -> Array:
        layer.weight.data = weight.clone()
        task = Theirs(layer, qcfg=settings)
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples = moment.clone(), 10**6
        return task.quantize()[0].detach().numpy()

    return solve


def qwix_loop(w: Array, h: Array) -> Solver:
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    how = qarray.HowToQuantize(
        qtype=jnp.int4, channelwise_axes=[0], tiled_axes={}, calibration_method="absmax"
    )
    arrays = jnp.asarray(w), jnp.asarray(h)

    def solve() -> Array:
        result, _ = gptq_core.quantize_weight(*arrays, how, percdamp=DAMPING)
        return np.asarray(jax.block_until_ready(result.qvalue)).astype(int)

    return solve


def loss(w: Array, h: Array, codes: Array, grid: Uniform, blocks: Groups) -> float:
    """tr(E H Eᵀ), float64 sums over float32 products; floats are values already."""
    values = codes
    if not np.issubdtype(codes.dtype, np.floating):
        groups = to_groups(jnp.asarray(w), blocks)
        cut = to_groups(jnp.asarray(codes.astype(np.int32)), blocks)
        values = np.asarray(from_groups(grid.decode(cut, grid.fit(groups)), blocks, w.shape[1]))
    e = w - values
    return float(np.sum((e @ h).astype(np.float64) * e))


def race(
    w: Array, h: Array, rivals: dict[str, Callable[[Array, Array], Solver]], grid: Uniform,
    blocks: Groups, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Alternate all solvers on one problem; ours first, and the one losses are compared with."""
    mine, compiled = ours(w, h, grid, blocks)
    solvers: dict[str, Solver] = {"jquant": mine}
    skipped: dict[str, str] = {}
    codes: dict[str, Array] = {}
    for name, make in rivals.items():
        try:
            solvers[name] = make(w, h)
            codes[name] = solvers[name]()  # warm
        except Exception as error:  # a rival that is absent or does not run is a fact to record
            solvers.pop(name, None)
            skipped[name] = f"{type(error).__name__}: {error}"[:200]
    codes["jquant"] = mine()
    times: dict[str, list[float]] = {name: [] for name in solvers}
    for _ in range(repeats):
        for name, solve in solvers.items():
            time.sleep(0.3)  # a rival's worker threads may still be spinning
            start = time.perf_counter()
            solve()
            times[name].append(time.perf_counter() - start)
    best = loss(w, h, codes["jquant"], grid, blocks)
    row: dict[str, Any] = {"shape": list(w.shape), "repeats": repeats, **compiled, "methods": {}}
    for name, spent in times.items():
        row["methods"][name] = {
            "median_s": round(float(np.median(spent)), 4),
            "min_s": round(min(spent), 4),
            "times_jquant": round(float(np.median(spent) / np.median(times["jquant"])), 2),
            "loss_ratio": round(loss(w, h, codes[name], grid, blocks) / best, 6),
            "equal_codes": None
            if np.issubdtype(codes[name].dtype, np.floating)
            else round(float((codes[name] == codes["jquant"]).mean()), 6),
        }
    if skipped:
        row["skipped"] = skipped
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats, no file")
    quick = parser.parse_args().quick
    import torch

    torch.set_num_threads(2)
    rivals = {"torch": torch_loop, "llm-compressor": llm_compressor, "gptqmodel": gptqmodel}
    rows = []
    for (out, width), repeats in (QUICK if quick else SHAPES).items():
        w, h = problem(out, width)
        rows.append(race(w, h, rivals, Uniform(BITS), Groups("in", GROUP), repeats))
        print(rows[-1], flush=True)
    w, h = problem(*(256, 256) if quick else (576, 576))
    grid = Uniform(BITS, symmetric=True)
    unrolled = race(w, h, {"qwix": qwix_loop}, grid, Groups(), 1 if quick else 3)
    print(unrolled, flush=True)
    if not quick:
        versions = {}
        for package in ("llmcompressor", "compressed-tensors", "gptqmodel", "qwix"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        harness.write("gptq_solver", rivals=versions, groups_of_64=rows, whole_rows=unrolled)


if __name__ == "__main__":
    main()
