"""Objectives, against NumPy in float64 and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jquant.learning.objectives import KL, MSE, TOKENS_AT_ONCE, Fisher, Reconstruction

RANDOM = np.random.default_rng(0)
WANTED = 2 * RANDOM.normal(size=(3, 7, 11)).astype(np.float32)
FOUND = WANTED + RANDOM.normal(size=WANTED.shape).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_scipy_s(temperature):
    p, q = (special.softmax(np.float64(x) / temperature, -1) for x in (WANTED, FOUND))
    wanted = stats.entropy(p, q, axis=-1).mean()
    np.testing.assert_allclose(KL(temperature)(FOUND, WANTED), wanted, rtol=1e-5)


def test_many_tokens_come_in_chunks_and_half_precision_in_float32():
    rows = 2 * TOKENS_AT_ONCE + 3
    wanted = RANDOM.normal(size=(rows, 5)).astype(np.float32)
    found = wanted[::-1].copy()
    few = jax.vmap(KL())(found, wanted).mean()  # each row by itself
    np.testing.assert_allclose(KL()(found, wanted), few, rtol=1e-5)
    half = KL()(jnp.asarray(found, jnp.bfloat16), jnp.asarray(wanted, jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, few, rtol=2e-2)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda q: KL()(q, wanted)))(found))
    assert f"f32[{rows},5]" in jaxpr and "remat" in jaxpr


def test_kl_s_gradient_is_the_difference_of_probabilities():
    gradient = jax.grad(lambda q: KL()(q, WANTED))(FOUND)
    wanted = (special.softmax(FOUND, -1) - special.softmax(WANTED, -1)) / 21
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_words_that_cannot_be_said_cost_nothing():
    wanted = jnp.array([[0.0, -jnp.inf]])
    assert float(KL()(jnp.array([[0.0, -100.0]]), wanted)) == pytest.approx(0, abs=1e-6)


def test_fisher_is_kl_to_second_order():
    near = WANTED + 1e-2 * (FOUND - WANTED)
    np.testing.assert_allclose(Fisher()(near, WANTED), KL()(near, WANTED), rtol=2e-2)
    np.testing.assert_allclose(Fisher()(WANTED + 5, WANTED), 0, atol=1e-5)  # softmax sees nothing


def test_mse_is_relative_and_sums_over_outputs():
    a, b = {"x": WANTED, "n": jnp.arange(3)}, {"x": FOUND, "n": jnp.arange(3)}
    wanted = np.mean(np.float64(FOUND - WANTED) ** 2) / np.mean(np.float64(WANTED) ** 2)
    np.testing.assert_allclose(MSE()(b, a), wanted, rtol=1e-5)
    np.testing.assert_allclose(
        MSE()([FOUND, 3 * FOUND], [WANTED, 3 * WANTED]), 2 * wanted, rtol=1e-5
    )
    assert float(MSE()(jnp.ones(2), jnp.zeros(2))) == 1.0
    assert Reconstruction()(b, a) == MSE()(b, a)


def test_refusals():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        KL(0)
    one = jnp.ones(3, jnp.float32)
    for objective in (KL(), Fisher()):
        with pytest.raises(
            ValueError, match=r"one array of logits .* got float32\[3\], float32\[3\]"
        ):
            objective((one, one), (one, one))
        with pytest.raises(ValueError, match=r"got int32\[3\]"):
            objective(*[jnp.arange(3, dtype=jnp.int32)] * 2)
