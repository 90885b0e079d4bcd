"""Half-quadratic zero points: HQQ's own loop as the oracle, and never worse than not searching."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import floats
from hypothesis import given
from hypothesis import strategies as st
from test_grid_laws import code, decode, fit, weights

from jquant.grids import HQQ, MSE, Uniform
from jquant.numerics.distortion import bits_per_weight
from jquant.rounding import Nearest

fit_weighed = jax.jit(lambda w, importance, grid: grid.fit(w, importance), static_argnames="grid")


def zeros_of_hqq(w: np.ndarray, bits: int, search: HQQ) -> np.ndarray:
    """The zero points of `optimize_weights_proximal_legacy` of HQQ's code, iteration by iteration,
    `[iterations + 1, groups]`, of weights in units of their group's step."""
    low, high = w.min(-1, keepdims=True), w.max(-1, keepdims=True)
    scale = (2**bits - 1) / (high - low)  # HQQ keeps the inverse
    w, zero, beta = w * scale, -low * scale, search.beta
    found = [zero[:, 0]]
    for _ in range(search.iterations):
        q = np.clip(np.round(w + zero), 0, 2**bits - 1)
        x = w - (q - zero)
        size = np.abs(x)
        with np.errstate(divide="ignore"):
            e = np.sign(x) * np.maximum(size - (1 / beta) * size ** (search.norm - 1), 0)
        zero = (q - (w - e)).mean(-1, keepdims=True)
        beta *= search.kappa
        found.append(zero[:, 0])
    return np.array(found)


def loss(w, params, grid, norm, importance=1.0):
    error = np.abs(w - np.asarray(decode(code(w, params, grid), params, grid), np.float64))
    return (importance * error**norm).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("search", [HQQ(iterations=6), HQQ(1.0, 2.0, 1.1, 6)], ids=str)
def test_the_best_zero_point_of_hqq_s_loop(bits, search):
    w = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    grid = Uniform(bits, range=search)
    assert grid.convention == "A4"
    params = fit(w, grid)
    tried = zeros_of_hqq(w.astype(np.float64), bits, search)
    losses = np.array([
        loss(w, {**params, "zero": jnp.asarray(z, jnp.float32)}, grid, search.norm) for z in tried
    ])  # fmt: skip
    got = loss(w, params, grid, search.norm)
    # A tie that falls the other way in float32 leads to other zero points from there on.
    assert np.isclose(got, losses.min(0), rtol=1e-4).mean() > 0.9
    assert (losses.argmin(0) > 0).mean() > 0.5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bits", [2, 4])
@given(w=weights, seed=st.integers(0, 100))
def test_never_worse_than_without_the_search(bits, dtype, w, seed):
    importance = np.random.default_rng(seed).exponential(size=w.shape).astype(np.float32)
    plain = Uniform(bits, convention="A4", scale_dtype=dtype)
    searched = Uniform(bits, range=HQQ(), scale_dtype=dtype)
    for h in (None, importance):
        losses = [
            loss(w, fit_weighed(w, h, grid), grid, 0.7, 1.0 if h is None else h)
            for grid in (searched, plain)
        ]
        # Weights that both grids hold are off by some units of the last place, to the power 0.7.
        last = (8 * np.finfo(np.float32).eps * np.abs(w).max(-1)) ** 0.7
        spare = last * (w.shape[-1] if h is None else h.sum(-1))
        assert (losses[0] <= losses[1] * (1 + 1e-4) + spare).all()


@pytest.mark.parametrize("unit", [1.0, 0.02])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_lowers_the_error_and_does_not_mind_units(bits, unit):
    w = unit * np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    plain, searched = Uniform(bits, convention="A4"), Uniform(bits, range=HQQ())
    sums = {
        norm: [loss(w, fit(w, grid), grid, norm).sum() for grid in (searched, plain)]
        for norm in (0.7, 2.0)
    }
    assert sums[0.7][0] < 0.97 * sums[0.7][1] and sums[2.0][0] < 0.94 * sums[2.0][1]


def test_importance_moves_the_zero_point():
    w = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    grid = Uniform(3, range=HQQ())
    some = (np.arange(64) < 8).astype(np.float32)[None]
    plain, weighed, alike, none = (
        floats(fit_weighed(w, h, grid))["zero"]
        for h in (None, some, np.full((1, 64), 7, np.float32), np.zeros((1, 64), np.float32))
    )
    assert (plain != weighed).any()
    np.testing.assert_array_equal(plain, alike)
    np.testing.assert_array_equal(plain, none)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_zero_points_are_stored_as_scales_are(dtype):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 128)), jnp.float32)
    grid = Uniform(4, range=HQQ(), scale_dtype=dtype)
    result = Nearest()(w, grid)
    assert result.params["zero"].dtype == result.params["scale"].dtype == dtype
    wanted = 4 + 2 * jnp.finfo(dtype).bits / 128
    assert bits_per_weight(result.codes, result.params, 4) == wanted


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_groups_far_from_zero_stay_within_a_step(dtype):
    w = 1000 + np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    for search in (HQQ(), MSE(steps=1)):
        grid = Uniform(4, convention="A4", range=search, scale_dtype=dtype)
        params = fit(w, grid)
        step = floats(params)["scale"][:, None]
        assert (np.abs(w - decode(code(w, params, grid), params, grid)) <= step).all()


@pytest.mark.parametrize(
    "arguments", [{"norm": 0}, {"norm": 1.5}, {"beta": 0}, {"kappa": -1}, {"iterations": 0}]
)
def test_bad_searches_are_refused(arguments):
    with pytest.raises(ValueError, match="0 < norm <= 1 and all else above 0"):
        HQQ(**arguments)
