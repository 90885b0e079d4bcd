"""Laws every rounding obeys on every grid, and what nearest rounding is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BLOCKS, GRIDS, LEARNED, ROUNDINGS, floats, layer

from jquant.axes.groups import Groups, from_groups, to_groups
from jquant.grids import MSE, Uniform, code_dtype, nearest
from jquant.numerics.distortion import bits_per_weight, mse, output_error, sqnr_db
from jquant.rounding import Nearest
from tests.marks import covering

# Every rounding meets two shapes on one grid, those without learning every shape and the grids
# whose parameters differ in kind (nearest codes are the law of every grid in `test_grid_laws`).
# GPTQ, which takes seconds to compile, meets only grids that differ in what they hand it.
KINDS = (
    "A1-3-half", "A3-3", "S1-4", "E3M2", "mx-E2M1", "nv", "power-3-groups", "nf4", "kmeans-4",
    "gguf-Q4_0", "gguf-Q4_K",
)  # fmt: skip
SHAPES = list(BLOCKS)
PRODUCT = [
    *itertools.product(("nearest", "stochastic", "gptq"), ("A1-4",), BLOCKS),
    *((r, "A1-4", SHAPES[(k + j) % 4]) for k, r in enumerate(list(ROUNDINGS)[3:]) for j in (0, 2)),
    *(("nearest", g, "in-ragged") for g in KINDS),
    *(("gptq", g, "in-8") for g in ("A1-4-mse", "A3-3", "S1-4", "S3-5-bf16", "gguf-Q4_K")),
    *covering(LEARNED, ("A4-4-hqq", "nv", "power-4", "nf4", "kmeans-2-bf16"), ("in-8",)),
]


@pytest.mark.parametrize(("rounding", "grid", "shape"), PRODUCT)
def test_codes_and_parameters_are_what_a_rounding_promises(rounding, grid, shape):
    rounding, grid, ((out, width), groups) = ROUNDINGS[rounding], GRIDS[grid], BLOCKS[shape]
    w, moment = layer(out, width)
    result = rounding(w, grid, groups, evidence=moment, key=jax.random.key(0))
    assert result.codes.shape == w.shape and result.codes.dtype == code_dtype(grid)
    codes = np.asarray(result.codes).astype(int)
    assert grid.codes[0] <= codes.min() and codes.max() <= grid.codes[1]
    rows, length = (out, width) if groups.axis == "in" else (width, out)
    for leaf in jax.tree.leaves(result.params):
        assert leaf.shape[0] in (1, rows) and leaf.shape[1] in (1, groups.count(length))
        assert np.isfinite(np.asarray(leaf, np.float64)).all()
    for name, value in result.info.items():
        assert value.shape == () and value.dtype == jnp.float32, name


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_second_call_with_equal_shapes_does_not_compile(rounding, compiles):
    rounding, grid, groups = ROUNDINGS[rounding], Uniform(4), Groups("in", 8)
    (w, moment), (other, more) = layer(12, 40), layer(12, 40, seed=1)
    rounding(w, grid, groups, evidence=moment, key=jax.random.key(0))
    with compiles() as programs:
        rounding(other, Uniform(4), Groups("in", 8), evidence=more, key=jax.random.key(1))
    assert programs == []


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround", "nupes"])
def test_rounding_works_inside_jit(rounding):
    rounding, (w, moment) = ROUNDINGS[rounding], layer(12, 40)
    call = jax.jit(lambda w, h: rounding(w, Uniform(4), Groups("in", 8), evidence=h).codes)
    outside = rounding(w, Uniform(4), Groups("in", 8), evidence=moment).codes
    np.testing.assert_array_equal(np.asarray(call(w, moment)), np.asarray(outside))


@pytest.mark.parametrize("shape", BLOCKS)
def test_nearest_is_the_grid_s_nearest(shape):
    (out, width), groups = BLOCKS[shape]
    w, _ = layer(out, width)
    result = Nearest()(w, Uniform(4), groups)
    grouped = to_groups(w, groups)
    codes = nearest(Uniform(4), grouped, Uniform(4).fit(grouped))
    length = width if groups.axis == "in" else out
    np.testing.assert_array_equal(
        np.asarray(result.codes).astype(int), np.asarray(from_groups(codes, groups, length))
    )


def test_nearest_maps_over_layers():
    w, _ = layer(12, 40, batch=(2, 3))
    together = Nearest()(w, Uniform(4), Groups("out", 4))
    alone = Nearest()(w[1, 2], Uniform(4), Groups("out", 4))
    np.testing.assert_array_equal(together.codes[1, 2], alone.codes)
    for name in alone.params:
        np.testing.assert_array_equal(together.params[name][1, 2], alone.params[name])


def test_nearest_lets_evidence_weigh_a_range_search():
    w, _ = layer(12, 40)
    grid, moment = Uniform(2, range=MSE()), jnp.diag(jnp.arange(40.0) ** 3)
    plain, weighed = (Nearest()(w, grid, evidence=h).params["scale"] for h in (None, moment))
    assert (np.asarray(plain) != np.asarray(weighed)).any()


def test_groups_out_are_groups_in_of_the_transpose():
    w, _ = layer(12, 10)
    out = Nearest()(w, Uniform(4), Groups("out", 4))
    inward = Nearest()(w.T, Uniform(4), Groups("in", 4))
    np.testing.assert_array_equal(out.codes, inward.codes.T)
    for name, leaf in floats(out.params).items():
        np.testing.assert_array_equal(leaf, floats(inward.params)[name])


def test_distortions():
    error, moment = layer(3, 7)
    e, h = np.asarray(error, np.float64), np.asarray(moment, np.float64)
    np.testing.assert_allclose(output_error(error, moment), np.trace(e @ h @ e.T), rtol=1e-5)
    np.testing.assert_allclose(mse(error, 2 * error), (e**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(sqnr_db(error, 1.1 * error), 20, rtol=1e-4)
    stacked = output_error(jnp.stack([error, 2 * error]), jnp.stack([moment, moment]))
    np.testing.assert_allclose(stacked[1], 4 * stacked[0], rtol=1e-6)


def test_bits_per_weight_counts_parameters():
    # DiscQuant's 3.25 bits: 3 and a 16-bit scale for 64 weights.
    grid = Uniform(3, symmetric=True, scale_dtype="float16")
    w, _ = layer(4, 128)
    result = Nearest()(w, grid, Groups("in", 64))
    assert bits_per_weight(result.codes, result.params, grid.bits) == 3.25
    grid = Uniform(4, scale_dtype="bfloat16")
    result = Nearest()(w, grid, Groups("in", 64))
    assert bits_per_weight(result.codes, result.params, grid.bits) == 4 + 20 / 64
