#!/usr/bin/env bash
# Orbax's StandardCheckpointer refuses a jax.Array whose shape is not the target's, and lets a NumPy array pass.
#
# Versions:  Python 3.11, orbax-checkpoint 0.12.8, tensorstore 0.1.86, jax 0.10.2, numpy 2.4.6.
# Seen:      An array of shape (4, 2) is restored with a target of shape (1, 2). Saved as a jax.Array it raises
#            "Requested shape: (1, 2) is not compatible with the stored shape: (4, 2)"; saved as a NumPy array it comes
#            back as (4, 2), with the same ShapeDtypeStruct as target and with strict left at its default, True. A NumPy
#            array as target lets both pass. The dtype of the target is obeyed in all of them.
# Expected:  the refusal in all of them: the docstring of StandardCheckpointer.restore says of `strict` that unless it is
#            False, a stored shape that does not match the target's raises an error.
# Matters:   a checkpoint of another network is restored without a word, and fails or broadcasts later.
# Output seen:
#            saved by jax, target ShapeDtypeStruct   raises
#            saved by jax, target ndarray            (4, 2)
#            saved by numpy, target ShapeDtypeStruct (4, 2)
#            saved by numpy, target ndarray          (4, 2)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

seen = {}
for kind, stored in (("jax", jnp.ones((4, 2))), ("numpy", np.ones((4, 2), np.float32))):
    folder = pathlib.Path.cwd() / kind
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, {"w": stored})
        checkpointer.wait_until_finished()
        for target in (jax.ShapeDtypeStruct((1, 2), jnp.float32), np.zeros((1, 2), np.float32)):
            name = f"saved by {kind}, target {type(target).__name__}"
            try:
                seen[name] = str(checkpointer.restore(folder, {"w": target})["w"].shape)
            except ValueError:
                seen[name] = "raises"
            print(f"{name:<39} {seen[name]}")

if list(seen.values()) == ["raises", "(4, 2)", "(4, 2)", "(4, 2)"]:
    print("still so: only arrays of JAX that are restored as such have their shapes checked")
else:
    sys.exit(f"CHANGED: {seen}")
PY
