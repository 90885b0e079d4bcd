#!/usr/bin/env bash
# safetensors.numpy.save and safetensors.flax.save write bfloat16 and float8; load of the same module raises.
#
# Versions:  Python 3.11, safetensors 0.8.0, ml_dtypes 0.6.0, numpy 2.4.6, jax 0.10.2.
# Seen:      save(...) of a bfloat16, float8_e4m3fn or float8_e8m0fnu array gives bytes; load(bytes) of the same
#            module raises KeyError 'BF16', 'F8_E4M3', 'F8_E8M0'. load_file of the same as a file reads
#            bfloat16, and raises AttributeError on the float8 dtypes.
# Expected:  the array back: both functions are the two halves of one documented API
#            (huggingface.co/docs/safetensors, pages "Numpy API" and "Flax API"), and JAX has these dtypes.
#            Near it: github.com/safetensors/safetensors/issues/598 (closed), about safe_open.
# Output seen:
#            safetensors.numpy bfloat16: load KeyError 'BF16', load_file bfloat16
#            safetensors.flax float8_e4m3fn: load KeyError 'F8_E4M3', load_file AttributeError module 'numpy' has
#                no attribute 'float8_e4m3fn'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import importlib
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np


def outcome(read, argument):
    """Return the dtype that a reader gives back, or the error it raises."""
    try:
        return str(read(argument)["scales"].dtype)
    except Exception as error:
        return f"{type(error).__name__} {error}"


same = True
for package in ("numpy", "flax"):
    module = importlib.import_module(f"safetensors.{package}")
    for dtype, tag in (("bfloat16", "BF16"), ("float8_e4m3fn", "F8_E4M3"), ("float8_e8m0fnu", "F8_E8M0")):
        array = np.ones(4, np.float32).astype(getattr(ml_dtypes, dtype))
        stored = module.save({"scales": jnp.asarray(array) if package == "flax" else array})
        module.save_file({"scales": jnp.asarray(array) if package == "flax" else array}, "scales.safetensors")
        loaded = outcome(module.load, stored)
        print(f"{module.__name__} {dtype}: load {loaded}, load_file {outcome(module.load_file, 'scales.safetensors')}")
        same &= loaded == f"KeyError '{tag}'"

if same:
    print("still so: what save writes, load of the same module does not read")
else:
    sys.exit("CHANGED: load reads one of these dtypes, or fails otherwise")
PY
