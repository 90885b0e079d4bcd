"""A product with a weight that is more than its codes, taken apart from outside in.

Each part of a weight (`weights/parts.py`) is taken off on the side of the input: it changes the
rows that the others see, or it is two thin products beside theirs,

    x · (Q + left @ right)  =  x · Q  +  (x · right) · left

for any `dot_general` that contracts the weight's whole input axis, or (as a tied embedding may be
used, and for thin products alone) its whole output axis, and runs along all of its batch axes. The
sum of codes and factors is never made: it would be as large as the weight. A product that cannot be
taken apart so (a part of an axis is contracted, or both operands are weights) is left to the
caller, who decodes the weight with its parts. Thin products see the input as it is, the codes' own
one goes through the table of `kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.axes.dimensions import Product
from jquant.inference.inputs import seen_by
from jquant.inference.kernels import product
from jquant.inference.views import own_layout
from jquant.numerics.narrow import as_dtype, is_coarse
from jquant.trees.placement import automatic, typed
from jquant.weights.parts import Part
from jquant.weights.qtensor import QTensor


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
    if not all(_comes_off(part, dimensions, q) for part in q.parts):
        return None
    inner, outer = _apart(q)
    thin: list[tuple[Part, jax.Array]] = []
    for part in reversed(outer):
        if part.rank:
            thin.append((part, x))
        else:
            x = automatic(partial(seen_by, dimensions.input), part, x, out=typed(x))
    y = product(eqn, dimensions, x, inner)
    for part, x in thin:
        y = y + _thin(eqn, dimensions, x, part, q.dtype).astype(y.dtype)
    return y


def _comes_off(part: Part, dimensions: Product, q: QTensor) -> bool:
    """Whether a product sees a part from the side of its input."""
    if part.rank:
        return not is_coarse(q.dtype)  # as one such factors are too few
    return part.alters or dimensions.role == "in"


def _apart(q: QTensor) -> tuple[QTensor, tuple[Part, ...]]:
    """What kernels know, codes and an innermost part that alters their products; and the rest."""
    own = q.parts[:1] if q.parts and q.parts[0].alters else ()
    return q.only(lambda part: any(part is one for one in own)), q.parts[len(own) :]


def _weight_of(eqn: core.JaxprEqn, values: Sequence[Any]) -> int | None:
    """Which operand of a `dot_general` is the weight, if the other one is an array of floats."""
    if eqn.primitive.name != "dot_general":
        return None
    weights = [k for k, value in enumerate(values) if isinstance(value, QTensor)]
    arrays = [value for value in values if isinstance(value, jax.Array)]
    others = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    return weights[0] if len(weights) == len(others) == 1 else None


def _thin(
    eqn: core.JaxprEqn, dimensions: Product, x: jax.Array, part: Part, dtype: Any
) -> jax.Array:
    """`(x · right) · left`, or of a product along the output axis `(x · left) · right`."""
    left, right = part.factors()
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

    first, here = dimensions.factor(dimensions.role, part.rank)
    last, there = dimensions.factor(dimensions.other, part.rank)
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
