#!/usr/bin/env bash
# compressed-tensors 0.20 reads the 3-bit weights that 0.17 packed as other weights, without an error.
#
# Versions:  Python 3.11, compressed-tensors 0.17.1 and 0.20.0, torch 2.13.0, transformers 5.24.0.
# Seen:      64 three-bit codes are 7 words of int32 in 0.17.1 (ten codes in each, two bits empty) and 6
#            words in 0.20.0 (dense). 0.20.0 unpacks the seven words into 64 codes, 48 of them
#            wrong. So it is for 5, 6 and 7 bits; 2, 4 and 8 bits agree.
# Expected:  the codes back, or an error: both write the format "pack-quantized" with num_bits 3, with no field that
#            tells the layouts apart. Three bits came with github.com/vllm-project/compressed-tensors/pull/715,
#            the dense layout with pull/732, where a maintainer asked for a new format name instead.
# Matters:   an older checkpoint loads with the right shapes and wrong numbers.
# Output seen:
#            3 bits: 0.17.1 7 words, 0.20.0 6 words; 0.20.0 reads the older as (1, 64), 48 codes wrong
#            4 bits: 0.17.1 8 words, 0.20.0 8 words; 0.20.0 reads the older as (1, 64), 0 codes wrong
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.0
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/older" compressed-tensors==0.17.1
cd "$folder"
cat > pack.py <<'PY'
"""Pack the same codes at four widths, and keep the words."""
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

words = {}
for bits in (3, 4, 5, 8):
    codes = (torch.arange(64) % 2**bits - 2 ** (bits - 1)).to(torch.int8)[None]
    words[bits] = codes, pack_to_int32(codes, bits)
torch.save(words, "words.pt")
PY
PYTHONPATH="$folder/older" "$folder/venv/bin/python" pack.py 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

seen = {}
for bits, (codes, words) in torch.load("words.pt").items():
    newer = pack_to_int32(codes, bits)
    read = unpack_from_int32(words, bits, codes.shape)
    wrong = int((read != codes).sum()) if read.shape == codes.shape else "all"
    print(
        f"{bits} bits: 0.17.1 {words.shape[1]} words, 0.20.0 {newer.shape[1]} words;",
        f"0.20.0 reads the older as {tuple(read.shape)}, {wrong} codes wrong",
    )
    seen[bits] = words.shape[1], newer.shape[1], tuple(read.shape) == (1, 64), wrong != 0

if seen == {
    3: (7, 6, True, True),
    4: (8, 8, True, False),
    5: (11, 10, True, True),
    8: (16, 16, True, False),
}:
    print("still so: one format name, two layouts, and no error between them")
else:
    sys.exit(f"CHANGED: {seen}")
PY
