"""Evidence of a whole weight out of evidence of its uses, or of windows of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.axes.digits import Part
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
    turn = order(seen)
    complete = all(part.whole for part in (*seen, *reading.inner)) and not reading.fixed
    if complete and turn == list(range(len(turn))):
        return evidence
    window = _Window.of(reading, [seen[k] for k in turn], whole)
    rank = len(seen)

    def put(axes: int, array: jnp.ndarray) -> jnp.ndarray:
        return window.put(array.transpose([*turn, *range(rank, array.ndim)]), axes)

    whole_one = Evidence(**{
        name: jax.tree.map(functools.partial(put, axes), getattr(evidence, name))
        for name, axes in _INPUT_AXES.items()
    })  # fmt: skip
    groups = [_place(evidence.of_group(g), reading, whole) for g in range(evidence.groups)]
    return whole_one.guided_by(groups) if groups else whole_one


# How many of the last axes of each part of evidence are those of the inputs.
_INPUT_AXES = {
    "second_moment": 2, "count": 0, "total": 1, "abs_max": 1, "drift": 2, "spread": 0,
}  # fmt: skip


class _Window(NamedTuple):
    """Where evidence of a window lies in the evidence of the whole weight.

    Attributes:
        sizes: the batch axes of the whole.
        index: what of them the window has.
        rank: how many batch axes it has itself.
        columns: its inputs among the `width` of the whole.
    """

    sizes: tuple[int, ...]
    index: tuple[slice | int, ...]
    rank: int
    columns: np.ndarray
    width: int

    @staticmethod
    def of(reading: Reading, batch: Sequence[Part], whole: Sequence[Part]) -> _Window:
        """Of evidence with batch axes for the parts `batch`, in a weight that has `whole`."""
        own = {(p.axis, p.stride): slice(p.start, p.start + p.length) for p in batch}
        pinned: dict[tuple[int, int], slice | int]
        pinned = {(p.axis, p.stride): p.start for p in reading.fixed}
        index = tuple({**pinned, **own}.get((p.axis, p.stride), slice(0, p.size)) for p in whole)
        inputs = np.arange(math.prod(p.size for p in reading.inner))
        columns = inputs.reshape([p.size for p in reading.inner])[
            tuple(slice(p.start, p.start + p.length) for p in reading.inner)
        ]
        sizes = tuple(p.size for p in whole)
        return _Window(sizes, index, len(batch), columns.reshape(-1), inputs.size)

    def put(self, array: jnp.ndarray, axes: int) -> jnp.ndarray:
        """An array of the window, `[*batch, *inputs]` with so many axes of inputs, in the whole."""
        # A window of the batch axes first, then of the in axes: two plain indexings.
        window = array
        if axes:
            window = jnp.zeros((*array.shape[: self.rank], *[self.width] * axes), array.dtype)
            window = window.at[(..., *np.ix_(*[self.columns] * axes))].set(array)
        whole = jnp.zeros((*self.sizes, *window.shape[self.rank :]), array.dtype)
        return whole.at[self.index].set(window)
