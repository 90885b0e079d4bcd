"""A product with a weight that is more than its codes: quantized inputs, thin products beside it.

With inputs that are quantized the product is one of codes where there is such (`codes.py`), else
one of the rounded input and the decoded weight. A compensation is two thin products beside it, on
the input as it is.

    x · (Q + left @ right)  =  x · Q  +  (x · right) · left

for any `dot_general` that contracts the weight's whole input axis, or (as a tied embedding may be
used) its whole output axis, and runs along all of its batch axes. The sum of codes and factors is
never made: it would be as large as the weight. A product that cannot be split so (a part of an axis
is contracted, or both operands are compensated weights) is left to the caller, who decodes the
weight with the term added in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.axes.layout import Factor, Layout
from jquant.inference.axes import Axes, Role, axes_of
from jquant.inference.codes import on_codes
from jquant.inference.inputs import round_canonical
from jquant.inference.views import own_layout
from jquant.numerics.narrow import as_dtype, is_coarse
from jquant.programs.walker import bind
from jquant.trees.placement import automatic, typed
from jquant.weights.qtensor import QTensor


def beside(
    eqn: core.JaxprEqn, values: Sequence[Any], decode: Callable[[QTensor, Any], jax.Array]
) -> jax.Array | None:
    """The result of a `dot_general` of such a weight and an array; codes and term are not added.

    Args:
        eqn: any equation.
        values: its operands, quantized weights among them.
        decode: gives the array of a weight, computed after the other operand.

    Returns:
        The result, or None where the equation is another one or cannot be split.
    """
    if eqn.primitive.name != "dot_general":
        return None
    weights = [
        k
        for k, v in enumerate(values)
        if isinstance(v, QTensor) and (v.compensation or v.activations)
    ]
    if len(weights) != 1:
        return None
    at = weights[0]
    q, x = values[at], values[1 - at]
    if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    layout, axes = own_layout(q), axes_of(eqn, at, own_layout(q))
    if axes is None or (q.compensation and is_coarse(q.dtype)):  # as one such factors are too few
        return None
    main = _main(eqn, at, replace(q, compensation=None), x, layout, axes, decode)
    if q.compensation is None:
        return main
    free: Role = "in" if axes.role == "out" else "out"
    left, right = q.compensation.factors()
    thin = {"out": as_dtype(left, q.dtype), "in": as_dtype(right, q.dtype)}
    wide = x.dtype if x.dtype.itemsize > 4 else jnp.dtype(jnp.float32)

    def product(role: Role, other: jax.Array, dims: Any) -> jax.Array:
        """With the factor of the axes of one role; operands stand as in the equation."""
        factor = _spread(thin[role], layout, role)
        pair = (factor, other) if at == 0 else (other, factor)
        numbers = dims if at == 0 else tuple(part[::-1] for part in dims)
        return lax.dot_general(
            *pair, numbers, precision=eqn.params["precision"], preferred_element_type=wide
        )

    (contract, batch) = eqn.params["dimension_numbers"]
    here = _places(layout, axes.role)
    dims = (
        ([here[k] for k in axes.contracted], contract[1 - at]),
        ([here[k] for k in axes.batch], batch[1 - at]),
    )
    inner = product(axes.role, x, dims).astype(x.dtype)
    # Batch axes come first; of the others, those of the factor stand where the factor stands.
    count, there = len(axes.batch), _places(layout, free)
    rank_at = count if at == 0 else inner.ndim - 1
    dims = (([len(there)], [rank_at]), ([there[k] for k in axes.batch], list(range(count))))
    return main + product(free, inner, dims).astype(main.dtype)


def _main(
    eqn: core.JaxprEqn,
    at: int,
    q: QTensor,
    x: jax.Array,
    layout: Layout,
    axes: Axes,
    decode: Callable[[QTensor, Any], jax.Array],
) -> jax.Array:
    """The product with the weight that is not compensated."""
    if q.activations is not None:
        product = partial(on_codes, eqn, at, layout=layout, axes=axes)
        found = automatic(product, q, x, out=typed(eqn.outvars[0].aval))
        if found is not None:
            return found
        rounded = partial(round_canonical, eqn, at, layout=layout, axes=axes)
        x = automatic(rounded, q, x, out=typed(x))
    operands = [x, x]
    operands[at] = decode(q, x)
    (main,) = bind(eqn, operands)
    return main


def _places(layout: Layout, role: Role) -> dict[int, int]:
    """For each axis of the weight that the factor of `role` has: where it has it."""
    kept = [k for k, axis in enumerate(layout.axes) if axis[0].role in ("batch", role)]
    return {axis: place for place, axis in enumerate(kept)}


def _spread(factor: jax.Array, layout: Layout, role: Role) -> jax.Array:
    """A factor with the axes that the weight has for `role` and its batch, and the rank last."""
    rank = factor.shape[-1 if role == "out" else -2]
    kept = tuple(axis for axis in layout.axes if axis[0].role in ("batch", role))
    other = Factor("in" if role == "out" else "out", 0, rank)
    return Layout((*kept, (other,))).original(factor)
