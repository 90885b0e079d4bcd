#!/usr/bin/env bash
# A large product whose operand is made from sums of bytes comes out wrong on the CPU, silently.
#
# Versions:  Python 3.11, jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6.
# Seen:      A weight is decoded from int8 or uint8 scales and offsets, to each of which one byte (zero)
#            is added; 4096 rows are multiplied by it; a residual is added and the rows are normalised.
#            Under jit the result is off by about its own size. With int16, without one of the two
#            sums, without the norm, or with `|` in place of `+`, it is right to 1e-6.
#            The compiled program holds all of it in one fusion of kind "__ynn_fusion".
# Expected:  The result that NumPy gives: jax.jit's page says that a function is compiled, not changed.
# Matters:   two-level scales of quantized weights (a float per block, a byte per group).
# Output seen (largest error, relative to the largest value):
#            int8 1.2e+00
#            uint8 1.2e+00
#            int16 9.7e-07
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
import numpy as np

draw = np.random.default_rng(0)
codes = draw.integers(0, 15, (256, 16, 32)).astype(np.float32)
scales, offsets = draw.integers(1, 60, (2, 256, 16))
rows = draw.normal(size=(4096, 512)).astype(np.float32)
residual = draw.normal(size=(16, 256, 256)).astype(np.float32)


def layer(rows, residual, scales, offsets, byte):
    scale = (scales + byte[0]).astype(jnp.float32) / 1000
    offset = (offsets + byte[0]).astype(jnp.float32) / 1000
    weight = (scale[:, :, None] * codes - offset[:, :, None]).reshape(256, 512)
    y = (rows @ weight.T).reshape(16, 256, 256) + residual
    return y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True))


weight = (scales[:, :, None] * codes - offsets[:, :, None]).reshape(256, 512) / 1000
y = (rows.astype(np.float64) @ weight.T).reshape(16, 256, 256) + residual
expected = y / np.sqrt((y * y).mean(-1, keepdims=True))
errors = {}
for dtype in ("int8", "uint8", "int16"):
    parts = scales.astype(dtype), offsets.astype(dtype), np.zeros(1, dtype)
    got = np.asarray(jax.jit(layer)(rows, residual, *parts))
    errors[dtype] = float(np.abs(got - expected).max() / np.abs(expected).max())
    print(dtype, f"{errors[dtype]:.1e}")
if errors["int16"] < 1e-4 and min(errors["int8"], errors["uint8"]) > 0.1:
    print("still so: sums of bytes come out wrong in a fused product")
else:
    sys.exit("CHANGED: the products agree, or int16 fails too")
PY
