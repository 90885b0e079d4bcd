"""The whole of quantizing SmolLM2-135M, from the model to the last weight, beside other tools.

    python -m benchmarks.total_time --rivals RIVALS/bin/python        # two rounds: take your time
    python -m benchmarks.total_time --windows 2 --layers 2 --rounds 1 ...        # does it all run?

W3 groups of 64, asymmetric, float32 scales where the tool has them, GPTQ with activation order and
static groups, damping 0.01; 64 calibration windows of 512 tokens (those of `quality`) in batches of
4; float32; two threads. Every part runs in a process of its own, pinned to two cores, parts
alternating (A B C A B C), medians. Timed is calibration and quantizing, not imports, not loading:

* `jquant weight`, `jquant block`: `find_weights`, `plan` and `jq.quantize(..., sequential=...)`
  from a fresh process, compiling and all (XLA's share is noted);
* `llm-compressor`: `oneshot`, sequential; `gptqmodel`: `quantize`, on the CPU, packing included;
* `reference`: a literal block-by-block loop around the published column loop (`run_reference`);
* `forwards`: two compiled plain forwards of jquant over the same tokens, heads and all;
* `solver`: `jq.quantize` on the same moments, read before; compiled, and the first time beside it.

The machine must be idle. PyTorch's threads spin for each other: where two others want the same two
cores, its column loop takes 50 times as long. `others_cpu_s` in the results says what else ran;
with `--passive` all threads sleep instead, for quick tries on a busy machine.

`forwards` and `solver` make the yardstick: 2.5 x `forwards` + `solver`. After the rounds, `quality`
takes the weights of every tool's first round to jquant: mean KL to the full model on 4 held-out
windows.

The rivals' environment, Python 3.11 (PyTorch's CPU build saves gigabytes where pip can get it; any
build of these versions will do):

    python3.11 -m venv RIVALS
    RIVALS/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 gptqmodel==7.2.0

Without `--rivals` the two tools are recorded as failed, and `reference` runs in this environment,
if PyTorch is in it. What has run lies in `--work` and is not run again by a later call with the
same windows and layers; `--fresh` forgets the chosen parts. A tool that fails is recorded with the
first line of its error, tried again by the next call. Writes `results/total_time.json` for 64
windows and all layers, whatever parts it has by then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import write

ROOT = Path(__file__).parent.parent
CORES = 2
EVALUATION = 4  # held-out windows
# Part: the module that runs it, its `--part`, whether the rivals' interpreter runs it.
PARTS = {
    "forwards": ("run_jquant", "forwards", False),
    "jquant weight": ("run_jquant", "weight", False),
    "jquant block": ("run_jquant", "block", False),
    "solver": ("run_jquant", "solver", False),
    "llm-compressor": ("run_llmcompressor", "", True),
    "gptqmodel": ("run_gptqmodel", "", True),
    "reference": ("run_reference", "", True),
}
TOOLS = [name for name in PARTS if name not in ("forwards", "solver")]
RIVALS = ["llm-compressor", "gptqmodel", "reference"]


def environment(passive: bool) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHONPATH"))}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(CORES))
    if passive:
        kept["OMP_WAIT_POLICY"] = "PASSIVE"
    return {
        **kept, **threads, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def pin() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def call(command: list[str], out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one measured process, its words in a log beside `out`; what it wrote there."""
    out.unlink(missing_ok=True)
    code: object = None
    with out.with_suffix(".log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment(options.passive), preexec_fn=pin, check=False,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                timeout=options.timeout,
            )  # fmt: skip
            code = done.returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            code = f"{type(error).__name__}: {error}".splitlines()[0]
    if not out.exists():
        out.write_text(json.dumps({"failed": f"ended without a result: {code}"}))
    return json.loads(out.read_text())


def prepare(work: Path, windows: int, layers: int | None) -> None:
    """The exported model and the tokens, unless they are there."""
    from benchmarks.quality import digest
    from benchmarks.rivals import export_hf
    from jquant import models

    folder = work / "model"
    if not (work / "export.json").exists():
        found = export_hf.export(folder, layers)
        (work / "export.json").write_text(json.dumps(found))
    tokenizer = models.load(folder)[2]
    calibration, evaluation = models.smollm2.text_windows(tokenizer)
    calibration, evaluation = calibration[:windows], evaluation[:EVALUATION]
    np.save(work / "calibration.npy", calibration)
    np.save(work / "evaluation.npy", evaluation)
    (work / "tokens.json").write_text(
        json.dumps({"calibration": digest(calibration), "evaluation": digest(evaluation)})
    )


def prepare_apart(work: Path, windows: int, layers: int | None) -> None:
    """`prepare` in a process of its own: JAX stays out of this one."""
    command = [
        sys.executable, "-c",
        "import sys; from pathlib import Path; from benchmarks.total_time import prepare; "
        "prepare(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) or None)",
        str(work), str(windows), str(layers or 0),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)


def run_part(name: str, number: int, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder = work / f"round-{number}"
    folder.mkdir(exist_ok=True)
    out = folder / f"{name.replace(' ', '-')}.json"
    old = json.loads(out.read_text()) if out.exists() else {"failed": "not run"}
    if "failed" not in old:
        return old
    module, part, foreign = PARTS[name]
    if foreign and options.rivals is None and name != "reference":
        found = {"failed": "no interpreter that has it: --rivals"}
        out.write_text(json.dumps(found))
        return found
    python = str(options.rivals if foreign and options.rivals else sys.executable)
    command = [python, "-m", f"benchmarks.rivals.{module}", str(work / "model")]
    command += [str(work / "calibration.npy"), str(out), "--part", part]
    if number == 0 and name in TOOLS:
        weights = work / "weights"
        weights.mkdir(exist_ok=True)
        (work / "quality.json").unlink(missing_ok=True)
        command += ["--save", str(weights / f"{name.replace(' ', '-')}.safetensors")]
    return call(command, out, options)


def quality(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """KL and the like per tool, computed once over the weights that were saved."""
    out = work / "quality.json"
    old = json.loads(out.read_text()) if out.exists() else {"failed": "not run"}
    if "failed" not in old:
        return old
    command = [sys.executable, "-m", "benchmarks.rivals.run_jquant", str(work / "model")]
    command += [str(work / "evaluation.npy"), str(out), "--part", "quality"]
    return call([*command, "--save", str(work / "weights")], out, options)


def collect(work: Path, rounds: int) -> dict[str, Any]:
    """Every part that has a record, its rounds and their median."""
    rows: dict[str, Any] = {}
    for name in PARTS:
        files = [work / f"round-{n}" / f"{name.replace(' ', '-')}.json" for n in range(rounds)]
        runs = [json.loads(file.read_text()) for file in files if file.exists()]
        good = [run for run in runs if "failed" not in run]
        row: dict[str, Any] = {}
        if good:
            row["median_s"] = round(statistics.median(run["seconds"] for run in good), 2)
            row["others_cpu_s"] = max(run["others_cpu_s"] for run in good)
            row["peak_bytes"] = max(run["peak_bytes"] for run in good)
        elif not runs:
            row["failed"] = "not run"
        else:
            row["failed"] = runs[-1]["failed"]
        rows[name] = row | {"rounds": runs}
    return rows


def verdict(rows: dict[str, Any]) -> dict[str, Any]:
    """Ours against the yardstick and against the fastest rival; of what there is."""
    median = {name: row["median_s"] for name, row in rows.items() if "median_s" in row}
    found: dict[str, Any] = {}
    if "forwards" in median and "solver" in median:
        found["bound_s"] = round(2.5 * median["forwards"] + median["solver"], 2)
    rivals = {name: median[name] for name in RIVALS if name in median}
    if rivals:
        found["fastest_rival"] = min(rivals, key=lambda name: rivals[name])
    for name in ("jquant weight", "jquant block"):
        if name in median:
            row = found[name] = {"seconds": median[name]}
            if "bound_s" in found:
                row["times_bound"] = round(median[name] / found["bound_s"], 3)
            if rivals:
                row["times_fastest_rival"] = round(median[name] / min(rivals.values()), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Total time of quantizing SmolLM2-135M.")
    parser.add_argument("--rivals", type=Path, help="the rivals' Python, see the module's text")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to run")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--layers", type=int, help="only the first so many layers: a quick try")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "total_time")
    parser.add_argument("--timeout", type=float, default=5400, help="seconds for one process")
    parser.add_argument("--passive", action="store_true", help="OpenMP threads sleep, not spin")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs of these parts")
    parser.add_argument("--no-quality", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    if options.rivals is not None:
        # Not resolved: a virtual environment's interpreter is a link out of it.
        options.rivals = options.rivals.absolute()
        if not options.rivals.exists():
            parser.error(f"{options.rivals} does not exist")

    parts = options.only or list(PARTS)
    work = options.work.absolute() / f"{options.windows}-windows-{options.layers or 'all'}-layers"
    work.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        for name in parts:
            for file in work.glob(f"round-*/{name.replace(' ', '-')}.json"):
                file.unlink()
    prepare_apart(work, options.windows, options.layers)
    exported = json.loads((work / "export.json").read_text())
    print("exported:", exported, flush=True)

    for number in range(options.rounds):
        for name in parts:
            found = run_part(name, number, work, options)
            print(f"round {number} {name}:", found.get("failed") or f"{found['seconds']:.1f} s",
                  flush=True)  # fmt: skip
    rows = collect(work, options.rounds)
    summary = verdict(rows)
    if not options.no_quality and any((work / "weights").glob("*.safetensors")):
        compared = quality(work, options)
        for name in TOOLS:
            row = compared.get(name.replace(" ", "-"))
            if row:
                rows[name]["quality"] = row
        if "failed" in compared:
            summary["quality_failed"] = compared["failed"]
    for name, row in rows.items():
        line = row.get("failed") or f"{row['median_s']:8.1f} s {row['peak_bytes'] / 2**30:5.2f} GiB"
        if "quality" in row:
            line += f"  KL {row['quality']['kl']:.4f}"
        print(f"{name:15}", line)
    print(summary)
    if options.windows == 64 and options.layers is None and not options.no_write:
        tokens = json.loads((work / "tokens.json").read_text())
        settings = {
            "bits": 3, "group": 64, "damping": 0.01, "windows": options.windows, "batch": 4,
            "evaluation_windows": EVALUATION, "threads": CORES, "passive": options.passive,
        }  # fmt: skip
        write("total_time", settings=settings, tokens=tokens, export=exported, verdict=summary,
              rows=rows)  # fmt: skip
        shutil.rmtree(work / "weights", ignore_errors=True)


if __name__ == "__main__":
    main()
