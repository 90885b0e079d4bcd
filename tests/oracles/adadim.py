"""AdaDim's fake quantizer, literally in NumPy float32, with a ragged last group (A2 grid)."""

from __future__ import annotations

import numpy as np


def a2_fit(group: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of groups `[m, b]`; zero need not lie inside the range."""
    group = group.astype(np.float32)
    top = np.float32(2**bits - 1)
    low, high = group.min(1), group.max(1)
    scale = np.maximum(high - low, np.float32(1e-5)) / top
    return scale, np.clip(-np.round(low / scale), 0, top)


def a2_round(
    x: np.ndarray, params: tuple[np.ndarray, np.ndarray], bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, values, and how far from a tie each weight was, in codes."""
    scale, zero = (p[:, None].astype(x.dtype) for p in params)
    where = x / scale
    codes = np.clip(np.round(where) + zero, 0, 2**bits - 1)
    return codes.astype(int), scale * (codes - zero), np.abs(where - np.floor(where) - 0.5)


def fake_quantize(w: np.ndarray, bits: int, group: int, axis: str) -> np.ndarray:
    """`w[out, in]` rounded to nearest: "in" (per OC) in runs of a row, "out" (per IC) of a column.

    Per IC is: transpose, quantize runs of a row, transpose back.
    """
    if axis == "out":
        return fake_quantize(w.T, bits, group, "in").T
    w = w.astype(np.float32)
    cuts = [w[:, k : k + group] for k in range(0, w.shape[1], group)]
    return np.concatenate([a2_round(cut, a2_fit(cut, bits), bits)[1] for cut in cuts], axis=1)
