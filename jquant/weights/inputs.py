"""Quantized inputs as a part of a weight: what its products see of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.grids.base import GridParams
from jquant.weights.activations import Activations, rounded
from jquant.weights.parts import Part


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """How the inputs of a weight are quantized where it is multiplied.

    Attributes:
        choice: the scheme's.
        params: of the inputs' grid, leaves `[*batch]`, where ranges are static; else None.
    """

    choice: Activations = field(metadata={"static": True})
    params: GridParams | None = None

    @property
    def alters(self) -> bool:
        return True

    @property
    def rank(self) -> int:
        return 0

    def weight(self, values: Float[Array, "*batch out in"]) -> Float[Array, "*batch out in"]:
        return values

    def rows(self, x: Float[Array, "*batch tokens in"]) -> Float[Array, "*batch tokens in"]:
        """The input, rounded to its grid and back, float32."""
        return rounded(x, self.choice, self.params)

    def factors(self) -> Any:
        raise AssertionError("quantized inputs have no factors")

    def picked(self, pick: Callable[[Array], Array]) -> Part:
        return self

    def array_bits(self) -> list[float]:
        return [8.0 * leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(self.params)]

    def check(self, whole: Any) -> None:
        """Raise if ranges do not fit their grid, or the weight."""
        if not isinstance(self.choice, Activations):
            raise TypeError("inputs are quantized by no Activations")
        fitted: Any = None
        if self.choice.granularity == "static":
            shape = jax.tree.leaves(self.params)[0].shape
            end = jax.ShapeDtypeStruct(shape, jnp.float32)
            fitted = dict(jax.eval_shape(self.choice.fit, end, end))
        if _types(self.params) != _types(fitted):
            raise ValueError("ranges of inputs do not fit their grid")
        if whole is None:
            return
        self.choice.check(whole.grid, whole.groups)
        batch = whole.codes.shape[:-2]
        if any(leaf.shape != batch for leaf in jax.tree.leaves(self.params)):
            raise ValueError(f"its inputs' ranges do not fit codes {whole.codes.shape}")


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)
