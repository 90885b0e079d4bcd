"""Grids that clip nothing: what stochastic rounding needs to be without bias.

A number beyond the ends of its group's grid is rounded to the end every time, so its mean is off.
Most conventions let that happen: with `2^b - 1` steps over `±max |w|` the largest weight lies half
a step outside, and a zero point that has to be a code moves the range by as much. `Enclosing`
stretches the scale of a grid that can be rescaled until its ends reach the group's own, and
`check_encloses` refuses a grid of which that is not enough, by trying it on groups that are hard.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jquant.axes.groups import Groups, to_groups
from jquant.errors import FormatError
from jquant.grids.base import Grid, GridParams, is_refitted, shares

# Beyond the end by this part of the group's largest number: the rounding of a float32 scale.
_SLACK = 2.0**-20


@jax.tree_util.register_static
@dataclass(frozen=True)
class Enclosing:
    """A grid whose scales are stretched until no weight of a group lies outside.

    Values are those of the grid itself, with the parameters that this has fitted. A scale grows by
    as much as its group needs, at most to the next numbers of the dtype that it is stored in.

    Args:
        grid: of one group; one that cannot be rescaled stays as it is.

    Example:
        >>> from jquant.grids import Uniform
        >>> w = jnp.array([[-1.0, 7.5]])
        >>> [float(g.fit(w)["scale"][0]) for g in (Uniform(4, True), Enclosing(Uniform(4, True)))]
        [1.0, 1.0714...]
    """

    grid: Grid

    @property
    def bits(self) -> int:
        """Bits a stored code takes."""
        return self.grid.bits

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code, both included."""
        return self.grid.codes

    def fit(
        self, w: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None = None
    ) -> GridParams:
        """The grid's parameters, stretched where the group reaches beyond them."""
        params = self.grid.fit(w, importance)
        if not is_refitted(self.grid) or shares(self.grid):
            return params
        stored = [a.dtype for a in jax.tree.leaves(params) if jnp.issubdtype(a.dtype, jnp.floating)]
        step = max((float(jnp.finfo(dtype).eps) for dtype in stored), default=0.0)
        # Beyond by two steps of the dtype, so that rounding to it cannot fall short; then, where
        # numbers are far apart (powers of two, the least of float16), by half.
        for beyond in (min(2.0 * step, 0.5), 0.5):
            low, high = ends(self.grid, params, w.shape[:-1])
            need = jnp.maximum(_part(w.max(-1), high), _part(-w.min(-1), -low))
            factor = jnp.where(need > 1.0 + _SLACK, need * jnp.float32(1.0 + beyond), 1.0)
            params = self.grid.rescaled(params, factor, jnp.zeros_like(factor))  # type: ignore[attr-defined]
        return params

    def bracket(
        self, w: Float[Array, "*g b"], params: GridParams
    ) -> tuple[Integer[Array, "*g b"], Integer[Array, "*g b"]]:
        """The grid's own."""
        return self.grid.bracket(w, params)

    def decode(self, codes: Integer[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """The grid's own."""
        return self.grid.decode(codes, params)


def is_enclosed(
    grid: Grid, groups: Groups, params: GridParams, w: Float[Array, "*batch out in"]
) -> Bool[Array, ""]:
    """Whether no weight lies beyond the ends of its group, but for the rounding of a scale."""
    cut = to_groups(w, groups)
    low, high = ends(grid, params, cut.shape[:-1])
    slack = _SLACK * jnp.abs(cut).max(-1)
    return ((cut.max(-1) <= high + slack) & (cut.min(-1) >= low - slack)).all()


def _part(reach: Float[Array, "*g"], end: Float[Array, "*g"]) -> Float[Array, "*g"]:
    """How much farther a group reaches than its grid, on the side where the end lies."""
    inside = (reach <= 0) | (end <= 0)
    return jnp.where(inside, 1.0, reach / jnp.where(inside, 1.0, end))


def ends(
    grid: Grid, params: GridParams, groups: tuple[int, ...]
) -> tuple[Float[Array, "*g"], Float[Array, "*g"]]:
    """The least and the greatest value of every group."""
    codes = jnp.broadcast_to(jnp.asarray(grid.codes, jnp.int32), (*groups, 2))
    values = grid.decode(codes, params)
    return values.min(-1), values.max(-1)


def check_encloses(grid: Grid) -> None:
    """Refuse a grid that clips, stretched or not.

    Raises:
        FormatError: it does; says what to pass instead.

    Example:
        >>> from jquant.grids import NF4, Uniform
        >>> check_encloses(NF4())
        >>> check_encloses(Uniform(4))
        Traceback (most recent call last):
        jquant.errors.FormatError: Uniform(bits=4...) clips numbers at the ends of a group...
    """
    if not _encloses(grid):
        raise FormatError(
            f"{grid} clips numbers at the ends of a group, so that rounded numbers would be biased;"
            " pass a grid that encloses them, such as Uniform(bits, symmetric=True, "
            "convention='S3'), or rounding=Nearest()"
        )


@functools.cache
def _encloses(grid: Grid) -> bool:
    """Whether no probe lies beyond the ends that the grid has after `Enclosing`."""
    size = getattr(grid, "group", None) or 32
    with jax.ensure_compile_time_eval():
        probes = jnp.asarray(_probes(size))
        groups = Groups("in", size)
        params = Enclosing(grid).fit(to_groups(probes, groups))
        return bool(is_enclosed(grid, groups, params, probes))


def _probes(size: int) -> np.ndarray:
    """Groups that are hard to enclose: lopsided, of one sign, far from zero, small and large.

    None is beyond the reach of a float16 scale: that is for `is_enclosed` to tell of the data.
    """
    random = np.random.default_rng(0)
    normal = random.normal(size=(16, size))
    some = np.zeros((4, size))
    some[:, 0] = 3.0, -3.0, 1e-3, 0.0
    ramp = np.linspace(0.0, 1.0, size) + np.array([[0.01], [1.0], [100.0], [-0.013], [-0.51]])
    groups = np.concatenate([normal, normal + 1.7, some, ramp])
    groups = np.concatenate([s * groups for s in (1.0, -1.0, 1e-3, 1e2)])
    return groups.reshape(1, -1).astype(np.float32)
