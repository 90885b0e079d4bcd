"""What a rounding makes of evidence before it sees a weight, once for all with the same inputs.

The weights of a query, a key and a value have one second moment, and so do those of a gate and what
it is multiplied with. A rounding whose method `prepare(evidence, groups)` does what the evidence
alone decides (GPTQ factorises it) is called with the result in place of the evidence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax

from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.rounding.base import Rounding


def prepared_for(rounding: Rounding, evidence: Evidence | None, groups: Groups) -> Any:
    """What a rounding makes of evidence before it sees a weight, to be passed on as evidence.

    That is what its method `prepare(evidence, groups)` returns, or the evidence itself if there is
    no such method. It serves all weights with these inputs, this rounding and these groups.

    Example:
        >>> from jquant.rounding import Nearest
        >>> evidence = Evidence.of(jax.numpy.ones((2, 4)))
        >>> prepared_for(Nearest(), evidence, Groups()) is evidence
        True
    """
    own = getattr(rounding, "prepare", None)
    return evidence if own is None or evidence is None else own(evidence, groups)


class LastCall:
    """A function that returns its last result when it is called on the same arrays again.

    The same arrays are the same objects; whatever is static compares as equal. It holds on to the
    arguments and the result of the last call, until it is told to forget them.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.forget()

    def forget(self) -> None:
        """Let go of the last call."""
        self.last: tuple[Any, list[Any], Any] | None = None

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        if self.last is None or self.last[0] != structure or not _same(self.last[1], leaves):
            self.forget()
            self.last = structure, leaves, self.function(*args)
        return self.last[2]


def _same(one: list[Any], two: list[Any]) -> bool:
    return all(map(operator.is_, one, two))
