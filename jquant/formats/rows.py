"""Large arrays, a few rows at a time: what is made of a run stays in a core's cache.

A step over a whole weight makes an array as large as the weight, in memory that was never touched
before; that costs more than the step. Through runs of rows, all steps cost about one pass. Copies
of transposed arrays go by runs too, so that a line of the cache is read once, and not for each of
its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

_RUN = 1 << 19  # elements in a run: about what a core's second cache holds


def runs(rows: int, width: int) -> Iterator[slice]:
    """Slices of so many rows of `width` elements, in order.

    Example:
        >>> list(runs(5, 1 << 18))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, _RUN // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def by_rows(
    function: Callable[[np.ndarray], np.ndarray], array: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """`out`, filled with what a function of rows makes of an array of as many rows.

    Example:
        >>> by_rows(lambda rows: rows.sum(-1), np.ones((3, 4)), np.empty(3)).tolist()
        [4.0, 4.0, 4.0]
    """
    for run in runs(len(array), array.size // max(len(array), 1)):
        out[run] = function(array[run])
    return out


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array with its rows one after the other; itself if they lie so.

    Example:
        >>> contiguous(np.arange(6).reshape(2, 3).T).tolist()
        [[0, 3], [1, 4], [2, 5]]
    """
    if array.flags.c_contiguous or array.ndim != 2:
        return np.ascontiguousarray(array)
    return by_rows(lambda rows: rows, array, np.empty(array.shape, array.dtype))
