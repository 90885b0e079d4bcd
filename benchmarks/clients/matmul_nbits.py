"""A weight on a 4-bit grid as onnxruntime's operator `MatMulNBits`, and its products.

No format of `export`: models for onnxruntime are graphs, and who makes one can pack its weights
like this. `B` holds the codes of a block of inputs as bytes `[out, blocks, block / 2]`, the first
of two in the low half; `scales` are `[out × blocks]`, zero points `[out, ⌈blocks / 2⌉]` bytes of
two each. Without zero points a code stands for itself less 8, which is a symmetric grid's.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from benchmarks.environments import Failed, reason
from jquant.grids import Uniform
from jquant.io.bitstream import pack_bits
from jquant.weights.qtensor import QTensor

NAME = "onnxruntime"
PACKAGES = ("onnxruntime==1.32.0", "onnx==1.23.2")
CHILD = Path(__file__).with_name("matmul_nbits_child.py")
SCHEMES = {
    "4 bits, groups of 32": jq.Scheme(Uniform(4, True), 32),
    "4 bits, groups of 32, zero points": jq.Scheme(Uniform(4), 32),
    "4 bits, groups of 128, zero points": jq.Scheme(Uniform(4), 128),
}
OUT, WIDTH, ROWS = 48, 384, 16


def packed(q: QTensor) -> dict[str, np.ndarray]:
    """The inputs of `MatMulNBits` of a weight `[out, in]` on a 4-bit `Uniform` grid.

    Example:
        >>> from jquant.axes import Groups, Layout
        >>> layout = Layout.of((1, 16), in_axes=(1,))
        >>> codes = np.arange(-8, 8, dtype=np.int8).reshape(1, 16)
        >>> params = {"scale": np.ones((1, 1), np.float32)}
        >>> packed(QTensor(codes, params, Uniform(4, True), Groups("in", 16), layout, "float32"))[
        ...     "B"].tolist()
        [[[16, 50, 84, 118, 152, 186, 220, 254]]]
    """
    codes = np.asarray(q.codes).astype(np.int8)
    out, width = codes.shape
    block = q.groups.group(width)
    unsigned = (codes - q.grid.codes[0]).astype(np.uint8)
    arrays = {
        "B": pack_bits(unsigned, 4).reshape(out, width // block, block // 2),
        "scales": np.asarray(q.params["scale"], np.float32).reshape(-1),
    }
    if "zero" in q.params:
        zeros = np.asarray(q.params["zero"]).astype(np.uint8)
        zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
        arrays["zero_points"] = pack_bits(zeros, 4).reshape(-1)
    return arrays


def rows(python: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """A row for each scheme: how far onnxruntime's products are from `apply`'s."""
    result = {}
    x = jax.random.normal(jax.random.key(1), (ROWS, WIDTH))
    for title, scheme in SCHEMES.items():
        params = {"w": jax.random.normal(jax.random.key(0), (WIDTH, OUT))}

        def fn(params: Any, x: jax.Array) -> jax.Array:
            return x @ params["w"]

        qparams, _ = jq.quantize(fn, params, jq.plan(jq.find_weights(fn, params, x), {"w": scheme}))
        q = qparams["w"]
        np.savez(folder / "in.npz", x=np.asarray(x), **packed(q))
        block = q.groups.group(WIDTH)
        command = [str(python), str(CHILD), str(folder), str(OUT), str(WIDTH), str(block)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Failed(reason(done.stderr))
        expected, got = np.asarray(jq.apply(fn)(qparams, x)), np.load(folder / "out.npy")
        result[title] = {
            "held": {"MatMulNBits": 1},
            "largest_difference": float(np.abs(expected - got).max()),
            "largest_logit": float(np.abs(expected).max()),
            "way": "float32",
            "note": "products of one weight",
            "versions": json.loads(done.stdout.splitlines()[-1]),
        }
        print(NAME, title, json.dumps(result[title]), flush=True)
    return result
