"""Columns that share parameters, as places in nested blocks, and their parameters as a table.

Groups along the input axis are units of as many columns, one after the other, the last one padded;
along the output axis every column is a unit by itself, of several groups. A table holds parameters
unit by unit, so that a loop over blocks of columns is one over blocks of the table.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer

from jquant.axes.groups import Groups
from jquant.grids.base import GridParams, spread
from jquant.numerics.packed import unpacked
from jquant.rounding.arrangement import BLOCK, LEAF, split
from jquant.rounding.columns import Across, Within


def sizes_for(width: int, span: int) -> tuple[tuple[int, ...], int]:
    """Nested block sizes for columns of which `span` share parameters, and the unit among them.

    Example:
        >>> sizes_for(576, 64), sizes_for(576, 576)
        (((640, 128, 64, 16, 1), 64), ((640, 128, 16, 1), 640))
    """
    leaf = split(span, LEAF)
    unit = -(-span // leaf) * leaf
    if unit > BLOCK:
        block = -(-split(unit, BLOCK) // leaf) * leaf
        unit = -(-unit // block) * block
        nested = (unit, block)
    elif span == 1:
        unit = 1
        leaf = split(min(width, BLOCK), LEAF)
        nested = (-(-split(width, BLOCK) // leaf) * leaf,)
    else:
        nested = (split(-(-width // span), BLOCK // unit) * unit, unit)
    whole = -(-(-(-width // span) * unit) // nested[0]) * nested[0]
    return tuple(dict.fromkeys([whole, *nested, leaf, 1])), unit


class Places(NamedTuple):
    """Where columns go: groups one by one, each padded to what its blocks divide."""

    source: Integer[Array, " n"]  # the column at each place, some column for padding
    real: Bool[Array, " n"]  # false for padding
    home: Integer[Array, " in"]  # the place of each column
    sizes: tuple[int, ...]
    unit: int  # places that share parameters, one of the sizes

    @staticmethod
    def of(groups: Groups, width: int) -> Places:
        span = groups.group(width) if groups.axis == "in" else 1
        sizes, unit = sizes_for(width, span)
        which, within = jnp.divmod(jnp.arange(sizes[0], dtype=jnp.int32), unit)
        source = which * span + within
        real = (within < span) & (source < width)
        column = jnp.arange(width, dtype=jnp.int32)
        home = column // span * unit + column % span
        return Places(jnp.clip(source, 0, width - 1), real, home, sizes, unit)


def table_of(params: GridParams, columns: Across | Within, place: Places) -> GridParams:
    """Parameters by place, of every unit its own, in types that can be looked up."""
    across, width = isinstance(columns, Across), columns.shape[1]
    rows, n = columns.shape[0], -(-width // columns.span)
    each = jax.tree.map(unpacked, spread(columns.grid.grid, params))
    units = jnp.arange(place.sizes[0] // place.unit, dtype=jnp.int32)

    def table(leaf: Array) -> Array:
        if across:
            leaf = jnp.broadcast_to(leaf, (rows, n, *leaf.shape[2:])).swapaxes(0, 1)
        else:
            m = columns.real.shape[0]
            leaf = jnp.broadcast_to(leaf, (width, m, *leaf.shape[2:]))
        return jnp.take(leaf, jnp.minimum(units, len(leaf) - 1), axis=0)

    return jax.tree.map(table, each)


def params_of(
    table: GridParams, like: GridParams, columns: Across | Within, place: Places
) -> GridParams:
    """Parameters from a table; those that stand for several groups have not moved."""
    across, width = isinstance(columns, Across), columns.shape[1]

    def back(leaf: Array, old: Array) -> Array:
        leaf = leaf[: -(-width // columns.span)]
        leaf = leaf.swapaxes(0, 1) if across else leaf
        return leaf.astype(old.dtype) if leaf.shape == old.shape else old

    return {name: back(table[name], old) for name, old in like.items()}
