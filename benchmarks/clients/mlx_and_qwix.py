"""Exports through mlx-lm and qwix, each in an environment of its own.

`python -m benchmarks.clients.mlx_and_qwix [--environments FOLDER] [--only mlx]` exports a small
random Llama, for qwix a small Flax network, in every flavour, has the engine say how far its
outputs are from `jquant.apply`'s, and writes `results/mlx_and_qwix.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jquant as jq
from benchmarks.clients.small_network import Network
from benchmarks.harness import RESULTS, write
from jquant.grids import GGUF, MX, Affine, Float, Uniform
from jquant.models import Decoder, DecoderConfig

HERE = Path(__file__).parent
NAME = "mlx_and_qwix"
NETWORK = DecoderConfig(vocab=96, width=64, hidden=128, layers=2, heads=4, kv_heads=2)
_BF16, _F16 = {"scale_dtype": "bfloat16"}, {"scale_dtype": "float16"}
_INT8, _FP8 = Uniform(8, symmetric=True), Float(4, 3, scale="float32")
_TABLE_TOO = "embed/.*|layers/.*|head/.*"


class Flavour(NamedTuple):
    """A way to hold weights: the format, the rules of the plan, how the client loads it, a note."""

    format: str
    rules: Mapping[str, Any]
    way: str = "as it comes"
    note: str = ""


def _all(format: str, scheme: jq.Scheme) -> Flavour:
    return Flavour(format, {"layers/.*": scheme})


def _kernels(scheme: jq.Scheme, way: str) -> Flavour:
    return Flavour("qwix", {".*kernel": scheme}, way)


QWIX: Mapping[str, Flavour] = {
    "4 bits, groups of 16": _kernels(jq.Scheme(Uniform(4, True), 16), "int4/16"),
    "2 bits, groups of 16": _kernels(jq.Scheme(Uniform(2, True), 16), "int2/16"),
    "8 bits, channels": _kernels(jq.Scheme(_INT8), "int8/all"),
    "E4M3, channels": _kernels(jq.Scheme(_FP8), "float8_e4m3fn/all"),
    "NVFP4": _kernels(jq.presets.nvfp4(), "nvfp4/16"),
    "MXFP4": _kernels(jq.presets.mxfp4(), "dequantize"),
    "4 bits, zero points": _kernels(jq.Scheme(Uniform(4), 16), "dequantize"),
    "3 bits, channels": _kernels(jq.Scheme(Uniform(3, True)), "dequantize"),
    "5 bits, zero points": _kernels(jq.Scheme(Uniform(5), 32), "dequantize"),
}
MLX: Mapping[str, Flavour] = {
    **{
        f"{bits} bits, groups of 32": _all("mlx", jq.Scheme(Uniform(bits), 32))
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "4 bits, symmetric, bfloat16": _all("mlx", jq.Scheme(Uniform(4, True, **_BF16), 64)),
    "4 bits, zero points, float16": _all("mlx", jq.Scheme(Uniform(4, **_F16), 32)),
    "4 bits, `Affine`, bfloat16": _all("mlx", jq.Scheme(Affine(4, **_BF16), 64)),
    "8 bits, channels": _all("mlx", jq.Scheme(Uniform(8, True, **_F16))),
    "GGUF's Q4_1": _all("mlx", jq.Scheme(GGUF("Q4_1"))),
    "MXFP4": _all("mlx", jq.presets.mxfp4()),
    "MXFP8": _all("mlx", jq.Scheme(MX("E4M3"))),
    "4 and 8 bits, table and head too": Flavour(
        "mlx",
        {
            ".*mlp/down.*": jq.Scheme(Uniform(8), 64),
            _TABLE_TOO: jq.Scheme(Uniform(4), 32),
        },
    ),
    "4 bits, table of bfloat16 scales": Flavour(
        "mlx", {_TABLE_TOO: jq.Scheme(Uniform(4, True, **_BF16), 64)},
        note="a table's rows are of the dtype of its scales, so all is computed in bfloat16",
    ),
}  # fmt: skip


class Client(NamedTuple):
    """An engine: what its environment has, the script that runs there, and what it is given."""

    packages: tuple[str, ...]
    script: str
    flavours: Mapping[str, Flavour]
    make: Callable[[], Subject]


class Subject(NamedTuple):
    """A network, its parameters and its inputs."""

    fn: Callable[..., Any]
    params: Any
    inputs: np.ndarray


def llama() -> Subject:
    fn = Decoder(NETWORK)
    params = jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, fn.init(jax.random.key(7)))
    tokens = np.random.default_rng(0).integers(0, NETWORK.vocab, (2, 24)).astype(np.int32)
    return Subject(fn, params, tokens)


def flax() -> Subject:
    network = Network()
    inputs = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    params = network.init(jax.random.key(7), inputs)["params"]
    return Subject(lambda params, x: network.apply({"params": params}, x), params, inputs)


CLIENTS = {
    "mlx": Client(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"), "mlx_client.py", MLX, llama),
    "qwix": Client(("qwix==0.1.8", "orbax-checkpoint==0.12.8"), "qwix_client.py", QWIX, flax),
}


def interpreter(folder: Path, packages: tuple[str, ...]) -> Path:
    """The Python of an environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return python


def exported(flavour: Flavour, subject: Subject, folder: Path) -> dict[str, Any]:
    """Exports a network in a flavour, and leaves beside it what its outputs are to be."""
    fn, params, inputs = subject
    plan = jq.plan(jq.find_weights(fn, params, inputs), {**flavour.rules, ".*": jq.keep})
    qparams, _ = jq.quantize(fn, params, plan)
    done = jq.export(fn, qparams, folder, format=flavour.format)
    logits = np.asarray(jq.apply(fn)(qparams, inputs))
    np.savez(folder.with_suffix(".npz"), tokens=inputs, logits=logits)
    kinds = list(done.weights.values())
    held = {kind: kinds.count(kind) for kind in kinds}
    return {"format": flavour.format, "held": held, "way": flavour.way, "note": flavour.note}


def asked(client: Client, python: Path) -> dict[str, dict[str, Any]]:
    """The rows of a client, by flavour."""
    rows, command, subject = {}, [str(python), str(HERE / client.script)], client.make()
    with tempfile.TemporaryDirectory() as scratch:
        for title, flavour in client.flavours.items():
            folder = Path(scratch, f"model-{len(rows)}")
            rows[title] = exported(flavour, subject, folder)
            command += [str(folder), str(folder.with_suffix(".npz")), flavour.way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(rows):
        raise SystemExit(f"{client.script} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return {t: row | json.loads(line) for (t, row), line in zip(rows.items(), lines, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path(".cache/clients"))
    parser.add_argument("--only", choices=CLIENTS, action="append")
    options = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in options.only or CLIENTS:
        client = CLIENTS[name]
        python = interpreter(options.environments.resolve() / name, client.packages)
        rows[name] = asked(client, python)
        print(name, json.dumps(rows[name], indent=1), flush=True)
    write(NAME, rows=rows)


if __name__ == "__main__":
    main()
