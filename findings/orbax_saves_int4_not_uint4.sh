#!/usr/bin/env bash
# Orbax's StandardCheckpointer saves int4 and int2 arrays, and raises on uint4 and uint2.
#
# Versions:  Python 3.11, orbax-checkpoint 0.12.8, tensorstore 0.1.86, jax 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6.
# Seen:      int4 and int2 come back equal, in their dtypes. Saving uint4 or uint2 ends in a ValueError about the
#            tensorstore dtype.
# Expected:  all four, or none: jax.numpy has all four dtypes, and by Orbax's pages a StandardCheckpointer stores
#            PyTrees of jax.Array. The signed pair works since tensorstore has a dtype for it.
# Matters:   unsigned codes, the usual ones of asymmetric quantization, cannot be kept in their own dtype.
# Output seen:
#            int4 comes back equal: True
#            uint4 ValueError Error parsing object member "dtype": Unsupported data type: "uint4"
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

seen = {}
for name in ("int4", "uint4", "int2", "uint2"):
    codes = jnp.arange(8).astype(jnp.int8).astype(name)
    folder = pathlib.Path.cwd() / name
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, {"codes": codes})
            checkpointer.wait_until_finished()
            back = checkpointer.restore(folder, {"codes": codes})["codes"]
        seen[name] = back.dtype == codes.dtype and bool((np.asarray(back) == np.asarray(codes)).all())
        print(name, "comes back equal:", seen[name])
    except Exception as error:
        seen[name] = "raises"
        print(name, type(error).__name__, str(error).splitlines()[0][:100])

if seen == {"int4": True, "uint4": "raises", "int2": True, "uint2": "raises"}:
    print("still so: the signed narrow integers are saved, the unsigned are not")
else:
    sys.exit(f"CHANGED: {seen}")
PY
