"""What a grid is: three functions of a group of weights, and nothing about how to choose.

* `fit(w, importance)` finds the group parameters (scales, zeros, tables): a dict of arrays.
* `bracket(w, params)` gives the two neighbouring codes of every weight, `lo <= hi <= lo + 1`.
* `decode(codes, params)` gives the values; it is increasing in the code (decreasing in a group of
  GGUF whose scale is negative).

Every rounding only ever chooses between `lo` and `hi`, so any rounding runs on any grid. Arrays of
weights are `[*g, b]` (groups, weights within a group); parameter leaves are `[*g]` or `[*g, k]`.
Of a whole weight, `*g` is `[*batch, rows, n]`, and an axis of a leaf that stands for rows or n may
have size one: one table for a row, `[rows, 1, k]`, one scale for the tensor, `[1, 1]`. A grid is a
frozen dataclass registered static: hashable, comparable, printable, without arrays. Where a format
fixes the size of a group, the grid says so in an attribute `group`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

GridParams = Mapping[str, Array]
"""The parameters of groups `[*g]` by name (`"scale"`, `"zero"`, `"table"`, …): leaves `[*g]` or
`[*g, k]`, of the dtype they are stored in."""


@runtime_checkable
class Grid(Protocol):
    """The values that weights may take: a frozen dataclass registered static, without arrays.

    Weights are `[*g, b]`, those of a group along the last axis. `fit` makes the parameters of
    groups, `decode` the values of codes, increasing in the code, and `bracket` the two codes around
    a weight, between which every rounding chooses. A format that fixes the size of its groups says
    so in an attribute `group`.

    Example:
        >>> from jquant.grids import Uniform
        >>> isinstance(Uniform(4), Grid)
        True
    """

    @property
    def bits(self) -> int:
        """Bits a stored code takes."""
        ...

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code, both included."""
        ...

    def fit(
        self, w: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None = None
    ) -> GridParams:
        """Group parameters for these weights; `importance` weighs errors where the grid can."""
        ...

    def bracket(
        self, w: Float[Array, "*g b"], params: GridParams
    ) -> tuple[Integer[Array, "*g b"], Integer[Array, "*g b"]]:
        """The neighbouring int32 codes around each weight, `lo <= hi <= lo + 1`, both in range."""
        ...

    def decode(self, codes: Integer[Array, "*g b"], params: GridParams) -> Float[Array, "*g b"]:
        """The float32 values of the codes."""
        ...


def nearest(grid: Grid, w: Float[Array, "*g b"], params: GridParams) -> Integer[Array, "*g b"]:
    """The code whose value is nearest to each weight, int32; ties go to the even code.

    A grid may bring its own method `nearest(w, params)`, where its convention says how ties fall or
    there is a shorter way.

    Example:
        >>> from jquant.grids import Uniform
        >>> grid = Uniform(2, symmetric=True)
        >>> nearest(grid, jnp.array([[0.4, 1.1]]), {"scale": jnp.array([1.0])}).tolist()
        [[0, 1]]
    """
    own = getattr(grid, "nearest", None)
    if own is not None:
        return own(w, params)
    lo, hi = grid.bracket(w, params)
    down, up = w - grid.decode(lo, params), grid.decode(hi, params) - w
    return jnp.where((down < up) | ((down == up) & (lo % 2 == 0)), lo, hi)


def is_refitted(grid: Grid) -> bool:
    """Whether parameters can follow values that are stretched: the grid has a method `rescaled`.

    `rescaled(params, factor, shift)` returns the parameters, as they are stored, of values that
    come nearest to `factor * value + shift`. Where an attribute `shifts` is true, values can be
    moved by any `shift`; other grids leave it out.

    Example:
        >>> from jquant.grids import Uniform
        >>> grid, half = Uniform(2, symmetric=True), jnp.full(1, 0.5)
        >>> is_refitted(grid), grid.rescaled({"scale": jnp.ones(1)}, half, 0 * half)
        (True, {'scale': Array([0.5], dtype=float32)})
    """
    return hasattr(grid, "rescaled")


def shares(grid: Grid) -> bool:
    """Whether a parameter of the grid stands for more than one group.

    Example:
        >>> from jquant.grids import NV, Uniform
        >>> shares(Uniform(4)), shares(NV())
        (False, True)
    """
    groups = (2, 3)
    fitted = jax.eval_shape(grid.fit, jax.ShapeDtypeStruct((*groups, 16), jnp.float32))
    return any(leaf.shape[:2] != groups for leaf in jax.tree.leaves(fitted))


def neighbours(
    position: Float[Array, "*s"], codes: tuple[int, int]
) -> tuple[Integer[Array, "*s"], Integer[Array, "*s"]]:
    """The int32 codes around positions among them, both from the first to the last of `codes`.

    Example:
        >>> [side.tolist() for side in neighbours(jnp.array([1.5, 9.0]), (0, 7))]
        [[1, 7], [2, 7]]
    """
    below = jnp.floor(position)
    lo, hi = jnp.clip(below, *codes), jnp.clip(below + 1.0, *codes)
    return lo.astype(jnp.int32), hi.astype(jnp.int32)


def closest(position: Float[Array, "*s"], codes: tuple[int, int]) -> Integer[Array, "*s"]:
    """The int32 codes nearest to positions among them; ties go to even codes.

    Example:
        >>> closest(jnp.array([1.5, 2.5, 9.0]), (0, 7)).tolist()
        [2, 2, 7]
    """
    return jnp.clip(jnp.round(position), *codes).astype(jnp.int32)


def spread(grid: Grid, params: GridParams) -> GridParams:
    """The parameters, with a number for every group where the grid keeps one for several.

    Axes of size one stay.

    Example:
        >>> from jquant.grids import GGUF
        >>> grid = GGUF("Q4_K")
        >>> params = grid.fit(jnp.ones((16, 32)))
        >>> params["scale"].shape, spread(grid, params)["scale"].shape
        ((2,), (16,))
    """
    own = getattr(grid, "spread", None)
    return params if own is None else own(params)


def code_dtype(grid: Grid) -> jnp.dtype:
    """The narrowest JAX integer type that holds the grid's codes; XLA packs the sub-byte ones."""
    lo, hi = grid.codes
    signed, unsigned = (
        (jnp.int2, jnp.int4, jnp.int8, jnp.int16),
        (jnp.uint2, jnp.uint4, jnp.uint8, jnp.uint16),
    )
    for dtype in signed if lo < 0 else unsigned:
        if jnp.iinfo(dtype).min <= lo and hi <= jnp.iinfo(dtype).max:
            return jnp.dtype(dtype)
    raise ValueError(f"codes {lo}..{hi} of {grid} do not fit in 16 bits")
