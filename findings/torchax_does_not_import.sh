#!/usr/bin/env bash
# torchax 0.0.13, its last release, does not import beside torch 2.13.
#
# Versions:  Python 3.11, torchax 0.0.13, torch 2.13.0, jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6.
# Seen:      pip installs the pair without a word; `import torchax` raises AttributeError, as its table of
#            lowerings names an overload of aten.prod that torch 2.13 no longer has.
# Expected:  an import, or a refusal by pip: torchax's metadata (Requires-Dist on PyPI) names no torch at all, and
#            its README asks for an installed PyTorch without an upper limit.
# Matters:   PyTorch models reach JAX, and so JAX's quantizers, through this package.
# Output seen:
#            AttributeError: The underlying op of 'aten.prod' has no overload name 'dim_Dimname'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchax==0.0.13 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import sys

needs = importlib.metadata.requires("torchax") or []
print("torchax", importlib.metadata.version("torchax"), "names torch:", any(need.startswith("torch") for need in needs))
try:
    import torchax
except AttributeError as error:
    print("AttributeError:", error)
    if "aten.prod" not in str(error):
        sys.exit("CHANGED: the import fails for another reason")
    print("still so: torchax 0.0.13 does not import beside torch 2.13.0")
else:
    sys.exit(f"CHANGED: {torchax.__name__} imports")
PY
