"""A weight as GPTQ's sweep takes it: column by column, each as the grid sees it.

A column is `[m, b]`, m groups of b weights. Groups along the input axis lie across the columns, one
weight of every row in each (m = out, b = 1); groups along the output axis lie within one column.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jquant.axes.groups import from_groups
from jquant.grids.base import GridParams, spread
from jquant.grids.grouped import Grouped
from jquant.numerics.packed import unpacked
from jquant.rounding.arrangement import Arrangement


class Across(NamedTuple):
    """Groups along the input axis; parameters `[out, n]` as a table `[n, m]`, m = out."""

    grid: Grouped
    shape: tuple[int, ...]

    @property
    def span(self) -> int:
        """How many columns share an entry of the table."""
        return self.grid.groups.group(self.shape[1])

    @property
    def real(self) -> Bool[np.ndarray, "m b"]:
        """Which numbers of a column are weights."""
        return np.ones((self.shape[0], 1), bool)

    def unit(self, place: Arrangement) -> int:
        """How many places share parameters that are fitted on the way."""
        return place.sizes[1]

    def edge(self, place: Arrangement) -> Shaped[Array, " n"] | None:
        """The place whose weight stands for each in a fit; None: its own."""
        return place.edge

    def of(self, w: Float[Array, "out in"]) -> Float[Array, "in m b"]:
        """The columns of a weight."""
        return w.T[:, :, None]

    def weights(self, columns: Shaped[Array, "in m b"]) -> Shaped[Array, "out in"]:
        """The inverse of `of`."""
        return columns[:, :, 0].T

    def table(self, params: GridParams) -> GridParams:
        """Parameters by group of columns, in types that can be looked up."""
        each = spread(self.grid.grid, params)
        return jax.tree.map(lambda leaf: unpacked(leaf).swapaxes(0, 1), each)

    def params(self, table: GridParams, place: Arrangement) -> GridParams:
        """Parameters from a table that was fitted on the way."""
        del place
        return self.table(table)


class Within(NamedTuple):
    """Groups along the output axis; parameters `[in, n]` are a table `[in, m]`, m = n."""

    grid: Grouped
    shape: tuple[int, ...]

    @property
    def span(self) -> int:
        """How many columns share an entry of the table."""
        return 1

    @property
    def real(self) -> Bool[np.ndarray, "m b"]:
        """Which numbers of a column are weights, and not there to fill up the last group."""
        groups, rows = self.grid.groups, self.shape[0]
        m, b = groups.count(rows), groups.group(rows)
        return np.arange(m * b).reshape(m, b) < rows

    def unit(self, place: Arrangement) -> int:
        """How many places share parameters that are fitted on the way."""
        del place
        return 1

    def edge(self, place: Arrangement) -> Shaped[Array, " n"] | None:
        """The place whose weight stands for each in a fit; None: its own."""
        del place

    def of(self, w: Float[Array, "out in"]) -> Float[Array, "in m b"]:
        """The columns of a weight."""
        return self.grid.cut(w)

    def weights(self, columns: Shaped[Array, "in m b"]) -> Shaped[Array, "out in"]:
        """The inverse of `of`."""
        return from_groups(columns, self.grid.groups, self.shape[0])

    def table(self, params: GridParams) -> GridParams:
        """Parameters by column, in types that can be looked up."""
        return jax.tree.map(unpacked, params)

    def params(self, table: GridParams, place: Arrangement) -> GridParams:
        """Parameters from a table, by place, that was fitted on the way."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, place.home, axis=0), table)


def columns_of(grid: Grouped, shape: tuple[int, ...]) -> Across | Within:
    """How a weight `[out, in]` is read by columns."""
    return (Across if grid.groups.axis == "in" else Within)(grid, shape)
