#!/usr/bin/env bash
# The maximum and the minimum of float8_e8m0fnu scales are NaN in JAX, and their argmax is 0.
#
# Versions:  Python 3.11, jax 0.10.2, jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6.
# Seen:      For the scales [1, 8, 2] and [8, 1, 2] jnp.max and jnp.min are NaN, jnp.argmax and jnp.argmin are 0
#            both times. NumPy's max of the same arrays is 8.
# Expected:  8 and 1, at their places: all three values are exact in this format, and no NaN is among them.
#            A reduction begins with infinity or zero, which E8M0 does not hold ("No zero and infinity",
#            README of ml_dtypes), so it begins with NaN. The same defect in other float8 types was reported as
#            github.com/jax-ml/jax/issues/19011 and repaired by pull request 19034, before E8M0 came.
# Matters:   the largest scale of an MX tensor is a usual question; argmax answers it wrongly without a word.
# Output seen:
#            [1, 8, 2] max nan min nan argmax 0 argmin 0
#            [8, 1, 2] max nan min nan argmax 0 argmin 0
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

same = True
for scales in ([1, 8, 2], [8, 1, 2]):
    stored = np.array(scales, np.float32).astype(ml_dtypes.float8_e8m0fnu)
    assert float(np.max(stored)) == 8, "NumPy's maximum changed"
    array = jnp.asarray(stored)
    largest, smallest = float(jnp.max(array)), float(jnp.min(array))
    places = int(jnp.argmax(array)), int(jnp.argmin(array))
    print(scales, "max", largest, "min", smallest, "argmax", places[0], "argmin", places[1])
    same &= np.isnan([largest, smallest]).all() and places == (0, 0)

if same:
    print("still so: E8M0 scales have a NaN for their maximum, and argmax 0")
else:
    sys.exit("CHANGED: reductions of E8M0 give other results")
PY
