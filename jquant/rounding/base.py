"""What a rounding is: a choice of one code per weight on a grid somebody else owns.

A rounding is a frozen dataclass registered static. It is called with a weight in the canonical view
`[*batch, out, in]`, and says by `needs` what it must be told beyond the weight: `"moment"` (the
second moment of its inputs), `"drift"` (how far those inputs are from the unquantized network's) or
`"key"` (randomness). By `papers` it may say what to cite (see `schemes/cite.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.grids.base import Grid, GridParams


class Rounded(NamedTuple):
    """Codes, the group parameters they refer to, and what happened (scalars per `[*batch]`).

    `target` is the weight that the codes are to come near to, where that is another than the one
    given: what makes up for their error must know.
    """

    codes: Integer[Array, "*batch out in"]
    params: GridParams  # leaves [*batch, rows, n] or [*batch, rows, n, k]
    info: Mapping[str, Array]
    target: Float[Array, "*batch out in"] | None = None


@runtime_checkable
class Rounding(Protocol):
    """A rounding. See the module docstring, and `prepare.py` for a method it may bring besides."""

    @property
    def needs(self) -> frozenset[str]:
        """A subset of `{"moment", "drift", "key"}`."""
        ...

    def __call__(
        self,
        w: Float[Array, "*batch out in"],
        grid: Grid,
        groups: Groups = Groups(),
        *,
        evidence: Evidence | Float[Array, "*batch in in"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Rounded:
        """Round `w` on `grid` in `groups`."""
        ...
