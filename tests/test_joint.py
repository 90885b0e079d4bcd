"""Range and zero point together: brute force as the oracle, and never worse than not searching."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import floats
from hypothesis import given
from hypothesis import strategies as st
from test_grid_laws import code, decode, fit, weights

from jquant.grids import MSE, Joint, Uniform, nearest
from jquant.grids.joint import best_zero
from jquant.grids.uniform import CONVENTIONS
from jquant.numerics.distortion import bits_per_weight
from jquant.rounding import Nearest

fit_weighed = jax.jit(lambda w, importance, grid: grid.fit(w, importance), static_argnames="grid")
ROWS = tuple(name for name in CONVENTIONS)


def uniform(bits: int, convention: str, **kwargs) -> Uniform:
    return Uniform(bits, convention[0] == "S", convention, **kwargs)


def student(groups: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, size=(groups, size)).astype(np.float32)


def loss(w, params, grid, norm=2.0, importance=np.ones(())):
    error = np.abs(w - np.asarray(decode(code(w, params, grid), params, grid), np.float64))
    return (importance * error**norm).sum(-1)


def brute(w: np.ndarray, h: np.ndarray, bits: int, zeros: np.ndarray) -> np.ndarray:
    """The least loss of each group over 300 steps and all these zero points, in float64."""
    top = 2**bits - 1
    least = []
    for group, weight in zip(w.astype(np.float64), h, strict=True):
        width = max(group.max(), 0) - min(group.min(), 0)
        step = width / top * np.geomspace(0.1, 1.4, 300)[:, None, None]
        q = np.clip(np.round(group / step + zeros[:, None]), 0, top)
        least.append((weight * (group - step * (q - zeros[:, None])) ** 2).sum(-1).min())
    return np.array(least)


@pytest.mark.parametrize("convention", ["A1", "A4"])
@pytest.mark.parametrize("bits", [2, 3])
def test_as_good_as_all_steps_and_zero_points(bits, convention):
    w = student(16, 32)
    h = np.random.default_rng(1).exponential(size=w.shape)
    grid = uniform(bits, convention, range=Joint())
    got = loss(w, fit_weighed(w, h.astype(np.float32), grid), grid, 2.0, h)
    zeros = np.arange(2**bits) if convention == "A1" else np.linspace(-1, 2**bits, 16 * 2**bits)
    best = brute(w, h, bits, zeros)
    assert (got <= 1.15 * best).all() and got.sum() <= 1.02 * best.sum()


@pytest.mark.parametrize("bits", [2, 4])
@given(seed=st.integers(0, 10**6))
def test_zero_points_between_codes_are_exact(bits, seed):
    random = np.random.default_rng(seed)
    x = (2**bits / 5 * random.normal(size=(4, 9))).astype(np.float32)
    weight = random.exponential(size=x.shape)
    weight = (weight / weight.sum(-1, keepdims=True)).astype(np.float32)
    start = random.uniform(-0.5, 2**bits, size=4).astype(np.float32)
    got = np.asarray(_best_zero(x, weight, start, (0, 2**bits - 1)), np.float64)
    assert (np.abs(got - start) <= 1 + 1e-5).all()

    def at(zero):
        position = x[:, None] + zero[..., None]
        error = position - np.clip(np.round(position), 0, 2**bits - 1)
        return (weight[:, None] * error**2).sum(-1)

    every = at(start[:, None] + np.linspace(-1, 1, 4001))
    assert (at(got[:, None])[:, 0] <= every.min(-1) + 1e-5).all()


_best_zero = jax.jit(best_zero, static_argnums=3)


@pytest.mark.parametrize("convention", ROWS)
@given(w=weights, seed=st.integers(0, 100))
def test_never_worse_than_without_the_search(convention, w, seed):
    h = np.random.default_rng(seed).exponential(size=w.shape).astype(np.float32)
    for search in (Joint(), Joint(2.5, steps=5)):
        losses = [
            loss(w, fit_weighed(w, h, grid), grid, search.norm, h)
            for grid in (uniform(2, convention, range=search), uniform(2, convention))
        ]
        spare = h.sum(-1) * (8 * np.finfo(np.float32).eps * np.abs(w).max(-1)) ** search.norm
        assert (losses[0] <= losses[1] * (1 + 1e-4) + spare).all()


@pytest.mark.parametrize("convention", ROWS)
@pytest.mark.parametrize("bits", [2, 4])
def test_better_than_ranges_alone(bits, convention):
    """A step and zero point that `MSE` has are nearly always tried, and more besides."""
    w = student(512, 32)
    searches = (Joint(), MSE(norm=2.0))
    joint, alone = (
        loss(w, fit(w, grid), grid)
        for grid in (uniform(bits, convention, range=search) for search in searches)
    )
    assert (joint > 1.01 * alone).mean() < 0.06
    gain = {"A": 0.99, "S": 1.0}[convention[0]] * (0.92 if convention == "A4" else 1.0)
    assert joint.sum() < gain * alone.sum()


def test_wider_than_the_weights_where_that_helps():
    w = np.array([[-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    params = floats(fit(w, Uniform(2, range=Joint())))
    assert params["scale"][0] == pytest.approx(1.0, rel=0.02) and params["zero"][0] in (1, 2)
    assert float(Uniform(2).fit(jnp.asarray(w))["scale"][0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("convention", ["A1", "A4", "S4"])
def test_importance_decides(convention):
    w, grid = student(32, 32), uniform(2, convention, range=Joint())
    some = (np.arange(32) < 4).astype(np.float32)[None] + 1e-3
    plain, weighed, alike, none = (
        floats(fit_weighed(w, h, grid))["scale"]
        for h in (None, some, np.full((1, 32), 7e30, np.float32), np.zeros((1, 32), np.float32))
    )
    assert (plain != weighed).mean() > 0.9
    np.testing.assert_allclose(plain, alike, rtol=1e-6)
    np.testing.assert_array_equal(plain, none)


@pytest.mark.parametrize("convention", ROWS)
def test_groups_of_all_kinds(convention):
    w = student(7, 32) * np.array([[1.0], [0.0], [np.nan], [1e30], [1e-30], [1.0], [1.0]])
    w[5, :3], w[6] = (3e38, -3e38, 1e-45), 0.25
    w = w.astype(np.float32)
    grid = uniform(2, convention, range=Joint())
    params = fit(w, grid)
    values = np.asarray(decode(code(w, params, grid), params, grid))
    assert np.isnan(floats(params)["scale"][2])
    others = np.arange(7) != 2
    assert np.isfinite(values[others]).all() and np.abs(values[1]).max() < 1e-30
    huge, plain = (floats(fit(student(7, 32)[3:4] * s, grid))["scale"] for s in (1e30, 1.0))
    np.testing.assert_allclose(huge / 1e30, plain, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("convention", ["A1", "A4", "S4", "S5"])
def test_codes_are_chosen_for_what_is_stored(convention, dtype):
    w = jnp.asarray(student(8, 64))
    grid = uniform(3, convention, range=Joint(), scale_dtype=dtype)
    result = Nearest()(w, grid)
    assert result.params["scale"].dtype == dtype
    fine = uniform(3, convention, range=Joint())
    params = {name: leaf[:, 0] for name, leaf in result.params.items()}
    assert loss(w, params, grid).sum() <= 1.02 * loss(w, fit(w, fine), fine).sum()
    whole = {"A1": 3, "A4": 16}.get(convention, 0)
    wanted = 3 + (jnp.finfo(dtype).bits + whole) / 64
    assert bits_per_weight(result.codes, result.params, 3) == wanted


def test_any_shape_at_once_gives_what_each_group_gives():
    w = student(12, 16).reshape(3, 4, 16)
    h = np.random.default_rng(0).exponential(size=(3, 1, 16)).astype(np.float32)
    grid = Uniform(2, convention="A4", range=Joint())
    whole = fit_weighed(w, h, grid)
    mapped = jax.jit(jax.vmap(grid.fit))(w, h)
    one = fit_weighed(w[1, 2], h[1, 0], grid)
    for name in whole:
        np.testing.assert_array_equal(whole[name], mapped[name])
        np.testing.assert_allclose(np.asarray(whole[name])[1, 2], one[name], rtol=1e-5)


def test_nothing_is_wide_with_64_bits():
    with jax.enable_x64(True):
        for convention in ("A1", "A4", "S4"):
            grid = uniform(2, convention, range=Joint())
            w = jnp.asarray(student(2, 8))
            jaxpr = jax.make_jaxpr(lambda w, grid=grid: grid.fit(w))(w)
            assert not re.search(r"f64\[\d", str(jaxpr))
            assert {leaf.dtype.itemsize for leaf in grid.fit(w).values()} <= {1, 4}


@pytest.mark.parametrize("convention", ["A1", "A4", "S4"])
def test_memory_is_that_of_a_few_weights(convention):
    w = jax.ShapeDtypeStruct((512, 64, 64), jnp.float32)
    grid = uniform(2, convention, range=Joint())
    importance = jax.ShapeDtypeStruct((1, 64, 64), jnp.float32)
    sizes = jax.jit(grid.fit).lower(w, importance).compile().memory_analysis()
    assert (
        sizes is not None and sizes.temp_size_in_bytes < 8 * 4 * 512 * 64 * 64
    )  # of more than 200 candidates


def test_a_signed_scale_keeps_the_largest_entry():
    w = jnp.asarray([[-4.0, 1.0, 3.0, 0.5], [-1.0, 4.0, 3.0, 0.0]])
    grid = Uniform(2, symmetric=True, convention="S4")
    params = grid.fit(w)
    assert params["scale"].tolist() == [2.0, -2.0]
    codes = nearest(grid, w, params)
    assert codes.tolist() == [[-2, 0, 1, 0], [0, -2, -2, 0]]
    assert grid.decode(codes, params).tolist() == [[-4.0, 0.0, 2.0, 0.0], [0.0, 4.0, 4.0, 0.0]]


def test_levels_without_zero():
    grid = Uniform(2, symmetric=True, convention="S5")
    params = grid.fit(jnp.array([[-6.0, 0.5, 3.0]]))
    assert params["scale"].tolist() == [2.0]
    assert grid.decode(jnp.array([[-2, -1, 0, 1]]), params).tolist() == [[-6.0, -2.0, 2.0, 6.0]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"norm": 0.5}, "norm"), ({"steps": 1}, "Joint.steps"), ({"zeros": 0}, "Joint.zeros"),
     ({"norm": float("nan")}, "norm"), ({"steps": 4.0}, "Joint.steps")],
)  # fmt: skip
def test_bad_searches_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Joint(**arguments)
