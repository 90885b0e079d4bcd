"""What meets a quantized weight in a product, as far as the choice of a kernel asks for it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from jquant.axes.dimensions import Dimensions


class Operand(NamedTuple):
    """The other operand of a product.

    Attributes:
        tokens: how many rows meet each matrix.
        dtype: of its numbers.
        precision: that the equation asks for, as `jax.lax.dot_general` has it; None: none.
    """

    tokens: int
    dtype: Any
    precision: Any

    @staticmethod
    def of(dimensions: Dimensions, x: jax.Array, precision: Any) -> Operand:
        """An array with these axes."""
        tokens = math.prod(x.shape[k] for k in dimensions.free)
        return Operand(tokens, x.dtype, precision)
