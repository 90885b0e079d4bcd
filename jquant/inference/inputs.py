"""Rounded inputs: what meets the decoded weight where a product is none of codes.

Grids without numbers, groups along the output axis, convolutions, `ragged_dot`, views that wait,
products over a part of an axis: the input is rounded to its grid and back, and the operation is
done as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jquant.axes.dimensions import Dimensions
from jquant.errors import UnsupportedPrimitiveError
from jquant.numerics.narrow import as_dtype
from jquant.weights.activations import rounded
from jquant.weights.qtensor import Inputs


def round_input(dimensions: Dimensions, inputs: Inputs, x: jax.Array) -> jax.Array:
    """The rounded input of a product, in its own shape and dtype."""
    rows = rounded(dimensions.rows(x), inputs.choice, inputs.params)
    return as_dtype(dimensions.place(rows, x.shape), x.dtype)


def no_integers(shape: Sequence[int], why: str) -> UnsupportedPrimitiveError:
    return UnsupportedPrimitiveError(
        f"a weight {tuple(shape)} with Activations(path='integer') has no product of integers "
        f"here: {why}; pass path='auto'"
    )


def rounded_inputs(
    eqn: core.JaxprEqn, values: Sequence[Any], inputs: Sequence[Inputs | None]
) -> list[Any]:
    """The operands of an equation, with the input of a weight that asks for it rounded.

    A `dot_general` has tokens as everywhere; a row of `ragged_dot` is a token. In a convolution,
    whose windows overlap, a token is a whole image (of one group of features).

    Args:
        eqn: any equation.
        values: its operands; those that are arrays may be inputs.
        inputs: for each operand, what it asks of its inputs if it is a weight.

    Raises:
        UnsupportedPrimitiveError: a product of integers was asked for, or static ranges are one for
            each of a batch that does not run along here.
    """
    operands, name = list(values), eqn.primitive.name
    at = next((k for k, one in enumerate(inputs) if one is not None), None)
    if at is None or name not in _SEEN:
        return operands
    other, ask = 1 - at if name == "dot_general" else 0, inputs[at]
    x = operands[other]
    if at == other or not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
        return operands
    assert ask is not None
    shape = eqn.invars[at].aval.shape  # type: ignore[attr-defined]
    if ask.choice.path == "integer":
        raise no_integers(shape, f"it enters {name!r}, or through a view")
    seen, dimensions, ask = _SEEN[name](eqn, at, values, ask)
    rank = len(dimensions.batch)
    if {leaf.ndim for leaf in jax.tree.leaves(ask)} - {0, rank}:
        raise UnsupportedPrimitiveError(
            f"a weight {shape} with static ranges of inputs, one for each of its batch, enters "
            f"{name!r} where no such axis runs along; pass Activations(granularity='token')"
        )
    ask = jax.tree.map(lambda a: a if a.ndim else a.reshape((1,) * rank), ask)
    operands[other] = round_input(dimensions, ask, seen).reshape(x.shape)
    return operands


# Each gives the input as it is seen, its dimensions, and what it is to be rounded to.


def _of_dot(eqn: core.JaxprEqn, at: int, values: Sequence[Any], ask: Inputs) -> Any:
    contracted, batch = (axes[1 - at] for axes in eqn.params["dimension_numbers"])
    if jax.tree.leaves(ask):  # a view may have turned the weight's batch axes: one range is for all
        batch = ()
    x = values[1 - at]
    return x, Dimensions.of(x.ndim, batch, contracted), ask


def _of_ragged_dot(eqn: core.JaxprEqn, at: int, values: Sequence[Any], ask: Inputs) -> Any:
    x, _, sizes = values
    ((contract, _), _) = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (rows,) = (k for k in range(x.ndim) if k not in contract)
    if not jax.tree.leaves(ask):
        return x, Dimensions((), (rows,), tuple(contract)), ask
    number = jnp.arange(x.shape[rows], dtype=sizes.dtype)
    group = jnp.searchsorted(jnp.cumsum(sizes, dtype=sizes.dtype), number, side="right")
    ask = jax.tree.map(lambda leaf: leaf[group] if leaf.ndim == 1 else leaf, ask)
    return x, Dimensions((rows,), (), tuple(contract)), ask


def _of_conv(eqn: core.JaxprEqn, at: int, values: Sequence[Any], ask: Inputs) -> Any:
    x, groups = values[0], eqn.params["feature_group_count"]
    images, channels, *window = eqn.params["dimension_numbers"].lhs_spec
    size = x.shape[channels] // groups
    seen = x.reshape(*x.shape[:channels], groups, size, *x.shape[channels + 1 :])
    images, *window = (k + (k > channels) for k in (images, *window))
    return seen, Dimensions((channels,), (images,), (channels + 1, *window)), ask


_SEEN = {
    "dot_general": _of_dot,
    "ragged_dot": _of_ragged_dot,
    "ragged_dot_general": _of_ragged_dot,
    "conv_general_dilated": _of_conv,
}
