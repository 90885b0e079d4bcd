"""A checkpoint in tunix's class, in an environment of its own: `python FILE EXPORT WAY FOLDER`.

FOLDER has `inputs.npy`, tokens `[B, T]`, and gets `out.npy`, the logits. WAY is "arrays";
"dequantize": weights become arrays first; or QTYPE/TILE, the rule of qwix's `quantize_model`, by
which the class multiplies by `QArray`s. `settings.json` says the class and its configuration.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import qwix
from flax import nnx


def model_of(settings: dict[str, Any]) -> Any:
    """The class; `tunix` itself would bring trainers and data sets."""
    package = types.ModuleType("tunix")
    package.__path__ = list(importlib.util.find_spec("tunix").submodule_search_locations)  # type: ignore
    sys.modules["tunix"] = package
    module, _, name = settings["class"].rpartition(".")
    of, config = importlib.import_module(module), dict(settings["config"])
    if "query_pre_attn_norm" in config:
        kind = of.QueryPreAttentionNormalisation
        config |= {"query_pre_attn_norm": kind[config["query_pre_attn_norm"]]}
        config |= {"param_dtype": jnp.float32}
    return getattr(of, name)(of.ModelConfig(**config), rngs=nnx.Rngs(0))


def filled(model: Any, params: Any) -> Any:
    """The model with these parameters; their names must be its own."""
    graph, state = nnx.split(model)
    own = nnx.to_pure_dict(state)
    names = [{jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(tree)}
             for tree in (own, params)]  # fmt: skip
    if names[0] != names[1]:
        raise ValueError(f"parameters differ: {sorted(names[0] ^ names[1])[:4]}")
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def with_numbers(tree: Any) -> Any:
    """Numbers of layers as integers, and no entry for zero points that are none."""
    if not isinstance(tree, dict):
        return jnp.asarray(tree)
    kept = {key: value for key, value in tree.items() if value is not None}
    return {int(key) if key.isdigit() else key: with_numbers(value) for key, value in kept.items()}


def dequantized(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {"array"}:
        return qwix.dequantize(qwix.QArray(**{"zero_point": None, **tree["array"]}))
    return {key: dequantized(value) for key, value in tree.items()}


def main(place: Path, way: str, folder: Path) -> None:
    model = model_of(json.loads((place / "settings.json").read_text("utf-8")))
    tokens = jnp.asarray(np.load(folder / "inputs.npy"))
    rows, length = tokens.shape
    inputs = (
        tokens, jnp.broadcast_to(jnp.arange(length), (rows, length)), None,
        jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length)),
    )  # fmt: skip
    if "/" in way:
        qtype, tile = way.split("/")
        size: Any = {} if tile == "all" else {"tile_size": int(tile)}
        rule = qwix.QuantizationRule(module_path="layers.*", weight_qtype=qtype, **size)
        model = qwix.quantize_model(model, qwix.PtqProvider([rule]), *inputs)
    with ocp.StandardCheckpointer() as checkpointer:
        params = with_numbers(checkpointer.restore((place / "default").absolute()))
    params = dequantized(params) if way == "dequantize" else params
    graph, state = nnx.split(filled(model, params))
    run = jax.jit(lambda state: nnx.merge(graph, state)(*inputs)[0])
    np.save(folder / "out.npy", np.asarray(run(state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    packages = ("google-tunix", "qwix", "flax", "jax", "orbax-checkpoint")
    print(json.dumps({name: importlib.metadata.version(name) for name in packages}))
