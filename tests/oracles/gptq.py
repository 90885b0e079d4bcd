"""GPTQ's column loop, transcribed literally into NumPy float64 (Frantar et al. 2022, §3.3).

Cholesky, inverse, Cholesky; one column at a time, all later columns updated at once. `fit` and
`round_to` are callables on `[m, b]` arrays, so that any grid can be put in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def inverse_factor(h: np.ndarray, damping: float) -> np.ndarray:
    """The upper Cholesky factor of `(H + λI)⁻¹`; λ relative to the mean diagonal of live inputs."""
    h = h.astype(np.float64).copy()
    diagonal = np.diag(h).copy()
    level = damping * diagonal[diagonal != 0].mean()
    h[np.diag_indices_from(h)] = np.where(diagonal == 0, 1.0, diagonal + level)
    return np.linalg.cholesky(np.linalg.inv(h)).T


def gptq(
    w: np.ndarray,
    h: np.ndarray,
    *,
    fit: Callable[[np.ndarray], Any],
    round_to: Callable[[np.ndarray, Any], tuple[np.ndarray, np.ndarray, np.ndarray]],
    axis: str = "in",
    group: int | None = None,
    order: str = "natural",
    groups: str = "static",
    damping: float = 0.01,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, values and updated weights at the moment of rounding, each `[out, in]`.

    `fit` takes `[m, b]` (m groups of b weights); `round_to(x [m, b], params)` gives codes and
    values.
    """
    w = w.astype(np.float64)
    rows, width = w.shape
    perm = np.argsort(-np.diag(h), kind="stable") if order == "activation" else np.arange(width)
    factor = inverse_factor(h[np.ix_(perm, perm)], damping)
    size = (width if axis == "in" else rows) if group is None else group

    def fit_column(column: np.ndarray) -> list[Any]:
        return [fit(column[i : i + size][None]) for i in range(0, rows, size)]

    def round_column(column: np.ndarray, params: Any) -> list[np.ndarray]:
        if axis == "in":
            return [part[:, 0] for part in round_to(column[:, None], params)]
        cuts = [column[i : i + size][None] for i in range(0, rows, size)]
        parts = [round_to(cut, p) for cut, p in zip(cuts, params, strict=True)]
        return [np.concatenate([p[0] for p in part]) for part in zip(*parts, strict=True)]

    if axis == "in":
        static = [fit(w[:, i : i + size]) for i in range(0, width, size)]
    else:
        static = [fit_column(w[:, j]) for j in range(width)]

    current = w[:, perm].copy()
    codes, values, margins = np.zeros((rows, width), int), np.zeros_like(w), np.zeros_like(w)
    params: Any = None
    for j in range(width):
        if groups == "static":
            params = static[perm[j] // size] if axis == "in" else static[perm[j]]
        elif axis == "out":
            params = fit_column(current[:, j])
        elif j % size == 0:
            params = fit(current[:, j : j + size])
        code, value, margin = round_column(current[:, j], params)
        codes[:, perm[j]], values[:, perm[j]], margins[:, perm[j]] = code, value, margin
        error = (current[:, j] - value) / factor[j, j]
        current[:, j:] -= np.outer(error, factor[j, j:])
    return codes, values, margins
