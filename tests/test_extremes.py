"""NaN that shows in a maximum: it does at every size, in every dtype, however it is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GRIDS
from marks import mostly_slow

import jquant as jq
from jquant.calibration.evidence import Evidence
from jquant.calibration.spread import Spread
from jquant.errors import EvidenceError
from jquant.grids import Float, Uniform, nearest
from jquant.learning.objectives import KL
from jquant.numerics.extremes import all_finite, largest, least
from jquant.weights.activations import encode, rounded

# XLA's CPU compiler forgets NaN from 4096 elements on: below, at, and beyond it, in rows and whole.
SHAPES = [(63, 65), (64, 64), (1, 5000), (2, 64, 65), (0, 5)]
AXES = (None, -1, 0)
BAD = {"nan": jnp.nan, "infinity": jnp.inf, "minus infinity": -jnp.inf, "large": 3e38}


def _drawn(shape, dtype="float32"):
    return jax.random.normal(jax.random.key(0), shape).astype(dtype)


@jax.jit
def _extremes(x):
    return [
        (largest(x, axis, initial=0.0), least(x, axis, initial=0.0), all_finite(x, axis))
        for axis in AXES
    ]


def _each(shape, value, dtype="float32"):
    """An array, and one in which the first, a middle and the last number are `value`."""
    x = _drawn(shape, dtype)
    flat = np.array(x).reshape(-1)
    flat[[k for k in {0, flat.size // 2, flat.size - 1} if 0 <= k < flat.size]] = value
    return x, jnp.asarray(flat.reshape(shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("bad", BAD)
def test_extremes_are_numpy_s_at_every_size(dtype, bad) -> None:
    with jax.enable_x64(dtype == "float64"), np.errstate(all="ignore"):
        for shape in SHAPES:
            for x in _each(shape, BAD[bad], dtype):
                wide = np.asarray(x).astype(np.float64)
                for axis, got in zip(AXES, _extremes(x), strict=True):
                    wanted = [
                        np.max(wide, axis, initial=0.0), np.min(wide, axis, initial=0.0),
                        np.isfinite(wide).all(axis),
                    ]  # fmt: skip
                    for one, other in zip(got, wanted, strict=True):
                        np.testing.assert_array_equal(np.asarray(one).astype(other.dtype), other)


def test_extremes_under_vmap_and_grad() -> None:
    x = _drawn((3, 4096)).at[1, 5].set(jnp.nan)
    found = jax.jit(jax.vmap(largest))(x)
    np.testing.assert_array_equal(jnp.isnan(found), [False, True, False])
    slope = jax.grad(lambda x: largest(x).sum())(x[0])
    assert float(slope.sum()) == 1 and float(slope[jnp.argmax(x[0])]) == 1


@pytest.mark.parametrize(
    ("grid", "granularity", "bad"),
    [
        (Uniform(8), "token", "nan"),
        (Uniform(8), "static", "infinity"),
        (Uniform(8, symmetric=True), "tensor", "infinity"),
        (Uniform(8, symmetric=True), "static", "nan"),
        (Float(4, 3, scale="float32"), "token", "infinity"),
        (Float(4, 3, scale="float32"), "tensor", "nan"),
    ],
    ids=[
        "affine-token-nan",
        "affine-static-infinity",
        "even-tensor-infinity",
        "even-static-nan",
        "fp8-token-infinity",
        "fp8-tensor-nan",
    ],
)
def test_a_token_that_is_not_finite_gives_nan_at_every_size(grid, granularity, bad) -> None:
    choice = jq.Activations(grid, granularity)
    static = choice.fit(jnp.float32(-3.0), jnp.float32(3.0)) if granularity == "static" else None
    for tokens, width in ((4, 8), (64, 64)):
        x = _drawn((tokens, width)).at[0, width - 1].set(BAD[bad])
        found = jax.jit(lambda x: rounded(x, choice, static))(x)
        np.testing.assert_array_equal(
            jnp.isnan(found).any(-1), [True] + [False] * (tokens - 1)
        )  # and nobody else's
        assert jnp.isnan(found[0]).all()
        clean = encode(x.at[0].set(0.0), choice, static)[0]
        np.testing.assert_array_equal(encode(x, choice, static)[0][1:], clean[1:])


def test_products_and_their_axes_keep_it() -> None:
    """All ways to compute a product, with the tokens that meet the weight one by one or all."""
    w = {"w": _drawn((64, 32))}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    x = _drawn((64, 64)).at[0, 0].set(jnp.nan)
    for grid in (Uniform(8, symmetric=True), Float(4, 3, scale="float32")):
        scheme = jq.Scheme(grid, activations=jq.Activations(grid))
        q, _ = jq.quantize(fn, w, jq.plan(jq.find_weights(fn, w, x), {".*": scheme}))
        for y in (jq.apply(fn)(q, x), jax.vmap(lambda x, q=q: jq.apply(fn)(q, x[None])[0])(x)):
            np.testing.assert_array_equal(jnp.isnan(y).sum(-1), [32] + [0] * 63)


NAN_QUICK = ("A1-4", "S1-2-mse", "A4-4-hqq", "E5M2-half", "mx-E2M1", "nv", "power-4", "nf4")


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        dict.fromkeys([*NAN_QUICK, *(n for n in list(GRIDS)[1::3] if GRIDS[n] != Float(3, 2))]),
        NAN_QUICK,
    ),
)
def test_a_group_that_holds_nan_is_nan_at_every_size(name) -> None:
    """Where there is a scale or a table; codes of floats without one know no NaN."""
    grid = GRIDS[name]
    if getattr(grid, "scale", "") is None:
        pytest.skip("no scale")

    @jax.jit
    def values(w):
        params = grid.fit(w)
        return grid.decode(nearest(grid, w, params), params)

    for groups, size in ((4, 9), (64, 64)):
        w = _drawn((groups, size)).at[1, 3].set(jnp.nan)
        assert jnp.isnan(values(w)[1]).all(), (groups, size)


def test_evidence_and_spread_tell_it() -> None:
    for tokens, width in ((8, 4), (64, 64)):
        x = _drawn((2, tokens, width)).at[1, 3, 1].set(jnp.nan)
        found = jax.jit(lambda x: Evidence.of(x, spread=True))(x)
        bad = np.zeros((2, width), bool)
        bad[1, 1] = True
        np.testing.assert_array_equal(jnp.isnan(found.abs_max), bad)
        assert found.spread is not None
        for end in (found.spread.low, found.spread.high):
            np.testing.assert_array_equal(jnp.isnan(end), [False, True])
        grouped = Spread.grouped(x.reshape(-1, width), jnp.repeat(jnp.arange(2), tokens), 2)
        np.testing.assert_array_equal(jnp.isnan(grouped.high), [False, True])


@pytest.mark.parametrize("part", ["total", "abs_max", "drift", "spread"])
def test_given_evidence_is_refused_where_any_part_is_not_finite(part) -> None:
    x = _drawn((80, 64))
    whole = Evidence.of(x, full=x, spread=True)
    bad = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), getattr(whole, part))
    given = {"w": jq.Evidence(**{**vars(whole), part: bad})}
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((64, 8), jnp.float32)}
    plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_gptq()})
    with pytest.raises(EvidenceError, match=f"'w': its {part.replace('_', ' ')} holds NaN"):
        jq.quantize(fn, params, plan, evidence=given)


def test_a_divergence_from_nan_is_nan() -> None:
    p = jnp.zeros((2, 5000)).at[0, 3].set(jnp.nan)
    assert jnp.isnan(KL()(jnp.zeros((2, 5000)), p)) and jnp.isnan(KL()(p, jnp.zeros((2, 5000))))
    impossible = jnp.zeros((2, 5000)).at[0, 3].set(-jnp.inf)
    assert float(KL()(impossible, impossible)) == 0.0
