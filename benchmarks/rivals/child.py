"""One measured process: its arguments, its clock, its JSON. NumPy and the standard library only.

    python -m benchmarks.rivals.run_<tool> FOLDER TOKENS.npy OUT.json [--save W] [--part P]

FOLDER is what `export_hf` wrote, TOKENS int32 `[windows, length]`. OUT gets what was
measured, or `{"failed": ...}`. `--save` names the safetensors file that takes
the dequantized weights under jquant's paths, for `run_jquant --part quality`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BITS, GROUP, DAMPING = 3, 64, 0.01
BATCH = 4  # windows
KINDS = {
    "self_attn.q_proj": "attention/q", "self_attn.k_proj": "attention/k",
    "self_attn.v_proj": "attention/v", "self_attn.o_proj": "attention/out",
    "mlp.gate_proj": "mlp/gate", "mlp.up_proj": "mlp/up", "mlp.down_proj": "mlp/down",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    folder: Path
    tokens: np.ndarray
    part: str
    save: Path | None

    def batches(self) -> list[np.ndarray]:
        return [self.tokens[i : i + BATCH] for i in range(0, len(self.tokens), BATCH)]

    def keep(self, weights: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Write the weights, Hugging Face name (`.weight` left off) to `[out, in]`, if wanted."""
        if self.save is None:
            return
        from safetensors.numpy import save_file

        arrays = {kernel_path(name): np.ascontiguousarray(w.T) for name, w in weights().items()}
        save_file(arrays, self.save)


def kernel_path(name: str) -> str:
    """jquant's path of a linear: `model.layers.3.mlp.up_proj` to `layers/3/mlp/up/kernel`."""
    found = re.fullmatch(r"(?:model\.)*layers\.(\d+)\.(.+)", name)
    if found is None:
        raise ValueError(f"{name} is not a linear of a block")
    return f"layers/{found[1]}/{KINDS[found[2]]}/kernel"


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def busy_seconds() -> float:
    """Processor time that the whole machine has spent, where the kernel tells; else 0."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # not idle, not waiting


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What `call` returns; seconds, processor seconds, and the peak of resident memory.

    `others_cpu_s` is what all other processes took meanwhile: near 0, or the figure is worth little
    (threads that spin for each other wait for whole time slices where cores are shared).
    """
    before, busy, own = peak_bytes(), busy_seconds(), time.process_time()
    start = time.perf_counter()
    value = call()
    seconds = time.perf_counter() - start
    own = time.process_time() - own
    return value, {
        "seconds": round(seconds, 3),
        "cpu_s": round(own, 2),
        "others_cpu_s": round(max(0.0, busy_seconds() - busy - own), 2),
        "peak_bytes_before": before,
        "peak_bytes": peak_bytes(),
    }


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def main(run: Callable[[Job], dict[str, Any]]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--part", default="")
    options = parser.parse_args()
    job = Job(options.folder, np.load(options.tokens), options.part, options.save)
    try:
        result = run(job)
    except Exception as error:  # a tool that does not run is a fact to record
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        result = {"failed": f"{type(error).__name__}: {first}"[:300]}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
