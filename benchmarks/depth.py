"""Peak memory against depth: GPTQ on decoders whose weights are several times the memory allowed.

    python -m benchmarks.depth                          # all depths, under the limit; ~20 minutes
    python -m benchmarks.depth --layers 2 --layers 4 --width 512 --hidden 1408 --limit 0    # a look

For every depth a decoder of random float32 weights is written to `.cache/depth`, tensor by tensor,
and deleted when it is done. A fresh process then takes itself a limit of address space (`ulimit
-v`: the strictest limit there is, for it counts all that is mapped or reserved, whether memory
stands behind it or not), loads the network lazily, quantizes it stage by stage with a work
directory, and saves the result. Peak memory is `VmHWM` of `/proc/self/status`, the largest resident
size since the process began. To load the deepest network eagerly under the same limit must fail,
and how it does is kept in the results.

Two settings of glibc's allocator: `MALLOC_ARENA_MAX=1`, because it reserves 64 MB of addresses or
more for every further thread, which the limit would count; and `MALLOC_MMAP_THRESHOLD_`, which
keeps arrays out of the heap. In the heap they leave gaps that only part of is used again: resident
memory then creeps upwards by some percent while what is alive stays the same (`--malloc default`
measures that, without the limit).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from benchmarks.harness import write
from jquant.grids import Uniform
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.models.quantized import is_quantized, save_quantized
from jquant.rounding import GPTQ
from jquant.trees.lazy import Lazy, Window

WORK = Path(__file__).parent.parent / ".cache" / "depth"
DEPTHS = (4, 8, 16, 32)
WIDTH, HIDDEN, HEADS, VOCAB = 2048, 2816, 16, 512
LIMIT = 1_400_000_000
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
WINDOWS, LENGTH = 4, 128
SCHEME = jq.Scheme(Uniform(4, scale_dtype="float16"), 64, GPTQ())


# The network on disk


def make(folder: Path, config: DecoderConfig) -> int:
    """A folder that `jq.models.load` reads; its weights are made as they are written.

    Returns:
        bytes of its float32 weights.
    """
    fn = Decoder(config)
    shapes = jax.eval_shape(fn.init, jax.random.key(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    params = jax.tree.unflatten(structure, [_random(str(keys), leaf) for keys, leaf in leaves])
    if not is_quantized(folder):
        save_quantized(folder, fn, params)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _random(name: str, like: jax.ShapeDtypeStruct) -> Lazy:
    """Numbers of about the size that `Decoder.init` draws, the same for a name every time."""

    def draw(window: Window) -> np.ndarray:
        if len(like.shape) == 1:
            return np.ones(like.shape, np.float32)[window]
        random = np.random.default_rng(zlib.crc32(name.encode()))
        return (random.random(like.shape, np.float32) - np.float32(0.5))[window] * scale

    scale = np.float32((12 / like.shape[0]) ** 0.5)
    return Lazy(like.shape, np.dtype(np.float32), draw, f"random numbers for {name}")


# One run, in a process of its own


def status() -> dict[str, int]:
    """Bytes: resident now and at most, of it in files; addresses taken now and at most."""
    said = Path("/proc/self/status").read_text()
    names = {"resident": "VmRSS", "files": "RssFile", "peak": "VmHWM", "addresses_peak": "VmPeak",
             "data": "VmData"}  # fmt: skip
    found = {k: re.search(rf"^{v}:\s+(\d+) kB", said, re.MULTILINE) for k, v in names.items()}
    return {k: int(match[1]) << 10 for k, match in found.items() if match}


def run(model: Path, limit: int, lazy: bool) -> dict[str, Any]:
    """Load, plan, quantize, save under the limit; memory after each."""
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    phases: dict[str, dict[str, int]] = {}
    by_stage: dict[int, int] = {}

    def done(phase: str) -> None:
        phases[phase] = status()

    def told(progress: jq.Progress) -> None:
        by_stage[progress.stage] = status()["resident"]

    done("import")
    start = time.perf_counter()
    fn, params, _ = jq.models.load(model, lazy=lazy)
    if not lazy:
        jax.block_until_ready(params)
    done("load")
    batch = np.random.default_rng(0).integers(0, VOCAB, (WINDOWS, LENGTH), np.int32)
    weights = jq.find_weights(fn, params, batch)
    plan = jq.plan(weights, {"layers/.*": SCHEME, ".*": jq.keep})
    done("plan")
    with tempfile.TemporaryDirectory(dir=model.parent) as work:
        q, report = jq.quantize(
            fn, params, plan, [batch], work_dir=work if lazy else None, progress=told
        )
        done("quantize")
        result = Path(f"{model}.result.safetensors")
        jq.save(result, q)
        done("save")
    size = result.stat().st_size
    result.unlink()
    return {
        "seconds": time.perf_counter() - start,
        "seconds_by_phase": dict(report.seconds),
        "result_bytes": size,
        "stages": len(report.stages),
        "error_vs_nearest": report.ratio,
        "peak_bytes": {phase: found["peak"] for phase, found in phases.items()},
        "status": phases,
        "resident_by_stage": [by_stage[stage] for stage in sorted(by_stage)],
    }


def start(model: Path, limit: int, tuned: bool, lazy: bool) -> subprocess.CompletedProcess[str]:
    """`run` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.depth", "--here", str(model)]
    command += ["--limit", str(limit)] + ([] if lazy else ["--eager"])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "MALLOC"))}
    env |= MALLOC if tuned else {}
    return subprocess.run(command, env=env, text=True, capture_output=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, action="append", help=f"depths; else {DEPTHS}")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--limit", type=int, default=LIMIT, help="bytes of addresses; 0: none")
    parser.add_argument("--malloc", choices=("tuned", "default"), default="tuned")
    parser.add_argument("--keep", action="store_true", help="leave the weights on disk")
    parser.add_argument("--here", type=Path, help="run this model in this process, print JSON")
    parser.add_argument("--eager", action="store_true", help="with --here: load all at once")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(run(options.here, options.limit, not options.eager)))
        return
    depths = options.layers or DEPTHS
    rows, eager, tuned = [], None, options.malloc == "tuned"
    for layers in depths:
        config = DecoderConfig(
            VOCAB, options.width, options.hidden, layers, heads=HEADS, kv_heads=HEADS
        )
        model = WORK / f"{options.width}-{options.hidden}-{layers}"
        _room(16 * layers * options.width * (options.width + options.hidden))
        size = make(model, config)
        found = start(model, options.limit, tuned, lazy=True)
        if found.returncode:
            sys.exit(found.stderr)
        row = {"layers": layers, "weights_bytes": size, "limit_bytes": options.limit}
        rows.append(row | json.loads(found.stdout.splitlines()[-1]))
        print({k: v for k, v in rows[-1].items() if k != "resident_by_stage"}, flush=True)
        if options.limit and layers == max(depths):
            failed = start(model, options.limit, tuned, lazy=False)
            said = [line for line in failed.stderr.splitlines() if line.strip()]
            eager = {"layers": layers, "returncode": failed.returncode, "stderr": said[-1:]}
            print("loaded eagerly:", eager, flush=True)
        if not options.keep:
            shutil.rmtree(model)
    if options.layers or options.width != WIDTH or not (options.limit and tuned):
        return
    write(
        "depth",
        network={"width": WIDTH, "hidden": HIDDEN, "heads": HEADS, "vocabulary": VOCAB},
        scheme=str(SCHEME),
        calibration_tokens=WINDOWS * LENGTH,
        limit={"kind": "RLIMIT_AS (ulimit -v)", "bytes": options.limit},
        malloc=MALLOC,
        rows=rows,
        eager_under_the_limit=eager,
    )


def _room(needed: int) -> None:
    """Leave if the disk has no room for so many bytes twice."""
    WORK.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(WORK).free
    if free < 2 * needed:
        sys.exit(f"{WORK}: {needed >> 20} MiB to write, {free >> 20} MiB free")


if __name__ == "__main__":
    main()
