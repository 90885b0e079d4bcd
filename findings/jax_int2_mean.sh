#!/usr/bin/env bash
# jnp.mean of an int2 or uint2 array is an int2 or uint2, computed modulo 4; of int4 it is float32.
#
# Versions:  Python 3.11, jax 0.10.2, jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6.
# Seen:      The mean of twelve uint2 ones is 3 and its dtype uint2; of twelve int2 ones it is -1.
#            The mean of twelve int4 ones is 1.0 in float32. jnp.sum of any of them raises ValueError
#            "Invalid integer data type 'V'.", unless a dtype is given.
# Expected:  1.0 in float32, as for all other integers: jax.numpy.mean follows numpy.mean, whose page has
#            floating-point intermediates for integer inputs; and jnp.sum in int32, as for int8.
# Matters:   a mean code of two-bit weights is a wrong number without a word.
# Output seen:
#            int4 mean 1.0 float32, sum ValueError: Invalid integer data type 'V'.
#            uint2 mean 3 uint2, sum ValueError: Invalid integer data type 'V'.
#            int2 mean -1 int2, sum ValueError: Invalid integer data type 'V'.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax.numpy as jnp

seen = {}
for name in ("int8", "int4", "uint2", "int2"):
    ones = jnp.ones(12, jnp.int8).astype(name)
    mean = jnp.mean(ones)
    try:
        total = int(jnp.sum(ones))
    except ValueError as error:
        total = f"ValueError: {error}"
    seen[name] = float(mean), mean.dtype.name, total == 12
    print(f"{name} mean {mean} {mean.dtype}, sum {total}")

if seen == {
    "int8": (1.0, "float32", True),
    "int4": (1.0, "float32", False),
    "uint2": (3.0, "uint2", False),
    "int2": (-1.0, "int2", False),
}:
    print("still so: two-bit means are taken modulo 4, and narrow sums raise")
else:
    sys.exit(f"CHANGED: {seen}")
PY
