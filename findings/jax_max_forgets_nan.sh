#!/usr/bin/env bash
# jnp.max and jnp.min of 4096 or more float32 values forget a NaN on the CPU.
#
# Versions:  Python 3.11, jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6.
# Seen:      One NaN in 4095 ones: jnp.max and jnp.min are NaN. One NaN in 4096 ones: both are 1.0,
#            eagerly and under jit. jnp.argmax still points at the NaN, so the two disagree.
# Expected:  NaN at every length. numpy.max's page (which jnp.max cites as its model) says that
#            NaN values are propagated, and jnp.nanmax exists for the other behaviour.
#            A relative for XLA's compiled reductions: github.com/openxla/xla/issues/21461.
# Matters:   an absmax scale, or a check for NaN made with max, is wrong silently on long rows only.
# Output seen:
#            4095 max nan min nan argmax 2047
#            4096 max 1.0 min 1.0 argmax 2048
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax.numpy as jnp
import numpy as np

rows = {}
for length in (4095, 4096):
    values = np.ones(length, np.float32)
    values[length // 2] = np.nan
    array = jnp.asarray(values)
    rows[length] = float(jnp.max(array)), float(jnp.min(array)), int(jnp.argmax(array))
    print(length, "max", rows[length][0], "min", rows[length][1], "argmax", rows[length][2])
    assert np.isnan(np.max(values)), "numpy no longer propagates NaN"

short, long = rows[4095], rows[4096]
if np.isnan(short[:2]).all() and long == (1.0, 1.0, 2048):
    print("still so: NaN is forgotten from 4096 values on")
else:
    sys.exit("CHANGED: the maximum of a long row is no longer 1.0")
PY
