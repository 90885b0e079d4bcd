"""Whether a weight that a file describes can be one: it is traced abstractly, nothing is computed.

A hostile file can name any grid, layout and shapes. What they would do together is found out with
`jax.eval_shape` before an array of the file is read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jquant.weights import qtensor
from jquant.weights.activations import Activations

# What the code of grids and layouts may raise when it is traced with a hostile file's values.
REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def check_weight(tree: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> None:
    """Raise if a weight of this structure cannot be what it says; nothing is computed."""
    weight = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(s, d) for s, d in leaves])
    if isinstance(weight, qtensor.LowRank):
        _sound_factors(weight)
        return
    if isinstance(weight, qtensor.Inputs):
        _sound_inputs(weight)
        return
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
    low = weight.compensation
    if low is not None and (
        not isinstance(low, qtensor.LowRank) or tuple(low.shape) != tuple(codes.shape)
    ):
        raise ValueError(f"its compensation does not fit codes {codes.shape}")
    inputs = weight.activations
    if inputs is not None:
        if not isinstance(inputs, qtensor.Inputs):
            raise TypeError("its inputs' quantization is none")
        inputs.choice.way(weight.grid, weight.blocks)
        if any(leaf.shape != codes.shape[:-2] for leaf in jax.tree.leaves(inputs.params)):
            raise ValueError(f"its inputs' ranges do not fit codes {codes.shape}")
    whole = jax.eval_shape(qtensor.dequantize_weight, weight)
    if whole.shape != weight.shape or whole.dtype != weight.dtype:
        raise ValueError(f"it dequantizes to {whole.shape}, not to {weight.shape}")


def _sound_factors(low: qtensor.LowRank) -> None:
    for factor in (low.left, low.right):
        if not isinstance(factor, jax.ShapeDtypeStruct | qtensor.QTensor):
            raise TypeError("a factor must be an array or a weight")
        if isinstance(factor, qtensor.QTensor) and (
            factor.compensation is not None or factor.shape != factor.codes.shape
        ):
            raise ValueError("a quantized factor must lie as it is used")
        if not jnp.issubdtype(factor.dtype, jnp.floating):
            raise TypeError("factors must be floats")
    left, right = low.left.shape, low.right.shape
    if len(left) < 2 or left[:-2] != right[:-2] or left[-1] != right[-2]:
        raise ValueError(f"factors {left} and {right} have no product")


def _sound_inputs(inputs: qtensor.Inputs) -> None:
    choice, params = inputs.choice, inputs.params
    if not isinstance(choice, Activations):
        raise TypeError("inputs are quantized by no Activations")
    wanted: Any = None
    if choice.granularity == "static":
        shape = jax.tree.leaves(params)[0].shape
        end = jax.ShapeDtypeStruct(shape, jnp.float32)
        wanted = dict(jax.eval_shape(choice.fit, end, end))
    if jax.tree.map(lambda x: (x.shape, x.dtype), params) != jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    ):
        raise ValueError("ranges of inputs do not fit their grid")
