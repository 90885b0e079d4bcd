"""Powers of errors, by whichever way they are taken."""

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics.powers import powered

ERRORS = np.array([0.0, -0.0, 1e-30, -3e-5, 0.3, -1.0, 7.5, 4e5], np.float32)


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0, 1.5, 2.0, 2.4, 3.0, 3.7])
def test_they_are_those_of_double_precision(norm):
    expected = np.abs(ERRORS.astype(np.float64)) ** norm
    given = np.asarray(powered(jnp.asarray(ERRORS), norm))
    np.testing.assert_allclose(given, expected, rtol=2e-5, atol=1e-38)
    assert (given[:2] == 0).all()


@pytest.mark.parametrize("norm", [0.7, 2.0, 2.4, 2.5, 3.0])
def test_what_is_no_number_or_infinite_shows(norm):
    given = np.asarray(powered(jnp.array([jnp.nan, jnp.inf, -jnp.inf]), norm))
    assert np.isnan(given[0]) and (given[1:] == np.inf).all()


def test_a_power_below_zero_is_of_what_is_not_zero():
    """As HQQ's shrinkage takes it."""
    given = np.asarray(powered(jnp.array([0.5, -2.0]), -0.3))
    np.testing.assert_allclose(given, [0.5**-0.3, 2.0**-0.3], rtol=1e-5)
