"""A checkpoint in MaxText's decoder, in an environment of its own: `python FILE EXPORT WAY FOLDER`.

FOLDER has `inputs.npy`, tokens `[B, T]`, and gets `out.npy`, the logits. The parameters are
restored by MaxText's own loader, which refuses names and shapes that are not the model's.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from flax import nnx
from maxtext.common import checkpointing
from maxtext.configs import pyconfig
from maxtext.models import models
from maxtext.utils import maxtext_utils


def main(place: Path, folder: Path) -> None:
    told = json.loads((place / "settings.json").read_text("utf-8"))["config"]
    tokens = jnp.asarray(np.load(folder / "inputs.npy"))
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    config = pyconfig.initialize(
        ["", str(base)], run_name="one", hardware="cpu", skip_jax_distributed_system=True,
        enable_checkpointing=False, log_config=False, attention="dot_product", dtype="float32",
        weight_dtype="float32", matmul_precision="highest", remat_policy="full",
        per_device_batch_size=len(tokens), max_target_length=tokens.shape[1], megablox=False,
        sparse_matmul=False, capacity_factor=-1.0, **told,
    )  # fmt: skip
    mesh = maxtext_utils.get_mesh_from_config(config)
    model = models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = checkpointing.load_params_from_path(str(place / "default"), params, 8)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(params: Any, rest: Any) -> jax.Array:
        network = nnx.merge(graph, params, rest)
        return network(tokens, positions, jnp.ones_like(positions), enable_dropout=False)

    np.save(folder / "out.npy", np.asarray(run(params, rest), np.float32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[3]))
    packages = ("maxtext", "flax", "jax", "orbax-checkpoint")
    print(json.dumps({name: importlib.metadata.version(name) for name in packages}))
