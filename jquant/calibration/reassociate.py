"""A product of parameters that meets an input, followed as if it were associated the other way.

`x @ (a @ b)` is `(x @ a) @ b`: the factor whose own axis is contracted sees the input, the other
one sees the input times that factor. The three arrays are brought to axes with names, as in an
einsum: the digits of the product's axes are called by their parts, and axes that the factors are
contracted along by their number. Axes of one name meet.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jquant.axes.contraction import Contraction, Pairs
from jquant.axes.digits import Axis, Part, apart
from jquant.axes.origin import Origin
from jquant.axes.roles import Sighting
from jquant.calibration.pending import Product
from jquant.calibration.tagged import Tagged
from jquant.trees.placement import automatic

Names = tuple[Hashable, ...]


class Step(NamedTuple):
    """A weight, and rows that it meets."""

    weight: Tagged
    x: jax.Array
    contraction: Contraction


class Detour(NamedTuple):
    """The two products that an input times a product of parameters is made of.

    `near` is the factor that the input meets first: 0 for the left one.
    """

    near: int
    first: Step
    second: Step


class _Rows(NamedTuple):
    """An array that depends on inputs, and the names of its axes."""

    x: jax.Array
    names: Names


class _Factor(NamedTuple):
    """A factor of a product, and the names of its axes."""

    weight: Tagged
    names: Names

    def meeting(self, rows: _Rows, summed: Sequence[Hashable]) -> tuple[Pairs, Pairs]:
        """The dimensions that are contracted, and those that run along: (its own, the rows')."""
        along = [name for name in self.names if name in rows.names and name not in summed]

        def dims(names: Sequence[Hashable]) -> Pairs:
            own, other = map(self.names.index, names), map(rows.names.index, names)
            return tuple(own), tuple(other)

        return dims(summed), dims(along)

    def meet(self, rows: _Rows, summed: Sequence[Hashable]) -> Step:
        pairs = self.meeting(rows, summed)
        contraction = Contraction.dot(self.weight.array.shape, rows.x.shape, *pairs)
        return Step(self.weight, rows.x, contraction)

    def times(self, rows: _Rows, summed: Sequence[Hashable]) -> _Rows:
        """The rows times this factor."""
        contract, batch = self.meeting(rows, summed)
        x, array = rows.x, self.weight.array
        dtype = x.dtype if x.dtype == array.dtype else jnp.dtype(jnp.float32)
        dims = (contract[1], contract[0]), (batch[1], batch[0])

        def product(x: jax.Array, array: jax.Array) -> jax.Array:
            return lax.dot_general(
                x.astype(dtype), array.astype(dtype), dims,
                precision=lax.Precision.HIGHEST, preferred_element_type=dtype,
            )  # fmt: skip

        along = [self.names[k] for k in batch[0]]
        left = [name for name in rows.names if name not in (*along, *summed)]
        own = [name for name in self.names if name not in (*along, *summed)]
        return _Rows(automatic(product, x, array), (*along, *left, *own))


def reassociated(
    product: Product, origin: Origin, x: jax.Array, contraction: Contraction
) -> Detour | None:
    """The way that `x` takes through a product of parameters; None if it takes none.

    Args:
        product: of the parameters.
        origin: what the array that meets `x` owes to it.
        contraction: how that array meets `x`.
    """
    met = _met(origin, contraction)
    inner = {part for there in contraction.summed for part in met.get(there, ())}
    near = next((k for k in (0, 1) if inner and _is_of(product, k, inner)), None)
    if near is None:
        return None
    digits = _digits(origin, len(contraction.shape))
    first, second = _factor(product, near, digits), _factor(product, 1 - near, digits)
    if first is None or second is None:
        return None
    rows = _rows(x, met)
    summed = [name for name in first.names if name in inner]
    sums = [("sum", k) for k in range(len(product.contract[0]))]
    return Detour(near, first.meet(rows, summed), second.meet(first.times(rows, summed), sums))


def _met(origin: Origin, contraction: Contraction) -> dict[int, Axis]:
    """The digits of the product that axes of the input meet; none where it meets others too."""
    rank = len(contraction.shape)
    pairs = zip(contraction.meets, origin.own(rank), strict=True)
    met = {there: axis for there, axis in pairs if there is not None}
    joined = any(offset is not None for offset in origin.own_offsets(rank))
    if joined or origin.scanned(rank) or not all(map(_is_plain, met.values())):
        return {}
    return met


def is_read_so(side: Tagged, contract: Sequence[int], sightings: Iterable[Sighting]) -> bool:
    """Whether a weight is contracted elsewhere as it is in its product with another parameter.

    A projection that makes keys of inputs, and queries of parameters, is one weight with one input
    axis: it sees the rows of both.
    """
    rank = side.array.ndim
    own = [
        (o, {p.axis for dim in contract for p in o.own(rank)[dim]})
        for o in side.good
        if o.product is None
    ]
    return any(
        s.reading.kind != "lookup"
        and s.path == origin.path
        and {p.axis for p in s.reading.inner} == inner
        and not apart(s.reading.parts, origin.parts)
        for s in sightings
        for origin, inner in own
    )


def _is_plain(axis: Axis) -> bool:
    """Whether an axis is digits of the product's in their own order, each once."""
    return not any(part.axis < 0 or part.reversed or part.shuffled for part in axis)


def _is_of(product: Product, which: int, parts: Collection[Part]) -> bool:
    """Whether all parts are of axes that only this factor brings into the product."""
    own = set(product.axes(which).values()) - set(product.axes(1 - which).values())
    return own.issuperset(part.axis for part in parts)


def _digits(origin: Origin, rank: int) -> dict[int, Axis]:
    """For each axis of the product, the parts that it is read as, outermost first."""
    digits: dict[int, list[Part]] = {}
    for part in (*(p for axis in origin.own(rank) for p in axis), *origin.fixed):
        if part.axis >= 0:
            digits.setdefault(part.axis, []).append(part)
    return {axis: tuple(sorted(parts, key=lambda p: -p.stride)) for axis, parts in digits.items()}


def _rows(x: jax.Array, met: dict[int, Axis]) -> _Rows:
    """The input, its axes cut into the digits that they meet."""
    sizes: list[int] = []
    names: list[Hashable] = []
    for axis, size in enumerate(x.shape):
        parts = met.get(axis)
        names += [("input", axis)] if parts is None else parts
        sizes += [size] if parts is None else [part.length for part in parts]
    return _Rows(x.reshape(sizes), tuple(names))


def _factor(product: Product, which: int, digits: dict[int, Axis]) -> _Factor | None:
    """A factor with an axis for every digit; None where its axes cannot be cut so."""
    side, contract, kept = product.sides[which], product.contract[which], product.axes(which)
    sizes: list[int] = []
    names: list[Hashable] = []
    for dim, size in enumerate(side.array.shape):
        parts = digits.get(kept[dim], ()) if dim in kept else ()
        name = ("sum", contract.index(dim)) if dim in contract else ("factor", dim)
        names += parts or [name]
        sizes += [part.size for part in parts] or [size]
    if math.prod(sizes) != side.array.size:
        return None
    weight = _cut(side, sizes, {k: name for k, name in enumerate(names) if isinstance(name, Part)})
    return None if weight is None else _Factor(weight, tuple(names))


def _cut(side: Tagged, sizes: Sequence[int], windows: dict[int, Part]) -> Tagged | None:
    """A factor reshaped, and of some axes the window that a part is; None: it is no view so."""
    views = [origin.reshape(side.array.shape, sizes) for origin in side.good]
    array = side.array.reshape(sizes)
    for dim, part in windows.items():
        if not part.whole:
            shape, start, length = array.shape, part.start, part.length
            views = [view and view.window(shape, dim, start, length) for view in views]
            array = lax.slice_in_dim(array, start, start + length, axis=dim)
    followed = tuple(view for view in views if view is not None)
    whole = len(followed) == len(views)
    return replace(side, array=array, origins=followed) if whole else None
