"""What a user of the walker decides: which values are special, and what becomes of them.

`walker` is the `programs.walker.Walker` that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax.extend import core


@runtime_checkable
class Client(Protocol):
    """What a user of the walker decides."""

    def special(self, value: Any, /) -> bool:
        """Whether a value needs the client's attention."""
        ...

    def asks(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> bool:
        """Whether the rule is to be asked about an equation without special operands."""
        ...

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Any, /) -> Sequence[Any] | None:
        """The results of an equation with a special operand; None lets the walker descend."""
        ...

    def drop(self, value: Any, eqn: core.JaxprEqn, data: bool = False, /) -> jax.Array:
        """An ordinary array in place of a special value that cannot go on as such; may raise.

        `data`: it is the first of the values that a loop makes of it and of ordinary ones.
        """
        ...

    def leave(self, results: list[Any], walker: Any) -> list[Any]:
        """The results of a function, or of the body of a loop or branch, that is left now."""
        ...

    def names(self, value: Any) -> Collection[Any]:
        """The first items of the keys under which this special value's emissions are filed."""
        ...

    def merge(self, left: Any, right: Any) -> Any:
        """The sum of two emissions; zeros are neutral."""
        ...


Rule = Callable[[core.JaxprEqn, list[Any], Any], Sequence[Any] | None]


def _never(value: Any) -> bool:
    return False


def _nothing_to_drop(value: Any, eqn: core.JaxprEqn, data: bool = False) -> jax.Array:
    raise AssertionError("this client has no special values")


@dataclass(frozen=True)
class Silent:
    """A client that emits nothing and asks about no equation of ordinary values: a rule alone.

    Attributes:
        rule: see `Client`.
        special: likewise; None is by default.
        drop: likewise.
    """

    rule: Rule
    special: Callable[[Any], bool] = _never
    drop: Callable[..., jax.Array] = _nothing_to_drop

    def asks(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> bool:
        return False

    def leave(self, results: list[Any], walker: Any) -> list[Any]:
        return results

    def names(self, value: Any) -> tuple[()]:
        return ()

    def merge(self, left: Any, right: Any) -> Any:
        raise AssertionError("this client emits nothing")
