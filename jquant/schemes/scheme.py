"""What to do with each weight: a `Scheme` per path, gathered in a `Plan`.

A scheme is a grid × a rounding × an optional compensation, for groups of weights, and may ask for
quantized inputs too. Everything here is static: schemes print, compare, hash, and are written into
checkpoints as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import jax

from jquant import deprecated
from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.calibration.find import Weight
from jquant.errors import EvidenceError
from jquant.grids.base import Grid
from jquant.rounding.base import Rounding
from jquant.rounding.elementwise import Nearest
from jquant.schemes.lorc import LoRC
from jquant.weights.activations import Activations
from jquant.weights.parts import Choice, Transform


@deprecated.keywords("Scheme")
@jax.tree_util.register_static
@dataclass(frozen=True)
class Scheme:
    """How one weight is quantized.

    Args:
        grid: the values a weight may take, e.g. `grids.Uniform(4)`.
        groups: weights that share grid parameters: None (the group size the grid's format fixes, as
            of MX and NV; else the whole input axis, one group per output channel), an int (groups
            of that size along the input axis) or `Groups(axis, size)`. Read, they are `Groups`.
        rounding: how codes are chosen, e.g. `rounding.GPTQ()`.
        compensation: what makes up for the error that is left, `LoRC(rank)`, or None.
        activations: how the inputs of the weight's products are quantized, `Activations(grid)`, or
            None: not at all.
        transforms: what is taken off the weight before it is rounded, first to last, as the
            protocol `jquant.weights.parts.Transform` says; default none.
        fallback: whether nearest rounding may stand in where the rounding's factorisation fails at
            every damping, and where no token reaches the weight, or one of its experts or layers;
            the report says where it did. Otherwise that is an error.

    Raises:
        ValueError: `grid`, `compensation`, `activations` or a transform is something else.
        PlanError: `activations` ask for a product of integers that grid and groups do not have; a
            transform refuses these.

    Example:
        >>> from jquant.grids import Uniform
        >>> Scheme(Uniform(4), 64).groups
        Groups(axis='in', size=64)
    """

    grid: Grid
    groups: Groups | int | None = None
    rounding: Rounding = Nearest()
    compensation: LoRC | None = None
    activations: Activations | None = None
    transforms: tuple[Transform, ...] = field(default=(), kw_only=True)
    fallback: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.grid, type) or not isinstance(self.grid, Grid):
            raise ValueError(
                "Scheme.grid must be a grid, as grids.Uniform(4), grids.MX() or grids.NF4 are, got "
                f"{self.grid!r}" + ("; call it" if callable(self.grid) else "")
            )
        if not isinstance(self.groups, Groups):
            size = getattr(self.grid, "group", None) if self.groups is None else self.groups
            object.__setattr__(self, "groups", Groups("in", size))
        if not isinstance(self.compensation, LoRC | None):
            raise ValueError(
                f"Scheme.compensation must be a jq.LoRC or None, got {self.compensation!r}"
            )
        if not isinstance(self.activations, Activations | None):
            raise ValueError(
                f"Scheme.activations must be a jq.Activations or None, got {self.activations!r}"
            )
        if not all(isinstance(one, Transform) for one in self.transforms):
            raise ValueError(
                "Scheme.transforms must be a tuple of transforms, see jquant.weights.parts, got "
                f"{self.transforms!r}"
            )
        for part in self.parts:
            part.check(self.grid, self.grouping)

    def __repr__(self) -> str:
        """As it is made, transforms left out where there are none."""
        shown = [f.name for f in fields(self) if f.name != "transforms" or self.transforms]
        return f"Scheme({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def grouping(self) -> Groups:
        """The field `groups`, which may be given as a size, by its type when it is read."""
        assert isinstance(self.groups, Groups)
        return self.groups

    @property
    def needs(self) -> frozenset[str]:
        """What must be told.

        A subset of `{"moment", "drift", "guided", "key", "inputs", "spread"}`.
        """
        return self.rounding.needs.union(*(part.needs for part in self.parts))

    @property
    def parts(self) -> tuple[Choice, ...]:
        """What the weight is to have besides its codes."""
        own = (self.compensation, self.activations)
        return (*(part for part in own if part is not None), *self.transforms)


def check_inputs(name: str, choice: Activations, evidence: Evidence | None) -> None:
    """Refuse static ranges of inputs that evidence (None: there is none) does not tell.

    Raises:
        EvidenceError: names the weight, what is missing, and what to pass.
    """
    who = f"weight {name!r}: " if name else ""
    if evidence is None:
        raise EvidenceError(
            f"{who}static ranges of its inputs need evidence of them; pass calibration batches or "
            "evidence=, or Activations(granularity='token')"
        )
    if evidence.spread is None and ("spread" in choice.needs or evidence.abs_max is None):
        raise EvidenceError(
            f"{who}{choice} needs the spread of the inputs, which this evidence has not; pass "
            "jq.capture(..., spread=True) or batches, or a symmetric grid with range=MinMax()"
        )


@jax.tree_util.register_static
@dataclass(frozen=True)
class Keep:
    """The choice to leave a weight as it is. Use the value `keep`."""


keep = Keep()


@dataclass(frozen=True)
class Plan(Mapping[str, Scheme]):
    """Path → `Scheme` for every weight that is to be quantized.

    Attributes:
        schemes: the mapping.
        weights: path → `Weight`, of the weights that are kept too.

    Example:
        >>> from jquant.grids import Uniform
        >>> list(Plan({"w": Scheme(Uniform(4))}, {}))
        ['w']
    """

    schemes: Mapping[str, Scheme]
    weights: Mapping[str, Weight]

    def __getitem__(self, path: str) -> Scheme:
        return self.schemes[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.schemes)

    def __len__(self) -> int:
        return len(self.schemes)
