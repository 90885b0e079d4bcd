"""Lengths of a weight's rows, trained apart from their direction (DoRA).

A row of the canonical view is all that goes to one output. With a magnitude m of each, a weight and
a low-rank term stand for

    m · (W + left @ right) / ‖W + left @ right‖

The length counts as a constant of a step, as in the paper (4.3): gradients reach `left` and `right`
by the rows alone. A row of codes is scaled by what its codes are multiplied by, and the term's row
with it, so the result is a quantized weight with a low-rank part like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jquant.axes.layout import Layout
from jquant.numerics.narrow import as_dtype
from jquant.trees.placement import automatic
from jquant.weights.qtensor import LowRank, QTensor, canonical_weight

_FOLLOW = ("scale", "offset", "bias", "table")  # values are proportional to these together


def refusal(q: QTensor) -> str | None:
    """Why the rows of a quantized weight cannot be scaled by its group parameters."""
    rows = q.codes.shape[:-1]
    names = [name for name in _FOLLOW if name in q.params]
    if q.groups.axis != "in" or not names:
        return f"its outputs share group parameters ({q.grid}, {q.groups})"
    for name in names:
        p = q.params[name]
        if not jnp.issubdtype(p.dtype, jnp.floating) or p.dtype.itemsize < 2:
            return f"its {name} of {p.dtype} has no digits left for that"
        if tuple(p.shape[: len(rows)]) != tuple(rows):
            return f"its outputs share one {name}"
    return None


def lengths(leaf: QTensor | Array, layout: Layout | None) -> Float[Array, "*batch out"]:
    """The Euclidean lengths of a weight's rows, low-rank part included; float32.

    One matrix of a stack is decoded at a time.
    """

    def of(leaf: QTensor | Array) -> Float[Array, "*batch out"]:
        if isinstance(leaf, QTensor):
            return _each(lambda q: lengths_of(canonical_weight(q)), leaf, leaf.codes.ndim - 2)
        assert layout is not None
        return lengths_of(layout.canonical(leaf).astype(jnp.float32))

    return automatic(of, leaf)


def turned(q: QTensor, magnitude: Float[Array, "*batch out"]) -> QTensor:
    """A quantized weight with its low-rank part, rows of these lengths; below zero counts as zero.

    Group parameters stay in their dtypes, and so are rounded to these.
    """

    factor = factors(lengths(lax.stop_gradient(q), None), magnitude)
    params = dict(q.params)
    for name in set(_FOLLOW) & set(params):
        p = params[name]
        over = factor.reshape(*factor.shape, *[1] * (p.ndim - factor.ndim))
        params[name] = as_dtype(p.astype(jnp.float32) * over, p.dtype)
    if q.compensation is None:
        return replace(q, params=params)
    left, right = q.compensation.factors()
    return replace(q, params=params, compensation=LowRank(left * factor[..., None], right))


def factors(
    length: Float[Array, "*batch out"], magnitude: Float[Array, "*batch out"]
) -> Float[Array, "*batch out"]:
    """What rows are multiplied by; rows of zeros by one."""
    safe = jnp.where(length > 0, length, 1.0)
    return jnp.where(length > 0, jnp.maximum(magnitude.astype(jnp.float32), 0.0) / safe, 1.0)


def lengths_of(rows: Float[Array, "*batch out in"]) -> Float[Array, "*batch out"]:
    """The Euclidean lengths of rows."""
    return jnp.sqrt(jnp.sum(rows * rows, axis=-1))


def _each(function: Callable[[QTensor], Array], q: QTensor, batch: int) -> Array:
    """`function` of every matrix of a stack, one after the other."""
    if not batch:
        return function(q)
    return lax.map(lambda one: _each(function, one, batch - 1), q)
