#!/usr/bin/env bash
# jnp shifts an unsigned uint4 or uint2 array to the right as if it were signed.
#
# Versions:  Python 3.11, jax 0.10.2, jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6.
# Seen:      uint4: 8 >> 1 is 12 and 15 >> 1 is 15; uint2: 3 >> 1 is 3. The copies of the top bit come in
#            from the left. uint8 is right, and so is jax.lax.shift_right_logical on the same uint4.
# Expected:  4, 7 and 1. jax.numpy.right_shift's page asks for an unsigned x1 and follows numpy, where a
#            right shift by n is the floor division by 2**n. jnp.issubdtype(uint4, unsignedinteger) is True.
# Matters:   taking two-bit or one-bit fields out of uint4 codes by shifts gives wrong codes without a word.
# Output seen:
#            uint4 >> 1     [0, 0, 1, 1, 2, 2, 3, 3, 12, 12, 13, 13, 14, 14, 15, 15]
#            uint4 // 2     [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
#            uint2 >> 1     [0, 0, 3, 3]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp

nibbles = jnp.arange(16).astype(jnp.uint4)
pairs = jnp.arange(4).astype(jnp.uint2)
assert jnp.issubdtype(nibbles.dtype, jnp.unsignedinteger)
shifted = (nibbles >> 1).astype(int).tolist()
halved = (nibbles // 2).astype(int).tolist()
logical = jax.lax.shift_right_logical(nibbles, jnp.ones_like(nibbles)).astype(int).tolist()
short = (pairs >> 1).astype(int).tolist()
print("uint4 >> 1    ", shifted)
print("uint4 // 2    ", halved)
print("lax, logical  ", logical)
print("uint2 >> 1    ", short)

right = [code // 2 for code in range(16)]
if halved == logical == right and shifted == right[:8] + [12, 12, 13, 13, 14, 14, 15, 15] and short == [0, 0, 3, 3]:
    print("still so: >> on uint4 and uint2 is the signed shift")
else:
    sys.exit("CHANGED: >> on uint4 or uint2 gives other numbers")
PY
