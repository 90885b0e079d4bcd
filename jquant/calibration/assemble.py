"""Evidence of a whole weight out of evidence of its uses, or of windows of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jquant.axes.origin import Part
from jquant.axes.roles import Reading, order
from jquant.calibration.evidence import Evidence


def assemble(sightings: Sequence[tuple[Reading, Evidence]], shape: Sequence[int]) -> Evidence:
    """The evidence of a whole weight from uses of it, or of windows of it, with equal axes.

    Windows of in axes fill blocks of the second moment, indices of batch axes its slices. Windows
    of out axes share it: those that saw the same input count once, others are added up.

    Args:
        sightings: each use, and the evidence gathered there.
        shape: of the weight.
    """
    places: dict[Reading, Evidence] = {}
    for reading, evidence in sightings:
        key = reading._replace(kind="dot", outer=())
        old = places.get(key)
        if old is not evidence:
            places[key] = evidence if old is None else old.merge(evidence)
    first = sightings[0][0]
    batch = {(p.axis, p.stride): p for p in (*first.batch, *first.fixed) if p.axis >= 0}
    whole = [batch[key] for key in sorted(batch, key=lambda key: (key[0], -key[1]))]
    total: Evidence | None = None
    for reading, evidence in places.items():
        part = _place(_own_share(evidence, reading), reading, whole)
        total = part if total is None else total.merge(part)
    assert total is not None
    # Digits of one axis, as nested loops over a stack have them, are one axis of the whole.
    sizes = [n for axis in first.axes(shape) for n, role in axis if role == "batch"]
    if list(total.count.shape) == sizes:
        return total
    rank = total.count.ndim
    return jax.tree.map(lambda a: a.reshape(*sizes, *a.shape[rank:]), total)


def _own_share(evidence: Evidence, reading: Reading) -> Evidence:
    """Evidence with an axis for every part of `reading.batch` that is a weight's, first to last."""
    parts, rank = reading.batch, evidence.count.ndim
    index = [slice(None)] * rank
    for axis, start, stop in reading.windows:
        index[axis] = slice(start, stop)
    turned = tuple(slice(None, None, -1 if part.reversed else 1) for part in parts)

    def own(array: jnp.ndarray) -> jnp.ndarray:
        array = array[tuple(index)]
        return array.reshape(*[p.length for p in parts], *array.shape[rank:])[turned]

    if (
        index != [slice(None)] * rank
        or evidence.count.shape != tuple(p.length for p in parts)
        or any(part.reversed for part in parts)
    ):
        evidence = jax.tree.map(own, evidence)
    for axis in [k for k, part in enumerate(parts) if part.axis < 0][::-1]:  # copies, all seen
        rows = [
            jax.tree.map(lambda a, k=k, axis=axis: jnp.take(a, k, axis), evidence)
            for k in range(parts[axis].length)
        ]
        evidence = functools.reduce(Evidence.merge, rows)
    return evidence


def _place(evidence: Evidence, reading: Reading, whole: list[Part]) -> Evidence:
    """Evidence of one window as evidence of the whole weight, zero elsewhere."""
    seen = tuple(part for part in reading.batch if part.axis >= 0)
    fixed, inner = reading.fixed, reading.inner
    sizes = tuple(part.size for part in whole)
    if not fixed and all(part.whole for part in (*seen, *inner)):
        turn = order(seen)
        if turn == list(range(len(turn))):
            return evidence
    rank = len(seen)
    ranked = [seen[k] for k in order(seen)]
    index: list[slice | int] = []
    for part in whole:
        at = next((p for p in (*ranked, *fixed) if (p.axis, p.stride) == part[:2]), part)
        index.append(at.start if at in fixed else slice(at.start, at.start + at.length))
    grid = np.arange(math.prod(p.size for p in inner)).reshape([p.size for p in inner])
    columns = grid[tuple(slice(p.start, p.start + p.length) for p in inner)].reshape(-1)
    width = grid.size

    def turned(array: jnp.ndarray) -> jnp.ndarray:
        return array.transpose([*order(seen), *range(rank, array.ndim)])

    def spread(array: jnp.ndarray, *tail: np.ndarray) -> jnp.ndarray:
        # A window of the batch axes first, then of the in axes: two plain indexings.
        array = turned(array)
        window = jnp.zeros((*array.shape[:rank], *([width] * len(tail))), array.dtype)
        window = window.at[(..., *np.ix_(*tail))].set(array) if tail else array
        return jnp.zeros((*sizes, *window.shape[rank:]), array.dtype).at[tuple(index)].set(window)

    assert evidence.total is not None and evidence.abs_max is not None  # `Evidence.of` gave both
    return Evidence(
        spread(evidence.second_moment, columns, columns),
        spread(evidence.count),
        spread(evidence.total, columns),
        spread(evidence.abs_max, columns),
        None if evidence.drift is None else spread(evidence.drift, columns, columns),
        None if evidence.spread is None else jax.tree.map(spread, evidence.spread),
    )
