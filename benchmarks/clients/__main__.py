"""Runs the clients, see `benchmarks.clients`, and writes `results/clients.json`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jquant as jq
from benchmarks.clients.flavours import TRANSFORMERS, Flavour
from benchmarks.harness import write
from jquant.models import Decoder, DecoderConfig

HERE = Path(__file__).parent
NETWORK = DecoderConfig(vocab=96, width=64, hidden=128, layers=2, heads=4, kv_heads=2)
_TORCH = ("torch==2.13.0", "transformers==5.24.0", "accelerate")


class Client(NamedTuple):
    """An engine: what its environment has, the script that runs there, and what it is given."""

    packages: tuple[str, ...]
    script: str
    flavours: Mapping[str, Flavour]


CLIENTS = {
    "transformers": Client(
        (*_TORCH, "compressed-tensors==0.20.1"), "transformers_client.py", TRANSFORMERS
    ),
}


def interpreter(folder: Path, packages: tuple[str, ...]) -> Path:
    """The Python of an environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return python


def exported(flavour: Flavour, folder: Path) -> dict[str, int]:
    """Exports the network in a flavour, and leaves beside it what its logits are to be."""
    fn = Decoder(NETWORK)
    params = jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, fn.init(jax.random.key(7)))
    tokens = np.random.default_rng(0).integers(0, NETWORK.vocab, (2, 24)).astype(np.int32)
    plan = jq.plan(jq.find_weights(fn, params, tokens), {**flavour.rules, ".*": jq.keep})
    qparams, _ = jq.quantize(fn, params, plan)
    done = jq.export(fn, qparams, folder, format=flavour.format)
    logits = np.asarray(jq.apply(fn)(qparams, tokens))
    np.savez(folder.with_suffix(".npz"), tokens=tokens, logits=logits)
    kinds = list(done.weights.values())
    return {kind: kinds.count(kind) for kind in kinds}


def asked(python: Path, script: str, folders: Mapping[Path, str]) -> list[dict[str, Any]]:
    """What a client says of folders, each to be loaded in its way."""
    command = [str(python), str(HERE / script)]
    for folder, way in folders.items():
        command += [str(folder), str(folder.with_suffix(".npz")), way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(folders):
        raise SystemExit(f"{script} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in lines]


def _row(flavour: Flavour, folder: Path) -> dict[str, Any]:
    held = exported(flavour, folder)
    return {
        "format": flavour.format, "held": held, "way": flavour.way, "note": flavour.note,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path(".cache/clients"))
    parser.add_argument("--only", choices=CLIENTS, action="append")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for name in options.only or CLIENTS:
        client = CLIENTS[name]
        python = interpreter(options.environments.resolve() / name, client.packages)
        with tempfile.TemporaryDirectory() as scratch:
            folders = {
                title: Path(scratch) / f"model-{k}" for k, title in enumerate(client.flavours)
            }
            rows[name] = {title: _row(client.flavours[title], f) for title, f in folders.items()}
            ways = {folders[title]: flavour.way for title, flavour in client.flavours.items()}
            results = asked(python, client.script, ways)
        for row, result in zip(rows[name].values(), results, strict=True):
            row |= result
        print(name, json.dumps(rows[name], indent=1), flush=True)
    write("clients", rows=rows)


if __name__ == "__main__":
    main()
