"""Leaves by path: what a leaf is called, and the randomness that belongs to its name."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PRNGKeyArray


def path_of(keys: Any) -> str:
    """A key path as `/`-joined keys, `"layers/0/kernel"`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries in dictionaries that hold these leaves, by path.

    Example:
        >>> nested({"layers/0/kernel": 1, "layers/0/bias": 2, "head": 3})
        {'layers': {'0': {'kernel': 1, 'bias': 2}}, 'head': 3}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def key_of(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """The key of one leaf, from its path: adding a leaf changes no other's."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
