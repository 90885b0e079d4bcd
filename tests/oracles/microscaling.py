"""MX and NVFP4 from their definitions, in NumPy, with the elements of ml_dtypes.

OCP Microscaling Formats v1.0 §6.3: `X = 2^(floor(log2 max |v|) - emax)`, elements `v / X` rounded
to nearest even and clipped to the largest number. NVFP4: `tensor = max |v| / (448 * 6)`, block
scale `E4M3(max |block| / 6 / tensor)`. Blocks are the last axis. The three ways to better scales of
E2M1: `oas`, `mbs`, `four_six`.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np


def elements(x: np.ndarray, dtype) -> np.ndarray:
    most = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -most, most).astype(dtype).astype(np.float64)


def mx(v: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Scales and values."""
    v = v.astype(np.float64)
    emax = np.floor(np.log2(float(ml_dtypes.finfo(dtype).max)))
    scale = 2.0 ** (np.floor(np.log2(np.abs(v).max(-1))) - emax)
    return scale, scale[..., None] * elements(v / scale[..., None], dtype)


def nv(v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tensor scale, block scales and values."""
    v = v.astype(np.float64)
    tensor = np.abs(v).max() / (448 * 6)
    scale = (np.abs(v).max(-1) / 6 / tensor).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    whole = tensor * scale[..., None]
    return tensor, scale, whole * elements(v / whole, ml_dtypes.float4_e2m1fn)


def oas(v: np.ndarray) -> np.ndarray:
    """Overflow-aware scaling: the values. The factor of a block is the power of two that takes its
    largest weight into (3, 6], doubled where that is at most 3.5."""
    v = v.astype(np.float64)
    factor = 2.0 ** np.floor(np.log2(6 / np.abs(v).max(-1, keepdims=True)))
    scaled = np.abs(v).max(-1, keepdims=True) * factor
    factor = np.where(scaled <= 3.5, 2 * factor, factor)
    return elements(v * factor, ml_dtypes.float4_e2m1fn) / factor


def mbs(v: np.ndarray, together: int, mantissas: list[np.ndarray] | None = None) -> np.ndarray:
    """Macro block scaling over `together` blocks `[rows, n, 32]`, with `oas` inside: the values.

    The multiplier is the inverse of the paper's: that of scales, `1 + m / 256`, rounded up so that
    nothing clips; or the best of `mantissas` by squared error.
    """
    v = v.astype(np.float64).reshape(len(v), -1, together, v.shape[-1])
    ratio = np.abs(v).max((-2, -1), keepdims=True) / 6
    part = ratio / 2.0 ** np.floor(np.log2(ratio))
    own = np.ceil((part - 1) * 256) % 256
    tried = [own] if mantissas is None else [own, *(np.full_like(own, m) for m in mantissas)]
    values = [oas(v / (1 + m / 256)) * (1 + m / 256) for m in tried]
    error = np.stack([((v - x) ** 2).sum((-2, -1)) for x in values])
    best = np.take_along_axis(np.stack(values), error.argmin(0)[None, ..., None, None], 0)[0]
    return best.reshape(len(v), -1, v.shape[-1])


def four_six(v: np.ndarray, importance: np.ndarray | float = 1.0) -> np.ndarray:
    """Four over six: the values. Each block has its largest weight at 6 or at 4."""
    v = v.astype(np.float64)
    tensor = np.abs(v).max() / (256 * 6)
    values = []
    for top in (6, 4):
        scale = (np.abs(v).max(-1) / top / tensor).astype(ml_dtypes.float8_e4m3fn)
        whole = tensor * scale.astype(np.float64)[..., None]
        values.append(whole * elements(v / whole, ml_dtypes.float4_e2m1fn))
    error = [(importance * (v - x) ** 2).sum(-1, keepdims=True) for x in values]
    return np.where(error[1] < error[0], values[1], values[0])
