"""Checkpoints of `QArray`s through qwix and Orbax, in an environment of its own.

Called as `python FILE CHECKPOINT WAY FOLDER`; FOLDER has `inputs.npy` `[B, 64]` and gets `out.npy`,
the outputs of `small_network`. WAY is "dequantize": weights become arrays, and the network is
Flax's; or QTYPE/TILE: the network of qwix's `quantize_model`, whose parameters Orbax restores as
they are. TILE is "all" where an output's inputs share one scale. Prints the versions of what ran.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import qwix
from small_network import Network


def run(folder: str, way: str, inputs: np.ndarray) -> np.ndarray:
    network = Network()
    if way != "dequantize":
        qtype, tile = way.split("/")
        size: Any = {} if tile == "all" else {"tile_size": int(tile)}
        rule = qwix.QuantizationRule(module_path=".*", weight_qtype=qtype, **size)
        network = qwix.quantize_model(network, qwix.PtqProvider([rule]))
    blank = jax.eval_shape(network.init, jax.random.key(0), inputs)["params"]
    with ocp.StandardCheckpointer() as checkpointer:
        place = Path(folder, "default").absolute()
        params = checkpointer.restore(place, None if way == "dequantize" else blank)
    if way == "dequantize":
        params = jax.tree.map(array, params, is_leaf=is_quantized)
    params = jax.tree.map(jax.numpy.asarray, params)
    return np.asarray(network.apply({"params": params}, inputs))


def is_quantized(node: Any) -> bool:
    return isinstance(node, dict) and set(node) == {"array"}


def array(node: Any) -> Any:
    return qwix.dequantize(qwix.QArray(**node["array"])) if is_quantized(node) else node


if __name__ == "__main__":
    checkpoint, way, folder = sys.argv[1:]
    np.save(Path(folder, "out.npy"), run(checkpoint, way, np.load(Path(folder, "inputs.npy"))))
    packages = ("jax", "flax", "orbax-checkpoint", "qwix")
    print(json.dumps({name: importlib.metadata.version(name) for name in packages}))
