"""What a rounding is: a choice of one code per weight on a grid somebody else owns.

A rounding is a frozen dataclass registered static. It is called with a weight in the canonical view
`[*batch, out, in]`, and says by `needs` what it must be told beyond the weight: `"moment"` (the
second moment of its inputs), `"drift"` (how far those inputs are from the unquantized network's),
`"guided"` (moments weighed by what errors of the outputs cost) or `"key"` (randomness). By `papers`
it may say what to cite (see `schemes/cite.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.grids.base import Grid, GridParams


class Rounded(NamedTuple):
    """The result of a rounding.

    Attributes:
        codes: `[*batch, out, in]`, in the grid's code dtype.
        params: the grid's parameters, leaves `[*batch, rows, n]` or `[*batch, rows, n, k]`.
        info: numbers about the rounding, `[*batch]`.
        target: the weight that the codes are to come near to, where it is not the given one: a
            low-rank term makes up for the codes' distance from it.
    """

    codes: Integer[Array, "*batch out in"]
    params: GridParams  # leaves [*batch, rows, n] or [*batch, rows, n, k]
    info: Mapping[str, Array]
    target: Float[Array, "*batch out in"] | None = None


def label_of(rounding: Rounding) -> str:
    """What reports and messages call a rounding: its attribute `label`, or its class's name.

    Example:
        >>> from jquant.rounding import GPTQ, Polish
        >>> label_of(Polish(GPTQ()))
        'Polish(GPTQ)'
    """
    return getattr(rounding, "label", type(rounding).__name__)


@runtime_checkable
class Rounding(Protocol):
    """How codes are chosen: a frozen dataclass registered static, called with a weight and a grid.

    `needs` names what must be told beside the weight: "moment" (the second moment of its inputs),
    "drift" (how far these are from the unquantized network's), "guided" (moments weighed by what
    errors of the outputs cost) and "key" (randomness). A rounding may have a method
    `prepare(evidence, groups)`: what it returns is passed on as evidence for every weight with
    these inputs. Papers to cite stand in an attribute `papers`, as BibTeX keys.

    Example:
        >>> from jquant.rounding import GPTQ
        >>> sorted(GPTQ(correction="qep").needs)
        ['drift', 'moment']
    """

    @property
    def needs(self) -> frozenset[str]:
        """A subset of `{"moment", "drift", "guided", "key"}`."""
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


def mapped(one: Callable[..., Any], batch: tuple[int, ...]) -> Callable[..., Any]:
    """A function of one matrix, and of what belongs to it, over these leading axes.

    Example:
        >>> mapped(jax.numpy.trace, (2, 3))(jax.numpy.ones((2, 3, 4, 4))).shape
        (2, 3)
    """
    for _ in batch:
        one = jax.vmap(one)
    return one
