"""What belongs to a quantized weight besides its codes: a low-rank term, quantized inputs, ….

With `V` the values of its codes, a weight of parts 1 … n, innermost first, stands for

    part_n.weight( … part_1.weight(V))

and a product with it takes the parts off from outside in, on the side where they cost less:

    x · part.weight(V)ᵀ  =  part.rows(x) · Vᵀ  +  (x · rightᵀ) · leftᵀ

with `left, right = part.factors()`.

A part has thin products beside it (`rank` of them) or acts on the rows of the input, and leaves the
other as it is. A part that `alters` products is one for which this is not an equality: quantized
inputs are no property of the array that the weight stands for, but its products see them.

A part is a frozen dataclass and a pytree. All of its arrays have the weight's batch axes first, so
that what slices, turns or stacks codes does the same to it. What a scheme says of it is a `Choice`:
static, and of a transform also how it is taken off a weight before that is rounded. Checkpoints
hold the parts that `io.tree.NODES` names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from jquant.axes.groups import Groups
from jquant.grids.base import Grid


@runtime_checkable
class Part(Protocol):
    """What belongs to a quantized weight besides its codes; see the module."""

    @property
    def alters(self) -> bool:
        """Whether products with the weight differ from those of the array it stands for."""
        ...

    @property
    def rank(self) -> int:
        """The rank of the thin products beside the codes' own; 0: there are none."""
        ...

    def weight(self, values: Float[Array, "*batch out in"]) -> Float[Array, "*batch out in"]:
        """What the weight stands for, of what the parts inside stand for; float32.

        Of a part that was `picked`, values are those of the picked rows, `[*rows, in]`.
        """
        ...

    def rows(self, x: Float[Array, "*batch tokens in"]) -> Float[Array, "*batch tokens in"]:
        """What the parts inside see of an input of any float dtype; float32."""
        ...

    def factors(self) -> tuple[Float[Array, "*batch out rank"], Float[Array, "*batch rank in"]]:
        """The factors of the thin products, float32; asked for where `rank` is not 0."""
        ...

    def picked(self, pick: Callable[[Array], Array]) -> Part:
        """The part of looked up rows of a table; `pick` gives those of an array `[rows, …]`."""
        ...

    def array_bits(self) -> list[float]:
        """The stored bits of each of its arrays."""
        ...

    def check(self, whole: Any) -> None:
        """Raise if the part, whose arrays may be abstract, cannot be what it says.

        Args:
            whole: the `QTensor` it is of; None where it stands alone.

        Raises:
            TypeError, ValueError: it cannot, or does not fit the weight.
        """
        ...


@runtime_checkable
class Choice(Protocol):
    """What a scheme says of a part; static, hashable, and printed as it is made."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be told to make the part, see `Scheme.needs`."""
        ...

    @property
    def label(self) -> str:
        """The choice in a few words, as reports show it."""
        ...

    def check(self, grid: Grid, groups: Groups) -> None:
        """Refuse grids and groups that the part cannot be of.

        Raises:
            PlanError: it cannot.
        """
        ...


@runtime_checkable
class Transform(Protocol):
    """A choice that is taken off a weight before its codes are chosen."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def label(self) -> str: ...

    def check(self, grid: Grid, groups: Groups) -> None: ...

    def apart(
        self, w: Float[Array, "*batch out in"], evidence: Any
    ) -> tuple[Part, Float[Array, "*batch out in"], Any]:
        """The part, the weight that is left to be rounded, and the evidence of its inputs.

        `part.weight(left)` is the weight; what is left sees `part.rows` of its inputs.
        """
        ...
