"""Tables of values: NF4 and AF4 against their definitions, any table, and what is refused."""

from __future__ import annotations

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import floats
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from test_grid_laws import all_codes, bracket, code, decode, extreme, fit, weights

import jquant as jq
from jquant.axes.groups import Groups
from jquant.grids import AF4, MSE, NF4, Codebook, Uniform, code_dtype
from jquant.grids.codebook import count
from jquant.numerics.distortion import bits_per_weight
from jquant.rounding import Nearest

# Figure 4 of bitsandbytes' kernels (dQuantizeNF4): the thresholds between codes 7, 8 and 9.
NF4_THRESHOLDS = (0.03979014977812767, 0.1202552504837513)


def test_nf4_is_made_of_normal_quantiles():
    # QLoRA, appendix E: eight probabilities from δ to 1/2 above zero and seven below.
    quantile, delta = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(delta, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(delta, 0.5, 8)[:-1]]
    values = np.array(sorted([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(NF4.values, values, atol=2e-7)
    assert NF4.codes == (0, 15) and NF4.bits == 4 and code_dtype(NF4) == jnp.uint4


def test_nf4_changes_codes_where_bitsandbytes_does():
    for lower, threshold in zip((7, 8), NF4_THRESHOLDS, strict=True):
        w = np.float32([1.0, np.nextafter(np.float32(threshold), 1), np.float32(threshold)])
        codes = np.asarray(code(w[None], fit(w[None], NF4), NF4))[0]
        assert codes.tolist() == [15, lower + 1, lower]


def block_maximum_cdf(x: float, block: int) -> float:
    """P(w / m <= x), w one of `block` normal weights and m the largest magnitude among them."""

    def given(m: float) -> float:
        density = block * stats.halfnorm.cdf(m) ** (block - 1) * stats.halfnorm.pdf(m)
        return stats.truncnorm.cdf(m * x, -m, m) * density

    inside = integrate.quad(given, 0, 8, epsabs=1e-10, points=[1.5, 2.5, 4])[0]
    return 1 / (2 * block) + inside * (block - 1) / block


def test_af4_is_made_of_medians_in_groups_of_64():
    # An absolute error is least where each value is the median of what is rounded to it. Yoshida's
    # code (generate_af4.py) keeps -1, 0 and 1, and takes what is rounded to the values next to zero
    # to reach up to zero, not to the midpoint.
    values = np.array(AF4.values)
    edge = (values[:-1] + values[1:]) / 2
    edge[6], edge[7] = 0.0, 0.0
    for k in (*range(1, 7), *range(8, 15)):
        low, at, high = (block_maximum_cdf(x, 64) for x in (edge[k - 1], values[k], edge[k]))
        assert abs(at - (low + high) / 2) < 2e-6, values[k]


def test_nf4_and_af4_on_normal_weights():
    w = jax.random.normal(jax.random.key(0), (4096, 64), jnp.float32)

    def absolute_error(g):
        return float(jnp.abs(w - decode(code(w, fit(w, g), g), fit(w, g), g)).mean())

    nf4, af4, even = map(absolute_error, (NF4, AF4, Uniform(4, symmetric=True, convention="S3")))
    assert nf4 < af4 < even


BOOKS = {
    "nf4": NF4,
    "two": Codebook((-3.0, 0.5)),
    "all-positive": Codebook((0.0, 1.0, 2.0, 4.0), scale_dtype="float16"),
    "all-negative": Codebook((-5.0, -2.0, -0.25)),
    "seventeen": Codebook(tuple(float(k**3) for k in range(-8, 9))),
    "wide": Codebook(tuple(2.0**k for k in range(-40, 41))),
    "full": Codebook(tuple(np.sort(np.random.default_rng(0).normal(size=256)).tolist())),
    "mse": Codebook(NF4.values, range=MSE()),
}
each_book = pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)


@each_book
@given(w=weights)
def test_codes_are_those_of_trying_every_value(book, w):
    params = fit(w, book)
    scale = floats(params)["scale"][:, None]
    points = scale[:, :, None] * np.array(book.values)
    distance = np.abs(np.asarray(w, np.float64)[:, :, None] - points)
    codes = np.asarray(code(w, params, book))
    chosen = np.take_along_axis(distance, codes[..., None], axis=-1)[..., 0]
    size = np.abs(points).max(-1)
    assert (chosen <= distance.min(-1) + 1e-6 * size).all()
    clear = np.sort(distance, axis=-1)
    clear = (clear[..., 1] - clear[..., 0]) > 1e-5 * size
    np.testing.assert_array_equal(codes[clear], distance.argmin(-1)[clear])


@each_book
@given(w=weights)
def test_brackets_enclose_and_points_are_their_own_codes(book, w):
    params = fit(w, book)
    codes = all_codes(book)
    points = np.asarray(decode(codes, params, book))
    assert (np.diff(points, axis=-1) > 0).all()
    np.testing.assert_array_equal(code(points, params, book), codes)
    lo, hi = (np.asarray(x) for x in bracket(w, params, book))
    assert lo.min() >= 0 and hi.max() <= book.codes[1] and ((lo <= hi) & (hi <= lo + 1)).all()
    low, high = (np.take_along_axis(points, x, axis=-1) for x in (lo, hi))
    inside = np.clip(w, points[:, :1], points[:, -1:])
    slack = 1e-6 * np.abs(points).max(-1, keepdims=True)
    assert (low <= inside + slack).all() and (inside <= high + slack).all()


@each_book
@given(w=extreme)
def test_finite_weights_give_finite_everything(book, w):
    params = fit(w, book)
    points = np.asarray(decode(all_codes(book), params, book))
    assert np.isfinite(points).all() and (np.diff(points, axis=-1) > 0).all()
    assert (floats(params)["scale"] > 0).all()
    codes = np.asarray(code(w, params, book))
    assert codes.min() >= 0 and codes.max() <= book.codes[1]


@given(w=weights, power=st.integers(-3, 3))
def test_scaling_by_a_power_of_two_scales_the_values_and_keeps_the_codes(w, power):
    factor = np.float32(2.0**power)
    one, other = fit(w, NF4), fit(w * factor, NF4)
    codes = code(w, one, NF4)
    np.testing.assert_array_equal(codes, code(w * factor, other, NF4))
    values = np.asarray(decode(codes, one, NF4))
    np.testing.assert_array_equal(values * factor, decode(codes, other, NF4))


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e38, 1e-42])
def test_constant_groups(value):
    w = np.full((2, 5), value, np.float32)
    back = np.asarray(decode(code(w, fit(w, NF4), NF4), fit(w, NF4), NF4))
    # Denormals are zeros to XLA, and the cap on ranges is a quarter of the largest number.
    np.testing.assert_allclose(back, w, rtol=1e-6 if abs(value) < 1e30 else 0.3, atol=1e-37)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 15, 16, 31, 100, 255])
def test_counting_is_searching_sorted_tables(k):
    random = np.random.default_rng(k)
    tables = np.sort(random.normal(size=(5, 1, k)).astype(np.float32), axis=-1)
    x = np.concatenate(
        [random.normal(size=(5, 3, 40)), np.broadcast_to(tables, (5, 3, k))], axis=-1
    ).astype(np.float32)
    for compare, side in ((jnp.greater, "left"), (jnp.greater_equal, "right")):
        each = np.stack(
            [np.searchsorted(t[0], row, side) for t, row in zip(tables, x, strict=True)]
        )
        np.testing.assert_array_equal(count(x, tables, compare), each)
        one = np.searchsorted(tables[0, 0], x, side)
        np.testing.assert_array_equal(count(x, tables[0, 0], compare), one)


def test_bits_per_weight():
    w = jax.random.normal(jax.random.key(0), (8, 128))
    half = Codebook(NF4.values, scale_dtype="float16")
    result = Nearest()(w, half, Groups("in", 64))
    assert bits_per_weight(result.codes, result.params, half.bits) == 4.25
    assert [Codebook(tuple(range(n))).bits for n in (2, 3, 4, 5, 16, 17, 256)] == [
        1, 2, 2, 3, 4, 5, 8,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"values": ()}, "2 to 256 numbers, got 0"),
        ({"values": (1.0,)}, "got 1"),
        ({"values": tuple(range(257))}, "got 257"),
        ({"values": (0.0, 1.0, 1.0)}, "got 1.0 before 1.0; pass sorted values without duplicates"),
        ({"values": (0.0, 2.0, 1.0)}, "got 2.0 before 1.0"),
        ({"values": (0.0, 1.0, 1.0 + 1e-9)}, "2\\^-20 of their size"),
        ({"values": (0.0, float("nan"))}, "got nan"),
        ({"values": (0.0, float("inf"))}, "got inf"),
        ({"values": (0.0, 1e-30)}, "got 1e-30"),
        ({"values": ("a", 1.0)}, "must be numbers, got"),
        ({"values": 3.0}, "must be numbers, got 3.0"),
        ({"values": NF4.values, "range": None}, r"MinMax\(\) or MSE\(\)"),
        ({"values": NF4.values, "scale_dtype": "int8"}, "'int8'"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        Codebook(**arguments)


def test_codebooks_are_values():
    assert Codebook([0, 1]) == Codebook((0.0, 1.0)) and hash(NF4) == hash(Codebook(NF4.values))
    assert Codebook(np.array([0.0, 1.0])).values == (0.0, 1.0) and jax.tree.leaves(NF4) == []


def test_a_table_can_be_called_for_another_range():
    assert NF4() == NF4 and hash(AF4()) == hash(AF4) and NF4().papers == NF4.papers
    other = AF4(range=MSE(steps=5), scale_dtype="float16")
    assert other == Codebook(AF4.values, MSE(steps=5), "float16")
    with pytest.raises(ValueError, match=r"Codebook\.range"):
        NF4(range="mse")  # type: ignore[arg-type]
    with pytest.raises(jq.errors.FormatError):  # no function of operations
        jq.emulate(lambda x: x * 2.0, NF4)(jnp.ones(2))
