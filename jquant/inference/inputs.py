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
from jquant.weights.inputs import Inputs
from jquant.weights.parts import Part


def seen_by(dimensions: Dimensions, part: Part, x: jax.Array) -> jax.Array:
    """What a product sees of its input beyond a part of the weight, in its own shape and dtype."""
    rows = part.rows(dimensions.rows(x))
    return as_dtype(dimensions.place(rows, x.shape), x.dtype)


def refuse_integers(part: Part, shape: Sequence[int], why: str) -> None:
    """Raise if a product of integers was asked for where there is none.

    Raises:
        UnsupportedPrimitiveError: it was.
    """
    if isinstance(part, Inputs) and part.choice.compute == "integer":
        raise UnsupportedPrimitiveError(
            f"a weight {tuple(shape)} with Activations(compute='integer') has no product of "
            f"integers here: {why}; pass compute='auto'"
        )


def rounded_inputs(
    eqn: core.JaxprEqn, values: Sequence[Any], asked: Sequence[tuple[Part, ...]]
) -> list[Any]:
    """The operands of an equation, with the input of a weight that asks for it rounded.

    A `dot_general` has tokens as everywhere; a row of `ragged_dot` is a token. In a convolution,
    whose windows overlap, a token is a whole image (of one group of features).

    Args:
        eqn: any equation.
        values: its operands; those that are arrays may be inputs.
        asked: for each operand, the parts that its products must see if it is a weight.

    Raises:
        UnsupportedPrimitiveError: a product of integers was asked for, or static ranges are one for
            each of a batch that does not run along here.
    """
    operands, name = list(values), eqn.primitive.name
    at = next((k for k, parts in enumerate(asked) if parts), None)
    if at is None or name not in _SEEN:
        return operands
    other = 1 - at if name == "dot_general" else 0
    x = operands[other]
    if at == other or not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
        return operands
    shape = eqn.invars[at].aval.shape  # type: ignore[attr-defined]
    for part in reversed(asked[at]):
        refuse_integers(part, shape, f"it enters {name!r}, or through a view")
        seen, dimensions, part = _SEEN[name](eqn, at, operands, part)
        rank = len(dimensions.batch)
        if {leaf.ndim for leaf in jax.tree.leaves(part)} - {0, rank}:
            raise UnsupportedPrimitiveError(
                f"a weight {shape} with static ranges of inputs, one for each of its batch, enters "
                f"{name!r} where no such axis runs along; pass Activations(granularity='token')"
            )
        part = jax.tree.map(lambda a, rank=rank: a if a.ndim else a.reshape((1,) * rank), part)
        operands[other] = seen_by(dimensions, part, seen).reshape(x.shape)
    return operands


# Each gives the input as it is seen, its dimensions, and the part that is to see it.


def _of_dot(eqn: core.JaxprEqn, at: int, values: Sequence[Any], part: Part) -> Any:
    contracted, batch = (axes[1 - at] for axes in eqn.params["dimension_numbers"])
    if jax.tree.leaves(
        part
    ):  # a view may have turned the weight's batch axes: one range is for all
        batch = ()
    x = values[1 - at]
    return x, Dimensions.of(x.ndim, batch, contracted), part


def _of_ragged_dot(eqn: core.JaxprEqn, at: int, values: Sequence[Any], part: Part) -> Any:
    x, _, sizes = values
    ((contract, _), _) = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (rows,) = (k for k in range(x.ndim) if k not in contract)
    if not jax.tree.leaves(part):
        return x, Dimensions((), (rows,), tuple(contract)), part
    number = jnp.arange(x.shape[rows], dtype=sizes.dtype)
    group = jnp.searchsorted(jnp.cumsum(sizes, dtype=sizes.dtype), number, side="right")
    part = jax.tree.map(lambda leaf: leaf[group] if leaf.ndim == 1 else leaf, part)
    return x, Dimensions((rows,), (), tuple(contract)), part


def _of_conv(eqn: core.JaxprEqn, at: int, values: Sequence[Any], part: Part) -> Any:
    x, groups = values[0], eqn.params["feature_group_count"]
    images, channels, *window = eqn.params["dimension_numbers"].lhs_spec
    size = x.shape[channels] // groups
    seen = x.reshape(*x.shape[:channels], groups, size, *x.shape[channels + 1 :])
    images, *window = (k + (k > channels) for k in (images, *window))
    return seen, Dimensions((channels,), (images,), (channels + 1, *window)), part


_SEEN = {
    "dot_general": _of_dot,
    "ragged_dot": _of_ragged_dot,
    "ragged_dot_general": _of_ragged_dot,
    "conv_general_dilated": _of_conv,
}
