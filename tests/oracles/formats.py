"""Packed layouts of other libraries, written from their descriptions and by no code of ours."""

from __future__ import annotations

import numpy as np


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of unsigned codes as int32 words: bit k of code i is bit `i * bits + k` of the row."""
    rows, count = codes.shape
    ones = (codes[:, :, None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32)) & 1
    ones = np.pad(ones.reshape(rows, -1), ((0, 0), (0, -count * bits % 32)))
    words = ones.reshape(rows, -1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
    return words.sum(-1).astype(np.uint32).view(np.int32)


def pack_quantized(
    q: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int
) -> dict[str, np.ndarray]:
    """compressed-tensors: signed codes `[out, in]`, and zero points packed along the outputs."""
    half = 1 << (bits - 1)
    tensors = {
        "weight_packed": stream(q + half, bits),
        "weight_scale": scale,
        "weight_shape": np.array(q.shape, np.int64),
    }
    if zero is not None:
        tensors["weight_zero_point"] = np.ascontiguousarray(stream((zero + half).T, bits).T)
    return tensors


def gptq(
    q: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    bits: int,
    version: int,
    index: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """GPTQ: unsigned codes `[out, in]`, zero points from 1 on, or any in version 2.

    `index`: the group of every input; None: they are runs of neighbours.
    """
    stored = zero - 1 if version == 1 else zero
    width, groups = q.shape[1], zero.shape[1]
    if index is None:
        index = np.arange(width) // (width // groups)
    return {
        "qweight": np.ascontiguousarray(stream(q, bits).T),
        "qzeros": stream(stored.T, bits),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": index.astype(np.int32),
    }


def awq(q: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> dict[str, np.ndarray]:
    """AWQ: nibble i of a word is its column `[0, 2, 4, 6, 1, 3, 5, 7][i]`."""

    def words(codes: np.ndarray) -> np.ndarray:
        nibbles = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        shifted = nibbles.astype(np.uint64) << (np.arange(8, dtype=np.uint64) * 4)
        return shifted.sum(-1).astype(np.uint32).view(np.int32)

    return {"qweight": words(q.T), "qzeros": words(zero.T), "scales": np.ascontiguousarray(scale.T)}
