"""Checkpoints of qwix's `QArray`s, by Orbax into qwix's own network: a small one of Flax.

Apart from the other clients, whose exports are language models with a `config.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from benchmarks.clients.small_network import Network
from benchmarks.environments import Failed, reason
from jquant.grids import Float, Uniform

NAME = "qwix"
PACKAGES = ("qwix==0.1.8", "orbax-checkpoint==0.12.8")
CHILD = Path(__file__).with_name("qwix_client.py")
# Each with the way in which it is loaded: the rule of `quantize_model`, or arrays of the weights.
SCHEMES: Mapping[str, tuple[jq.Scheme, str]] = {
    "4 bits, groups of 16": (jq.Scheme(Uniform(4, True), 16), "int4/16"),
    "2 bits, groups of 16": (jq.Scheme(Uniform(2, True), 16), "int2/16"),
    "8 bits, channels": (jq.Scheme(Uniform(8, True)), "int8/all"),
    "E4M3, channels": (jq.Scheme(Float(4, 3, scale="float32")), "float8_e4m3fn/all"),
    "NVFP4": (jq.presets.nvfp4(), "nvfp4/16"),
    "MXFP4": (jq.presets.mxfp4(), "dequantize"),
    "4 bits, zero points": (jq.Scheme(Uniform(4), 16), "dequantize"),
    "3 bits, channels": (jq.Scheme(Uniform(3, True)), "dequantize"),
    "5 bits, zero points": (jq.Scheme(Uniform(5), 32), "dequantize"),
}


def rows(python: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """A row for each scheme: how far qwix's outputs are from `apply`'s."""
    network, result = Network(), {}
    x = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    np.save(folder / "inputs.npy", x)
    params = network.init(jax.random.key(7), x)["params"]

    def fn(params: Any, x: jax.Array) -> Any:
        return network.apply({"params": params}, x)

    weights = jq.find_weights(fn, params, x)
    for k, (title, (scheme, way)) in enumerate(SCHEMES.items()):
        qparams, _ = jq.quantize(fn, params, jq.plan(weights, {".*kernel": scheme}))
        done = jq.export(fn, qparams, folder / str(k), format="qwix")
        command = [str(python), str(CHILD), str(folder / str(k)), way, str(folder)]
        environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ran.returncode:
            raise Failed(reason(ran.stderr))
        kinds = list(done.weights.values())
        expected = np.asarray(jq.apply(fn)(qparams, x))
        result[title] = {
            "format": "qwix",
            "held": {kind: kinds.count(kind) for kind in kinds},
            "largest_difference": float(np.abs(expected - np.load(folder / "out.npy")).max()),
            "largest_logit": float(np.abs(expected).max()),
            "way": "`qwix.dequantize`" if way == "dequantize" else f"`quantize_model`, {way}",
            "note": "",
            "versions": json.loads(ran.stdout.splitlines()[-1]),
        }
        print(NAME, title, json.dumps(result[title]), flush=True)
    return result
