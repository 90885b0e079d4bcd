"""Runs the clients, see `benchmarks.clients`, and writes `results/clients.json`.

    ./run clients                                  # all
    ./run clients transformers onnxruntime         # some; results of the others stay
    ./run clients llama-cpp --python env/bin/python  # in an environment that is there

Environments lie in `build/clients`, what their installation said in `build/clients/CLIENT.log`;
`jquant.exporters.CLIENTS` says the versions. Those that take long are made last (llama-cpp-python
is compiled: half an hour of two cores). A flavour that an engine refuses is a row of the results,
with the reason; a client that cannot be installed or run is told at the end, the others run all the
same, and its earlier rows stay. Rows are written client by client, and an environment that is
complete is not made again, so what was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from benchmarks.clients import matmul_nbits, maxtext_rows, qwix_rows, tunix_rows
from benchmarks.clients.flavours import BARE, COMPILED, EXTRAS, FLAVOURS, Flavour
from benchmarks.environments import ROOT, Failed, made
from benchmarks.harness import RESULTS, machine
from jquant.errors import ClientError
from jquant.exporters import apart, ask
from jquant.exporters.clients import CLIENTS
from jquant.models import Decoder, DecoderConfig

FOLDER = ROOT / "build" / "clients"
PYTHON = "3.11"  # what the versions of the table were tried on
# Engines that take no model with a `config.json`.
APART = {module.NAME: module for module in (matmul_nbits, qwix_rows, tunix_rows, maxtext_rows)}
NETWORK = DecoderConfig(vocab=96, width=64, hidden=128, layers=2, heads=4, kv_heads=2)


def environment(client: str) -> Path:
    """The interpreter of a client's environment.

    Raises:
        Failed: it cannot be made.
    """
    module = APART.get(client)
    bare = getattr(module, "BARE", BARE.get(client, ()))
    version = getattr(module, "PYTHON", PYTHON)
    own = {name.split("==")[0].lower() for name in bare}
    if module is not None:
        requirements = list(module.PACKAGES)
    else:
        every = {k: v for row in CLIENTS[client].formats.values() for k, v in row.items()}
        names = {k: f"{k}[{EXTRAS[k]}]" if k in EXTRAS else k for k in every}
        requirements = [f"{names[k]}=={v}" for k, v in every.items() if k.lower() not in own]
        requirements += ["accelerate"] * ("transformers" in every)
    for name, value in COMPILED.get(client, {}).items():
        os.environ[name] = f"{value} {os.environ.get(name, '')}".strip()
    return made(FOLDER / client, version, [*requirements, *bare], requirements, bare)


def tokenizer() -> Any:
    """One of numbers: some engines open no folder without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(k): k for k in range(NETWORK.vocab)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="1")


def measured(client: str, flavour: Flavour, python: Path, folder: Path) -> dict[str, Any]:
    """The row of a flavour: how far the client's logits are from `apply`'s, or why it has none."""
    fn = Decoder(dataclasses.replace(NETWORK, **flavour.network))
    params = jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, fn.init(jax.random.key(7)))
    tokens = np.random.default_rng(0).integers(0, NETWORK.vocab, (2, 24)).astype(np.int32)
    plan = jq.plan(jq.find_weights(fn, params, tokens), {**flavour.rules, ".*": jq.keep})
    qparams, _ = jq.quantize(fn, params, plan)
    words = None if flavour.format == "gguf" else tokenizer()
    done = jq.export(fn, qparams, folder / "model", format=flavour.format, tokenizer=words)
    kinds = list(done.weights.values())
    held = {kind: kinds.count(kind) for kind in kinds}
    row: dict[str, Any] = {"format": flavour.format, "held": held, "note": flavour.note}
    try:
        answer = ask(client, folder / "model", tokens, folder, python=python)
        logits = np.asarray(jq.apply(fn)(qparams, tokens))
        row |= asdict(apart(iter(logits), answer.logits()))
        return row | {"way": answer.way, "versions": dict(answer.versions)}
    except ClientError as error:
        return row | {"error": str(error).replace(str(folder), "").partition(": ")[2][:300]}


def rows_of(client: str, python: Path) -> dict[str, dict[str, Any]]:
    """The rows of a client, by flavour."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        if client in APART:
            rows = APART[client].rows(python, Path(scratch))
        for title, flavour in FLAVOURS.get(client, {}).items():
            folder = Path(scratch, str(len(rows)))
            folder.mkdir()
            rows[title] = measured(client, flavour, python, folder)
            print(client, title, json.dumps(rows[title]), flush=True)
    today = datetime.date.today().isoformat()
    return {title: {**row, "date": today} for title, row in rows.items()}


def main() -> None:
    every = [*CLIENTS, *APART]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CLIENT", help=", ".join(every))
    parser.add_argument("--python", type=Path, help="an interpreter that has the one client named")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - set(every)):
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(every)}")
    if asked.python is not None and len(asked.names) != 1:
        parser.error("--python is for one client; name it")
    failed = {}
    # Whatever is quick first: an hour's build that fails is to cost the others nothing.
    for client in sorted(asked.names or every, key=COMPILED.__contains__):
        try:
            say(f"{client}: environment")
            python = asked.python or environment(client)
            say(f"{client}: exports")
            put(client, rows_of(client, python), every)
        except Exception as error:  # of whatever kind: the other clients are to run
            if not isinstance(error, Failed):
                traceback.print_exc()
            failed[client] = f"{error}" or type(error).__name__
            say(f"{client}: {failed[client]}")
    if failed:
        told = "\n".join(f"  {client}: {why}" for client, why in failed.items())
        again = f"./run clients {' '.join(failed)}"
        raise SystemExit(f"not run, their rows are as they were:\n{told}\nagain: {again}")


def put(client: str, rows: dict[str, Any], every: list[str]) -> None:
    """Writes the rows of a client into the results; those of others stay."""
    path = RESULTS / "clients.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else {}
    merged = {name: {**old, client: rows}[name] for name in every if name in {**old, client: 0}}
    path.write_text(json.dumps({"machine": machine(), "rows": merged}, indent=1) + "\n")


def say(what: str) -> None:
    print(time.strftime("%H:%M:%S"), what, flush=True)


if __name__ == "__main__":
    main()
