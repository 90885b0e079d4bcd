"""LoRC and QERA as their papers have them, in float64."""

import numpy as np


def lorc(error: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """ZeroQuant-V2 §5: `U_m Σ^½` and `Σ^½ V_m` of the error."""
    u, s, v = np.linalg.svd(np.asarray(error, np.float64), full_matrices=False)
    half = np.sqrt(s[:rank])
    return u[:, :rank] * half, half[:, None] * v[:rank]


def qera(error: np.ndarray, moment: np.ndarray, rank: int) -> np.ndarray:
    """QERA's exact solution, Theorem 1: `SVD_k(E R^½) R^-½` with the symmetric root."""
    values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    half = vectors * np.sqrt(values) @ vectors.T
    back = vectors / np.sqrt(values) @ vectors.T
    left, right = lorc(np.asarray(error, np.float64) @ half, rank)
    return left @ right @ back
