"""Exact k-means on a line, by dynamic programming over sorted numbers, in NumPy float64.

The least `Σ h (x - c)²` for k clusters of sorted numbers is that of k - 1 clusters of a head and
one of the tail, at the best cut (Wang and Song, Ckmeans.1d.dp, 2011; Bellman 1973).
"""

from __future__ import annotations

import numpy as np


def least_error(x: np.ndarray, h: np.ndarray, k: int) -> float:
    """The least weighted squared error of any k values."""
    order = np.argsort(x, kind="stable")
    x, h = x[order].astype(np.float64), h[order].astype(np.float64)
    n = x.size

    def of_run(first: int, last: int) -> float:
        run, weight = x[first:last], h[first:last]
        if weight.sum() == 0:
            return 0.0
        mean = (weight * run).sum() / weight.sum()
        return float((weight * (run - mean) ** 2).sum())

    error = np.array(
        [[of_run(i, j) if i <= j else np.inf for j in range(n + 1)] for i in range(n + 1)]
    )
    best = error[0]
    for _ in range(k - 1):
        best = (best[:, None] + error).min(axis=0)
    return float(best[n])
