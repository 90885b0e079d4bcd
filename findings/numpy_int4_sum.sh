#!/usr/bin/env bash
# np.sum and np.mean of an int4 array of ml_dtypes are computed modulo 16.
#
# Versions:  Python 3.11, numpy 2.4.6, ml_dtypes 0.6.0.
# Seen:      np.sum of twelve int4 ones is -4, and np.mean is 0, both of dtype int4. np.max of the same is int8,
#            so one array's reductions have two dtypes. For int8 the sum is 12 and the mean 1.0.
# Expected:  12 and 1.0. numpy.sum's page says that integers of less precision than the platform's are summed in
#            the platform's; numpy.mean's that integers have float64 intermediates. ml_dtypes' README calls
#            int4 an integer type; NumPy does not count it among its integers, so the rule passes it by.
# Matters:   zero points or code histograms from sums over int4 weights are wrong without a word.
# Output seen:
#            int8 sum 12 int64, mean 1.0 float64
#            int4 sum -4 int4, mean 0 int4
#            uint2 sum 0 uint2, mean 0 uint2
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np

seen = {}
for name in ("int8", "int4", "uint2"):
    ones = np.ones(12, np.int8).astype(np.int8 if name == "int8" else getattr(ml_dtypes, name))
    total, mean = np.sum(ones), np.mean(ones)
    seen[name] = int(total), total.dtype.name, float(mean), mean.dtype.name
    print(f"{name} sum {total} {total.dtype}, mean {mean} {mean.dtype}; max {np.max(ones)} {np.max(ones).dtype}")

if seen["int4"] == (-4, "int4", 0.0, "int4") and seen["uint2"] == (0, "uint2", 0.0, "uint2"):
    print("still so: sums of narrow integers wrap")
else:
    sys.exit(f"CHANGED: {seen}")
PY
