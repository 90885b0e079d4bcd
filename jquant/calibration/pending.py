"""Uses of weights in values that depend on no input, which count only if such a value meets one.

Learned queries times a projection are an activation that nothing flows into: each parameter sees
the other's rows. So is a table looked up at fixed positions. But in `x @ (a @ b)` the product is an
effective weight that meets `x`, and in `w / (u @ w @ v)` it is no more than a factor. Which it is
shows later; until then the use is pending.

A product that meets an input is followed as if it were associated the other way: `(x @ a) @ b`. The
factor whose own axis is contracted sees the input, the other one sees the input times that factor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jquant.axes.origin import Axis, Origin, Part
from jquant.axes.roles import Sighting
from jquant.calibration.tagged import Tagged
from jquant.trees.placement import automatic

Pairs = tuple[tuple[int, ...], tuple[int, ...]]


def seen_from(slot: int, pairs: Pairs) -> Pairs:
    """Dimensions that meet, those of the operand in `slot` first."""
    return (pairs[1], pairs[0]) if slot else pairs


class Product(NamedTuple):
    """`dot_general` of two values that depend on no input; `site` is where."""

    site: tuple[int, ...]
    left: Tagged
    right: Tagged
    contract: Pairs
    batch: Pairs


class Lookup(NamedTuple):
    """Rows picked from a table; `uses` are what it is to each of its weights."""

    site: tuple[int, ...]
    uses: tuple[Sighting, ...]


class Pending:
    """The uses of one walk that are not decided yet, by number.

    Args:
        roots: where the whole function is known, the positions of its steps that use weights; what
            a part of it does with a value does not tell.
    """

    def __init__(self, roots: Collection[int] | None = None) -> None:
        self._roots = roots
        self._items: dict[int, Product | Lookup] = {}
        self._reached: set[int] = set()  # those whose value met an input
        self._count = 0

    def add(self, item: Product | Lookup) -> int:
        self._count += 1
        self._items[self._count] = item
        return self._count

    def product(self, origin: Origin) -> Product:
        """The product that a value stands for."""
        item = self._items[origin.product or 0]
        assert isinstance(item, Product)
        return item

    def weight(self, origin: Origin) -> Origin:
        """The origin, or that of a weight in a product of parameters."""
        while origin.product is not None:
            product = self.product(origin)
            origin = (*product.left.origins, *product.right.origins)[0]
        return origin

    def reach(self, values: Iterable[Tagged]) -> None:
        """Count what went into these values."""
        for value in values:
            self._reached.update(value.reach)
            self._reached.update(o.product for o in value.origins if o.product is not None)

    def inside(self, site: tuple[int, ...]) -> set[int]:
        """The numbers of those that began in the body at this site."""
        return {n for n, item in self._items.items() if item.site[: len(site)] == site}

    def outside(self, value: Tagged, inner: set[int], name: str | None) -> Tagged:
        """A value as it leaves the body of `name` (None: the function) in which `inner` began."""
        self._reached.update(inner.intersection(value.reach))
        products = [o for o in value.origins if o.product in inner]
        if not products or name is None:
            return value
        self._reached.update(o.product for o in products if o.product is not None)
        kept = tuple(o for o in value.origins if o not in products)
        return replace(
            value, origins=kept or tuple(self.weight(o).break_at(name) for o in products)
        )

    def end(self, number: int) -> tuple[Product | Lookup, bool]:
        """Take one out, and whether it counts."""
        item = self._items.pop(number)
        if self._roots is not None and len(item.site) == 1:
            return item, item.site[0] in self._roots
        return item, number in self._reached


class Step(NamedTuple):
    """A weight that meets rows: dimension pairs are (the weight's, those of `x`)."""

    weight: Tagged
    x: jax.Array
    contract: Pairs
    batch: Pairs


def reassociated(
    product: Product, origin: Origin, rank: int, x: jax.Array, contract: Pairs, batch: Pairs
) -> tuple[int, Step, Step] | None:
    """The two products that `x` times a product of parameters is made of; None if it is not.

    Before them, which factor it meets first: 0 for the left one.

    Args:
        product: of the parameters.
        origin: what the array that meets `x` owes to it.
        rank: of that array.
        x: the input.
        contract, batch: the dimensions that meet, (the array's, those of `x`).
    """
    if origin.scanned(rank):
        return None
    own, digits = origin.own(rank), _digits(origin, rank, product)
    meets = dict(zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True))
    if any(o is not None for o in origin.own_offsets(rank)) or any(
        part.axis < 0 or part.reversed or part.shuffled for dim in meets for part in own[dim]
    ):
        return None
    # The axes of `x`, cut into the digits that they meet.
    places: dict[Part, int] = {}
    sizes: list[int] = []
    theirs = {there: own[dim] for dim, there in meets.items()}
    for axis, size in enumerate(x.shape):
        for part in theirs.get(axis, ()):
            places[part] = len(sizes)
            sizes.append(part.length)
        if axis not in theirs:
            sizes.append(size)
    x = x.reshape(sizes)
    inner = {part for dim in contract[0] for part in own[dim]}
    count = len(product.batch[0])
    free = _free(product.left, product.contract[0], product.batch[0])
    owners = {"left" if count <= p.axis < count + len(free) else "right" for p in inner}
    if len(owners) != 1 or any(part.axis < count for part in inner):
        return None
    sides = [_viewed(product, k, digits) for k in ((0, 1) if owners == {"left"} else (1, 0))]
    if sides[0] is None or sides[1] is None:
        return None
    (near, near_places, near_contract), (far, far_places, far_contract) = sides[0], sides[1]
    runs = [part for part in near_places if part in places and part not in inner]
    order = [part for part in near_places if part in inner]
    one = Step(
        near, x,
        (tuple(near_places[p] for p in order), tuple(places[p] for p in order)),
        (tuple(near_places[p] for p in runs), tuple(places[p] for p in runs)),
    )  # fmt: skip
    dtype = x.dtype if x.dtype == near.array.dtype else jnp.dtype(jnp.float32)
    dims = (one.contract[1], one.contract[0]), (one.batch[1], one.batch[0])

    def times(x: jax.Array, near: jax.Array) -> jax.Array:
        return lax.dot_general(
            x.astype(dtype), near.astype(dtype), dims,
            precision=lax.Precision.HIGHEST, preferred_element_type=dtype,
        )  # fmt: skip

    y = automatic(times, x, near.array)
    # Where its axes are: those that ran along, what is left of `x`, what is left of the factor.
    gone = {*one.contract[1], *one.batch[1]}
    after: dict[Any, int] = {part: k for k, part in enumerate(runs)}
    at = len(runs)
    for k in range(x.ndim):
        if k not in gone:
            after |= {part: at for part, place in places.items() if place == k}
            at += 1
    gone = {*one.contract[0], *one.batch[0]}
    names = {place: part for part, place in near_places.items()}
    names |= {place: k for k, place in enumerate(near_contract)}
    for k in range(near.array.ndim):
        if k not in gone:
            after[names.get(k, ("free", k))] = at
            at += 1
    runs = [part for part in far_places if part in after]
    two = Step(
        far, y,
        (tuple(far_contract), tuple(after[k] for k in range(len(far_contract)))),
        (tuple(far_places[p] for p in runs), tuple(after[p] for p in runs)),
    )  # fmt: skip
    return (0 if owners == {"left"} else 1), one, two


def is_read_so(side: Tagged, contract: Sequence[int], sightings: Iterable[Sighting]) -> bool:
    """Whether a weight is contracted elsewhere as it is in its product with another parameter.

    A projection that makes keys of inputs, and queries of parameters, is one weight with one input
    axis: it sees the rows of both.
    """
    rank = side.array.ndim
    inner = {
        o.path: {p.axis for dim in contract for p in o.own(rank)[dim]}
        for o in side.good
        if o.product is None
    }
    return any(
        s.reading.kind != "lookup" and {p.axis for p in s.reading.inner} == inner.get(s.path)
        for s in sightings
    )


def _free(side: Tagged, contract: Sequence[int], batch: Sequence[int]) -> list[int]:
    return [k for k in range(side.array.ndim) if k not in (*contract, *batch)]


def _digits(origin: Origin, rank: int, product: Product) -> dict[int, Axis]:
    """For each axis of the product, the parts that it is read as, outermost first."""
    digits: dict[int, list[Part]] = {}
    for part in (*(p for axis in origin.own(rank) for p in axis), *origin.fixed):
        if part.axis >= 0:
            digits.setdefault(part.axis, []).append(part)
    return {axis: tuple(sorted(parts, key=lambda p: -p.stride)) for axis, parts in digits.items()}


def _viewed(
    product: Product, which: int, digits: dict[int, Axis]
) -> tuple[Tagged, dict[Part, int], list[int]] | None:
    """A factor with an axis for every digit, where these are, and where it is contracted."""
    side = (product.left, product.right)[which]
    contract, batch = product.contract[which], product.batch[which]
    other = (product.left, product.right)[1 - which]
    count = len(batch)
    skip = 0 if which == 0 else len(_free(other, product.contract[0], product.batch[0]))
    axis_of = {dim: k for k, dim in enumerate(batch)}
    axis_of |= {dim: count + skip + k for k, dim in enumerate(_free(side, contract, batch))}
    array, origins = side.array, list(side.good)
    places: dict[Part, int] = {}
    where: dict[int, int] = {}
    sizes: list[int] = []
    windows: list[tuple[int, Part]] = []
    for dim, size in enumerate(array.shape):
        parts = digits.get(axis_of[dim], ()) if dim in axis_of else ()
        where[dim] = len(sizes)
        if not parts:
            sizes.append(size)
        for part in parts:
            places[part] = len(sizes)
            windows.append((len(sizes), part))
            sizes.append(part.size)
    if math.prod(sizes) != array.size:
        return None
    now = [origin.reshape(array.shape, sizes) for origin in origins]
    array = array.reshape(sizes)
    for dim, part in windows:
        if not part.whole:
            shape = array.shape
            now = [o and o.window(shape, dim, part.start, part.length) for o in now]
            array = lax.slice_in_dim(array, part.start, part.start + part.length, axis=dim)
    if any(origin is None for origin in now):
        return None
    kept = tuple(origin for origin in now if origin is not None)
    return replace(side, array=array, origins=kept), places, [where[dim] for dim in contract]
