"""A product with a weight that is more than its codes: thin products beside the one of codes.

    x · (Q + left @ right)  =  x · Q  +  (x · right) · left

for any `dot_general` that contracts the weight's whole input axis, or (as a tied embedding may be
used) its whole output axis, and runs along all of its batch axes. The sum of codes and factors is
never made: it would be as large as the weight. A product that cannot be split so (a part of an axis
is contracted, or both operands are compensated weights) is left to the caller, who decodes the
weight with the term added in. The factors see the input as it is; the codes' own product goes
through the table of `kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.axes.dimensions import Product
from jquant.inference.kernels import product
from jquant.inference.views import own_layout
from jquant.numerics.narrow import as_dtype, is_coarse
from jquant.weights.qtensor import LowRank, QTensor


def dot(eqn: core.JaxprEqn, values: Sequence[Any]) -> jax.Array | None:
    """The result of a `dot_general` of a quantized weight and an array.

    Args:
        eqn: any equation.
        values: its operands, quantized weights among them.

    Returns:
        The result, or None where the equation is another one or cannot be split.
    """
    at = _weight_of(eqn, values)
    if at is None:
        return None
    q, x = values[at], values[1 - at]
    dimensions = Product.of(eqn, at, own_layout(q))
    if dimensions is None:
        return None
    if q.compensation is None:
        return product(eqn, dimensions, x, q)
    if is_coarse(q.dtype):  # as one such factors are too few
        return None
    main = product(eqn, dimensions, x, replace(q, compensation=None))
    return main + _thin(eqn, dimensions, x, q.compensation, q.dtype).astype(main.dtype)


def _weight_of(eqn: core.JaxprEqn, values: Sequence[Any]) -> int | None:
    """Which operand of a `dot_general` is the weight, if the other one is an array of floats."""
    if eqn.primitive.name != "dot_general":
        return None
    weights = [k for k, value in enumerate(values) if isinstance(value, QTensor)]
    arrays = [value for value in values if isinstance(value, jax.Array)]
    others = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    return weights[0] if len(weights) == len(others) == 1 else None


def _thin(
    eqn: core.JaxprEqn, dimensions: Product, x: jax.Array, low: LowRank, dtype: Any
) -> jax.Array:
    """`(x · right) · left`, or of a product along the output axis `(x · left) · right`."""
    left, right = low.factors()
    factors = {"out": as_dtype(left, dtype), "in": as_dtype(right, dtype)}
    wide = x.dtype if x.dtype.itemsize > 4 else jnp.dtype(jnp.float32)
    at = dimensions.at

    def thin(factor: jax.Array, other: jax.Array, contracted: Any, batch: Any) -> jax.Array:
        """With pairs of axes of a factor and of another array; they stand as in the equation."""
        pair = (factor, other) if at == 0 else (other, factor)
        (a, b), (c, d) = (([k for k, _ in p], [k for _, k in p]) for p in (contracted, batch))
        return lax.dot_general(
            *pair,
            ((a, b), (c, d)) if at == 0 else ((b, a), (d, c)),
            precision=eqn.params["precision"],
            preferred_element_type=wide,
        )

    first, here = dimensions.factor(dimensions.role, low.rank)
    last, there = dimensions.factor(dimensions.other, low.rank)
    inner = thin(
        first.original(factors[dimensions.role]), x,
        [(here[k], axis) for k, axis in dimensions.contracted],
        [(here[k], axis) for k, axis in dimensions.batch],
    ).astype(x.dtype)  # fmt: skip
    # Batch axes come first; of the others, those of the factor stand where the factor stands.
    count = len(dimensions.batch)
    rank_at = count if at == 0 else inner.ndim - 1
    return thin(
        last.original(factors[dimensions.other]), inner,
        [(len(there), rank_at)], [(there[k], n) for n, (k, _) in enumerate(dimensions.batch)],
    )  # fmt: skip
