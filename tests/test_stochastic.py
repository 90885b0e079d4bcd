"""Stochastic rounding: neighbours only, the right mean, the right variance, nothing else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import BLOCKS, GRIDS, layer

import jquant as jq
from jquant.axes.groups import from_groups, to_groups
from jquant.grids import Float, Uniform
from jquant.rounding import Stochastic
from tests.marks import covering, mostly_slow

slow = pytest.mark.slow
KEY = jax.random.key(0)
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2]
each_dtype = pytest.mark.parametrize(
    "dtype", mostly_slow(DTYPES, [jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
)
rounded = jq.stochastic_round


QUICK = ("A1-2", "mx-E2M1", "nf4")


def numbers(dtype, count=4096):
    """Float32 numbers over the whole range of a dtype, subnormals and both signs."""
    info, random = ml_dtypes.finfo(dtype), np.random.default_rng(0)
    low, high = np.log2(float(info.smallest_subnormal)) - 2, np.log2(float(info.max))
    x = 2.0 ** random.uniform(max(low, -126), high, count) * random.choice([-1, 1], count)
    return np.clip(x, float(info.min), float(info.max)).astype(np.float32)


def neighbours(x, dtype):
    """The largest number of the dtype that is not above, the smallest that is not below: float64.

    By trying all of them.
    """
    words = np.arange(2 ** (8 * np.dtype(dtype).itemsize), dtype=np.uint32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        points = words.astype(f"u{np.dtype(dtype).itemsize}").view(dtype).astype(np.float64)
    points = np.unique(points[np.isfinite(points)])
    at = np.searchsorted(points, x.astype(np.float64), side="right") - 1
    below = points[at]
    return below, np.where(below == x, below, points[np.minimum(at + 1, len(points) - 1)])


@each_dtype
def test_a_number_becomes_one_of_its_neighbours_and_both_come(dtype):
    x = numbers(dtype)
    below, above = neighbours(x, dtype)
    seen = np.stack([
        np.asarray(rounded(jax.random.key(seed), jnp.asarray(x), dtype)).astype(np.float64)
        for seed in range(16)
    ])  # fmt: skip
    assert ((seen == below) | (seen == above)).all()
    inside = np.clip((x - below) / np.where(above > below, above - below, 1), 0, 1)
    fair = (inside > 0.4) & (inside < 0.6)
    assert fair.sum() > 100
    assert ((seen == below).any(0) & (seen == above).any(0))[fair].mean() > 0.99


@each_dtype
@pytest.mark.parametrize("source", ["hash", "threefry"])
def test_the_mean_is_the_number(dtype, source):
    count, x = 1 << 16, 1.3 * 2.0**-5
    (below,), (above,) = neighbours(np.array([x], np.float32), dtype)
    y = np.asarray(rounded(KEY, jnp.full(count, x), dtype, source=source)).astype(np.float64)
    p = (np.float32(x) - below) / (above - below)
    sigma = (above - below) * np.sqrt(p * (1 - p) / count)
    assert abs(y.mean() - np.float32(x)) < 5 * sigma
    variance = (above - below) ** 2 * p * (1 - p)
    assert abs(y.var() - variance) < 0.05 * variance


@each_dtype
def test_what_the_dtype_holds_is_kept(dtype):
    size = np.dtype(dtype).itemsize
    words = np.arange(2 ** (8 * size), dtype=np.uint32).astype(f"u{size}")
    x = words.view(dtype).astype(np.float32)
    back = np.asarray(rounded(KEY, jnp.asarray(x), dtype)).astype(np.float32)
    # XLA's CPU backend takes float32's own subnormals for zero; bfloat16's lie among them.
    normal = ~(np.abs(x) < np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(back[normal], x[normal])


@each_dtype
def test_beyond_the_largest_number_is_the_largest(dtype):
    top = float(ml_dtypes.finfo(dtype).max)
    x = jnp.asarray([top * 1.001, -top * 1.001, np.float32(top), 3.3e38])
    y = np.asarray(rounded(KEY, x, dtype)).astype(np.float64)
    np.testing.assert_array_equal(y[:3], [top, -top, top])
    assert np.isfinite(y).all()


def test_nan_and_infinity_stay():
    y = np.asarray(rounded(KEY, jnp.array([jnp.nan, jnp.inf, -jnp.inf]), jnp.bfloat16), np.float32)
    assert np.isnan(y[0]) and y[1] == np.inf and y[2] == -np.inf


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_integers(dtype):
    x = jnp.full(1 << 14, 3.25)
    y = np.asarray(rounded(KEY, x, dtype)).astype(int)
    assert set(y) == {3, 4} and abs(y.mean() - 3.25) < 0.02
    info = jnp.iinfo(dtype)
    ends = np.asarray(rounded(KEY, jnp.array([1e12, -1e12]), dtype)).astype(int)
    assert ends[1] == info.min and info.max - 128 <= ends[0] <= info.max


def test_small_steps_are_not_lost():
    """What it is for: a state in bfloat16 that grows by less than half its last digit."""
    steps, grow = 512, jnp.float32(2.0**-10)

    def add(state, key):
        near, random = state
        wide = random.astype(jnp.float32) + grow
        return ((near.astype(jnp.float32) + grow).astype(jnp.bfloat16),
                rounded(key, wide, jnp.bfloat16)), None  # fmt: skip

    start = (jnp.ones(256, jnp.bfloat16), jnp.ones(256, jnp.bfloat16))
    (near, random), _ = jax.lax.scan(add, start, jax.random.split(KEY, steps))
    assert (np.asarray(near, np.float32) == 1).all()
    assert abs(np.asarray(random, np.float32).mean() - 1.5) < 0.01


def test_on_a_grid_the_values_are_unbiased():
    x = jax.random.uniform(KEY, (8, 64), minval=-1.0)
    keys = jax.random.split(KEY, 2000)
    y = jax.vmap(lambda key: rounded(key, x, Uniform(3, symmetric=False)))(keys)
    inside = (x > jnp.min(y, (0, 2))[:, None]) & (x < jnp.max(y, (0, 2))[:, None])
    step = 2 / 7
    assert jnp.abs(jnp.where(inside, y.mean(0) - x, 0)).max() < 5 * step / 2 / np.sqrt(2000)


@pytest.mark.parametrize(
    ("grid", "shape"), mostly_slow(covering(GRIDS, BLOCKS), lambda case: case[0] in QUICK)
)
def test_codes_are_the_neighbours(grid, shape):
    (out, width), groups = BLOCKS[shape]
    grid, (w, _) = GRIDS[grid], layer(out, width)
    result = Stochastic()(w, grid, groups, key=KEY)
    grouped = to_groups(w, groups)
    lo, hi = grid.bracket(grouped, grid.fit(grouped))
    length = width if groups.axis == "in" else out
    codes = np.asarray(result.codes).astype(int)
    lo, hi = (np.asarray(from_groups(x, groups, length)) for x in (lo, hi))
    assert ((codes == lo) | (codes == hi)).all()


def test_the_codes_of_a_weight_are_unbiased():
    w, _ = layer(6, 32)
    grid = Uniform(4)
    keys = jax.random.split(KEY, 2000)
    codes = jax.vmap(lambda key: Stochastic()(w, grid, key=key).codes)(keys).astype(jnp.float32)
    params = grid.fit(to_groups(w, jq.Groups()))
    where = w / params["scale"] + params["zero"].astype(jnp.float32)
    where = jnp.clip(where, 0, 15)
    assert jnp.abs(codes.mean(0) - where).max() < 5 * 0.5 / np.sqrt(2000)


def test_luck_does_not_depend_on_the_groups():
    w = jnp.full((4, 64), 0.3).at[:, ::16].set(1.0).at[:, 1::16].set(-1.0)
    one, two = (
        Stochastic()(w, Uniform(4), jq.Groups("in", size), key=KEY).codes for size in (16, 32)
    )
    np.testing.assert_array_equal(one, two)


@slow
def test_adding_a_weight_changes_no_other():
    def fn(params, x):
        for name in sorted(params):
            x = x @ params[name]
        return x

    weights = {name: jax.random.normal(jax.random.key(n), (8, 8)) for n, name in enumerate("abc")}

    def codes(params):
        found = jq.find_weights(fn, params, jnp.ones((1, 8)))
        plan = jq.plan(found, {".*": jq.Scheme(Uniform(3), None, Stochastic())})
        return jq.quantize(fn, params, plan, key=KEY)[0]

    few, all_ = codes({name: weights[name] for name in "ac"}), codes(weights)
    for name in "ac":
        np.testing.assert_array_equal(few[name].codes, all_[name].codes)
    same = jq.tree_map_weights(lambda q: q, codes({"a": weights["a"], "b": weights["a"]}))
    assert (np.asarray(same["a"].codes) != np.asarray(same["b"].codes)).any()


@slow
def test_the_sharding_changes_nothing():
    x = jax.random.normal(KEY, (8, 16))
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices[: min(len(devices), 4)]), "d")
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("d")))
    one, other = (rounded(KEY, a, jnp.bfloat16) for a in (x, spread))
    np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_without_a_key():
    w, _ = layer(4, 8)
    with pytest.raises(ValueError, match="pass key="):
        Stochastic()(w, Uniform(3))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = jq.plan(
        jq.find_weights(fn, {"w": w.T}, jnp.ones((1, 8))),
        {".*": jq.Scheme(Uniform(3), None, Stochastic())},
    )
    with pytest.raises(jq.errors.PlanError, match=r"'w'.*key"):
        jq.quantize(fn, {"w": w.T}, plan)


@pytest.mark.parametrize(
    ("x", "to", "says"),
    [
        (jnp.ones(2), "elephant", "a dtype or a grid, got 'elephant'"),
        (jnp.ones(2), jnp.complex64, "rounds to numbers"),
        (jnp.ones(2), bool, "rounds to numbers"),
        (jnp.ones(2, jnp.int32), jnp.int8, "takes floating arrays, got int32"),
    ],
)
def test_bad_arguments(x, to, says):
    with pytest.raises(ValueError, match=says):
        rounded(KEY, x, to)
    with pytest.raises(ValueError, match="one of"):
        Stochastic(source="dice")  # type: ignore[arg-type]


@slow
@pytest.mark.parametrize("source", ["hash", "threefry"])
@pytest.mark.parametrize(
    "to", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.int8]
)
def test_float64_goes_to_neighbours_by_chance_too(to, source):
    """A quarter of the way between two numbers, where float32 would see only the lower one."""
    count = 1 << 14
    with jax.enable_x64(True):
        step = 1.0 if to == jnp.int8 else float(ml_dtypes.finfo(to).eps)
        x = jnp.full(count, 1 + step / 4, jnp.float64)
        y = np.asarray(rounded(KEY, x, to, source=source))
        assert y.dtype == to and set(y.astype(np.float64)) == {1, 1 + step}
        share = (y.astype(np.float64) > 1).mean()
        assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / count)


@slow
def test_float64_that_is_held_is_kept_and_what_is_beyond_is_the_end():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=500).astype(np.float32), jnp.float64)
        np.testing.assert_array_equal(rounded(KEY, x, jnp.float32), x)
        fine = x + 2.0**-40
        np.testing.assert_array_equal(rounded(KEY, fine, jnp.float64), fine)
        np.testing.assert_array_equal(
            rounded(KEY, x.astype(jnp.float32), jnp.float64), x.astype(jnp.float32)
        )
        y = np.asarray(rounded(KEY, jnp.array([1e300, -1e300, jnp.inf, jnp.nan]), jnp.float32))
        top = np.finfo(np.float32).max
        np.testing.assert_array_equal(y, [top, -top, np.inf, np.nan])
        ends = np.asarray(rounded(KEY, jnp.array([1e30, -1e30]), jnp.int64))
        assert ends[0] > 2**63 - 2048 and ends[1] == -(2**63)
        exact = rounded(KEY, jnp.array([2.0**31 - 1, -(2.0**31)]), jnp.int32)
        np.testing.assert_array_equal(exact, [2**31 - 1, -(2**31)])


def test_float64_on_a_grid_is_unbiased_below_float32():
    count, grid = 1 << 14, Float(8, 22)  # steps of 2^-22 from 1 on
    with jax.enable_x64(True):
        y = np.asarray(rounded(KEY, jnp.full((1, count), 1 + 2.0**-24, jnp.float64), grid))
    assert y.dtype == np.float32 and set(y.reshape(-1).tolist()) == {1.0, 1 + 2.0**-22}
    assert abs((y > 1).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / count)


@slow
def test_pairs_of_narrow_dtypes():
    """Wider than the target or not: what it holds is kept, finite stays finite, NaN is NaN."""
    kinds = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2]
    for one in kinds:
        for two in kinds:
            x = jnp.array([0.0, 1.0, -1.5, 448.0, float(ml_dtypes.finfo(one).max)]).astype(one)
            y = np.asarray(rounded(KEY, x, two)).astype(np.float64)
            assert np.isfinite(y).all()
            np.testing.assert_array_equal(y[:4], [0.0, 1.0, -1.5, 448.0])
            assert np.isnan(np.asarray(rounded(KEY, x * jnp.array(jnp.nan, one), two), float)).all()


@slow
def test_powers_of_two_have_neither_zero_nor_sign():
    y = np.asarray(rounded(KEY, jnp.array([0.0, -3.0, 1e-40, 1.0, 3e38]), jnp.float8_e8m0fnu))
    assert np.isfinite(y.astype(np.float64)).all() and (y.astype(np.float64) > 0).all()
