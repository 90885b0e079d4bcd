"""What recipes run on: random inputs, the same in every environment."""

from __future__ import annotations

import numpy as np

WIDTH, VOCABULARY, LENGTH = 64, 128, 32
BATCHES = 5  # the last one measures, the others calibrate


def tokens(rows: int = 8, length: int = LENGTH) -> list[np.ndarray]:
    """Batches of tokens, int32 `[rows, length]`, rare ones rarer: ranks by a power law."""
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    draw = [np.random.default_rng(100 + k) for k in range(BATCHES)]
    choose = dict(size=(rows, length), p=frequency / frequency.sum())
    return [d.choice(VOCABULARY, **choose).astype(np.int32) for d in draw]


def images(side: int = 32, rows: int = 8) -> list[np.ndarray]:
    """Batches of float32 `[rows, side, side, 3]`: smooth noise, as pixels of a picture agree."""
    batches = []
    for k in range(BATCHES):
        noise = np.random.default_rng(200 + k).normal(size=(rows, side, side, 3))
        smooth = np.cumsum(np.cumsum(noise, 1), 2)
        smooth = (smooth - smooth.mean((1, 2), keepdims=True)) / smooth.std((1, 2), keepdims=True)
        batches.append(smooth.astype(np.float32))
    return batches
