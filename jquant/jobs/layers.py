"""A stacked weight as its layers: what belongs to one of them, and all of them put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jquant.calibration.evidence import Evidence
from jquant.numerics.packed import joined
from jquant.programs.straight import Piece
from jquant.schemes.scheme import Plan
from jquant.trees.lazy import Lazy
from jquant.trees.placement import at_ease
from jquant.weights.qtensor import QTensor


def evidence_of_layer(evidence: Evidence, plan: Plan, piece: Piece) -> Evidence:
    """The part of a whole weight's evidence that is of one layer, whose axes stay."""
    for place, at in _places(plan, piece):
        evidence = jax.tree.map(partial(_layer, at=at, axis=place), evidence)
    return evidence


def places_of(plan: Plan, piece: Piece) -> tuple[int, ...]:
    """The batch axes of the canonical view that the layer is taken of."""
    return tuple(place for place, _ in _places(plan, piece))


def evidence_as_layer(evidence: Evidence | None, *places: int) -> Evidence | None:
    """The evidence of a layer that was read by itself, with the whole weight's batch axes."""
    for place in places:
        evidence = jax.tree.map(partial(jnp.expand_dims, axis=place), evidence)
    return evidence


def put_together(plan: Plan, path: str, layers: Mapping[Piece, QTensor]) -> QTensor:
    """A quantized weight from its layers, innermost loop first; lazy if they are.

    `layers`: of any weights.
    """
    parts = {piece.where: q for piece, q in layers.items() if piece.path == path}
    while len(next(iter(parts))) > 0:
        place = _place(plan, path, next(iter(parts))[-1][0])
        rows: dict[Any, list[QTensor]] = {}
        for where in sorted(parts):
            rows.setdefault(where[:-1], []).append(parts[where])
        join = partial(join_layers, axis=place)
        parts = {outer: jax.tree.map(join, *row) for outer, row in rows.items()}
    return parts[()]


def join_layers(*leaves: Any, axis: int) -> Any:
    """Arrays that are one layer each along `axis`, as one array; lazy if they are."""
    first = leaves[0]
    if not isinstance(first, Lazy):
        return at_ease(lambda *leaves: joined(leaves, axis), *leaves)
    shape = (*first.shape[:axis], len(leaves), *first.shape[axis + 1 :])
    identity = f"concatenated along {axis}: {'; '.join(leaf.identity for leaf in leaves)}"

    def window(index: tuple[slice, ...]) -> Any:
        inner = (*index[:axis], slice(0, 1), *index[axis + 1 :])
        return np.concatenate([leaf[inner] for leaf in leaves[index[axis]]], axis)

    return Lazy(shape, first.dtype, window, identity)


def _places(plan: Plan, piece: Piece) -> Iterable[tuple[int, int]]:
    """For each axis that the layer is taken of, the batch axis it is, and which layer."""
    return sorted((_place(plan, piece.path, axis), at) for axis, at in piece.where)


def _place(plan: Plan, path: str, axis: int) -> int:
    """The batch axis of the canonical view that a stacked axis of the leaf is."""
    ((role, place, _),) = plan.weights[path].layout.axes[axis]
    assert role == "batch", "a scan slices a weight along an axis of its stack"
    return place


def _layer(leaf: Array, at: int, axis: int) -> Array:
    return jax.lax.slice_in_dim(leaf, at, at + 1, axis=axis)
