"""The array that a quantized weight stands for, made when it is read."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np

from jquant.axes.layout import Layout
from jquant.formats.rows import runs
from jquant.trees.lazy import Lazy, Window, read
from jquant.weights.inputs import Inputs
from jquant.weights.qtensor import QTensor, dequantize_weight


def array_of(q: QTensor) -> Lazy:
    """The array that a matrix of codes stands for, made when it is read, a few rows at a time."""

    def values(window: Window) -> np.ndarray:
        whole: QTensor = jax.tree.map(lambda array: np.asarray(read(array)), q)
        if not _rows_are_apart(q):
            return np.asarray(dequantize_weight(whole))[window]
        out = np.empty(q.shape, q.dtype)
        for run in runs(*q.shape):
            some = jax.tree.map(lambda array, run=run: array[run], whole)
            layout = Layout.of(some.codes.shape, in_axes=(1,))
            out[run] = dequantize_weight(replace(some, layout=layout))
        return out[window]

    return Lazy(tuple(q.shape), np.dtype(q.dtype), values, "dequantized")


def _rows_are_apart(q: QTensor) -> bool:
    """Whether a row of the array is made of the same row of codes and of parameters."""
    rows = q.codes.shape[0]
    return (
        q.codes.ndim == 2
        and q.groups.axis == "in"
        and not [part for part in q.parts if not isinstance(part, Inputs)]
        and q.layout == Layout.of(tuple(q.codes.shape), in_axes=(1,))
        and all(array.ndim > 1 and array.shape[0] == rows for array in q.params.values())
    )
