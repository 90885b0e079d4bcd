"""1-Wasserstein distances: cases worked out by hand, SciPy's one, and what a metric must be."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from jquant import distances
from jquant.arithmetic.distances import (
    assignment,
    band,
    histogram,
    sinkhorn,
    transport,
    wasserstein,
)

# The tests of EarthMover.jl, the code of the paper.
PAIRS = [
    ([(1, 3), (3, 5), (5, 1)], [(0, 3), (3, 6), (6, 1)], 1.0),
    (
        [(1, 2, 1), (2, 2, 1), (4, 4, 1), (4, 1, 2)],
        [(1, 2, 1), (3, 4, 1), (2, 2, 2), (4, 2, 2)],
        0.75,
    ),
    ([(0.5, 0.5), (1.5, 1.5), (1.5, 2.5)], [(0.5, 0.5), (2.5, 1.5), (0.5, 2.5)], 2 / 3),
]


@pytest.mark.parametrize(("x", "y", "wanted"), PAIRS)
def test_cases_worked_out_by_hand(x, y, wanted):
    assert transport(x, y) == pytest.approx(wanted)
    assert assignment(x, y) == pytest.approx(wanted)
    assert transport(histogram(x, 1.0), histogram(y, 1.0)) == pytest.approx(wanted)


def test_bins_of_one_dimension():
    x = [0.1] * 3 + [0.3] * 4 + [0.5] * 3
    y = [0.1] * 2 + [0.3] * 4 + [0.5] + [0.7] * 2 + [0.9]
    binned = histogram(x, 0.2), histogram(y, 0.2)
    assert transport(*binned) == pytest.approx(0.12)
    np.testing.assert_allclose(binned[0].points[:, 0], [0, 0.2, 0.4])
    np.testing.assert_allclose(binned[1].masses, [0.2, 0.4, 0.1, 0.2, 0.1])


samples = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=12)


@given(x=samples, y=samples)
def test_one_dimension_is_scipy_s(x, y):
    wanted = wasserstein_distance(x, y)
    assert float(wasserstein(jnp.array(x), jnp.array(y))) == pytest.approx(wanted, abs=2e-6)
    assert transport(x, y) == pytest.approx(wanted, abs=1e-9)


@given(x=samples, shift=st.floats(-4, 4, width=16), scale=st.sampled_from([-2.0, 0.5, 3.0]))
def test_translation_and_scaling(x, shift, scale):
    a = jnp.array(x)
    assert float(wasserstein(a, a + shift)) == pytest.approx(abs(shift), abs=1e-5)
    assert float(wasserstein(scale * a, scale * jnp.flip(a) + scale)) == pytest.approx(
        abs(scale), abs=1e-5
    )


def clouds(count=3, n=12, dimensions=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, n, dimensions))


def test_a_metric_in_two_and_three_dimensions():
    for dimensions in (2, 3):
        a, b, c = clouds(dimensions=dimensions)
        assert transport(a, a[::-1]) == 0
        assert transport(a, b) == pytest.approx(transport(b, a))
        assert transport(a, c) <= transport(a, b) + transport(b, c) + 1e-12
        assert transport(a, a + 0.5) == pytest.approx(0.5 * np.sqrt(dimensions))
        assert transport(a, b) == pytest.approx(assignment(a, b))


def test_what_two_histograms_share_stays():
    """More mass in common leaves less to move, and the same work per unit of it."""
    a, b = clouds(2)
    both = np.concatenate([a, b])
    shared = transport(np.concatenate([both, a]), np.concatenate([both, b]))
    assert shared == pytest.approx(transport(a, b) / 3)


def test_many_at_once():
    x, y = (jax.random.normal(jax.random.key(k), (5, 40)) for k in range(2))
    found = jax.jit(jax.vmap(wasserstein))(x, y[:, :30])
    wanted = [wasserstein_distance(a, b) for a, b in zip(x, y[:, :30], strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_histograms_count():
    h = histogram([[0.0, 0.9], [0.1, 0.8], [-0.1, 0.9], [0.5, -0.5]], [0.5, 1.0])
    np.testing.assert_array_equal(h.points, [[-0.5, 0], [0, 0], [0.5, -1]])
    np.testing.assert_array_equal(h.masses, [0.25, 0.5, 0.25])


def test_the_band_of_double_precision():
    runs = [jnp.array([0.0, 1.0]) + shift for shift in (0.0, 0.1, 0.3)]
    found = band(runs)
    assert found == pytest.approx((0.1, 0.2, 0.3), abs=1e-6)
    assert found.holds(0.25) and not found.holds(0.31)
    assert band(clouds(), transport).high >= band(clouds(2), transport).high
    with pytest.raises(ValueError, match="two runs or more, got 1"):
        band(runs[:1])


def test_the_other_solver_agrees():
    pytest.importorskip("ot")
    for x, y, wanted in PAIRS:
        assert transport(x, y, solver="pot") == pytest.approx(wanted)
    a, b = clouds(2, 40, 3)
    assert transport(a, b, solver="pot") == pytest.approx(transport(a, b))


def test_sinkhorn_is_near_and_above():
    pytest.importorskip("ott")
    a, b = clouds(2, 60)
    exact = transport(a, b)
    assert exact <= sinkhorn(a, b, epsilon=0.02, tolerance=1e-3) * 1.01 < 1.1 * exact


def test_extras_that_are_absent_are_named(monkeypatch: pytest.MonkeyPatch):
    original = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] in ("ot", "ott"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"jquant-jax\[transport\]"):
        transport([0.0], [1.0], solver="pot")
    with pytest.raises(ImportError, match=r"jquant-jax\[sinkhorn\]"):
        sinkhorn([0.0], [1.0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wasserstein(jnp.ones((2, 2)), jnp.ones(2)), "vmap over the other axes"),
        (lambda: wasserstein(jnp.ones(0), jnp.ones(2)), r"shapes \(0,\)"),
        (lambda: transport([[0.0, 1.0]], [[1.0]]), "x has 2 dimensions and y 1"),
        (lambda: transport([np.nan], [1.0]), "x holds NaN"),
        (lambda: transport([], [1.0]), "n above zero"),
        (lambda: transport([0.0], [1.0], solver="glpk"), "'scipy' or 'pot', got 'glpk'"),  # type: ignore[arg-type]
        (lambda: assignment([0.0], [1.0, 2.0]), "as many samples"),
        (lambda: histogram([1.0], 0), "above zero"),
        (lambda: sinkhorn([0.0], [1.0], epsilon=0.0), "epsilon must be above zero"),
        (lambda: sinkhorn([0.0], [[1.0, 2.0]]), "x has 1 dimensions and y 2"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_public_names():
    assert distances.histogram is histogram
