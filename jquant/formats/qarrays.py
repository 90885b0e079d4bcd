"""What the arrays of qwix's `QArray` stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def values_of(arrays: Mapping[str, Any]) -> np.ndarray:
    """The numbers that the arrays of a `QArray` stand for, float32, as qwix multiplies them."""
    value = np.asarray(arrays["qvalue"]).astype(np.float32)
    for name, step in (("zero_point", np.subtract), ("scale", np.multiply)):
        if name in arrays:
            other = np.asarray(arrays[name]).astype(np.float32)
            tiles = [size // count for size, count in zip(value.shape, other.shape, strict=True)]
            for axis, tile in enumerate(tiles):
                other = np.repeat(other, tile, axis)
            value = step(value, other)
    return value
