"""Weights kept in narrow floats: decoded values take their dtype without NaN, and errors see it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jquant as jq
from jquant.grids import MX, NF4, Float, Uniform
from jquant.numerics.narrow import as_dtype
from jquant.rounding import GPTQ, Descent, DiscQuant, Nearest, Stochastic
from tests.functions import _normal
from tests.marks import covering

NARROW = [
    "float8_e4m3fn", "float8_e4m3", "float8_e3m4", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e4m3b11fnuz", "float4_e2m1fn", "float16",
]  # fmt: skip
each_dtype = pytest.mark.parametrize("dtype", NARROW)
SHAPE = (48, 16)


def filling(dtype, *shape, seed=0):
    """Weights scaled to fill their dtype, each column, as eight-bit checkpoints are."""
    w = _normal(seed, *shape)
    most = float(jnp.finfo(dtype).max)
    return as_dtype(w / jnp.abs(w).max(-2, keepdims=True) * most, dtype)


def fn(p, x):
    return jnp.tanh(x @ p["a"].astype(jnp.float32) * p["s"]) @ p["b"].astype(jnp.float32)


def params(dtype):
    return {
        "a": filling(dtype, *SHAPE),
        "b": filling(dtype, 16, 24, seed=1),
        "s": jnp.ones(16, jnp.float32),
    }


def relative(q, w, moment=None):
    """The error of what a weight is now, float64 from its own bits."""
    now, was = (np.asarray(a).astype(np.float64) for a in (q, w))
    moment = np.eye(len(was)) if moment is None else np.asarray(moment, np.float64)
    size = lambda e: np.einsum("io,ij,jo->", e, moment, e)  # noqa: E731
    return size(was - now) / size(was)


@each_dtype
def test_a_cast_that_does_not_leave_the_dtype(dtype) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    most = float(jnp.finfo(dtype).max)
    inside = np.linspace(-most, most, 257, dtype=np.float32)
    np.testing.assert_array_equal(
        np.asarray(as_dtype(jnp.asarray(inside), dtype)).view(np.uint8).ravel()[:64],
        inside.astype(kind).view(np.uint8).ravel()[:64],
    )
    beyond = jnp.array([most * 1.01, most * 2, 3e38, jnp.inf])
    for sign in (1, -1):
        found = jax.jit(lambda x: as_dtype(x, dtype))(sign * beyond)
        np.testing.assert_array_equal(found.astype(jnp.float32), sign * most)
    if dtype != "float4_e2m1fn":
        assert jnp.isnan(as_dtype(jnp.array([jnp.nan]), dtype).astype(jnp.float32)).all()
    slope = jax.grad(lambda x: as_dtype(x, dtype).astype(jnp.float32).sum())
    np.testing.assert_array_equal(slope(jnp.array([most, -most, most * 3])), [1, 1, 0])


@pytest.mark.parametrize(
    ("grid", "dtype"),
    covering([Uniform(2), Uniform(4), Uniform(4, convention="A2"), MX(), NF4, Float(3, 2)], NARROW),
    ids=str,
)
def test_a_weight_stays_finite_and_its_error_is_told(dtype, grid) -> None:
    w = filling(dtype, *SHAPE)
    for moment in (None, _normal(3, 64, 48)):
        evidence = None if moment is None else jq.Evidence.of(moment)
        q, info = jq.quantize_weight(
            w, jq.Scheme(grid, 16), jq.Layout.of(SHAPE, in_axes=(0,)), evidence=evidence
        )
        found = jq.dequantize({"w": q})["w"]
        assert found.dtype == w.dtype and jnp.isfinite(found.astype(jnp.float32)).all()
        h = None if evidence is None else evidence.second_moment
        told = float(info["error"] / info["power"])
        # In sixteen bits the rounding to the dtype is left out: it is far less.
        wide = dtype == "float16"
        np.testing.assert_allclose(told, relative(found, w, h), rtol=2e-3 if wide else 1e-4)
        assert info["error"] == info["nearest_error"]


SCHEMES = {
    "gptq": jq.Scheme(Uniform(3), 16, GPTQ()),
    "dynamic": jq.Scheme(Uniform(2), None, GPTQ(groups="dynamic")),
    "lorc": jq.Scheme(Uniform(2), None, Nearest(), jq.LoRC(2)),
    "stochastic": jq.Scheme(Uniform(3), None, Stochastic()),
    "discquant": jq.Scheme(Uniform(2), None, DiscQuant(descent=Descent(4, 0.05))),
}


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    covering(SCHEMES, ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float16"]),
)
def test_a_network_stays_finite_and_reports_what_apply_uses(dtype, scheme) -> None:
    before, x = params(dtype), _normal(5, 64, 48)
    plan = jq.plan(jq.find_weights(fn, before, x), {".*": SCHEMES[scheme]})
    q, report = jq.quantize(fn, before, plan, [x], key=jax.random.key(0))
    y = jq.apply(fn)(q, x)
    assert jnp.isfinite(y).all()
    now = jq.dequantize(q)
    np.testing.assert_allclose(y, fn(now, x), rtol=1e-4, atol=1e-4 * float(jnp.abs(y).max()))
    moment = jq.Evidence.of(x).second_moment
    told, true = report["a"].error, relative(now["a"], before["a"], moment)
    np.testing.assert_allclose(told, true, rtol=2e-3)


@pytest.mark.parametrize("low", [None, jq.LoRC(2)], ids=["codes", "lorc"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e3m4", "float16"])
def test_views_products_and_lookups_stay_finite_too(dtype, low) -> None:
    """Casts of wider weights, rows of a table, products in the narrow dtype itself."""
    w = filling(dtype, 48, 16)

    def looked_up(p, i):
        return p[i].astype(jnp.float32)

    def cast(p, x):
        return x @ p.astype(dtype).astype(jnp.float32)

    def narrow(p, x):
        return jax.lax.dot_general(
            x.astype(dtype), p, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    x = _normal(5, 8, 48)
    scheme = jq.Scheme(Uniform(2), 8, compensation=low)
    for run, given, leaf in (
        (looked_up, jnp.arange(48), w), (cast, x, w.astype(jnp.float32)), (narrow, x, w),
    ):  # fmt: skip
        plan = jq.plan(jq.find_weights(run, leaf, given), {".*": scheme})
        q, _ = jq.quantize(run, leaf, plan)
        assert jnp.isfinite(jq.apply(run)(q, given)).all()
        # A cast leaves the dtype in the function itself; codes and a term beside them, in float16,
        # end at 65504 each and not together.
        if run is looked_up or run is narrow and not (low and dtype == "float16"):
            found, wanted = jq.apply(run)(q, given), run(jq.dequantize(q), given)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_quantized_inputs_stay_in_their_dtype() -> None:
    dtype = jnp.float8_e4m3fn
    x, w = filling(dtype, 16, 48).astype(jnp.float32), _normal(2, 48, 8)
    choice = jq.Activations(Uniform(2, convention="A2"), compute="fake_quant")

    def run(p, x):
        return x.astype(dtype).astype(jnp.float32) @ p

    def direct(p, x):
        return jax.lax.dot_general(
            x.astype(dtype), p.astype(dtype), (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    for fn in (run, direct):
        scheme = jq.Scheme(Uniform(8), activations=choice)
        q, _ = jq.quantize(fn, w, jq.plan(jq.find_weights(fn, w, x), {".*": scheme}))
        assert jnp.isfinite(jq.apply(fn)(q, x)).all()
