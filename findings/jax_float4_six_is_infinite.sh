#!/usr/bin/env bash
# The largest float4_e2m1fn, 6, is taken for an infinity when JAX casts it to an integer.
#
# Versions:  Python 3.11, jax 0.10.2, jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6.
# Seen:      float4 6 cast to int8 is 127, to uint8 255, to int32 2147483647; -6 to int8 is -128. All other
#            fourteen codes are right. jnp.isinf(6) is True while jnp.isfinite(6) is True as well.
#            Through float32 the cast is right, and ml_dtypes on NumPy is right.
# Expected:  6 and -6, and isinf False: float4_e2m1fn holds no infinity (README of ml_dtypes, section
#            float4_e2m1fn: all codes are finite), and by jax.numpy.isinf's page only infinities
#            are True.
# Matters:   every MXFP4 or NVFP4 block holds its largest value as 6, so this hits ordinary data.
# Output seen:
#            JAX   float4 -> int8  [0, 0, 1, 1, 2, 3, 4, 127, 0, 0, -1, -1, -2, -3, -4, -128]
#            NumPy float4 -> int8  [0, 0, 1, 1, 2, 3, 4, 6, 0, 0, -1, -1, -2, -3, -4, -6]
#            6: isinf True isfinite True
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np

half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
values = np.array(half + [-number for number in half], np.float32).astype(ml_dtypes.float4_e2m1fn)
array = jnp.asarray(values)
direct = array.astype(jnp.int8).tolist()
through = array.astype(jnp.float32).astype(jnp.int8).tolist()
numpy = values.astype(np.int8).tolist()
six = array[7]
infinite, finite = bool(jnp.isinf(six)), bool(jnp.isfinite(six))
print("JAX   float4 -> int8           ", direct)
print("JAX   float4 -> float32 -> int8", through)
print("NumPy float4 -> int8           ", numpy)
print("JAX   float4 6 -> int32        ", int(six.astype(jnp.int32)))
print("6: isinf", infinite, "isfinite", finite)

changed = [place for place in range(16) if direct[place] != numpy[place]]
seen = direct[7], direct[15], int(six.astype(jnp.int32)), infinite, finite
if through == numpy and changed == [7, 15] and seen == (127, -128, 2147483647, True, True):
    print("still so: the largest float4 counts as infinite")
else:
    sys.exit("CHANGED: float4's 6 is cast or classified otherwise")
PY
