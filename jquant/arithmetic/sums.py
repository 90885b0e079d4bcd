"""Sums written out: each product and each partial sum an operation of its own, in a stated order.

`in_order(eqn)` is a function of the operands that does what a sum's primitive does, by a `scan` of
`mul` and `add`. The order is that of the index, from zero up: `((0 + x_0) + x_1) + ...`, over
several axes with the last one running fastest; `cumsum(reverse=True)` starts at the end. A dot
product is such a sum of products. Time grows with the length of the sum: this is to find out what
an order does, not to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array


def in_order(eqn: core.JaxprEqn) -> Callable[..., Array]:
    """What this `dot_general`, `reduce_*` or `cum*` computes, term by term."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        kind: Any = eqn.outvars[0].aval
        return lambda a, b: _dot(a, b, params["dimension_numbers"], kind.dtype)
    if name in ("reduce_sum", "reduce_prod"):
        return lambda x: _fold(_first(x, params["axes"]), name == "reduce_prod")[0]
    return lambda x: _cumulative(x, params["axis"], params["reverse"], name == "cumprod")


def _fold(terms: Array, product: bool, reverse: bool = False) -> tuple[Array, Array]:
    """The sum (or product) over the first axis, and all partial ones."""

    def step(total: Array, term: Array) -> tuple[Array, Array]:
        total = total * term if product else total + term
        return total, total

    start = jnp.full(terms.shape[1:], 1 if product else 0, terms.dtype)
    return lax.scan(step, start, terms, reverse=reverse)


def _first(x: Array, axes: Any) -> Array:
    """These axes as one, in front."""
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    size = math.prod(x.shape[axis] for axis in axes)
    return x.transpose([*axes, *rest]).reshape(size, *(x.shape[axis] for axis in rest))


def _cumulative(x: Array, axis: int, reverse: bool, product: bool) -> Array:
    _, partial = _fold(jnp.moveaxis(x, axis, 0), product, reverse)
    return jnp.moveaxis(partial, 0, axis)


def _dot(a: Array, b: Array, dimension_numbers: Any, dtype: Any) -> Array:
    (a_sum, b_sum), (a_batch, b_batch) = dimension_numbers
    a, b = a.astype(dtype), b.astype(dtype)
    a_free = [k for k in range(a.ndim) if k not in (*a_sum, *a_batch)]
    b_free = [k for k in range(b.ndim) if k not in (*b_sum, *b_batch)]
    batch = [a.shape[k] for k in a_batch]
    rows, columns = [a.shape[k] for k in a_free], [b.shape[k] for k in b_free]
    length = math.prod(a.shape[k] for k in a_sum)
    left = a.transpose([*a_sum, *a_batch, *a_free]).reshape(
        length, *batch, *rows, *(1 for _ in columns)
    )
    right = b.transpose([*b_sum, *b_batch, *b_free]).reshape(
        length, *batch, *(1 for _ in rows), *columns
    )

    def step(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + pair[0] * pair[1], None

    return lax.scan(step, jnp.zeros((*batch, *rows, *columns), dtype), (left, right))[0]
