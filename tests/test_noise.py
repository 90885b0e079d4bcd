"""Random words are even, independent, and a function of the key and the place alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics import noise

SIDE = 1 << 10
KEYS = [jax.random.key(seed) for seed in range(4)]


def drawn(key, shape=(SIDE, SIDE)):
    return np.asarray(noise.words(key, shape))


def bits_of(words):
    return (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1


def test_every_bit_is_even():
    for key in KEYS:
        ones = bits_of(drawn(key).reshape(-1)).mean(0)
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / SIDE  # five standard deviations


def test_bits_of_one_word_and_of_neighbours_do_not_correlate():
    for key in KEYS[:2]:
        signs = 1.0 - 2.0 * bits_of(drawn(key).reshape(-1)[: 1 << 18]).astype(np.float32)
        n = len(signs)
        within = signs.T @ signs / n - np.eye(32)
        assert np.abs(within).max() < 6 / np.sqrt(n)
        for lag in (1, 2, 3, 64, SIDE):
            across = signs[lag:].T @ signs[:-lag] / (n - lag)
            assert np.abs(across).max() < 6 / np.sqrt(n - lag), lag


def test_words_of_neighbouring_keys_do_not_correlate():
    signs = [1.0 - 2.0 * bits_of(drawn(k, (1 << 17,))).astype(np.float32) for k in KEYS]
    for one in range(len(KEYS)):
        for two in range(one):
            across = signs[one].T @ signs[two] / len(signs[0])
            assert np.abs(across).max() < 6 / np.sqrt(len(signs[0]))


def test_values_fill_their_range_evenly():
    counts = np.bincount(drawn(KEYS[0]).reshape(-1) >> 20, minlength=4096)
    expected = SIDE * SIDE / 4096
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 4095) < 5 * np.sqrt(2 * 4095)


def test_no_word_comes_twice():
    """As from a cipher in counter mode: mixing is a permutation. Its low bits do repeat."""
    words = drawn(KEYS[1]).reshape(-1)
    assert len(np.unique(words)) == len(words)
    repeated = len(words) - len(np.unique(words & 0xFFFFFF))
    expected = len(words) - 2**24 * (1 - np.exp(-len(words) / 2**24))
    assert abs(repeated - expected) < 6 * np.sqrt(expected)


def test_a_word_depends_on_its_place_and_not_on_the_shape_behind():
    whole = drawn(KEYS[0], (6, 5))
    np.testing.assert_array_equal(whole.reshape(-1), drawn(KEYS[0], (30,)))
    np.testing.assert_array_equal(whole, jax.jit(noise.words, static_argnums=1)(KEYS[0], (6, 5)))


def test_more_than_a_word_of_places(monkeypatch: pytest.MonkeyPatch):
    """Rows of what lies beyond 32 bits differ: seen on the index, for lack of memory."""
    shape = (3, 1 << 16, 1 << 16)
    row = jax.eval_shape(lambda: noise._index(shape, range(1)))
    assert row.shape == shape
    small = [noise._mixed(jnp.full(4, k, jnp.uint32) + 7) for k in range(3)]
    assert len({int(words[0]) for words in small}) == 3


def test_uniform_numbers():
    u = np.asarray(noise.uniform(KEYS[2], (SIDE, SIDE)), np.float64)
    assert 0 <= u.min() and u.max() < 1 and (u * 2**24 == np.floor(u * 2**24)).all()
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12) / SIDE
    assert abs((u**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45) / SIDE


def test_the_other_source_is_jax_s_own():
    words = noise.words(KEYS[0], (7,), "threefry")
    np.testing.assert_array_equal(words, jax.random.bits(KEYS[0], (7,), jnp.uint32))
    with pytest.raises(ValueError, match=r"one of \('hash', 'threefry'\), got 'mersenne'"):
        noise.words(KEYS[0], (7,), "mersenne")  # type: ignore[arg-type]
