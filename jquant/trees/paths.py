"""Leaves by path: what a leaf is called, and the randomness that belongs to its name."""

from __future__ import annotations

import zlib
from typing import Any

import jax
from jaxtyping import PRNGKeyArray


def path_of(keys: Any) -> str:
    """A key path as `/`-joined keys, `"layers/0/kernel"`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def key_of(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """The key of one leaf, from its path: adding a leaf changes no other's."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
