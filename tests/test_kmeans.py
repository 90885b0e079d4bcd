"""Fitted tables: as good as exact clustering, exact where they can be, and never degenerate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import floats, layer
from hypothesis import given
from hypothesis import strategies as st
from oracles.kmeans import least_error
from test_grid_laws import GROUPS, SIZE, code, decode, extreme, fit, weights

from jquant.axes.groups import Groups
from jquant.grids import NF4, KMeans, Uniform, code_dtype
from jquant.numerics.distortion import bits_per_weight
from jquant.rounding import GPTQ, Nearest
from tests.marks import covering

pytestmark = pytest.mark.slow

fit_weighed = jax.jit(lambda w, importance, grid: grid.fit(w, importance), static_argnames="grid")


def draw(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    sources = {
        "gauss": lambda: random.normal(size=shape),
        "t4": lambda: random.standard_t(4, size=shape),
        "lattice": lambda: np.round(random.normal(size=shape) * 6) / 5,
        "far": lambda: 100 + 0.01 * random.normal(size=shape),
    }
    return sources[name]().astype(np.float32)


def error(w, params, grid, importance=1.0) -> np.ndarray:
    values = np.asarray(decode(code(w, params, grid), params, grid), np.float64)
    return (importance * (np.asarray(w, np.float64) - values) ** 2).sum(-1)


LONGEST = [(1, 30), (2, 48), (3, 48), (4, 40)]  # bits, and how long a group may be tried


@pytest.mark.parametrize(
    ("bits", "size", "source"),
    [(*one, source) for one, source in covering(LONGEST, ["gauss", "t4", "lattice", "far"])],
)
def test_small_groups_get_the_best_table_there_is(source, bits, size):
    w = draw(source, (6, size))
    importance = np.exp(draw("gauss", (6, size), seed=1))
    for h in (np.ones_like(w), importance):
        best = np.array([least_error(x, y, 2**bits) for x, y in zip(w, h, strict=True)])
        got = error(w, fit_weighed(w, h, KMeans(bits)), KMeans(bits), h)
        slack = 1e-9 * (h * w**2).sum(-1)
        assert (got >= best * (1 - 1e-6) - slack).all()
        np.testing.assert_allclose(got, best, rtol=1e-3, atol=slack.max())


@pytest.mark.parametrize(("source", "bits"), [("gauss", 3), ("t4", 4)])
def test_longer_groups_come_within_a_hundredth_of_it(source, bits):
    w = draw(source, (4, 200))
    h = np.exp(draw("gauss", (4, 200), seed=1))
    best = np.array([least_error(x, y, 2**bits) for x, y in zip(w, h, strict=True)])
    got = error(w, fit_weighed(w, h, KMeans(bits)), KMeans(bits), h)
    assert (got >= best * (1 - 1e-6)).all() and (got <= 1.02 * best).all()
    assert got.sum() <= 1.01 * best.sum()


def test_a_table_of_six_bits_comes_close():
    w = draw("gauss", (2, 300))
    best = sum(least_error(x, np.ones_like(x), 64) for x in w)
    assert best < error(w, fit(w, KMeans(6)), KMeans(6)).sum() < 1.1 * best


def test_lloyd_only_improves():
    w = draw("t4", (16, 600))
    errors = [error(w, fit(w, KMeans(4, n)), KMeans(4, n)).sum() for n in (0, 1, 3, 10)]
    assert errors[0] > errors[1] > errors[2] >= errors[3] * (1 - 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(w=weights)
def test_groups_of_few_values_are_kept(dtype, w):
    # Nine weights, sixteen values: all of them, as exactly as the type of the table has them.
    grid = KMeans(4, table_dtype=dtype)
    if dtype != "float32":
        w = np.clip(w, 2.0**-10, 1000) * np.sign(w)
    params = fit(w, grid)
    assert params["table"].dtype == dtype and params["table"].shape == (GROUPS, 16)
    back = np.asarray(decode(code(w, params, grid), params, grid))
    # Values that the type cannot tell apart move on by its steps, sixteen at the most.
    step = 0.0 if dtype == "float32" else 16 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(back, w, rtol=step, atol=0)
    assert (np.diff(floats(params)["table"], axis=-1) > 0).all()


@pytest.mark.parametrize("size", [100, 1000])
def test_as_many_distinct_weights_as_values_are_kept(size):
    # Also where some of them are so near each other that hardly any error would be lost.
    few = np.float32([far + 1e-4 * near for far in (-8, -1, 0, 5) for near in range(4)])
    w = np.random.default_rng(0).choice(few, size=(5, size))
    params = fit(w, KMeans(4))
    np.testing.assert_array_equal(decode(code(w, params, KMeans(4)), params, KMeans(4)), w)


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, -1e-38, 1e-42, 3.0e4])
@pytest.mark.parametrize("grid", [KMeans(3), KMeans(8), KMeans(4, table_dtype="float16")], ids=str)
def test_constant_groups(value, grid):
    w = np.full((2, 5), value, np.float32)
    params = fit(w, grid)
    assert (np.diff(floats(params)["table"], axis=-1) > 0).all()
    back = decode(code(w, params, grid), params, grid)
    exact = grid.table_dtype == "float32" and abs(value) >= 2.0**-126
    np.testing.assert_allclose(back, w, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-7)


@pytest.mark.parametrize("grid", [KMeans(2), KMeans(8), KMeans(3, table_dtype="float16")], ids=str)
@given(w=extreme)
def test_finite_weights_give_finite_increasing_tables(grid, w):
    table = floats(fit(w, grid))["table"]
    assert np.isfinite(table).all() and (np.diff(table, axis=-1) > 0).all()


@given(w=weights, power=st.integers(-3, 3), seed=st.integers(0, 100))
def test_scaled_and_shuffled_groups_have_scaled_values(w, power, seed):
    grid, factor = KMeans(2), np.float32(2.0**power)
    order = np.random.default_rng(seed).permutation(SIZE)
    values, scaled, shuffled = (
        np.asarray(decode(code(x, fit(x, grid), grid), fit(x, grid), grid))
        for x in (w, w * factor, w[:, order])
    )
    np.testing.assert_array_equal(values * factor, scaled)
    np.testing.assert_array_equal(values[:, order], shuffled)


def test_importance_counts_like_copies():
    w = draw("gauss", (4, 40))
    times = np.random.default_rng(0).integers(0, 4, size=40)
    copies = np.repeat(w, times, axis=-1)
    tables = [
        floats(params)["table"]
        for params in (
            fit(copies, KMeans(3)),
            fit_weighed(w, times.astype(np.float32)[None], KMeans(3)),
        )
    ]
    np.testing.assert_allclose(tables[0], tables[1], atol=1e-4)


def test_weights_of_no_importance_still_draw_values():
    w = draw("gauss", (4, 40))
    nothing, some = np.zeros((1, 40), np.float32), np.ones((1, 40), np.float32)
    table = fit_weighed(w, nothing, KMeans(3))["table"]
    np.testing.assert_allclose(table, fit_weighed(w, some, KMeans(3))["table"], rtol=1e-4)
    some[:, 20:] = 0
    params = fit_weighed(w, some, KMeans(4))
    assert (
        error(w, params, KMeans(4)) < error(w, {"table": params["table"][:, 4:12]}, KMeans(3))
    ).all()


def test_a_row_s_table_serves_all_its_groups():
    w = draw("gauss", (3, 5, 40))
    grid = KMeans(3)
    one = grid.fit(w.reshape(3, 1, 200))
    codes = grid.nearest(w, one)
    values = np.asarray(grid.decode(codes, one))
    whole = grid.nearest(w.reshape(3, 1, 200), one)
    np.testing.assert_array_equal(np.asarray(codes).reshape(3, 1, 200), whole)
    np.testing.assert_array_equal(values.reshape(3, 1, 200), grid.decode(whole, one))
    for x, y in zip(grid.bracket(w, one), grid.bracket(w.reshape(3, 1, 200), one), strict=True):
        np.testing.assert_array_equal(np.asarray(x).reshape(3, 1, 200), y)


def test_second_moments_weigh_rows_and_gptq_runs():
    w, moment = layer(12, 96)
    plain, weighed = (
        np.asarray(Nearest()(w, KMeans(3), evidence=h).params["table"]) for h in (None, moment)
    )
    wanted = KMeans(3).fit(w[:, None], jnp.diagonal(moment)[None, None])["table"]
    np.testing.assert_allclose(weighed, wanted, rtol=1e-5)
    assert plain.shape == (12, 1, 8) and (plain != weighed).any()
    result = GPTQ()(w, KMeans(3), evidence=moment)
    assert float(result.info["error"]) < float(result.info["nearest_error"])
    assert result.codes.dtype == code_dtype(KMeans(3)) == jnp.uint4


def test_many_groups_at_once_are_each_fitted_alone():
    w = draw("gauss", (41, 53, 16))  # more than are fitted at a time
    together = fit(w, KMeans(2))["table"]
    np.testing.assert_array_equal(together[40], fit(w[40], KMeans(2))["table"])
    mapped = jax.vmap(KMeans(2).fit)(w[:3])["table"]
    np.testing.assert_array_equal(together[:3], mapped)


def test_bits_per_weight_counts_tables():
    w, _ = layer(4, 512)
    grid = KMeans(4, table_dtype="float16")
    result = Nearest()(w, grid, Groups())
    assert bits_per_weight(result.codes, result.params, grid.bits) == 4 + 16 * 16 / 512


def test_fitted_tables_beat_fixed_ones():
    w = draw("t4", (64, 512))
    fixed = [error(w, fit(w, grid), grid).sum() for grid in (NF4, Uniform(4))]
    assert error(w, fit(w, KMeans(4)), KMeans(4)).sum() < 0.5 * min(fixed)


@pytest.mark.parametrize("grid", [KMeans(2), KMeans(6)], ids=str)
def test_a_second_call_with_equal_shapes_does_not_compile(grid, compiles):
    Nearest()(layer(12, 40)[0], grid, Groups("in", 8))
    with compiles() as programs:
        Nearest()(layer(12, 40, seed=1)[0], grid, Groups("in", 8))
    assert programs == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"bits": 0}, "KMeans.bits must be an int from 1 to 8, got 0"),
        ({"bits": 9}, "got 9"),
        ({"bits": 2.0}, "got 2.0"),
        ({"bits": True}, "got True"),
        ({"bits": 4, "iterations": -1}, "iterations must be an int from 0 to 10000, got -1"),
        ({"bits": 4, "table_dtype": "float8"}, "'float8'"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        KMeans(**arguments)
