"""Which format an operation is rounded to: one for all, ordered rules, or a function.

Rules map regular expressions to formats; the first one that matches the whole of an operation's
primitive (`"exp"`), its dtype (`"float64"`) or its path (`"physics/clouds/exp"`: named scopes, then
the primitive) decides, and what none matches is left as it is. Static: all but traced numbers
of bits, which are kept beside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from jquant.arithmetic.operations import Operation
from jquant.arithmetic.targets import Target, target
from jquant.errors import FormatError, near
from jquant.grids.base import Grid


@dataclass(frozen=True)
class Rules:
    """Pairs of an expression and a target in order; or a function of the operation."""

    pairs: tuple[tuple[str, Target | None], ...] = ()
    function: Callable[[Operation], Any] | None = None

    @staticmethod
    def of(format: Any) -> tuple[Rules, list[Array]]:
        """The rules that a user's format means, and the traced numbers of bits in it."""
        traced: list[Array] = []
        if callable(format) and not isinstance(format, type | Grid):
            return Rules(function=format), traced
        if not isinstance(format, Mapping):
            return Rules(((".*", target(format, traced, "format")),)), traced
        if not format:
            raise FormatError("format: got a mapping without rules; pass {'.*': bits}")
        for pattern in format:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                message = f"rule {pattern!r} is not a regular expression: {error}"
                raise FormatError(message) from error
        pairs = ((pattern, target(f, traced, f"rule {pattern!r}")) for pattern, f in format.items())
        return Rules(tuple(pairs)), traced

    def names(self, primitive: str) -> bool:
        """Whether they say something of exactly this primitive; a function does of any."""
        return self.function is not None or any(pattern == primitive for pattern, _ in self.pairs)


class Lookup:
    """Rules at work on one program: what they say of an operation, and which of them said it."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self.seen: dict[Operation, Target | None] = {}
        self.used: set[int] = set()

    def __call__(self, operation: Operation) -> Target | None:
        if operation not in self.seen:
            self.seen[operation] = self._find(operation)
        return self.seen[operation]

    def _find(self, operation: Operation) -> Target | None:
        if self.rules.function is not None:
            traced: list[Array] = []
            chosen = target(self.rules.function(operation), traced, f"rule for {operation}")
            if traced:
                raise FormatError(
                    f"rule for {operation}: a function gives static formats; pass a mapping for "
                    "traced numbers of bits"
                )
            return chosen
        for at, (pattern, chosen) in enumerate(self.rules.pairs):
            if operation.matches(re.compile(pattern)):
                self.used.add(at)
                return chosen
        return None

    def check(self) -> None:
        """Refuse rules that decided nothing; a last `".*"` may be left over.

        Raises:
            FormatError: naming the rule and what the program has.
        """
        for at, (pattern, _) in enumerate(self.rules.pairs):
            if at not in self.used and not (pattern == ".*" and at == len(self.rules.pairs) - 1):
                names = {f"{o.scope}/{o.primitive}".lstrip("/") for o in self.seen}
                names |= {o.dtype for o in self.seen} | {o.primitive for o in self.seen}
                raise FormatError(
                    f"rule {pattern!r} decides nothing (it must match a whole primitive, dtype or "
                    f"scope/primitive, and come first); the program has {near(pattern, names, 5)}"
                )
