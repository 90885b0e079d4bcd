"""Calibrated K-quants beside llama.cpp's own, at equal types of all tensors, in its own runtime.

    python -m benchmarks.clients.k_quants --client VENV/bin/python --network smollm2 --folder FOLDER

VENV has `llama-cpp-python`. llama.cpp's quantizer makes a file of each type (`--pure`, the table of
tokens and the head Q8_0) with the importances of the calibration tokens and without; what type it
gave each tensor is read from its file, and jquant rounds each to that type, to nearest and by QEP
on the same tokens. All are compared with the network in float32, on text held out.

*bytes* is the trained network of the tests, `padded`, *smollm2* SmolLM2-135M, whose width of 576
leaves K-quants to `ffn_down` and falls back to others elsewhere, *smollm2-768* the same `padded`,
K-quants everywhere. SmolLM2 comes from a file of 4 bits: this is about what is lost besides.

Files in FOLDER are not made again, and results are written after each type: a run that was ended
goes on where it was.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gguf import GGUFReader

import jquant as jq
from benchmarks.clients.llama_cpp import NAMES, SEARCH, Subject, child, record, say, subject
from benchmarks.clients.padded import padded
from jquant import models
from jquant.exporters.gguf import write_gguf
from jquant.grids import GGUF
from jquant.rounding import GPTQ

KINDS = ("Q3_K", "Q2_K", "Q4_K")
PARTS = {tensor: part for part, tensor in NAMES.items()}


def types_of(file: Path) -> dict[str, str]:
    """The type of every matrix of a file, by jquant's path."""
    types = {}
    for tensor in GGUFReader(file).tensors:
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            if part := PARTS.get(match[2]):
                types[f"layers/{match[1]}/{part}/kernel"] = tensor.tensor_type.name
        elif tensor.name in ("token_embd.weight", "output.weight"):
            path = "head/kernel" if tensor.name == "output.weight" else "embed/embedding"
            types[path] = tensor.tensor_type.name
    return types


def importances(fn: models.Decoder, params: Any, batches: list[np.ndarray]) -> dict[str, Any]:
    """The mean square of every input of every matrix: what llama.cpp calls an imatrix."""
    means = {}
    for path, evidence in jq.capture(fn, params, batches).items():
        if path.startswith("layers/"):
            _, layer, *part, _ = path.split("/")
            moment = np.diagonal(np.asarray(evidence.second_moment))
            tensor = f"blk.{layer}.{NAMES['/'.join(part)]}.weight"
            means[tensor] = moment / np.float32(evidence.count)
    return means


def sources(one: Subject, fn: models.Decoder, params: Any, folder: Path) -> dict[str, str]:
    """What the quantizer of llama.cpp needs, and the logits that all are compared with."""
    places = {"full": folder / "full.npy", "file": folder / "full.gguf",
              "importance": folder / "importance.npz"}  # fmt: skip
    np.save(folder / "tokens.npy", one.tokens)
    if not places["full"].exists():
        np.save(places["full"], np.asarray(jax.jit(one.fn)(one.params, one.tokens)))
    if not places["file"].exists():
        write_gguf(places["file"], fn, params, one.tokenizer)
    if not places["importance"].exists():
        np.savez(places["importance"], **importances(fn, params, one.batches))
        say("importances")
    return {name: str(place) for name, place in places.items()}


def rounded(one: Subject, fn: models.Decoder, params: Any, types: dict[str, str], row: str,
            file: Path) -> None:  # fmt: skip
    """The file of jquant's codes, every tensor of the type it has in llama.cpp's file."""
    if file.exists():
        return
    start, rounding = time.monotonic(), GPTQ(correction="qep") if row == "QEP" else None
    rules: dict[str, Any] = {
        path: jq.Scheme(GGUF("Q8_0"))
        if kind == "Q8_0"
        else jq.Scheme(GGUF(kind, SEARCH), None, rounding or jq.rounding.Nearest())
        for path, kind in types.items()
    }
    plan = jq.plan(jq.find_weights(fn, params, one.batches[0]), {**rules, ".*": jq.keep})
    qparams, _ = jq.quantize(fn, params, plan, one.batches if rounding else None)
    write_gguf(file, fn, qparams, one.tokenizer)
    say(file.name, f"{time.monotonic() - start:.0f} s")


def compared(
    kind: str, one: Subject, model: tuple[models.Decoder, Any], given: dict[str, str], client: str,
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """The rows of a type."""
    own = {row: folder / f"{kind}-{row}.gguf" for row in ("plain", "imatrix")}
    if not all(file.exists() for file in own.values()):
        job = {"source": given["file"], "importance": given["importance"], "types": [kind],
               "folder": str(folder)}  # fmt: skip
        child(client, "quantize", job, folder)
    types = types_of(own["plain"])
    if types_of(own["imatrix"]) != types:
        raise SystemExit(f"{kind}: llama.cpp chose other types with importances")
    files = {f"{kind}: llama.cpp, {row}": file for row, file in own.items()}
    for row in ("nearest", "QEP"):
        file = files[f"{kind}: jquant, {row}"] = folder / f"{kind}-jquant-{row}.gguf"
        rounded(one, *model, types, row, file)
        if types_of(file) != types:
            raise SystemExit(f"{file} has other types than llama.cpp's")
    job = {
        "tokens": str(folder / "tokens.npy"),
        "files": {name: (str(file), given["full"]) for name, file in files.items()},
    }
    rows = child(client, "measure", job, folder)
    for name in files:
        rows[name].pop("ids")
    held = list(types.values())
    return {**rows, "types": {kind: {each: held.count(each) for each in sorted(set(held))}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--client", required=True)
    parser.add_argument("--network", choices=("bytes", "smollm2", "smollm2-768"), default="bytes")
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--windows", type=int, default=16, help="of SmolLM2's calibration")
    parser.add_argument("--folder", type=Path, required=True, help="for the files")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    one = subject(args.network.split("-")[0], args.windows, 512)
    model = (one.fn, one.params) if args.network == "smollm2" else padded(one.fn, one.params)
    given = sources(one, *model, args.folder)
    texts = {
        "evaluation": list(one.tokens.shape),
        "calibration": [len(one.batches), *one.batches[0].shape],
    }
    for kind in args.kinds:
        rows = compared(kind, one, model, given, args.client, args.folder)
        version, types = rows.pop("version"), rows.pop("types")
        record(args.network, "calibrated", {**texts, "version": version, "types": types, **rows})


if __name__ == "__main__":
    main()
