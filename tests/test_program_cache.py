"""Compiled programs that the command line keeps on disk."""

import jax
import pytest

from jquant.app import program_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """What JAX is told, by name; as it was afterwards. Before: nothing is kept."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path))
    monkeypatch.delenv("JQUANT_PROGRAMS", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: {name: getattr(jax.config, name) for name in NAMES}
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_cache_folder_up_to_a_size(settings, tmp_path):
    program_cache.keep_programs()
    assert settings() == dict(
        zip(NAMES, (str(tmp_path / "programs"), program_cache.LIMIT, 0.2), strict=True)
    )


def test_a_users_own_choice_stays(settings, tmp_path):
    jax.config.update(NAMES[0], str(tmp_path / "own"))
    program_cache.keep_programs()
    assert settings()[NAMES[0]] == str(tmp_path / "own")


@pytest.mark.parametrize("word", ["off", "OFF", "0", "no"])
def test_it_can_be_turned_off(settings, monkeypatch, word):
    monkeypatch.setenv("JQUANT_PROGRAMS", word)
    program_cache.keep_programs()
    assert settings()[NAMES[0]] is None
