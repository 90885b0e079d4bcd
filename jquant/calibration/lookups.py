"""Lookups: parts of a table, picked along some of its axes by an index.

A lookup has no rows. Picked by data, a row is a use of the table; picked at fixed positions, it is
one if it meets an input as it is, and where it is contracted instead the table is a weight like
others, read in another order. Whole matrices that data picks (experts, layers) are no weight any
more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jax.extend import core

from jquant.axes.layout import Role
from jquant.axes.origin import Origin
from jquant.calibration.picks import Picked
from jquant.calibration.tagged import Tagged, array_of, changed, is_independent
from jquant.programs.walker import Walker, bind


class Pick(NamedTuple):
    """What a lookup takes of a table.

    Attributes:
        shape: of the table.
        sizes: of what is taken at once, along each axis of the table.
        rows: the axes that are indexed.
        batch: those that run along with the indices.
        turn: for each axis of the result that of the table, if the result is the table with one
            axis in another order; else None.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: frozenset[int]
    batch: frozenset[int]
    turn: tuple[int, ...] | None

    @staticmethod
    def of_gather(eqn: core.JaxprEqn, shape: tuple[int, ...], rank: int) -> Pick:
        """Of `gather`; `rank` is that of the indices."""
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        batch, collapsed = numbers.operand_batching_dims, numbers.collapsed_slice_dims
        rows = {
            dim for dim in numbers.start_index_map if sizes[dim] != shape[dim] or dim in collapsed
        }
        turn = None
        if tuple(rows) == tuple(collapsed) and len(rows) == 1 and rank == 2 and not batch:
            left = [dim for dim in range(len(shape)) if dim not in collapsed]
            out = {int(k): dim for k, dim in zip(numbers.offset_dims, left, strict=True)}
            turn = tuple(out[k] if k in out else collapsed[0] for k in range(len(shape)))
        return Pick(shape, tuple(sizes), frozenset(rows), frozenset(batch), turn)

    @staticmethod
    def of_slice(eqn: core.JaxprEqn, shape: tuple[int, ...], rank: int) -> Pick:
        """Of `dynamic_slice`."""
        del rank
        sizes = eqn.params["slice_sizes"]
        rows = frozenset(dim for dim, size in enumerate(shape) if sizes[dim] != size)
        turn = tuple(range(len(shape))) if len(rows) == 1 else None
        return Pick(shape, tuple(sizes), rows, frozenset(), turn)

    @property
    def kept(self) -> list[int]:
        """The axes of what is picked: features of a row, both axes of a matrix."""
        gone = self.rows | self.batch
        return [dim for dim, size in enumerate(self.shape) if dim not in gone and size > 1]

    @property
    def whole(self) -> bool:
        """Whether it picks one entry of each indexed axis, with all that belongs to it."""
        entire = all(self.sizes[dim] == self.shape[dim] for dim in self.kept)
        return entire and all(self.sizes[dim] == 1 for dim in self.rows)

    @property
    def is_row(self) -> bool:
        """Whether it picks vectors, each as a whole."""
        return self.whole and len(self.kept) == 1

    @property
    def roles(self) -> list[Role]:
        """What the axes of the table are to a lookup."""
        special: dict[int, Role] = dict.fromkeys(self.batch, "batch")
        special |= dict.fromkeys(self.rows, "out")
        return [special.get(dim, "in") for dim in range(len(self.shape))]

    def reorder(self, origin: Origin, shape: Sequence[int], site: tuple[int, ...]) -> Origin | None:
        """Of a result of `shape` that is the table in another order, picked at `site`."""
        assert self.turn is not None
        (row,) = self.rows
        shuffled = origin.shuffle(self.shape, row, shape[self.turn.index(row)], site)
        return shuffled and shuffled.transpose(self.turn)


def lookup(observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any]:
    table, name = values[0], eqn.primitive.name
    if not isinstance(table, Tagged) or not table.good:
        return observer.other(eqn, values, all(map(is_independent, eqn.invars, values)))
    (result,) = bind(eqn, list(map(array_of, values)))
    pick = _PICKS[name](eqn, table.array.shape, array_of(values[1]).ndim if len(values) > 1 else 0)
    free = all(map(is_independent, eqn.invars[1:], values[1:]))
    site = walker.site if free else None
    observer.reach(values[1:])
    is_use = pick.whole and bool(pick.rows and pick.kept)
    if is_use and pick.is_row and not free:
        for k, origin in enumerate(table.good):
            observer.see(walker, (0, k), origin, observer.looked_up(walker, origin, pick.roles), 0)
        return [result]
    if not is_use:
        return [_picked(table, pick, result, eqn, site)]
    number = observer.postpone(walker, table.good, pick.roles)
    value = _picked(replace(table, reach=(*table.reach, number)), pick, result, eqn, site)
    if name != "gather" or free:
        return [value]
    matrices = Picked.of(eqn, walker.site, table, array_of(values[1]), number)
    return [value if matrices is None else replace(value, pick=observer.pick(matrices))]


def _picked(
    table: Tagged, pick: Pick, result: Any, eqn: core.JaxprEqn, site: tuple[int, ...] | None
) -> Tagged:
    """What was picked from a table, where that is no use of it yet.

    `site`: where, if it was picked at fixed positions.
    """
    free, name = site is not None, eqn.primitive.name
    plain = Tagged(table.array, table.origins, table.reach)
    if site is not None and pick.turn is not None:
        reordered = [pick.reorder(origin, result.shape, site) for origin in table.origins]
        return changed(plain, result, reordered, name)
    if free and pick.is_row:
        return Tagged(result, (), table.reach)
    value = changed(plain, result, [None] * len(table.origins), name)
    return replace(value, dependent=not free)


_PICKS = {"gather": Pick.of_gather, "dynamic_slice": Pick.of_slice}
RULES: Mapping[str, Any] = dict.fromkeys(_PICKS, lookup)
