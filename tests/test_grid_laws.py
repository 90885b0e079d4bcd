"""Laws every grid obeys, over groups of weights of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GRIDS, UNIFORM, assert_codes_equal_but_for_ties, floats, position
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from jquant.grids import GGUF, HQQ, MSE, MinMax, Uniform, code_dtype, nearest

ULP = float(np.finfo(np.float32).eps)
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
each_uniform = pytest.mark.parametrize("grid", UNIFORM.values(), ids=UNIFORM)

# Fixed shapes: a new one would compile again. Weights are drawn small and scaled by a power of two.
GROUPS, SIZE = 4, 9
weights = st.builds(
    lambda grid, power: (grid * np.float32(2.0) ** power).astype(np.float32),
    nps.arrays(np.float32, (GROUPS, SIZE), elements=st.floats(-4, 4, width=16)),
    st.integers(-12, 12),
)
extreme = nps.arrays(
    np.float32,
    (GROUPS, SIZE),
    elements=st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.sampled_from([0.0, 1e-45, -1e-38, 3.4e38, -3.4e38]),
)

fit = jax.jit(lambda w, grid: grid.fit(w), static_argnames="grid")
weighed_fit = jax.jit(lambda w, by, grid: grid.fit(w, by), static_argnames="grid")
bracket = jax.jit(lambda w, params, grid: grid.bracket(w, params), static_argnames="grid")
decode = jax.jit(lambda codes, params, grid: grid.decode(codes, params), static_argnames="grid")
code = jax.jit(lambda w, params, grid: nearest(grid, w, params), static_argnames="grid")

rescaled = jax.jit(
    lambda params, factor, shift, grid: grid.rescaled(params, factor, shift), static_argnames="grid"
)


def all_codes(grid):
    """Every code of a grid, for every group."""
    first, last = grid.codes
    return jnp.broadcast_to(jnp.arange(first, last + 1), (GROUPS, last + 1 - first))


def signed(grid):
    """Whether scales may be negative."""
    searched = isinstance(grid, GGUF) and grid.range != MinMax()
    return searched or getattr(grid, "convention", None) == "S4"


@each_grid
@given(w=weights)
def test_decode_increases_with_the_code(grid, w):
    steps = np.diff(np.asarray(decode(all_codes(grid), fit(w, grid), grid)), axis=-1)
    falls = steps[:, :1] < 0  # all of a group's values, where a searched scale is negative
    assert (np.where(falls, -steps, steps) > 0).all()
    assert not falls.any() or signed(grid)


@each_grid
@given(w=weights)
def test_bracket_encloses_the_weight_or_clips_it(grid, w):
    params = fit(w, grid)
    lo, hi = (np.asarray(x) for x in bracket(w, params, grid))
    first, last = grid.codes
    assert first <= lo.min() and hi.max() <= last and lo.dtype == hi.dtype == np.int32
    assert ((lo <= hi) & (hi <= lo + 1)).all()
    below, above = (np.asarray(decode(jnp.asarray(x), params, grid)) for x in (lo, hi))
    points = np.asarray(decode(all_codes(grid), params, grid))
    inside = np.clip(w, points.min(-1, keepdims=True), points.max(-1, keepdims=True))
    below, above = np.minimum(below, above), np.maximum(below, above)
    slack = 8 * ULP * np.abs(points).max(-1, keepdims=True)
    assert (below <= inside + slack).all() and (inside <= above + slack).all()


@each_grid
@given(w=weights)
def test_a_grid_point_is_its_own_nearest(grid, w):
    params = fit(w, grid)
    codes = all_codes(grid)
    again = code(decode(codes, params, grid), params, grid)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(codes))


@each_grid
@given(w=weights)
def test_nearest_is_nearest_of_all_points(grid, w):
    params = fit(w, grid)
    points = np.asarray(decode(all_codes(grid), params, grid), np.float64)
    best = np.abs(np.asarray(w, np.float64)[:, :, None] - points[:, None]).min(-1)
    chosen = np.asarray(decode(code(w, params, grid), params, grid), np.float64)
    assert (np.abs(w - chosen) <= best + 8 * ULP * np.abs(points).max(-1, keepdims=True)).all()


@each_uniform
@given(w=weights, power=st.integers(-3, 3))
def test_scaling_by_a_power_of_two_scales_the_values_and_keeps_the_codes(grid, w, power):
    # A2's least range is absolute; a float16 scale has few subnormals: both stop scaling there.
    if grid.convention == "A2":
        w = w + np.float32(np.abs(w).max() + 1) * np.linspace(-1, 1, SIZE, dtype=np.float32)
    if grid.scale_dtype == "float16":
        w = np.clip(w, -64, 64) + np.linspace(-1, 1, SIZE, dtype=np.float32)
    factor = np.float32(2.0**power)
    one, other = fit(w, grid), fit(w * factor, grid)
    codes = code(w, one, grid)
    zero = (w == 0).all(-1)
    np.testing.assert_array_equal(codes, code(w * factor, other, grid))
    scale, scaled = (np.asarray(p["scale"], np.float32)[~zero] for p in (one, other))
    np.testing.assert_array_equal(scale * factor, scaled)


@each_uniform
@given(w=weights)
def test_error_is_at_most_half_a_step_unless_clipped(grid, w):
    params = fit(w, grid)
    points = np.asarray(decode(all_codes(grid), params, grid), np.float64)
    value = np.asarray(decode(code(w, params, grid), params, grid), np.float64)
    inside = (points.min(-1, keepdims=True) <= w) & (w <= points.max(-1, keepdims=True))
    half = np.abs(points[:, 1:2] - points[:, :1]) / 2
    slack = 8 * ULP * np.abs(points).max(-1, keepdims=True)
    assert (np.abs(w - value) <= half + slack)[inside].all()


@each_grid
@given(w=extreme)
def test_finite_weights_give_finite_everything(grid, w):
    params = fit(w, grid)
    codes = code(w, params, grid)
    scale = floats(params).get("scale", np.ones(1))
    assert (scale != 0).all() and ((scale > 0).all() or isinstance(grid, GGUF) or signed(grid))
    points = (decode(codes, params, grid), decode(all_codes(grid), params, grid))
    for array in (*floats(params).values(), *map(np.asarray, points)):
        assert np.isfinite(array).all()
    assert np.asarray(codes).min() >= grid.codes[0] and np.asarray(codes).max() <= grid.codes[1]


@pytest.mark.parametrize("convention", ["A1", "A2", "A3", "A4", "S1", "S2", "S3", "S4", "S5"])
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_constant_groups(convention, value):
    grid = Uniform(4, symmetric=convention[0] == "S", convention=convention)
    w = np.full((GROUPS, SIZE), value, np.float32)
    params = fit(w, grid)
    back = np.asarray(decode(code(w, params, grid), params, grid))
    # A2 clips constant groups by definition; S2 has no point at its upper end, S1 none at either.
    # S4 keeps the largest entry, S5 both ends.
    bound = {"A2": 0.7, "S1": 0.09, "S2": 0.09, "S3": 0.09}.get(convention, 1e-6)
    assert np.abs(back - value).max() <= bound


@pytest.mark.parametrize("convention", ["A1", "A2", "A3", "A4"])
def test_a_narrow_group_far_from_zero_has_distinct_points(convention):
    w = jnp.broadcast_to(100 + 1e-4 * jnp.arange(SIZE, dtype=jnp.float32), (GROUPS, SIZE))
    grid = Uniform(4, convention=convention)
    assert (np.diff(grid.decode(all_codes(grid), grid.fit(w)), axis=-1) > 0).all()


@each_uniform
@given(w=weights)
def test_asymmetric_nearest_is_the_usual_formula_but_for_ties(grid, w):
    if grid.symmetric:
        return
    # Spread the groups, so that ties are rare.
    w = w + np.random.default_rng(0).normal(size=w.shape).astype(np.float32) * np.abs(w).max()
    params = fit(w, grid)
    scale, zero = (floats(params)[name][:, None] for name in ("scale", "zero"))
    whole = np.round(w / scale + zero) if grid.convention == "A4" else np.round(w / scale) + zero
    usual = np.clip(whole, *grid.codes)
    where = position(grid, params)(w)
    if (np.abs(where - np.floor(where) - 0.5) < 1e-3).mean() < 0.05:
        assert_codes_equal_but_for_ties(code(w, params, grid), usual, where)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@settings(max_examples=10)
@given(w=weights, seed=st.integers(0, 100))
def test_a_range_search_is_never_worse_in_its_own_error(symmetric, bits, w, seed):
    importance = np.random.default_rng(seed).exponential(size=w.shape).astype(np.float32)
    losses = []
    for search in (MSE(), MinMax()):
        grid = Uniform(bits, symmetric=symmetric, range=search)
        params = weighed_fit(w, importance, grid)
        chosen = decode(code(w, params, grid), params, grid)
        error = np.abs(np.asarray(w, np.float64) - np.asarray(chosen, np.float64))
        losses.append((importance * error**2.4).sum(-1))
    assert (losses[0] <= losses[1] * (1 + 1e-5) + 1e-30).all()


def test_a_range_search_uses_importance():
    w = jax.random.normal(jax.random.key(0), (GROUPS, SIZE))
    grid = Uniform(2, range=MSE())
    plain, weighed = grid.fit(w), grid.fit(w, jnp.arange(SIZE, dtype=jnp.float32) ** 4)
    assert (np.asarray(plain["scale"]) != np.asarray(weighed["scale"])).any()


def test_the_first_symmetric_convention_treats_positive_groups_like_negative_ones():
    grid = Uniform(4, symmetric=True)
    w = jnp.linspace(0.1, 1.5, 8, dtype=jnp.float32)[None]
    assert grid.fit(w) == grid.fit(-w)
    assert float(jnp.abs(w - grid.decode(nearest(grid, w, grid.fit(w)), grid.fit(w))).max()) <= 0.11


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_codes_are_chosen_for_the_stored_scale(dtype):
    grid = Uniform(4, scale_dtype=dtype)
    w = jax.random.normal(jax.random.key(1), (3, 64), jnp.float32)
    params = grid.fit(w)
    assert params["scale"].dtype == dtype and params["zero"].dtype == code_dtype(grid) == jnp.uint4
    where = position(grid, params)(np.asarray(w))
    codes = np.asarray(nearest(grid, w, params))
    assert_codes_equal_but_for_ties(codes, np.round(where), where)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"bits": 1}, "from 2 to 8, got 1"),
        ({"bits": 9}, "got 9"),
        ({"bits": 4.0}, "got 4.0"),
        ({"bits": True}, "got True"),
        ({"bits": 4, "symmetric": 1}, "True or False"),
        ({"bits": 4, "convention": "S1"}, r"\['A1', 'A2', 'A3', 'A4'\]"),
        ({"bits": 4, "symmetric": True, "convention": "A1"}, r"\['S1', .*'S5'\]"),
        ({"bits": 4, "convention": "B1"}, "'B1'"),
        ({"bits": 4, "range": "mse"}, r"MinMax\(\), MSE\(\), HQQ\(\) or Joint\(\)"),
        ({"bits": 8, "symmetric": True, "convention": "S5"}, "2 to 7 bits"),
        ({"bits": 4, "scale_dtype": "float64"}, "'float64'"),
        ({"bits": 4, "range": HQQ(), "convention": "A1"}, "'A4' or None, got 'A1'"),
        ({"bits": 4, "range": HQQ(), "symmetric": True}, "symmetric=False"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        Uniform(**arguments)


def test_a_bad_search_is_refused():
    with pytest.raises(ValueError, match="steps"):
        MSE(steps=0)


def test_grids_are_values():
    assert Uniform(4) == Uniform(4, convention="A1") != Uniform(4, convention="A2")
    assert hash(Uniform(4)) == hash(Uniform(4, convention="A1"))
    assert jax.tree.leaves(Uniform(4)) == []
    assert eval(repr(Uniform(3, range=MSE()))) == Uniform(3, range=MSE())


@each_grid
@settings(max_examples=5)
@given(w=weights)
def test_parameters_that_are_rescaled_by_nothing_stay(grid, w):
    params = fit(w, grid)
    one, nothing = np.ones(GROUPS, np.float32), np.zeros(GROUPS, np.float32)
    same = rescaled(params, one, nothing, grid)
    assert {k: v.dtype for k, v in same.items()} == {k: v.dtype for k, v in params.items()}
    for name, leaf in floats(same).items():
        np.testing.assert_allclose(leaf, floats(params)[name], rtol=1e-6)


@each_grid
def test_values_follow_parameters_that_are_rescaled(grid):
    params = fit(jax.random.normal(jax.random.key(0), (GROUPS, SIZE)), grid)
    values = np.asarray(decode(all_codes(grid), params, grid))
    unit = np.abs(np.diff(values, axis=-1)).max(-1)  # the widest step of each group
    factor = jnp.asarray([1.25, 0.75, 1.0, 1.5], jnp.float32)
    if getattr(grid, "scale", None) == "e4m3":  # the largest is the largest there is
        factor = jnp.minimum(factor, 1.0)
    shift = jnp.asarray(unit, jnp.float32) * (0.5 if grid.shifts else 0.0)
    moved = rescaled(params, factor, shift, grid)
    got = np.asarray(decode(all_codes(grid), moved, grid))
    goal = values * np.asarray(factor)[:, None] + np.asarray(shift)[:, None]
    steps = np.diff(got, axis=-1)
    assert ((steps > 0) == (np.diff(values, axis=-1) > 0)).all()  # increasing, or decreasing
    if "_K" in getattr(grid, "kind", "") or not params:
        return  # levels of a super-block are coarse, and without a scale nothing can follow
    if getattr(grid, "scale", None) == "e8m0":
        ratio = got[:, -1] / goal[:, -1]
        assert (ratio >= 0.5).all() and (ratio <= 2).all()
        return
    room = np.abs(goal).max(-1) * (0.07 if getattr(grid, "scale", None) == "e4m3" else 0.01)
    assert (np.abs(got - goal).max(-1) <= room + 1e-30).all()
