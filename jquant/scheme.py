"""What to do with each weight: a `Scheme` per path, gathered in a `Plan`.

A scheme is a grid × a rounding × an optional compensation (activations join later), for groups of
weights. Everything here is static: schemes print, compare, hash, and are written into checkpoints
as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax

from jquant.blocks import Blocks
from jquant.calibration.weights import Weight
from jquant.compensation import LoRC
from jquant.grids.base import Grid
from jquant.rounding.base import Rounding
from jquant.rounding.elementwise import Nearest


@jax.tree_util.register_static
@dataclass(frozen=True)
class Scheme:
    """How one weight is quantized.

    Args:
        grid: the values a weight may take, e.g. `grids.Uniform(4)`.
        blocks: groups that share grid parameters: None (the group size the grid's format fixes, as
            of MX and NV; else the whole input axis, one group per output channel), an int (groups
            along the input axis) or `Blocks(axis, size)`.
        rounding: how codes are chosen, e.g. `rounding.GPTQ()`.
        compensation: what makes up for the error that is left, `LoRC(rank)`, or None.
        fallback: whether nearest rounding may stand in where the rounding's factorisation fails at
            every damping; the report says where it did. Otherwise that is an error.

    Raises:
        ValueError: `compensation` is something else.

    Example:
        >>> from jquant.grids import Uniform
        >>> Scheme(Uniform(4), 64).blocks
        Blocks(axis='in', size=64)
    """

    grid: Grid
    blocks: Blocks | int | None = None
    rounding: Rounding = Nearest()
    compensation: LoRC | None = None
    fallback: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.blocks is None:
            object.__setattr__(self, "blocks", Blocks("in", getattr(self.grid, "group", None)))
        elif not isinstance(self.blocks, Blocks):
            object.__setattr__(self, "blocks", Blocks("in", self.blocks))
        if not isinstance(self.compensation, LoRC | None):
            raise ValueError(
                f"Scheme.compensation must be a jq.LoRC or None, got {self.compensation!r}"
            )

    @property
    def groups(self) -> Blocks:
        """The blocks, as `Blocks`."""
        assert isinstance(self.blocks, Blocks)
        return self.blocks

    @property
    def needs(self) -> frozenset[str]:
        """What rounding and compensation must be told: a subset of `{"moment", "drift", "key"}`."""
        more = frozenset() if self.compensation is None else self.compensation.needs
        return self.rounding.needs | more


@jax.tree_util.register_static
@dataclass(frozen=True)
class Keep:
    """The choice to leave a weight as it is. Use the value `keep`."""


keep = Keep()


@dataclass(frozen=True)
class Plan(Mapping[str, Scheme]):
    """Path → `Scheme` for every weight that is to be quantized, with what is known of the weights.

    Weights that are kept are in `weights` but not in the mapping.
    """

    schemes: Mapping[str, Scheme]
    weights: Mapping[str, Weight]

    def __getitem__(self, path: str) -> Scheme:
        return self.schemes[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.schemes)

    def __len__(self) -> int:
        return len(self.schemes)
