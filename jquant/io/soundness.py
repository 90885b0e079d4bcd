"""Whether a weight that a file describes can be one: it is traced abstractly, nothing is computed.

A hostile file can name any grid, layout and shapes. What they would do together is found out with
`jax.eval_shape` before an array of the file is read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jquant.weights.inputs import Inputs
from jquant.weights.parts import Part
from jquant.weights.qtensor import LowRank, QTensor, dequantize_weight

# What the code of grids and layouts may raise when it is traced with a hostile file's values.
REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def check_weight(tree: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> None:
    """Raise if a weight, or a part of one, cannot be what it says; nothing is computed.

    Args:
        tree: its structure.
        leaves: shape and dtype of each of its arrays.
    """
    weight = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(s, d) for s, d in leaves])
    if not isinstance(weight, QTensor):
        weight.check(None)
        return
    _check_codes(weight)
    _check_parts(weight)
    whole = jax.eval_shape(dequantize_weight, weight)
    if whole.shape != weight.shape or whole.dtype != weight.dtype:
        raise ValueError(f"it dequantizes to {whole.shape}, not to {weight.shape}")


def _check_codes(weight: QTensor) -> None:
    layout, codes = weight.layout, weight.codes
    factors = [factor for axis in layout.axes for factor in axis]
    if not all(f.role in ("batch", "out", "in") and f.size >= 0 <= f.place for f in factors):
        raise ValueError("malformed layout")
    if codes.shape[-2:] != (layout.size("out"), layout.size("in")):
        raise ValueError(f"codes {codes.shape} do not fit the layout")
    if len(codes.shape) - 2 > layout.batch_rank:
        raise ValueError(f"codes {codes.shape} have more batch axes than the layout")
    if not jnp.issubdtype(codes.dtype, jnp.integer) or not isinstance(weight.grid.codes[0], int):
        raise TypeError("codes must be integers")


def _check_parts(weight: QTensor) -> None:
    for name, kind in (("compensation", LowRank), ("activations", Inputs)):
        if not isinstance(getattr(weight, name), kind | None):
            raise TypeError(f"its {name} are no {kind.__name__}")
    for part in weight.parts:
        if not isinstance(part, Part):
            raise TypeError("a part of it is none")
        part.check(weight)
