"""Evidence of a whole weight out of evidence of its uses, or of windows of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.axes.agreement import Digit, Spot, digits
from jquant.axes.roles import Axes, Reading
from jquant.calibration.evidence import Evidence


def assemble(
    sightings: Sequence[tuple[Reading, Evidence]], shape: Sequence[int], axes: Axes
) -> Evidence:
    """The evidence of a whole weight from uses of it, or of windows of it, that agree.

    Windows of in axes fill blocks of the second moment, indices of batch axes its slices. Windows
    of out axes share it: those that saw the same input count once, others are added up.

    Args:
        sightings: each use, and the evidence gathered there.
        shape: of the weight.
        axes: its digits, as `settled` has them; each use is `counted` of them.
    """
    whole = digits(axes, "batch")
    places: dict[Any, tuple[_Window, list[Evidence]]] = {}
    for reading, evidence in sightings:
        window = _Window.of(reading, whole, shape)
        # What tells two uses apart: not the kind of the operation, nor which outputs they have.
        key = reading._replace(kind="dot", outer=()), window.spots
        _, inputs = places.setdefault(key, (window, []))
        if not any(evidence is other for other in inputs):
            inputs.append(evidence)
    parts = [
        _place(_own_share(functools.reduce(Evidence.merge, inputs), window.reading), window)
        for window, inputs in places.values()
    ]
    total = functools.reduce(Evidence.merge, parts)
    sizes = [n for axis in axes for n, role in axis if role == "batch"]
    if list(total.count.shape) == sizes:
        return total
    rank = total.count.ndim  # digits of one value are there too
    return jax.tree.map(lambda a: a.reshape(*sizes, *a.shape[rank:]), total)


def _own_share(evidence: Evidence, reading: Reading) -> Evidence:
    """Evidence with an axis for every part of `reading.batch`, first to last; of copies one."""
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
    return evidence


def _summed(evidence: Evidence, axis: int) -> Evidence:
    """Evidence of all along one of its leading axes together."""
    rows = [
        jax.tree.map(lambda a, k=k: jnp.take(a, k, axis), evidence)
        for k in range(evidence.count.shape[axis])
    ]
    return functools.reduce(Evidence.merge, rows)


def _place(evidence: Evidence, window: _Window) -> Evidence:
    """Evidence of one window as evidence of the whole weight, zero elsewhere."""
    held = [place for spot in window.spots for _, place in spot.parts if place is not None]
    for axis in range(evidence.count.ndim)[::-1]:
        if axis not in held:  # copies, all seen, or outputs that meet an input each
            evidence = _summed(evidence, axis)
    left = sorted(held)
    turn = [left.index(place) for place in held]
    if window.complete and turn == list(range(len(turn))):
        sizes = tuple(digit.size for digit in window.whole)
        if evidence.count.shape == sizes:
            return evidence
    rank = len(turn)

    def put(axes: int, array: jnp.ndarray) -> jnp.ndarray:
        return window.put(array.transpose([*turn, *range(rank, array.ndim)]), rank, axes)

    groups = [_each(put, evidence.of_group(g)) for g in range(evidence.groups)]
    whole_one = _each(put, evidence)
    return whole_one.guided_by(groups) if groups else whole_one


# How many of the last axes of each part of evidence are those of the inputs.
_INPUT_AXES = {
    "second_moment": 2, "count": 0, "total": 1, "abs_max": 1, "drift": 2, "spread": 0,
}  # fmt: skip


def _each(put: Callable[[int, jnp.ndarray], jnp.ndarray], evidence: Evidence) -> Evidence:
    """Each part of evidence put in its place, but for what is guided."""
    return Evidence(**{
        name: jax.tree.map(functools.partial(put, axes), getattr(evidence, name))
        for name, axes in _INPUT_AXES.items()
    })  # fmt: skip


class _Window(NamedTuple):
    """Where evidence of a use lies in the evidence of the whole weight.

    Attributes:
        reading: the use.
        whole: the batch digits of the weight.
        spots: what of each of them the use has.
        columns: its inputs among the `width` of the whole.
    """

    reading: Reading
    whole: tuple[Digit, ...]
    spots: tuple[Spot, ...]
    columns: np.ndarray
    width: int

    @staticmethod
    def of(reading: Reading, whole: tuple[Digit, ...], shape: Sequence[int]) -> _Window:
        spots = tuple(Spot.of(reading, digit, shape) for digit in whole)
        inputs = np.arange(math.prod(p.size for p in reading.inner))
        columns = inputs.reshape([p.size for p in reading.inner])[
            tuple(slice(p.start, p.start + p.length) for p in reading.inner)
        ]
        return _Window(reading, whole, spots, columns.reshape(-1), inputs.size)

    @property
    def complete(self) -> bool:
        """Whether it is all of the weight."""
        pairs = zip(self.spots, self.whole, strict=True)
        return len(self.columns) == self.width and all(
            spot.index == tuple(range(digit.size)) for spot, digit in pairs
        )

    def put(self, array: jnp.ndarray, rank: int, axes: int) -> jnp.ndarray:
        """An array of the window, with `rank` leading axes, in the whole.

        `axes`: how many of the last axes are those of the inputs.
        """
        lengths = [n for spot in self.spots for n, _ in spot.parts]
        held = [n if place is not None else 1 for spot in self.spots for n, place in spot.parts]
        rest = array.shape[rank:]
        array = jnp.broadcast_to(array.reshape(*held, *rest), (*lengths, *rest))
        array = array.reshape(*[len(spot.index) for spot in self.spots], *rest)
        if self.complete:
            return array
        batch = len(self.spots)
        if axes and len(self.columns) < self.width:
            wide = jnp.zeros((*array.shape[: array.ndim - axes], *[self.width] * axes), array.dtype)
            array = wide.at[(..., *np.ix_(*[self.columns] * axes))].set(array)
        if not batch:
            return array
        whole = jnp.zeros((*[d.size for d in self.whole], *array.shape[batch:]), array.dtype)
        return whole.at[self._index()].set(array)

    def _index(self) -> tuple[Any, ...]:
        """What to index the batch axes of the whole with; slices where they do."""
        ends = [(spot.index[0], spot.index[-1] + 1) for spot in self.spots]
        pairs = zip(self.spots, ends, strict=True)
        if all(spot.index == tuple(range(*end)) for spot, end in pairs):
            return tuple(slice(*end) for end in ends)
        return np.ix_(*[np.array(spot.index) for spot in self.spots])
