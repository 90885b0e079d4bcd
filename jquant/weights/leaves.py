"""The parameters of a job: arrays by path, read a piece at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jquant.errors import WeightError
from jquant.programs.straight import Piece
from jquant.trees.lazy import read
from jquant.trees.paths import path_of
from jquant.weights.arguments import by_path, shape_of, value_of


@dataclass(frozen=True, eq=False)
class Leaves:
    """The arrays of a tree of parameters.

    Attributes:
        arrays: path → array, in the order of the tree. Arrays inside a `QTensor` stand apart.
        structure: the tree that they are the leaves of.
    """

    arrays: Mapping[str, Any]
    structure: Any

    @staticmethod
    def of(params: PyTree) -> Leaves:
        """The leaves of a tree.

        Raises:
            TreeError: a leaf is no array or number, or two have one path.
        """
        by_path(params)
        pairs, structure = jax.tree_util.tree_flatten_with_path(params)
        return Leaves({path_of(keys): value_of(leaf) for keys, leaf in pairs}, structure)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path → shape and dtype."""
        return {path: shape_of(leaf) for path, leaf in self.arrays.items()}

    @property
    def abstract(self) -> PyTree:
        """The tree with a shape and dtype in the place of every array: for tracing."""
        return jax.tree.unflatten(self.structure, list(self.shapes.values()))

    def read(self, piece: Piece) -> Array:
        """A leaf or one layer of it, whose axes stay, in memory."""
        leaf = self.arrays[piece.path]
        return jnp.asarray(read(leaf, piece.index(len(leaf.shape)) if piece.where else ...))

    def read_weight(self, piece: Piece) -> Array:
        """The same of a weight, which is checked if it comes from a file.

        Raises:
            WeightError: it holds NaN or infinite values.
        """
        array = self.read(piece)
        if not isinstance(self.arrays[piece.path], jax.Array):
            check_finite(piece.path, array)
        return array


def check_finite(path: str, array: Array) -> None:
    """Refuse a weight that was read from a file just now."""
    refuse_unless(path, is_finite(array))


def refuse_unless(path: str, finite: Array) -> None:
    """Refuse a weight by the flag that `is_finite` has given."""
    if not finite:
        raise WeightError(
            f"weight {path!r} holds NaN or infinite values; repair it, or keep it (jq.keep)"
        )


@jax.jit
def is_finite(leaf: Array) -> Array:
    """Whether all values are finite, a bool array."""
    return jnp.all(jnp.isfinite(leaf))
