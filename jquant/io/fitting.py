"""Stored leaves in the places of a tree's: the same paths, the same shapes, or an error first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jquant.errors import TreeError, near
from jquant.weights.arguments import by_path


def check_places(like: Any, stored: Mapping[str, tuple[int, ...]], whose: str = "the file") -> None:
    """Raise unless each leaf of a tree is where a stored array of its shape goes, and none is left.

    Args:
        like: a tree of parameters, or of their shapes.
        stored: path → shape of what is stored.
        whose: names what is stored, in messages.

    Raises:
        TreeError: one has a path that the other has not, or another shape there.
    """
    leaves = by_path(like, "like")
    for one, other, name in ((leaves, stored, whose), (stored, leaves, "like")):
        for path in one:
            if path not in other:
                raise TreeError(f"{name} has no leaf at {path!r}; near: {near(path, other)}")
    for path, leaf in leaves.items():
        if tuple(leaf.shape) != stored[path]:
            raise TreeError(
                f"like, at {path!r}, has the shape {tuple(leaf.shape)}, {whose} has {stored[path]}"
            )
