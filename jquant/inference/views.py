"""Views of a quantized weight that are quantized weights again: no value is decoded.

A cast, a transpose, the slice of one layer out of a stack, the experts that data picks from one,
the rows of an embedding: where such a view can be expressed on codes and group parameters, `view`
returns the `QTensor` it yields (or, for looked-up rows, the decoded rows alone). Where it cannot,
it returns None and the caller dequantizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jquant.axes.groups import from_groups, to_groups
from jquant.axes.layout import Factor, Layout
from jquant.numerics.narrow import as_dtype
from jquant.weights.qtensor import QTensor


def view(eqn: core.JaxprEqn, values: Sequence[Any]) -> Any | None:
    """The result of an equation on the quantized weight `values[0]`, or None."""
    rule = _VIEWS.get(eqn.primitive.name)
    if rule is None or not isinstance(values[0], QTensor):
        return None
    return rule(values[0], values[1:], eqn)


def own_layout(q: QTensor) -> Layout:
    """The layout of the batch axes that are left."""
    return q.layout.trimmed(q.codes.ndim - 2)


def _leaves(q: QTensor, function: Any, layout: Layout) -> QTensor:
    # Parts have the weight's batch axes first, so what is done to those of codes is done to theirs.
    return replace(jax.tree.map(function, q), layout=layout)


def _convert(q: QTensor, _: Sequence[Any], eqn: core.JaxprEqn) -> QTensor | None:
    new, old = jnp.dtype(eqn.params["new_dtype"]), jnp.dtype(q.dtype)
    if new == old or (
        old == jnp.float32 and jnp.issubdtype(new, jnp.floating) and new.itemsize < 4
    ):
        return replace(q, dtype=new)
    return None  # widening must pass through the narrower type first


def _transpose(q: QTensor, _: Sequence[Any], eqn: core.JaxprEqn) -> QTensor:
    axes = [own_layout(q).axes[k] for k in eqn.params["permutation"]]
    places = [f.place for axis in axes for f in axis if f.role == "batch"]
    named = [
        tuple(Factor("batch", places.index(f.place), 0) if f.role == "batch" else f for f in axis)
        for axis in axes
    ]

    def turn(leaf: jax.Array) -> jax.Array:
        return leaf.transpose([*places, *range(len(places), leaf.ndim)])

    return _leaves(q, turn, Layout(tuple(named)))


def _batch_place(layout: Layout, axis: int) -> int | None:
    """The batch axis that an array axis is, if it is one and nothing else."""
    factors = layout.axes[axis]
    return factors[0].place if len(factors) == 1 and factors[0].role == "batch" else None


def _slice(q: QTensor, _: Sequence[Any], eqn: core.JaxprEqn) -> QTensor | None:
    layout, index = own_layout(q), [slice(None)] * (q.codes.ndim - 2)
    bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], q.shape, strict=True)
    strides = eqn.params["strides"] or [1] * q.ndim
    for axis, (start, stop, size) in enumerate(bounds):
        place = _batch_place(layout, axis)
        if place is not None:
            index[place] = slice(start, stop, strides[axis])
        elif (start, stop, strides[axis]) != (0, size, 1):
            return None
    return _leaves(q, lambda leaf: leaf[tuple(index)], layout)


def _squeeze(q: QTensor, _: Sequence[Any], eqn: core.JaxprEqn) -> QTensor | None:
    layout, gone = own_layout(q), eqn.params["dimensions"]
    places = [_batch_place(layout, axis) for axis in gone]
    if None in places:
        return None
    left = [axis for k, axis in enumerate(layout.axes) if k not in gone]
    rank = {p: n for n, p in enumerate(sorted(set(range(q.codes.ndim - 2)) - set(places)))}
    named = [
        tuple(f._replace(place=rank[f.place]) if f.role == "batch" else f for f in axis)
        for axis in left
    ]
    return _leaves(q, lambda leaf: jnp.squeeze(leaf, tuple(places)), Layout(tuple(named)))  # type: ignore[arg-type]


def _gather(q: QTensor, rest: Sequence[Any], eqn: core.JaxprEqn) -> jax.Array | QTensor | None:
    if _is_table(q) and _picks_rows(eqn, q.shape[-1]):
        return _rows(q, rest, eqn)
    return _matrices(q, rest[0], eqn)


def _matrices(q: QTensor, index: Any, eqn: core.JaxprEqn) -> QTensor | None:
    """Matrices of a stack, one for each index `[n, 1]`: their codes."""
    numbers, layout = eqn.params["dimension_numbers"], own_layout(q)
    axis = numbers.collapsed_slice_dims
    if len(axis) != 1 or axis != numbers.start_index_map or numbers.operand_batching_dims:
        return None
    place, sizes = _batch_place(layout, axis[0]), list(q.shape)
    sizes[axis[0]] = 1
    if place is None or tuple(sizes) != tuple(eqn.params["slice_sizes"]) or index.ndim != 2:
        return None
    axes = [factors for k, factors in enumerate(layout.axes) if k != axis[0]]
    (at,) = set(range(q.ndim)) - set(numbers.offset_dims)
    axes.insert(at, layout.axes[axis[0]])

    def pick(leaf: jax.Array) -> jax.Array:
        # Out of range, a float parameter takes the fill value (NaN) and so does what it decodes to.
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        others = tuple(k for k in range(leaf.ndim) if k != place)
        return jax.lax.gather(
            leaf, index, jax.lax.GatherDimensionNumbers(others, (place,), (place,)),
            tuple(1 if k == place else size for k, size in enumerate(leaf.shape)),
            mode=eqn.params["mode"], fill_value=eqn.params["fill_value"] if floating else 0,
        )  # fmt: skip

    return _leaves(q, pick, Layout(tuple(axes)))


def _rows(q: QTensor, rest: Sequence[Any], eqn: core.JaxprEqn) -> jax.Array:
    """Rows of a table `[rows, features]`, decoded after they were picked."""

    def pick(leaf: jax.Array) -> jax.Array:
        # Out of range, a float parameter takes the fill value (NaN) and so does what it decodes to.
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        fill = eqn.params["fill_value"] if floating else 0
        changed = {**eqn.params, "slice_sizes": (1, leaf.shape[1]), "fill_value": fill}
        return eqn.primitive.bind(leaf, rest[0], **changed)

    codes = pick(q.codes)
    grid_params = {name: x[0] if len(x) == 1 else pick(x) for name, x in q.params.items()}
    values = q.grid.decode(to_groups(codes.astype(jnp.int32), q.groups), grid_params)
    values = from_groups(values, q.groups, q.shape[-1])
    for part in q.parts:
        values = part.picked(pick).weight(values)
    return as_dtype(values, q.dtype)


def _is_table(q: QTensor) -> bool:
    """Whether rows of codes and of group parameters can be picked for rows of the weight."""
    plain = [tuple(f.role for f in axis) for axis in own_layout(q).axes] == [("out",), ("in",)]
    by_rows = q.groups.axis == "in" and all(leaf.ndim == 2 for leaf in q.params.values())
    # Only a float parameter of its own can say that a row is out of range: NaN.
    tells = any(len(x) > 1 and jnp.issubdtype(x.dtype, jnp.floating) for x in q.params.values())
    return plain and by_rows and tells


def _picks_rows(eqn: core.JaxprEqn, features: int) -> bool:
    """Whether a `gather` picks whole rows of a table, features last."""
    numbers = eqn.params["dimension_numbers"]
    last = eqn.outvars[0].aval.ndim - 1  # type: ignore[attr-defined]
    return (
        numbers.collapsed_slice_dims == (0,)
        and numbers.operand_batching_dims == ()
        and numbers.offset_dims == (last,)
        and eqn.params["slice_sizes"] == (1, features)
    )


_VIEWS = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "slice": _slice,
    "squeeze": _squeeze,
    "gather": _gather,
}
