"""The inputs of a weight in an order of its own, as a part of it: groups that are no neighbours.

A file may put any inputs into one group (`desc_act` of GPTQ, `actorder` of compressed-tensors). The
codes of such a weight lie group after group here, and the part says which input each column is of:
a product permutes its input, and no number is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jquant.weights.parts import Part


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Columns:
    """Column k of the codes is of input `order[k]`.

    Attributes:
        order: a permutation of the inputs, `[*batch, in]`.

    Example:
        >>> columns = Columns(jnp.array([2, 0, 1]))
        >>> columns.rows(jnp.array([[10.0, 20.0, 30.0]])).tolist()
        [[30.0, 10.0, 20.0]]
        >>> columns.weight(jnp.array([[3.0, 1.0, 2.0]])).tolist()
        [[1.0, 2.0, 3.0]]
    """

    order: Int32[Array, "*batch in"]

    @property
    def alters(self) -> bool:
        return False

    @property
    def rank(self) -> int:
        return 0

    def weight(self, values: Float[Array, "*batch out in"]) -> Float[Array, "*batch out in"]:
        return _along(values, jnp.argsort(self.order, axis=-1))

    def rows(self, x: Float[Array, "*batch tokens in"]) -> Float[Array, "*batch tokens in"]:
        """The input in the order of the columns; of its own dtype, as no number changes."""
        return _along(x, self.order)

    def factors(self) -> Any:
        raise AssertionError("an order of columns has no factors")

    def picked(self, pick: Callable[[Array], Array]) -> Part:
        return self

    def array_bits(self) -> list[float]:
        return [8.0 * self.order.dtype.itemsize * self.order.size]

    def check(self, whole: Any) -> None:
        """Raise if it is no order of the weight's inputs, as far as its type tells."""
        if self.order.dtype != jnp.int32:
            raise TypeError("the order of columns must be int32")
        if whole is not None:
            *batch, _, width = whole.codes.shape
            if tuple(self.order.shape) != (*batch, width):
                raise ValueError(f"its order of columns does not fit codes {whole.codes.shape}")


def _along(values: Float[Array, "..."], order: Int32[Array, "*batch in"]) -> Float[Array, "..."]:
    """Values `[..., in]` with the last axis in this order, one for each of a batch."""
    if order.ndim == 1:
        return jnp.take(values, order, axis=-1)
    return jnp.take_along_axis(values, order[..., None, :], axis=-1)
