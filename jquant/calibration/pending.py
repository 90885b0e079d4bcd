"""Uses of weights in values that depend on no input, which count only if such a value meets one.

Learned queries times a projection are an activation that nothing flows into: each parameter sees
the other's rows. So is a table looked up at fixed positions. But in `x @ (a @ b)` the product is an
effective weight that meets `x`, and in `w / (u @ w @ v)` it is no more than a factor. Which it is
shows later; until then the use is pending. What becomes of a product that meets an input: see
`reassociate.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from jquant.axes.contraction import Contraction, Pairs, seen_from
from jquant.axes.origin import Origin
from jquant.axes.roles import Sighting
from jquant.calibration.tagged import Tagged


class Product(NamedTuple):
    """`dot_general` of two values that depend on no input; `site` is where."""

    site: tuple[int, ...]
    left: Tagged
    right: Tagged
    contract: Pairs
    batch: Pairs

    @property
    def sides(self) -> tuple[Tagged, Tagged]:
        """The factors."""
        return self.left, self.right

    def contraction(self, which: int) -> Contraction:
        """How a factor is contracted with the other one."""
        shape, other = self.sides[which].array.shape, self.sides[1 - which].array.shape
        pairs = seen_from(which, self.contract), seen_from(which, self.batch)
        return Contraction.dot(shape, other, *pairs)

    def axes(self, which: int) -> dict[int, int]:
        """The axes of a factor that are left in the product, and which ones of it they are."""
        left, right = self.contraction(0), self.contraction(1)
        free = [[k for k, role in enumerate(c.roles) if role == "out"] for c in (left, right)]
        count = len(self.batch[0])
        first = count if which == 0 else count + len(free[0])
        axes = {dim: k for k, dim in enumerate(self.batch[which])}
        return axes | {dim: first + k for k, dim in enumerate(free[which])}


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
