"""A grid over the groups of a whole weight: fit, bracket, decode on `[*batch, out, in]`.

A grid knows groups of weights, `[*g, b]`; a weight in the canonical view is `[*batch, out, in]`,
and `Groups` says how one is cut into the other. `Grouped` joins the two, so that nobody who rounds
or decodes a weight cuts it: it has the methods of a grid, and stands where a grid does.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from jquant.axes.groups import Groups, from_groups, to_groups
from jquant.grids.base import Grid, GridParams, nearest


@jax.tree_util.register_static
@dataclass(frozen=True)
class Grouped:
    """A grid for the groups of weights `[*batch, out, in]`.

    Group parameters are as the grid makes them, leaves `[*batch, rows, n]` or `[*batch, rows, n,
    k]`: `n` groups in each of `rows`, rows being the axis that groups do not lie along.

    Args:
        grid: of one group.
        groups: which weights share the parameters of one group; the last group may be shorter.

    Example:
        >>> from jquant.grids import Uniform
        >>> grid = Grouped(Uniform(2), Groups("in", 2))
        >>> w = jnp.array([[0.0, 3.0, 0.0, 6.0]])
        >>> params = grid.fit(w)
        >>> codes = grid.nearest(w, params)
        >>> params["scale"].tolist(), codes.tolist(), grid.decode(codes, params).tolist()
        ([[1.0, 2.0]], [[0, 3, 0, 3]], [[0.0, 3.0, 0.0, 6.0]])
    """

    grid: Grid
    groups: Groups = Groups()

    @property
    def bits(self) -> int:
        """Bits a stored code takes."""
        return self.grid.bits

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code, both included."""
        return self.grid.codes

    def cut(self, array: Shaped[Array, "*batch out in"]) -> Shaped[Array, "*batch rows n b"]:
        """The array as the grid sees it; a shorter last group repeats its last entry."""
        return to_groups(array, self.groups)

    def fit(
        self,
        w: Float[Array, "*batch out in"],
        importance: Float[Array, "*#batch #out #in"] | None = None,
    ) -> GridParams:
        """The parameters of all groups; `importance` weighs errors where the grid can."""
        if importance is None:
            return self.grid.fit(self.cut(w))
        return self.grid.fit(self.cut(w), self.cut(importance))

    def nearest(
        self, w: Float[Array, "*batch out in"], params: GridParams
    ) -> Integer[Array, "*batch out in"]:
        """The nearest codes, int32; ties fall as the grid has it."""
        return self._joined(nearest(self.grid, self.cut(w), params), w.shape)

    def bracket(
        self, w: Float[Array, "*batch out in"], params: GridParams
    ) -> tuple[Integer[Array, "*batch out in"], Integer[Array, "*batch out in"]]:
        """The neighbouring int32 codes around each weight, `lo <= hi <= lo + 1`, both in range."""
        lo, hi = self.grid.bracket(self.cut(w), params)
        return self._joined(lo, w.shape), self._joined(hi, w.shape)

    def decode(
        self, codes: Integer[Array, "*batch out in"], params: GridParams
    ) -> Float[Array, "*batch out in"]:
        """The float32 values of codes of any integer type."""
        values = self.grid.decode(self.cut(codes.astype(jnp.int32)), params)
        return self._joined(values, codes.shape)

    def _joined(
        self, groups: Shaped[Array, "*batch rows n b"], shape: tuple[int, ...]
    ) -> Shaped[Array, "*batch out in"]:
        """What `cut` has cut, without the entries that were repeated."""
        return from_groups(groups, self.groups, shape[-1 if self.groups.axis == "in" else -2])
