#!/usr/bin/env bash
# qwix.quantize with 'nvfp4' turns weights below about 0.006 into zeros, and clips those above 2688.
#
# Versions:  Python 3.11, qwix 0.1.8, flax 0.12.8, jax 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6.
# Seen:      Weights evenly spaced over +-1 lose at most 0.16 of their largest; the same times 0.005 all come
#            back as 0; times 1e5 they end at 2688. 'mxfp4' loses at most 0.19 at all three sizes.
# Expected:  about the same loss at every size: NVFP4 as NVIDIA describes it ("Introducing NVFP4 for
#            Efficient and Accurate Low-Precision Inference", developer.nvidia.com/blog) has a second scale
#            in float32 for the whole tensor besides the float8_e4m3fn one of 16 values. qwix keeps only the
#            latter, whose range is 2**-9 to 448. MLX met the same and added a tensor scale in
#            github.com/ml-explore/mlx/pull/3022.
# Matters:   a block of sixteen small weights vanishes without a word; whether it does hangs on the tensor's unit.
# Output seen:
#            times 1      nvfp4 loss 0.158  mxfp4 loss 0.123
#            times 0.005  nvfp4 loss 1.000  mxfp4 loss 0.187
#            times 100000 nvfp4 loss 0.973  mxfp4 loss 0.154
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet qwix==0.1.8 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax.numpy as jnp
import numpy as np
import qwix

shape = np.linspace(-1, 1, 64, dtype=np.float32)[None]
loss = {}
for size in (1, 0.005, 100000):
    weights = jnp.asarray(shape * size)
    for form, block in (("nvfp4", 16), ("mxfp4", 32)):
        back = qwix.dequantize(qwix.quantize(weights, form, tiled_axes={1: block}))
        loss[form, size] = float(jnp.max(jnp.abs(back - weights)) / size)
    print(f"times {size:<6} nvfp4 loss {loss['nvfp4', size]:.3f}  mxfp4 loss {loss['mxfp4', size]:.3f}")

even = all(loss["mxfp4", size] < 0.25 for size in (1, 0.005, 100000)) and loss["nvfp4", 1] < 0.25
if even and loss["nvfp4", 0.005] == 1 and loss["nvfp4", 100000] > 0.9:
    print("still so: NVFP4 without a tensor scale loses small and large weights whole")
else:
    sys.exit(f"CHANGED: {loss}")
PY
