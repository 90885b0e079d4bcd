"""Decoders in the trees of tunix and MaxText: exported, restored into their classes, run there."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jquant as jq
from benchmarks.environments import Failed, reason
from benchmarks.zoo.__main__ import SETTINGS
from jquant.grids import Float, Uniform
from jquant.models import Decoder, DecoderConfig

_LLAMA = DecoderConfig(vocab=96, width=64, hidden=128, layers=2, heads=4, kv_heads=2)
_GEMMA = dict(
    norms="both", activation="gelu_tanh", qk_norm="head", norm_eps=1e-6, tied=True,
    embed_scale=8.0, attention_scale=0.25, window_theta=1e4,
)  # fmt: skip
_LAYERS = "layers.*kernel"


class Case(NamedTuple):
    """A network and its schemes, by expressions of paths; the rest is kept.

    Attributes:
        format: of the export.
        changes: what it has that the plain network has not.
        rules: of the plan.
        way: how a client is told to load it.
        scanned: whether the network itself has stacks of layers.
        bfloat16: whether its table of tokens has numbers of bfloat16.
        note: what is to be told of the row.
    """

    format: str
    changes: Mapping[str, Any]
    rules: Mapping[str, jq.Scheme]
    way: str = "arrays"
    scanned: bool = False
    bfloat16: bool = False
    note: str = ""


def all_layers(scheme: jq.Scheme) -> dict[str, jq.Scheme]:
    """One scheme for every linear layer of the blocks."""
    return {_LAYERS: scheme}


INT4 = jq.Scheme(Uniform(4, True), 16)
INT8 = jq.Scheme(Uniform(8, True))
ZEROS = jq.Scheme(Uniform(4), 16)
FP8 = jq.Scheme(Float(4, 3, scale="float32"))
QWEN = dict(qk_norm="head", head_dim=32)
EXPERTS = dict(qk_norm="head", experts=4, experts_used=2)
GEMMA = _GEMMA | dict(layers=7, windows=(8, 8, 8, 8, 8, 0, 8))


def network(case: Case) -> tuple[Decoder, Any]:
    """A network with random parameters, norms and biases too."""
    config: Any = dataclasses.replace(_LLAMA, rotary=0, **case.changes)
    fn = Decoder(config, scan_layers=case.scanned)
    leaves, structure = jax.tree.flatten(fn.init(jax.random.key(7)))
    keys = jax.random.split(jax.random.key(8), len(leaves))
    moved = [
        leaf * 1.5 + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    params = jax.tree.unflatten(structure, moved)
    if case.bfloat16:
        table = params["embed"]["embedding"]
        params["embed"]["embedding"] = table.astype("bfloat16").astype(table.dtype)
    return fn, params


def rows_of_trees(
    name: str, cases: Mapping[str, Case], child: Path, python: Path, folder: Path
) -> dict[str, dict[str, Any]]:
    """A row for each case: how far the logits of the library's class are from `apply`'s."""
    result = {}
    tokens = np.random.default_rng(0).integers(0, _LLAMA.vocab, (2, 24)).astype(np.int32)
    np.save(folder / "inputs.npy", tokens)
    for k, (title, case) in enumerate(cases.items()):
        fn, params = network(case)
        plan = jq.plan(jq.find_weights(fn, params, tokens), {**case.rules, ".*": jq.keep})
        qparams, _ = jq.quantize(fn, params, plan)
        done = jq.export(fn, qparams, folder / str(k), format=case.format)
        command = [str(python), str(child), str(folder / str(k)), case.way, str(folder)]
        environment = {key: v for key, v in os.environ.items() if key != "PYTHONPATH"}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment | SETTINGS)
        kinds = list(done.weights.values())
        row: dict[str, Any] = {
            "format": case.format,
            "held": {kind: kinds.count(kind) for kind in kinds},
            "way": case.way,
            "note": case.note,
        }
        result[title] = row
        if ran.returncode:
            row["error"] = reason(ran.stderr).replace(str(folder), "")[:300]
        else:
            expected, got = np.asarray(jq.apply(fn)(qparams, tokens)), np.load(folder / "out.npy")
            row |= {
                "largest_difference": float(np.abs(expected - got).max()),
                "largest_logit": float(np.abs(expected).max()),
                "versions": json.loads(ran.stdout.splitlines()[-1]),
            }
        print(name, title, json.dumps(row), flush=True)
    if all("error" in row for row in result.values()):
        raise Failed(next(iter(result.values()))["error"])
    return result
