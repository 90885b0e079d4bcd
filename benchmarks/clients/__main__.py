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
from benchmarks.clients.flavours import COMPRESSED, TRANSPOSED, Flavour
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
        (*_TORCH, "compressed-tensors==0.20.1"), "transformers_client.py", COMPRESSED
    ),
    "gptqmodel": Client((*_TORCH, "gptqmodel==7.2.0"), "gptqmodel_client.py", TRANSPOSED),
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


def asked(python: Path, script: str, folder: Path, way: str) -> dict[str, Any]:
    """What a client says of a folder, or why it does not."""
    command = [str(python), str(HERE / script), str(folder), str(folder.with_suffix(".npz")), way]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path(".cache/clients"))
    parser.add_argument("--only", choices=CLIENTS, action="append")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for name in options.only or CLIENTS:
        client = CLIENTS[name]
        python = interpreter(options.environments.resolve() / name, client.packages)
        rows[name] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for number, (title, flavour) in enumerate(client.flavours.items()):
                folder = Path(scratch) / f"model-{number}"
                held = exported(flavour, folder)
                result = asked(python, client.script, folder, flavour.way)
                own = {"format": flavour.format, "held": held, "way": flavour.way}
                rows[name][title] = {**own, "note": flavour.note, **result}
                print(name, title, result, flush=True)
    write("clients", rows=rows)


if __name__ == "__main__":
    main()
