"""How far apart two climates are: the 1-Wasserstein distance between clouds of states.

`W1(P, Q) = min E |X - Y|` over all joint distributions with marginals P and Q: the work of moving
one distribution onto the other, in units of the states. Unlike a difference of trajectories it
means something for chaotic systems, and unlike a difference of means it sees all of a distribution.

    wasserstein   one dimension, exact: the area between the two distribution functions; in JAX
    transport     any dimension, exact: a linear program (SciPy), or network simplex (POT)
    assignment    any dimension, equal numbers of samples, exact: who goes to whom (SciPy)
    sinkhorn      any dimension, large: entropic, approximate (ott-jax)

Two runs of the *same* model from other starts have a distance too, as samples are finite. `band`
takes it from pairs of runs in double precision, and a low-precision run is as good as double where
its distances lie inside (Paxton et al. 2022). Everything but `wasserstein` works on the host.

References: Paxton et al., Climate modeling in low precision, J. Climate 35, 2022; Peyré and Cuturi,
Computational optimal transport, 2019.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jquant.errors import extra

papers = ("paxton2022climate", "peyre2019transport")  # for `jq.cite`
Solver = Literal["scipy", "pot"]


def wasserstein(x: Shaped[Array, " n"], y: Shaped[Array, " m"]) -> Float[Array, ""]:
    """W1 between two sets of numbers, exact: `∫ |F(t) - G(t)| dt`.

    For many at once (grid points, variables) use `jax.vmap`. Equal numbers of samples cost a sort.

    Args:
        x, y: samples, floating, one axis each; sizes may differ.

    Returns:
        a scalar in their dtype and units.

    Raises:
        ValueError: not one axis each, or no samples.

    Example:
        >>> float(wasserstein(jnp.array([0.0, 1.0]), jnp.array([3.0, 2.0])))
        2.0
    """
    if jnp.ndim(x) != 1 or jnp.ndim(y) != 1 or not len(x) or not len(y):
        raise ValueError(
            f"wasserstein takes samples along one axis, got shapes {jnp.shape(x)} and "
            f"{jnp.shape(y)}; jax.vmap over the other axes"
        )
    x, y = jnp.sort(x), jnp.sort(y)
    if len(x) == len(y):
        return jnp.mean(jnp.abs(x - y))
    ends = jnp.sort(jnp.concatenate([x, y]))
    below = [
        jnp.searchsorted(a, ends[:-1], side="right").astype(ends.dtype) / len(a) for a in (x, y)
    ]
    return jnp.sum(jnp.abs(below[0] - below[1]) * jnp.diff(ends))


class Histogram(NamedTuple):
    """Masses at points: what `transport` moves.

    Attributes:
        points: `[n, d]`, float64.
        masses: `[n]`, float64, of sum one.
    """

    points: np.ndarray
    masses: np.ndarray


def histogram(samples: Any, width: Any) -> Histogram:
    """Samples counted in bins. A bin stands at its lower edge, edges are multiples of `width`.

    Two histograms of one width have common bins, which is what makes distances between them cheap.

    Args:
        samples: `[n]` or `[n, d]`.
        width: of a bin, one number or `d` of them, above zero.

    Raises:
        ValueError: no samples, one that is not finite, another number of axes, a width of zero.

    Example:
        >>> histogram([0.1, 0.2, 1.7], 1.0)
        Histogram(points=array([[0.], [1.]]), masses=array([0.66666667, 0.33333333]))
    """
    points, width = _points(samples, "samples"), np.asarray(width, np.float64)
    if not (width > 0).all():
        raise ValueError(f"the width of bins must be above zero, got {width}")
    bins, counts = np.unique(np.floor(points / width), axis=0, return_counts=True)
    return Histogram(bins * width, counts / len(points))


def transport(x: Any, y: Any, *, solver: Solver = "scipy") -> float:
    """W1 between two histograms, or two sets of samples, in any dimension: exact.

    What both have in common stays where it is, which for W1 loses nothing. The program has a
    variable for each pair of what is left: SciPy takes seconds for 300 × 300, POT for 3000 × 3000.

    Args:
        x, y: each a `Histogram`, or samples `[n]` or `[n, d]` of equal mass. Distances are
            Euclidean.
        solver: "scipy" (HiGHS), or "pot", the Python Optimal Transport library, an extra:
            `pip install 'jquant-jax[transport]'`.

    Raises:
        ValueError: dimensions differ, points are not finite, or there is no such solver.
        MissingPackageError: SciPy or POT is asked for and not installed: SciPy comes with
            `pip install 'jquant-jax[distances]'`.

    Example:
        >>> transport([[0.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [3.0, 4.0]])
        2.5
    """
    if solver not in ("scipy", "pot"):
        raise ValueError(f"transport: solver must be 'scipy' or 'pot', got {solver!r}")
    x, y = _masses(x, "x"), _masses(y, "y")
    if x.points.shape[1] != y.points.shape[1]:
        raise ValueError(
            f"x has {x.points.shape[1]} dimensions and y {y.points.shape[1]}; they must agree"
        )
    points, where = np.unique(np.concatenate([x.points, y.points]), axis=0, return_inverse=True)
    where, surplus = where.reshape(-1), np.zeros(len(points))
    np.add.at(surplus, where, np.concatenate([x.masses, -y.masses]))
    surplus[np.abs(surplus) < 1e-14] = 0
    if not surplus.any():
        return 0.0
    left, right = surplus > 0, surplus < 0
    have, want = surplus[left], -surplus[right]
    costs = np.linalg.norm(points[left, None] - points[None, right], axis=-1)
    moved = have.sum()
    return float(moved) * _SOLVERS[solver](have / moved, want / want.sum(), costs)


def _scipy(have: np.ndarray, want: np.ndarray, costs: np.ndarray) -> float:
    with extra("distances"):
        from scipy import sparse
        from scipy.optimize import linprog

    n, m = costs.shape
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    # The last equation follows from the others, but for rounding errors.
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m - 1, m))
    constraints = sparse.vstack([rows, columns], format="csr")
    optimum = linprog(
        costs.reshape(-1), A_eq=constraints, b_eq=np.concatenate([have, want[:-1]]), method="highs"
    )
    if optimum.fun is None:
        raise RuntimeError(f"the linear program was not solved: {optimum.message}")
    return float(optimum.fun)


def _pot(have: np.ndarray, want: np.ndarray, costs: np.ndarray) -> float:
    with extra("transport", "or pass solver='scipy'"):
        import ot  # pyright: ignore[reportMissingImports]
    return float(ot.emd2(have, want, costs, numItermax=10_000_000))


_SOLVERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], float]] = {
    "scipy": _scipy,
    "pot": _pot,
}


def assignment(x: Any, y: Any) -> float:
    """W1 between two sets of as many samples, in any dimension: the cheapest pairing, exact.

    Args:
        x, y: `[n]` or `[n, d]`; thousands of samples take seconds.

    Raises:
        ValueError: their shapes differ, or points are not finite.

    Example:
        >>> assignment([[0.0, 0.0], [2.0, 0.0]], [[2.0, 1.0], [0.0, 1.0]])
        1.0
    """
    with extra("distances"):
        from scipy.optimize import linear_sum_assignment
        from scipy.spatial.distance import cdist

    x, y = _points(x, "x"), _points(y, "y")
    if x.shape != y.shape:
        raise ValueError(
            f"assignment pairs as many samples, got {x.shape} and {y.shape}; use transport"
        )
    costs = cdist(x, y)
    return float(costs[linear_sum_assignment(costs)].mean())


def sinkhorn(
    x: Any, y: Any, *, epsilon: float = 0.125, tolerance: float = 1e-4, steps: int = 10_000
) -> float:
    """About W1 between two histograms or sets of samples: the cost of the entropic plan.

    The plan's entropy is rewarded by `epsilon`, which smears it out: the cost is above W1, and near
    it where `epsilon` is well below typical distances. Time and memory go with pairs of points.

    Args:
        x, y: as for `transport`.
        epsilon: in the units of the states; 0.125 is EarthMover.jl's default, as is `tolerance`.
        tolerance: of the marginals, where iteration stops.
        steps: after which it is given up.

    Raises:
        MissingPackageError: ott-jax is not installed: `pip install 'jquant-jax[sinkhorn]'`.
        ValueError: as for `transport`, or `epsilon` is not above zero.
        RuntimeError: no convergence in as many steps.
    """
    if not epsilon > 0:
        raise ValueError(f"sinkhorn: epsilon must be above zero, got {epsilon}")
    x, y = _masses(x, "x"), _masses(y, "y")
    if x.points.shape[1] != y.points.shape[1]:
        raise ValueError(
            f"x has {x.points.shape[1]} dimensions and y {y.points.shape[1]}; they must agree"
        )
    with extra("sinkhorn", "or use transport"):
        from ott.geometry import costs, pointcloud  # pyright: ignore[reportMissingImports]
        from ott.problems.linear import (  # pyright: ignore[reportMissingImports]
            linear_problem,
        )
        from ott.solvers.linear import (  # pyright: ignore[reportMissingImports]
            sinkhorn as solver,
        )
    with jax.numpy_dtype_promotion("standard"):  # which ott-jax counts on
        cloud = pointcloud.PointCloud(
            jnp.asarray(x.points), jnp.asarray(y.points), cost_fn=costs.Euclidean(), epsilon=epsilon
        )
        problem = linear_problem.LinearProblem(cloud, jnp.asarray(x.masses), jnp.asarray(y.masses))
        plan = solver.Sinkhorn(threshold=tolerance, max_iterations=steps)(problem)
    if not bool(plan.converged):
        raise RuntimeError(f"no convergence in {steps} steps; raise epsilon, tolerance or steps")
    return float(plan.primal_cost)


class Band(NamedTuple):
    """Distances between runs that differ in their start only: the least, the mean, the largest."""

    low: float
    mean: float
    high: float

    def holds(self, distance: float) -> bool:
        """Whether a distance is no larger than chance makes it."""
        return distance <= self.high


def band(runs: Sequence[Any], distance: Callable[[Any, Any], Any] = wasserstein) -> Band:
    """The least, mean and largest distance between any two of these runs.

    Args:
        runs: two or more, of the full model from other starts.
        distance: a function of two runs.

    Raises:
        ValueError: fewer than two runs.

    Example:
        >>> band([jnp.array([0.0, 1.0]), jnp.array([0.5, 1.0]), jnp.array([0.0, 2.0])])
        Band(low=0.25, mean=0.5, high=0.75)
    """
    if len(runs) < 2:
        raise ValueError(f"a band takes two runs or more, got {len(runs)}")
    apart = [float(distance(one, two)) for one, two in itertools.combinations(runs, 2)]
    return Band(min(apart), float(np.mean(apart)), max(apart))


def _points(samples: Any, name: str) -> np.ndarray:
    points = np.asarray(samples, np.float64)
    points = points[:, None] if points.ndim == 1 else points
    if points.ndim != 2 or not points.size:
        raise ValueError(f"{name} must be [n] or [n, d] with n above zero, got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return points


def _masses(distribution: Any, name: str) -> Histogram:
    if isinstance(distribution, Histogram):
        return Histogram(_points(distribution.points, name), np.asarray(distribution.masses))
    points = _points(distribution, name)
    return Histogram(points, np.full(len(points), 1 / len(points)))
