"""FP4 with better scales: four over six, overflow-aware scaling, macro blocks, by their words."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.microscaling import four_six, mbs, oas

import jquant as jq
from jquant.errors import FormatError
from jquant.exporters.described import Described
from jquant.exporters.targets import TARGETS, held
from jquant.grids import MSE, MX, NV, Float, Grid, nearest
from jquant.grids.base import shares
from jquant.numerics.distortion import bits_per_weight
from jquant.rounding import GPTQ, Nearest

ALL = {
    "oas": MX(scale_rule="oas"),
    "macro": MX(scale_rule="oas", macro=4),
    "macro, searched": MX(scale_rule="oas", macro=4, range=MSE(1, norm=2.0)),
    "four over six": NV(four_six=True),
}


def weights(shape=(6, 8, 32), seed=0) -> np.ndarray:
    """Weights in groups of different sizes, rounded so that ties and equal errors do occur."""
    random = np.random.default_rng(seed)
    w = random.standard_t(5, size=shape) * np.exp(0.3 * random.normal(size=(*shape[:-1], 1)))
    return np.asarray(w, np.float32)


@partial(jax.jit, static_argnames="grid")
def rounded(w, importance, grid):
    params = grid.fit(w, importance)
    return grid.decode(nearest(grid, w, params), params)


def values(grid: Grid, w: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(rounded(jnp.asarray(w), importance, grid))


def test_overflow_aware_scaling_is_its_definition():
    w = weights()
    w[0, :3] *= 7 / np.abs(w[0, :3]).max(-1, keepdims=True)  # on the border: 3.5 after scaling
    np.testing.assert_array_equal(values(ALL["oas"], w), oas(w))
    differ = values(MX(scale_rule="even"), w) != oas(w)
    assert differ.any() and not differ[1:].any()


def test_macro_blocks_are_their_definition():
    w = weights()
    np.testing.assert_allclose(values(ALL["macro"], w), mbs(w, 4), rtol=1e-6)
    each = [np.float64(m) for m in range(0, 256, 16)]
    np.testing.assert_allclose(values(ALL["macro, searched"], w), mbs(w, 4, each), rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_four_over_six_is_its_definition(weighted):
    w = weights((4, 9, 16))
    h = np.random.default_rng(1).exponential(size=16).astype(np.float32) if weighted else None
    wanted = four_six(w, 1.0 if h is None else h)
    np.testing.assert_allclose(values(ALL["four over six"], w, h), wanted, rtol=1e-6)


def test_a_group_may_have_its_largest_weight_at_four():
    w = jnp.array([[[1536.0, *[0.0] * 15], [4.5, *[6.0] * 15]]])
    params = NV(four_six=True).fit(w)
    assert params["tensor"].tolist() == [[1.0]]
    assert params["scale"].tolist() == [[256.0, 1.5]]  # 6 = 4 * 1.5, 4.5 = 3 * 1.5


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (ALL["oas"], MX()),
        (ALL["macro"], ALL["oas"]),
        (ALL["macro, searched"], ALL["macro"]),
        (MX(scale_rule="oas", macro=4, range=MSE(norm=2.0)), ALL["macro, searched"]),
        (ALL["four over six"], NV()),
        (NV(four_six=True, range=MSE(norm=2.0)), ALL["four over six"]),
    ],
)
def test_each_has_a_smaller_error_than_what_it_improves(better, worse):
    w = weights((16, 16, 32), 3)
    assert np.square(values(better, w) - w).sum() < np.square(values(worse, w) - w).sum()


def test_a_search_of_mantissas_is_weighted():
    w, h = weights(), np.zeros(32, np.float32)
    h[:4] = 1.0
    grid = MX(macro=4, range=MSE(norm=2.0))
    error = [np.square(values(grid, w, by) - w)[..., :4].sum() for by in (h, None)]
    assert error[0] < 0.8 * error[1]


def test_groups_that_share_a_mantissa_may_be_fewer_at_the_end():
    w = weights((3, 5, 32))
    params = ALL["macro"].fit(w)
    assert params["macro"].shape == (3, 2) and params["macro"].dtype == jnp.uint8
    alone = ALL["macro"].fit(w[:, 4:])
    np.testing.assert_array_equal(params["macro"][:, 1:], alone["macro"])
    assert shares(ALL["macro"]) and not shares(ALL["oas"])


def test_what_is_stored_is_counted():
    w = jnp.asarray(weights().reshape(6, 256))
    for name, bits in (("oas", 4.25), ("macro", 4.25 + 1 / 16), ("four over six", 4.5 + 32 / 1536)):
        result = Nearest()(w, ALL[name], jq.Scheme(ALL[name]).groups)
        assert bits_per_weight(result.codes, result.params, 4) == bits


@pytest.mark.parametrize("name", ALL)
def test_weights_are_saved_multiplied_and_rounded_by_gptq(name, tmp_path: Path):
    def fn(p, x):
        return x @ p["w"]

    w = jnp.asarray(weights((1, 6, 160), 2)[0].T)  # five groups: the last macro block has one
    x = jax.random.normal(jax.random.key(0), (400, 160)) @ (jnp.tri(160) / 8)
    plan = jq.plan(jq.find_weights(fn, {"w": w}, x), {".*": jq.Scheme(ALL[name], None, GPTQ())})
    q, report = jq.quantize(fn, {"w": w}, plan, [x])
    assert report["w"].error < 0.8 * report["w"].nearest_error
    jq.save(tmp_path / "q", q)
    again = jq.load(tmp_path / "q")
    np.testing.assert_array_equal(jq.dequantize(again)["w"], jq.dequantize(q)["w"])
    np.testing.assert_allclose(
        jq.apply(fn)(again, x), fn(jq.dequantize(q), x), rtol=1e-4, atol=1e-4
    )
    assert again["w"].grid == ALL[name]


def test_files_hold_what_their_format_has_a_place_for():
    def described(grid):
        return Described((64, 128), grid, jq.Scheme(grid).grouping)

    for name in ("oas", "four over six"):
        plain = NV() if name == "four over six" else MX()
        same = [held(TARGETS["compressed-tensors"], "k", described(g)) for g in (ALL[name], plain)]
        assert same[0].settings == same[1].settings
    for target in ("compressed-tensors", "gguf", "mlx", "qwix"):
        with pytest.raises(
            FormatError, match=rf"'k': {target} cannot hold mantissas that 4 groups"
        ):
            held(TARGETS[target], "k", described(ALL["macro"]))
        near = TARGETS[target].nearest(described(ALL["macro"]))
        assert near is not None
        TARGETS[target].hold(near)
        if target != "gguf":
            assert near.grid == ALL["oas"]


def test_papers_are_named():
    assert "cook2025foursix" in jq.cite(NV(four_six=True)) and "cook" not in jq.cite(NV())
    assert "chhugani2026mxfp4" in jq.cite(MX(macro=4)) and "chhugani" not in jq.cite(MX())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"macro": 1, "scale": "e8m0"}, "Float.macro must be an int from 2 to 65536, got 1"),
        ({"macro": 4.0, "scale": "e8m0"}, "got 4.0"),
        ({"macro": 4, "scale": "e4m3"}, "macro=4 is of the scale 'e8m0' alone"),
        ({"four_six": 1, "scale": "e4m3"}, "four_six must be True or False"),
        ({"four_six": True, "scale": "e8m0"}, "E2M1 with the scale 'e4m3' alone"),
        ({"four_six": True, "scale": "e4m3", "mantissa_bits": 3}, "E2M1 with the scale"),
        ({"scale_rule": "oas", "scale": "float16"}, "'oas' is of the scale 'e8m0' alone"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        Float(**{"exponent_bits": 2, "mantissa_bits": 1, **arguments})


def test_inputs_have_no_macro_blocks():
    with pytest.raises(ValueError, match="Activations"):
        jq.Activations(Float(2, 1, scale="e8m0", macro=4))
