"""Matrices that data picks from a stack, one for each row: experts without capacity.

    picked = w[index];   y[s] = picked[s] @ x[s]

Row s meets the matrix number `index[s]`, so the evidence of matrix e is that of the rows whose
index is e, and their count. Sorted by index, rows are the groups of a `ragged_dot`, and are read as
its rows are; what a row is multiplied with stays as it was.

Such a gather is no use of the weight by itself, and may stand long before its product. The step
that makes it belongs to the stage of the product (`schedule.py`): picked earlier, it would be of
the weight before it was quantized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.axes.contraction import Contraction
from jquant.axes.layout import Role
from jquant.calibration.meeting import Rows, meet
from jquant.calibration.tagged import Tagged
from jquant.programs.walker import Walker


class Picked(NamedTuple):
    """What a `gather` has picked.

    Attributes:
        site: where it was picked.
        table: the stack.
        axis: the axis of the table along which it was picked.
        index: the numbers of the matrices, `[*rows]`.
        places: the axes of the result that are the index's, in order.
        shape: of the result.
        lookup: the number of the pending lookup that it is if it meets no rows.
    """

    site: tuple[int, ...]
    table: Tagged
    axis: int
    index: jax.Array
    places: tuple[int, ...]
    shape: tuple[int, ...]
    lookup: int

    @staticmethod
    def of(
        eqn: core.JaxprEqn, site: tuple[int, ...], table: Tagged, index: Any, lookup: int
    ) -> Picked | None:
        """Of `gather`; None where it picks along several axes, or parts of matrices."""
        shape, numbers = table.array.shape, eqn.params["dimension_numbers"]
        axis = numbers.collapsed_slice_dims[:1]
        one = numbers.collapsed_slice_dims == numbers.start_index_map == axis and axis
        sizes = (1 if k == axis[0] else n for k, n in enumerate(shape)) if one else ()
        if tuple(sizes) != tuple(eqn.params["slice_sizes"]) or numbers.operand_batching_dims:
            return None
        result: Any = eqn.outvars[0].aval
        places = tuple(k for k in range(result.ndim) if k not in numbers.offset_dims)
        numbered = _numbered(index[..., 0], shape[axis[0]], eqn.params["mode"])
        return Picked(site, table, axis[0], numbered, places, tuple(result.shape), lookup)

    def contraction(self, summed: Sequence[int], rows: Sequence[int]) -> Contraction:
        """How the table is contracted with sorted rows, of this shape.

        `summed`: the axes of the result that are contracted.
        """
        shape = self.table.array.shape
        left = [k for k in range(len(self.shape)) if k not in self.places]
        kept = [k for k in range(len(shape)) if k != self.axis]
        place_of = dict(zip(kept, left, strict=True))
        meets = {k: 1 + summed.index(p) for k, p in place_of.items() if p in summed}
        roles: dict[int, Role] = {self.axis: "batch"}
        roles |= dict.fromkeys(meets, "in")
        axes = range(len(shape))
        return Contraction(
            "ragged_dot", shape, tuple(roles.get(k, "out") for k in axes),
            tuple(map(meets.get, axes)), tuple(rows),
        )  # fmt: skip


def meet_picked(observer: Any, walker: Walker, slot: int, weight: Tagged, x: jax.Array) -> bool:
    """Whether picked matrices are met by rows in this `dot_general`; then it is recorded."""
    picked = None if weight.pick is None else observer.picked[weight.pick]
    if picked is None or picked.shape != weight.array.shape:
        return False
    seen = Contraction.of(walker.within[-1], slot)
    stacked = [k for k, role in enumerate(seen.roles) if role == "batch" and k not in picked.places]
    if stacked or len(picked.site) != len(walker.site):
        return False
    count = picked.table.array.shape[picked.axis]
    summed = [k for k, role in enumerate(seen.roles) if role == "in" and k not in picked.places]
    meeting = tuple(seen.meets[k] for k in picked.places), tuple(seen.meets[k] for k in summed)
    operands = x, picked.index
    sort = partial(_in_groups, *operands, *meeting, count)
    rows, sizes = walker.share(("rows by index", meeting), operands, sort)
    contraction = picked.contraction(summed, rows.shape)
    table = Tagged(picked.table.array, picked.table.origins)
    meet(observer, walker, ("picked", slot), table, Rows(rows, None, sizes), contraction)
    observer.deferred.add(picked.site)
    return True


def _numbered(index: jax.Array, count: int, mode: Any) -> jax.Array:
    """Indices as they are read: clipped where they are, else `count` for what is out of range."""
    if mode == lax.GatherScatterMode.CLIP:
        return jnp.clip(index, 0, count - 1)
    return jnp.where((index >= 0) & (index < count), index, count)


def _in_groups(
    x: jax.Array,
    index: jax.Array,
    along: Sequence[int | None],
    inner: Sequence[int | None],
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """Rows `[tokens, *in]` sorted by index, and how many there are of each number, `[count]`.

    `along`: the axes of `x` that the index's run along, None for one that a row is repeated along;
    `inner`: those that are contracted.
    """
    shared = [axis for axis in along if axis is not None]
    free = [axis for axis in range(x.ndim) if axis not in {*shared, *inner}]
    first = [k for k, axis in enumerate(along) if axis is not None]
    rest = [k for k, axis in enumerate(along) if axis is None]
    turned = x.transpose([*shared, *free, *inner])  # type: ignore[list-item]
    features = turned.shape[len(shared) + len(free) :]
    numbers = index.transpose([*first, *rest])
    lead = math.prod(numbers.shape[: len(first)])
    tokens = turned.reshape(lead, 1, -1, *features)
    groups = numbers.reshape(lead, -1, 1)
    shape = lead, groups.shape[1], tokens.shape[2]
    rows = jnp.broadcast_to(tokens, (*shape, *features)).reshape(-1, *features)
    group = jnp.broadcast_to(groups, shape).reshape(-1)
    sizes = jax.ops.segment_sum(jnp.ones_like(group, jnp.int32), group, count)
    return rows[jnp.argsort(group)], sizes
