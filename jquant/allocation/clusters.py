"""Numbers on a line in k clusters, optimally: what CPTQuant's k-means is meant to find.

Clusters of least squared distance to their means are runs of the sorted numbers, so dynamic
programming over where runs end is exact and depends on no start:

    cost(k, n) = min over m < n of  cost(k - 1, m) + spread(m, n)

(Wang and Song, Ckmeans.1d.dp, 2011). Clusters come out sorted; the released CPTQuant maps k-means'
arbitrary labels to bits. Quadratic in the count of numbers, in NumPy: they are hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def clusters(values: Sequence[float], count: int) -> list[int]:
    """The cluster of every value, 0 for the smallest.

    Equal values are in one cluster, so there may be fewer than `count`.

    Raises:
        ValueError: `count` is below 1, or there are no values.

    Example:
        >>> clusters([5.0, 0.1, 0.2, 5.1, 2.0], 3)
        [2, 0, 0, 2, 1]
    """
    if count < 1 or not len(values):
        raise ValueError(
            f"clusters needs values and a count above 0, got {len(values)} and {count}"
        )
    numbers, which, times = np.unique(
        np.asarray(values, np.float64), return_inverse=True, return_counts=True
    )
    scale = max(np.abs(numbers).max(), np.finfo(float).tiny)
    x, n = numbers / scale, len(numbers)
    x = x - np.average(x, weights=times)
    sums = [np.concatenate([[0.0], np.cumsum(times * x**power)]) for power in (0, 1, 2)]

    def spread(start: np.ndarray, stop: int) -> np.ndarray:
        zero, one, two = (total[stop] - total[start] for total in sums)
        return np.maximum(two - one**2 / zero, 0.0)

    many = min(count, n)
    cost = np.full((many + 1, n + 1), np.inf)
    cut = np.zeros((many + 1, n + 1), int)
    cost[0, 0] = 0.0
    for k in range(1, many + 1):
        for stop in range(k, n + 1):
            starts = np.arange(k - 1, stop)
            totals = cost[k - 1, starts] + spread(starts, stop)
            best = int(np.argmin(totals))
            cost[k, stop], cut[k, stop] = totals[best], starts[best]
    label, stop = np.zeros(n, int), n
    for k in range(many, 0, -1):
        start = cut[k, stop]
        label[start:stop], stop = k - 1, start
    return label[which.ravel()].tolist()
