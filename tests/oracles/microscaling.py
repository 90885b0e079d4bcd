"""MX and NVFP4 from their definitions, in NumPy, with the elements of ml_dtypes.

OCP Microscaling Formats v1.0 §6.3: `X = 2^(floor(log2 max |v|) - emax)`, elements `v / X` rounded
to nearest even and clipped to the largest number. NVFP4: `tensor = max |v| / (448 * 6)`, block
scale `E4M3(max |block| / 6 / tensor)`. Blocks are the last axis.
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
