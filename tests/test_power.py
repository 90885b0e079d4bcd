"""What power grids promise beyond the laws of all grids: PowerQuant's operator and its exponent."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import floats
from hypothesis import example, given
from hypothesis import strategies as st
from test_grid_laws import GROUPS, SIZE, all_codes, code, decode, extreme, fit, weights

from jquant.allocation import power_exponent
from jquant.axes.groups import Groups
from jquant.grids import MSE, MinMax, Power, Uniform, code_dtype, nearest
from jquant.numerics.distortion import bits_per_weight
from jquant.rounding import Nearest

ROUNDED = [Power(4, 0.6), Power(3, 0.5), Power(8, 0.3), Power(2, 0.7), Power(5, 1.1)]
fit_weighed = jax.jit(lambda w, importance, grid: grid.fit(w, importance), static_argnames="grid")
each_power = pytest.mark.parametrize("grid", ROUNDED, ids=str)


def draw(name: str, shape: tuple[int, ...] = (256, 1024), seed: int = 0) -> jax.Array:
    random = np.random.default_rng(seed)
    sources = {
        "uniform": lambda: random.uniform(-1, 1, shape),
        "gauss": lambda: random.normal(size=shape),
        "laplace": lambda: random.laplace(size=shape),
        "t4": lambda: random.standard_t(4, size=shape),
    }
    return jnp.asarray(sources[name](), jnp.float32)


def paper(w, bits, a):
    """PowerQuant's operator (§3.1) in float64: codes and values, m = max |w| of each group."""
    top = 2 ** (bits - 1) - 1
    m = np.abs(w).max(-1, keepdims=True)
    q = np.round(np.sign(w) * (np.abs(w) / m) ** a * top)
    return q, np.sign(q) * m * (np.abs(q) / top) ** (1 / a)


def squared_error(grid, w, params=None):
    params = fit(w, grid) if params is None else params
    return float(jnp.mean((w - decode(code(w, params, grid), params, grid)) ** 2))


@pytest.mark.parametrize(("bits", "a"), [*itertools.product([2, 3, 4, 8], [0.3, 0.5, 0.72, 1.1])])
def test_the_domain_of_codes_is_the_paper_s_operator(bits, a):
    w = draw("gauss", (8, 256))
    grid = Power(bits, a, domain="codes")
    params = fit(w, grid)
    codes, values = paper(np.asarray(w, np.float64), bits, a)
    got = np.asarray(code(w, params, grid))
    # In float32 a position may fall on the other side of a tie.
    where = np.abs(np.asarray(w, np.float64)) / np.abs(w).max(-1, keepdims=True)
    where = where**a * (2 ** (bits - 1) - 1)
    tie = np.abs(where - np.floor(where) - 0.5) < 1e-4
    assert tie.mean() < 0.01
    np.testing.assert_array_equal(got[~tie], codes[~tie])
    back = np.asarray(decode(jnp.asarray(codes, jnp.int32), params, grid))
    np.testing.assert_allclose(back, values, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("domain", ["values", "codes"])
@given(w=weights)
@example(w=np.tile(np.float32([1, 2]), (GROUPS, 5))[:, :SIZE])
def test_exponent_one_is_the_restricted_uniform_grid_bit_for_bit(bits, domain, w):
    one, other = Power(bits, 1.0, domain=domain), Uniform(bits, symmetric=True, convention="S3")
    params, uniform = fit(w, one), fit(w, other)
    codes = code(w, params, one)
    np.testing.assert_array_equal(codes, code(w, uniform, other))
    np.testing.assert_array_equal(decode(codes, params, one), decode(codes, uniform, other))
    for mine, theirs in zip(one.bracket(w, params), other.bracket(w, uniform), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@each_power
@pytest.mark.parametrize("domain", ["values", "codes"])
@given(w=weights)
def test_odd_zero_to_zero_and_the_largest_exact(grid, domain, w):
    grid = Power(grid.bits, grid.exponent, domain=domain)
    w = np.concatenate([w, -w, np.zeros((GROUPS, 1), np.float32)], axis=-1)
    params = fit(w, grid)
    codes = np.asarray(code(w, params, grid))
    values = np.asarray(decode(codes, params, grid))
    np.testing.assert_array_equal(codes[:, :SIZE], -codes[:, SIZE:-1])
    np.testing.assert_array_equal(values[:, :SIZE], -values[:, SIZE:-1])
    assert (codes[:, -1] == 0).all() and (values[:, -1] == 0).all()
    largest = np.abs(w) == np.abs(w).max(-1, keepdims=True)
    # Whole 1 / exponent multiply integers by a step, as uniform grids do: exact to that division.
    ulp = 0.0 if 1 / grid.exponent % 1 else float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(values[largest], w[largest], rtol=ulp, atol=0)


@each_power
@given(w=weights)
def test_codes_rise_with_the_weight(grid, w):
    w = np.sort(w, axis=-1)
    for domain in ("values", "codes"):
        chosen = Power(grid.bits, grid.exponent, domain=domain)
        assert (np.diff(code(w, fit(w, chosen), chosen), axis=-1) >= 0).all()


@each_power
@given(w=weights, power=st.integers(-3, 3))
def test_scaling_by_a_power_of_two_scales_the_values_and_keeps_the_codes(grid, w, power):
    factor = np.float32(2.0**power)
    one, other = fit(w, grid), fit(w * factor, grid)
    codes = code(w, one, grid)
    np.testing.assert_array_equal(codes, code(w * factor, other, grid))
    values = np.asarray(decode(codes, one, grid))
    np.testing.assert_array_equal(values * factor, decode(codes, other, grid))


@pytest.mark.parametrize("a", [0.4, 0.5, 0.72])
def test_the_product_of_values_is_the_value_of_the_product_of_codes(a):
    grid, top = Power(4, a), 7
    params = {"scale": jnp.array([3.0, 0.2])}
    q = np.arange(-7, 8)
    x, y = np.asarray(decode(np.stack([q, q]), params, grid), np.float64)
    product = np.multiply.outer(q, q)
    wanted = np.sign(product) * (np.abs(product) / top**2) ** (1 / a) * 3.0 * 0.2
    np.testing.assert_allclose(np.multiply.outer(x, y), wanted, rtol=2e-6)


@pytest.mark.parametrize(
    ("bits", "root", "dtype"),
    [(4, 2, "int8"), (4, 3, "int16"), (8, 2, "int16"), (8, 3, "int32"), (3, 2, "int8")],
)
def test_integers_are_the_values_bit_for_bit(bits, root, dtype):
    grid = Power(bits, 1 / root)
    w = draw("laplace", (16, 300))
    params = fit(w, grid)
    q = nearest(grid, w, params)
    integers, step = grid.integers(q, params)
    assert integers.dtype == dtype
    np.testing.assert_array_equal(integers, np.sign(q) * np.abs(q) ** root)
    for values in (grid.decode(q, params), decode(q, params, grid)):
        exact = np.asarray(integers, np.float32) * np.asarray(step)[:, None]
        np.testing.assert_array_equal(values, exact)
    searched = {**params, "exponent": jnp.full(16, 1 / root)}
    np.testing.assert_allclose(decode(q, params, grid), decode(q, searched, Power(bits)), rtol=1e-5)


def test_an_integer_matmul_gives_the_products_of_the_values():
    grid = Power(4, 0.5)
    w, x = draw("gauss", (5, 64)), draw("laplace", (3, 64), seed=1)
    (a, s), (b, t) = (grid.integers(nearest(grid, v, grid.fit(v)), grid.fit(v)) for v in (w, x))
    whole = np.asarray(a, np.int64) @ np.asarray(b, np.int64).T
    values = [np.asarray(grid.decode(nearest(grid, v, grid.fit(v)), grid.fit(v))) for v in (w, x)]
    np.testing.assert_allclose(
        whole * np.outer(s, t), values[0].astype(np.float64) @ values[1].T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("exponent", [0.7, 0.2])
def test_no_integers_where_there_are_none(exponent):
    grid = Power(8, exponent)
    with pytest.raises(ValueError, match="whole r, with 127"):
        grid.integers(jnp.zeros((1, 2), jnp.int32), {"scale": jnp.ones(1)})


@pytest.mark.parametrize("a", [0.3, 0.5, 0.9, 1.15])
def test_the_gradient_by_the_exponent_is_finite_and_right(a):
    grid, q = Power(4), jnp.arange(-7, 8)[None]
    scale = jnp.array([1.7])

    def value(a, q):
        return grid.decode(q, {"scale": scale, "exponent": a[None]})

    got = np.asarray(jax.jacobian(value)(jnp.float32(a), q))[0]
    part = np.abs(np.arange(-7, 8)) / 7
    log = np.log(np.where(part > 0, part, 1))
    wanted = -np.sign(q[0]) * 1.7 / a**2 * part ** (1 / a) * log
    assert np.isfinite(got).all() and got[7] == 0
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-6)
    step = 1e-2
    difference = (value(jnp.float32(a + step), q) - value(jnp.float32(a - step), q)) / (2 * step)
    np.testing.assert_allclose(got, difference[0], atol=4e-2 * np.abs(got).max())
    real = jax.grad(lambda q: value(jnp.float32(a), q).sum())(q.astype(jnp.float32))
    assert np.isfinite(real).all()


# ALGORITHMS §e.2 of the specification: absmax per channel, 256 channels of 1024 weights, 4 bits.
TABLE = {
    "uniform": (1.00, 1.00, 1.99),
    "gauss": (0.72, 0.78, 0.93),
    "laplace": (0.57, 0.52, 0.54),
    "t4": (0.47, 0.37, 0.37),
}


@pytest.mark.parametrize("source", TABLE)
def test_the_exponents_of_known_distributions(source):
    best, at_best, at_half = TABLE[source]
    w = draw(source)
    plain = squared_error(Power(4, 1.0), w)
    found = float(jax.jit(power_exponent, static_argnames=("bits", "domain"))(w, 4, domain="codes"))
    assert abs(found - best) <= 0.03
    own = floats(fit(w, Power(4)))["exponent"]
    assert own.shape == (1,) and abs(own[0] - best) <= 0.03
    for a, wanted in ((found, at_best), (0.5, at_half)):
        ratio = squared_error(Power(4, a, domain="codes"), w) / plain
        assert abs(ratio - wanted) <= 0.03, ratio


def test_the_exponent_hardly_depends_on_the_bits():
    w = draw("laplace", (64, 1024))
    found = [float(power_exponent(w, bits)) for bits in (3, 4, 8)]
    assert max(found) - min(found) <= 0.05


@pytest.mark.parametrize("source", TABLE)
@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_finds_what_trying_every_exponent_finds(source, bits):
    w = draw(source, (32, 256))
    params = fit(w, Power(bits, per="group"))
    miss = w - decode(code(w, params, Power(bits)), params, Power(bits))
    got = np.asarray(jnp.sum(miss**2, axis=-1))

    def tried(a):
        given = {**params, "exponent": jnp.full(32, a, jnp.float16)}
        miss = w - decode(code(w, given, Power(bits)), given, Power(bits))
        return jnp.sum(miss**2, axis=-1)

    every = np.asarray(jax.lax.map(tried, jnp.linspace(0.2, 1.2, 101)))
    assert params["exponent"].dtype == jnp.float16
    # Errors of 256 weights have bumps; the search must still be close, in the mean and always.
    assert got.sum() <= 1.01 * every.min(0).sum()
    assert (got <= 1.25 * every.min(0)).all(), (got / every.min(0)).max()


@pytest.mark.parametrize("per", ["group", "weight"])
@pytest.mark.parametrize("bits", [2, 4])
@given(w=weights, seed=st.integers(0, 100))
def test_a_searched_exponent_is_never_worse_than_one(per, bits, w, seed):
    importance = np.random.default_rng(seed).exponential(size=w.shape).astype(np.float32)
    grid = Power(bits, per=per)
    params = fit_weighed(w, importance, grid)
    one = {**params, "exponent": jnp.ones_like(params["exponent"])}
    got, plain = (
        (importance * (w - np.asarray(decode(code(w, p, grid), p, grid), np.float64)) ** 2).sum(-1)
        for p in (params, one)
    )
    got, plain = (got, plain) if per == "group" else (got.sum(), plain.sum())
    assert (got <= plain * (1 + 1e-4) + 1e-6 * np.abs(w).max(-1) ** 2).all()


def test_rounding_values_is_never_worse_than_rounding_codes():
    w = draw("t4", (64, 256))
    for bits, a in itertools.product([3, 4], [0.4, 0.7, 1.2]):
        values, codes = Power(bits, a), Power(bits, a, domain="codes")
        assert squared_error(values, w) < squared_error(codes, w)


def test_importance_moves_the_exponent():
    w = draw("gauss", (8, 256))
    small = jnp.exp(-jnp.abs(w) * 3)
    for per in ("group", "weight"):
        grid = Power(3, per=per)
        plain, weighed = (floats(grid.fit(w, h))["exponent"] for h in (None, small))
        assert (weighed < plain - 0.02).all()
    assert power_exponent([w], 3, [small]) < power_exponent([w], 3) - 0.02


def test_a_network_s_exponent_lies_between_those_of_its_weights():
    wide, heavy = draw("uniform", (16, 512)), draw("t4", (16, 512))
    both = float(power_exponent({"a": wide, "b": heavy}, 4))
    assert float(power_exponent(heavy, 4)) < both < float(power_exponent(wide, 4))
    # A weight counts by its norm, so the small one counts little.
    assert abs(float(power_exponent([wide * 1e-4, heavy], 4) - power_exponent(heavy, 4))) < 0.02
    with pytest.raises(ValueError, match="at least one weight"):
        power_exponent({}, 4)


@pytest.mark.parametrize("per", ["group", "weight"])
def test_one_exponent_for_each_group_or_for_each_weight(per):
    grid = Power(4, per=per, scale_dtype="float16")
    w = draw("gauss", (2, 3, 6, 40))
    params = grid.fit(w)
    assert params["exponent"].shape == ((2, 3, 6) if per == "group" else (2, 1, 1))
    mapped = jax.vmap(grid.fit)(w)
    for name, leaf in floats(params).items():
        np.testing.assert_array_equal(leaf, floats(mapped)[name])
    result = Nearest()(w[0].reshape(3, 240), grid, Groups("in", 40))
    assert result.codes.dtype == code_dtype(grid) == jnp.int4
    exponents = 18 if per == "group" else 1
    wanted = 4 + 16 / 40 + 16 * exponents / (3 * 240)
    assert bits_per_weight(result.codes, result.params, grid.bits) == pytest.approx(wanted)


@pytest.mark.parametrize("grid", [Power(4), Power(3, per="group"), Power(8, 0.5)], ids=str)
def test_a_second_call_with_equal_shapes_does_not_compile(grid, compiles):
    Nearest()(draw("gauss", (12, 40)), grid, Groups("in", 8))
    with compiles() as programs:
        Nearest()(draw("gauss", (12, 40), seed=1), grid, Groups("in", 8))
    assert programs == []


@pytest.mark.parametrize("grid", [Power(4), Power(8, 0.125), Power(3, scale_dtype="float16")])
@given(w=extreme)
def test_finite_weights_give_finite_everything(grid, w):
    params = fit(w, grid)
    points = np.asarray(decode(all_codes(grid), params, grid))
    for leaf in floats(params).values():
        assert np.isfinite(leaf).all() and (leaf > 0).all()
    assert np.isfinite(points).all() and (np.diff(points, axis=-1) > 0).all()
    assert np.isfinite(decode(code(w, params, grid), params, grid)).all()


@pytest.mark.parametrize("top", [1e-37, 1e-30, 3e38])
@pytest.mark.parametrize("grid", [Power(8, 0.125), Power(8, 1 / 3), Power(4)], ids=str)
def test_points_of_the_smallest_and_largest_groups_are_distinct(grid, top):
    w = np.full((GROUPS, SIZE), top, np.float32)
    points = np.asarray(decode(all_codes(grid), fit(w, grid), grid))
    assert np.isfinite(points).all() and (np.diff(points, axis=-1) > 0).all()


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_compiled_and_uncompiled_values_are_equal(bits):
    grid = Power(bits, 0.6)
    params = {"scale": jnp.array([1.0, 0.3, 1.7, 3.14])}
    codes = all_codes(grid)
    np.testing.assert_array_equal(grid.decode(codes, params), decode(codes, params, grid))


def test_a_searched_range_is_never_worse_in_its_own_error():
    w = draw("t4", (16, 512))
    errors = []
    for search in (MSE(norm=2.0), MSE(steps=1, norm=2.0)):
        errors.append(squared_error(Power(3, 0.7, range=search), w))
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] == squared_error(Power(3, 0.7), w)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"bits": 1}, "from 2 to 8, got 1"),
        ({"bits": 9}, "got 9"),
        ({"bits": True}, "got True"),
        ({"bits": 4, "exponent": 0}, "from 0.125 to 8.0, or None to search for it, got 0"),
        ({"bits": 4, "exponent": -0.5}, "got -0.5"),
        ({"bits": 4, "exponent": float("nan")}, "got nan"),
        ({"bits": 4, "exponent": float("inf")}, "got inf"),
        ({"bits": 4, "exponent": "half"}, "got 'half'"),
        ({"bits": 4, "exponent": True}, "got True"),
        ({"bits": 4, "per": "network"}, r"\('group', 'weight'\), got 'network'"),
        ({"bits": 4, "domain": "log"}, "got 'log'"),
        ({"bits": 4, "range": "mse"}, r"MinMax\(\) or MSE\(\)"),
        ({"bits": 4, "scale_dtype": "float64"}, "'float64'"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        Power(**arguments)


def test_grids_are_values():
    assert Power(4, 1) == Power(4, 1.0) and hash(Power(4)) == hash(Power(4, None))
    assert eval(repr(Power(3, 0.5, range=MinMax()))) == Power(3, 0.5)
    assert jax.tree.leaves(Power(4)) == []
