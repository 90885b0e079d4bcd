"""Floating point grids: bit for bit the casts of ml_dtypes, and MX and NV byte for byte."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.microscaling import mx, nv

from jquant.axes.groups import Groups
from jquant.grids import MSE, MX, NV, Float, MinMax, Uniform, code_dtype, nearest
from jquant.io.schemes import from_json, to_json
from jquant.numerics.distortion import bits_per_weight
from jquant.numerics.formats import FORMATS
from jquant.rounding import GPTQ, Nearest
from jquant.schemes.scheme import Scheme
from jquant.weights.activations import numbers

# Every format that has a NumPy type, and those of other tools that are a row of no table.
TYPES = {
    "E2M1": (Float(2, 1, overflow="infinity"), ml_dtypes.float4_e2m1fn),
    "E2M3": (Float(2, 3, overflow="infinity"), ml_dtypes.float6_e2m3fn),
    "E3M2": (Float(3, 2, overflow="infinity"), ml_dtypes.float6_e3m2fn),
    "E4M3": (Float(4, 3, overflow="infinity"), ml_dtypes.float8_e4m3fn),
    "E5M2": (Float(5, 2, overflow="infinity"), ml_dtypes.float8_e5m2),
    "FP16": (Float(5, 10, overflow="infinity"), np.float16),
    "BF16": (Float(8, 7, overflow="infinity"), ml_dtypes.bfloat16),
    "E4M3 ieee": (Float(4, 3, special="ieee", overflow="infinity"), ml_dtypes.float8_e4m3),
    "E3M4 ieee": (Float(3, 4, overflow="infinity"), ml_dtypes.float8_e3m4),
}
# Formats without a negative zero, whose NaN has its pattern: equal up to the largest number.
FINITE = {
    "E4M3 fnuz": (Float(4, 3, special="none", bias=8), ml_dtypes.float8_e4m3fnuz),
    "E4M3 b11": (Float(4, 3, special="none", bias=11), ml_dtypes.float8_e4m3b11fnuz),
    "E5M2 fnuz": (Float(5, 2, special="none", bias=16), ml_dtypes.float8_e5m2fnuz),
    "E8M0": (Float(8, 0, signed=False), ml_dtypes.float8_e8m0fnu),
}
LOUD = np.uint32(0x7FFFFFFF).view(np.float32)  # the NaN of the largest bits

fit = jax.jit(lambda w, grid: grid.fit(w), static_argnames="grid")
code = jax.jit(lambda w, params, grid: nearest(grid, w, params), static_argnames="grid")
bracket = jax.jit(lambda w, params, grid: grid.bracket(w, params), static_argnames="grid")
decode = jax.jit(lambda codes, params, grid: grid.decode(codes, params), static_argnames="grid")
rounded = jax.jit(lambda x, grid: grid.round(x), static_argnames="grid")


def patterns(dtype) -> np.ndarray:
    """All numbers of a type, NaN and infinity left out, as float32."""
    width = np.uint16 if np.dtype(dtype).itemsize == 2 else np.uint8
    values = np.arange(1 << ml_dtypes.finfo(dtype).bits).astype(width).view(dtype)
    with np.errstate(invalid="ignore"):
        values = values.astype(np.float32)
    return values[np.isfinite(values)]


def edges(dtype) -> np.ndarray:
    """float32 numbers at which rounding to a type turns, and others at random."""
    values = np.unique(patterns(dtype).astype(np.float64))
    top = values[-1] + (values[-1] - values[-2])  # where the next number would be
    values = np.concatenate([-values, values, [top, -top]])
    values = np.unique(values)
    turns = np.concatenate([values, (values[:-1] + values[1:]) / 2])
    with np.errstate(over="ignore"):
        turns = turns.astype(np.float32)
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 20000, np.uint64).astype(np.uint32)
    subnormal = random.integers(0, 1 << 23, 2000).astype(np.uint32)
    near = turns.view(np.uint32)
    bits = [bits, subnormal, subnormal | (1 << 31), near, near + 1, near - 1]
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45], np.float32)
    return np.concatenate([*(b.astype(np.uint32).view(np.float32) for b in bits), special])


def cast(x: np.ndarray, dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype).astype(np.float32)


def assert_same_bits(got, wanted) -> None:
    """Equal float32 numbers, signs of zeros included; one NaN is as good as another."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    number = ~np.isnan(wanted)
    np.testing.assert_array_equal(got.view(np.uint32)[number], wanted.view(np.uint32)[number])


@pytest.mark.parametrize("name", TYPES)
def test_rounding_is_the_cast_of_ml_dtypes_bit_for_bit(name):
    grid, dtype = TYPES[name]
    x = edges(dtype)
    if grid.special == "none":
        x = x[~np.isnan(x)]  # which these types turn to zero, and `round` keeps
    wanted = cast(x, dtype)
    assert_same_bits(rounded(x, grid), wanted)
    if name == "BF16":
        with jax.disable_jit():
            assert_same_bits(grid.round(jnp.asarray(x)), wanted)


@pytest.mark.parametrize("name", FINITE)
def test_rounding_is_the_cast_up_to_the_largest_number(name):
    grid, dtype = FINITE[name]
    x = edges(dtype)
    x = x[np.abs(x) <= grid.format.largest]
    if not grid.signed:  # nor zero, nor anything tiny; and its type has ties go up
        x = x[(x >= 2.0**-126) & (np.frexp(x)[0] != 0.75)]
    np.testing.assert_array_equal(rounded(x, grid), cast(x, dtype))


@pytest.mark.parametrize("name", [*TYPES, *FINITE])
def test_codes_are_bit_patterns(name):
    grid, dtype = {**TYPES, **FINITE}[name]
    first, last = grid.codes
    codes = np.arange(first, last + 1)
    ranks = np.abs(codes).astype(np.uint16 if np.dtype(dtype).itemsize == 2 else np.uint8)
    with np.errstate(invalid="ignore"):
        values = np.sign(codes).astype(np.float32) * ranks.view(dtype).astype(np.float32)
    values[codes == 0] = 0.0  # of E8M0's least number, float32 makes nothing
    assert_same_bits(decode(codes, {}, grid), values)
    np.testing.assert_array_equal(code(values, {}, grid), codes)
    assert grid.bits == ml_dtypes.finfo(dtype).bits


@pytest.mark.optimized
@pytest.mark.parametrize("name", [*TYPES, *FINITE])
def test_nearest_codes_are_those_of_the_rounded_numbers(name):
    grid, dtype = {**TYPES, **FINITE}[name]
    x = edges(dtype)
    x = x[np.isfinite(x)]
    values = np.asarray(decode(code(x, {}, grid), {}, grid))
    saturating = type(grid)(**{**vars(grid), "overflow": "saturate"})
    np.testing.assert_array_equal(values, rounded(x, saturating))


@pytest.mark.parametrize("name", [*TYPES, *FINITE])
def test_brackets_are_exact(name):
    grid, dtype = {**TYPES, **FINITE}[name]
    x = edges(dtype)
    x = x[np.abs(x) <= grid.format.largest]
    x = x if grid.signed else x[x > 0]
    lo, hi = bracket(x, {}, grid)
    below, above = (np.asarray(decode(c, {}, grid), np.float64) for c in (lo, hi))
    assert ((below <= x) & (x <= above)).all()
    assert (np.asarray(hi - lo) == (np.abs(x) < grid.format.largest)).all()


def test_overflow_saturates_unless_told_otherwise():
    x = jnp.array([1e6, -1e6, jnp.inf, -jnp.inf, jnp.nan])
    assert Float(4, 3).round(x)[:4].tolist() == [448.0, -448.0, 448.0, -448.0]
    assert Float(5, 2, overflow="infinity").round(x)[:2].tolist() == [jnp.inf, -jnp.inf]
    assert np.isnan(Float(4, 3, overflow="infinity").round(x)).all()  # it has no infinity
    assert Float(2, 1, overflow="infinity").round(x)[:4].tolist() == [6.0, -6.0, 6.0, -6.0]
    assert np.isnan(Float(5, 10).round(x)[4])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_arrays_are_rounded_exactly(dtype):
    x = jnp.linspace(-9, 9, 1001).astype(dtype)
    wanted = np.asarray(x, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(jax.vmap(Float(4, 3).round)(x), wanted)


@pytest.mark.optimized
@given(e=st.integers(1, 8), m=st.integers(0, 23), special=st.sampled_from(["none", "nan", "ieee"]))
def test_numbers_of_any_format_increase_and_stay_themselves(e, m, special):
    try:
        grid = Float(e, m, special=special)
    except ValueError:
        assert (e == 8 and special != "ieee") or (1 << e + m) < 3 or (e == 1 and m == 0)
        return
    top = grid.codes[1]
    codes = np.unique(np.linspace(-top, top, 999).astype(int))
    values = np.asarray(decode(codes, {}, grid))
    assert (np.diff(values) > 0).all() and (values == -values[::-1]).all()
    np.testing.assert_array_equal(code(values, {}, grid), codes)
    assert_same_bits(rounded(values, grid), values)


# Scales


def signed_nibbles(codes) -> bytes:
    """Codes as elements of E2M1, sign and magnitude, the first in the low half of a byte."""
    nibbles = [abs(c) | (8 if c < 0 else 0) for c in np.asarray(codes).astype(int).reshape(-1)]
    return bytes(a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True))


def test_golden_bytes_of_mxfp4():
    # 7.9 < 8, so the scale is 2^(2 - 2) = 2^0, byte 127. 7.9 and 7 clip to 6; 5, 3.5, 2.5, 1.75,
    # 1.25, 0.75 and 0.25 are ties, and go to even mantissas: 4, 4, 2, 2, 1, 1 and 0.
    block = [-7.9, 7, 6, -5, 4.9, 3.5, 2.5, -1.75, 1.25, 0.75, -0.25, 0.26, 1.24, 0, 0.2, -3]
    w = jnp.array([block + [0.0] * 16])
    for power in (0, -10, 30):
        params = fit(w * 2.0**power, MX())
        codes = code(w * 2.0**power, params, MX())
        assert np.asarray(params["scale"]).view(np.uint8).tolist() == [127 + power]
        assert signed_nibbles(codes).hex() == "7f e7 66 c4 22 10 02 d0".replace(" ", "") + "00" * 8


def test_golden_bytes_of_nvfp4():
    # tensor = 2688 / (448 * 6) = 1, and 2688 / 6 = 448 is byte 0x7e of E4M3. In the second group
    # 3.3 / 6 = 0.55 is nearest to 0.5625 = 2^-1 * (1 + 1/8), byte (7 - 1) << 3 | 1 = 0x31; in units
    # of it 3.3 is 5.87 and becomes 6, -1.6 -> -3, 0.7 = 1.24 units -> 1, 1.0 = 1.78 units -> 2. The
    # third group is nothing, its scale 1: byte 0x38.
    w = np.zeros((1, 3, 16), np.float32)
    w[0, 0, :3] = 2688.0, -1344.0, 100.0
    w[0, 1, :4] = 3.3, -1.6, 0.7, 1.0
    params = fit(w, NV())
    assert params["tensor"].tolist() == [[1.0]] and params["tensor"].dtype == jnp.float32
    assert np.asarray(params["scale"]).view(np.uint8).tolist() == [[0x7E, 0x31, 0x38]]
    codes = code(w, params, NV())
    zeros = "00" * 6
    assert signed_nibbles(codes).hex() == "d700" + zeros + "d742" + zeros + "0000" + zeros


@pytest.mark.parametrize(
    ("format", "largest", "scale", "one"),
    [  # 2^(floor(log2 largest) - emax), and the code of 1.0 under it
        ("E2M1", 1.0, 125, 6),  # 1 / 2^-2 = 4, pattern 11.0
        ("E2M3", 1.0, 125, 24),  # 4, pattern 11.000
        ("E3M2", 1.0, 123, 28),  # 16, pattern 111.00
        ("E4M3", 1.0, 119, 120),  # 256, pattern 1111.000
        ("E5M2", 1.0, 112, 120),  # 2^15, pattern 11110.00
        ("INT8", 1.0, 127, 64),
        ("INT8", 1.999, 127, 64),
        ("E2M1", 5.0, 127, 2),
        ("E4M3", 449.0, 127, 56),
    ],
)
def test_the_shared_exponent_of_ocp(format, largest, scale, one):
    w = jnp.array([[largest, 1.0, -largest / 2]])
    params = fit(w, MX(format))
    assert np.asarray(params["scale"]).view(np.uint8).tolist() == [scale]
    assert int(code(w, params, MX(format))[0, 1]) == one


@pytest.mark.parametrize(
    ("rule", "powers"),
    [  # of groups whose largest weights are 4, 6, 6.1, 6.9, 7, 7.9 and 8
        ("floor", [0, 0, 0, 0, 0, 0, 1]),
        ("even", [0, 0, 0, 0, 1, 1, 1]),
        ("ceil", [0, 0, 1, 1, 1, 1, 1]),
        ("oas", [0, 0, 0, 0, 0, 1, 1]),
    ],
)
def test_rules_of_the_shared_exponent(rule, powers):
    w = jnp.array([4, 6, 6.1, 6.9, 7, 7.9, 8])[:, None]
    scale = fit(w, MX(scale_rule=rule))["scale"].astype(jnp.float32)
    assert scale.tolist() == [2.0**k for k in powers]


def weights(shape=(3, 5, 64), seed=0) -> np.ndarray:
    """Weights with groups of very different sizes."""
    random = np.random.default_rng(seed)
    return (random.normal(size=shape) * np.exp(random.normal(size=(*shape[:-1], 1)))).astype("f")


@pytest.mark.parametrize("format", ["E2M1", "E2M3", "E3M2", "E4M3", "E5M2"])
def test_mx_is_its_definition(format):
    w, grid = jnp.asarray(weights()), MX(format)
    params = fit(w, grid)
    scale, values = mx(weights(), TYPES[format][1])
    assert params["scale"].dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(params["scale"], np.float32), scale)
    np.testing.assert_array_equal(decode(code(w, params, grid), params, grid), values)


def test_nv_is_its_definition():
    w = jnp.asarray(weights())
    params = fit(w, NV())
    tensor, scale, values = nv(weights())
    assert params["tensor"].shape == (1, 1) and params["scale"].dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(params["tensor"], tensor, rtol=1e-7)
    np.testing.assert_array_equal(np.asarray(params["scale"], np.float32), scale)
    np.testing.assert_allclose(decode(code(w, params, NV()), params, NV()), values, rtol=1e-6)


def test_each_tensor_of_a_stack_has_its_own_scale():
    w = jnp.asarray(weights((2, 3, 5, 16)))
    together = fit(w, NV())
    assert together["tensor"].shape == (2, 1, 1)
    for name, leaf in fit(w[1], NV()).items():
        np.testing.assert_array_equal(together[name][1], leaf)


@pytest.mark.parametrize("scale", ["float32", "float16", "bfloat16"])
def test_float_scales_bring_the_largest_weight_to_the_largest_number(scale):
    grid, w = Float(4, 3, scale=scale), weights()
    params = fit(w, grid)
    wanted = (np.abs(w).max(-1) / np.float32(448)).astype(jnp.dtype(scale))
    np.testing.assert_array_equal(params["scale"], wanted)


def test_bits_per_weight():
    w = jnp.asarray(weights((32, 64)))
    for grid, bits in (
        (MX(), 4 + 8 / 32),
        (MX("E4M3"), 8 + 8 / 32),
        (NV(), 4 + 8 / 16 + 32 / w.size),
        (Float(5, 10), 16),
    ):
        result = Nearest()(w, grid, Scheme(grid).groups)
        assert bits_per_weight(result.codes, result.params, grid.bits) == bits


def test_block_formats_know_their_groups():
    assert Scheme(MX()).groups == Groups("in", 32) and Scheme(NV()).groups == Groups("in", 16)
    assert Scheme(Float(4, 3)).groups == Groups() and Scheme(MX(), 8).groups == Groups("in", 8)


@pytest.mark.parametrize("grid", [MX(scale_rule="ceil"), NV(), Float(3, 2, scale="float16")])
def test_a_range_search_gains(grid):
    w, importance = jnp.asarray(weights()), jnp.asarray(np.random.default_rng(1).random(64), "f")
    search = type(grid)(**{**vars(grid), "range": MSE()})
    losses = []
    for candidate in (search, grid):
        params = candidate.fit(w, importance)
        error = w - candidate.decode(nearest(candidate, w, params), params)
        losses.append(np.asarray(jnp.sum(importance * jnp.abs(error) ** 2.4, axis=-1)))
    assert (losses[0] <= losses[1] * (1 + 1e-5)).all() and losses[0].sum() < losses[1].sum()


@pytest.mark.parametrize("grid", [MX(), MX("E5M2", scale_rule="even"), NV(), Float(8, 7)])
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-45, 1e-38, 3e38, np.inf, np.nan, LOUD])
def test_groups_of_any_kind_give_finite_values(grid, value):
    w = np.full((2, 3, 32), value, np.float32)
    w[0, 0, ::2], w[0, 1] = 0.0, 1.0
    params = fit(w, grid)
    codes = code(w, params, grid)
    assert grid.codes[0] <= codes.min() and codes.max() <= grid.codes[1]
    if not np.isnan(value):
        back = np.asarray(decode(codes, params, grid))
        assert np.isfinite(back).all()
        if 1e-38 < abs(value) < 1e38:
            np.testing.assert_allclose(back, w, rtol=0.15)


@pytest.mark.parametrize("grid", [MX(), MX("E5M2"), NV(), Float(4, 3, scale="float32")])
@pytest.mark.parametrize("value", [1.2e-38, 1e-42, 3.4e38])
def test_groups_at_the_ends_of_float32_have_distinct_values(grid, value):
    first, last = grid.codes
    codes = jnp.arange(first, last + 1)[None]
    values = np.asarray(decode(codes, fit(np.full((1, 8), value, np.float32), grid), grid))
    assert (np.diff(values) > 0).all() and np.isfinite(values).all()


def test_gptq_runs_on_blocks_with_a_tensor_scale():
    w = jnp.asarray(weights((12, 40)))
    x = np.random.default_rng(2).normal(size=(200, 40)) @ np.random.default_rng(3).normal(
        size=(40, 40)
    )
    moment = jnp.asarray(x.T @ x, "f")
    for grid in (MX(), NV()):
        info = GPTQ()(w, grid, Scheme(grid).groups, evidence=moment).info
        assert info["error"] < 0.9 * info["nearest_error"]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"exponent_bits": 0}, "exponent_bits must be an int from 1 to 8, got 0"),
        ({"exponent_bits": 9}, "got 9"),
        ({"exponent_bits": True}, "got True"),
        ({"mantissa_bits": -1}, "mantissa_bits must be an int from 0 to 23, got -1"),
        ({"mantissa_bits": 24}, "got 24"),
        ({"mantissa_bits": 3.0}, "got 3.0"),
        ({"signed": 1}, "signed must be True or False"),
        ({"special": "inf"}, "'none', 'nan', 'ieee'.*got 'inf'"),
        ({"bias": 1.5}, "bias must be an int"),
        ({"bias": 200}, "too small .* lower bias"),
        ({"bias": -130}, "too large .* higher bias"),
        ({"exponent_bits": 1, "mantissa_bits": 0}, "no number but zero; pass special='none'"),
        ({"exponent_bits": 8, "special": "none"}, "too large for float32"),
        ({"overflow": "wrap"}, "'saturate', 'infinity'.*got 'wrap'"),
        ({"scale": "e5m2"}, "'e8m0', 'e4m3'.*got 'e5m2'"),
        ({"scale": "e8m0", "scale_rule": "up"}, "'floor', 'even', 'ceil'.*got 'up'"),
        ({"scale": "float32", "scale_rule": "ceil"}, "'e8m0' alone"),
        ({"range": MSE()}, "no range to search; pass scale="),
        ({"range": "mse", "scale": "float32"}, r"MinMax\(\) or MSE\(\)"),
        ({"group": 0}, "positive int or None, got 0"),
        ({"exponent_bits": 8, "scale": "float32"}, "needs no scale; pass None"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        Float(**{"exponent_bits": 2, "mantissa_bits": 1, **arguments})


def test_formats_that_do_not_exist_are_refused():
    for name in ("E8M0", "FP4", "e2m1", "E9M9", 4):
        with pytest.raises(ValueError, match=r"MX.format must be one of \('E2M1', .* got"):
            MX(name)


def test_codes_wider_than_files_hold_are_refused():
    assert code_dtype(Float(8, 7)) == jnp.int16
    assert code_dtype(Float(6, 10, signed=False)) == jnp.uint16
    with pytest.raises(ValueError, match="do not fit in 16 bits"):
        Nearest()(jnp.ones((2, 2)), Float(8, 8))


def test_a_negative_zero_is_a_code_that_rounding_never_chooses():
    grid = Float(2, 1, negative_zero=True)
    assert grid.codes == (-8, 7)
    assert np.signbit(np.asarray(grid.decode(jnp.array([[-8, 0]]), {}))).tolist() == [[True, False]]
    w = jnp.linspace(-7.0, 7.0, 99)[None]
    plain = Float(2, 1)
    assert (grid.nearest(w, {}) == plain.nearest(w, {})).all()
    c, _ = numbers(grid, jnp.array([-8, -7], jnp.int4), jnp.bfloat16)
    assert c.tolist() == [-0.0, -6.0]
    with pytest.raises(ValueError, match="no sign"):
        Float(4, 3, signed=False, negative_zero=True)


def test_files_that_know_no_negative_zero_are_read_and_written_as_ever():
    said = to_json(Float(2, 1))
    assert "negative_zero" not in said["Float"] and from_json(said) == Float(2, 1)
    assert from_json(to_json(Float(2, 1, negative_zero=True))).negative_zero


def test_floating_grids_are_values():
    assert Float(4, 3) == Float(4, 3, special="nan", bias=7) != Float(4, 3, special="ieee")
    assert hash(MX("E4M3")) == hash(Float(4, 3, scale="e8m0", group=32))
    assert jax.tree.leaves(NV()) == [] and eval(repr(NV(range=MSE()))) == NV(range=MSE())
    assert MinMax() == NV().range and Uniform(4) != NV()
    for row in FORMATS.values():
        size = {"signed": row.signed}
        assert Float(row.exponent_bits, row.mantissa_bits, **size).format == row


def test_e8m0_rounds_to_the_nearest_and_its_cast_does_not():
    """What `Format.round` says of the one format whose cast it is not."""
    x = jnp.array([3.0, 0.0, -1.0, 1.4, 6.0, 5.9])
    found = FORMATS["E8M0"].round(x)
    np.testing.assert_array_equal(found, [2.0, 0.0, 0.0, 1.0, 8.0, 4.0])
    other = np.asarray(x).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(other, [4.0, np.nan, np.nan, 1.0, 8.0, 4.0])
