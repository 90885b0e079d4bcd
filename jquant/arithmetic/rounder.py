"""What becomes of each equation of an emulated program: a table from primitives to actions.

Every equation is left as it stands, converted, rounded, written out as a sum term by term, entered
(calls and loops), or refused; `ACTIONS` in `operations.py` says which, but for what depends on the
equation: results that are no floating numbers, sums that are to have an order, complex operands,
and primitives that the user's rules name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float32, PRNGKeyArray, UInt32

from jquant.arithmetic.once import once
from jquant.arithmetic.operations import (
    ACTIONS,
    ARITHMETIC,
    COMPLEX,
    CONVERSIONS,
    SUMS,
    UNORDERED,
    Operation,
    scope,
)
from jquant.arithmetic.rules import Lookup, Rules
from jquant.arithmetic.sums import in_order
from jquant.arithmetic.targets import Numbers, check, rounded
from jquant.errors import UnsupportedPrimitiveError
from jquant.numerics import noise
from jquant.programs.calls import split_axes
from jquant.programs.walker import DESCENDED, Walker, bind, trace

Rounding = Literal["nearest", "stochastic"]
Operations = Literal["all", "arithmetic"]
Sums = Literal["result", "sequential"]


@dataclass(frozen=True)
class Settings:
    """The arguments of `emulate`, all static."""

    rules: Rules
    rounding: Rounding
    operations: Operations
    sums: Sums
    source: noise.Source


class Rounder:
    """The rule of a walker that asks about every equation, for one trace of a program.

    Args:
        settings: see there.
        traced: the traced numbers of bits of the settings' rules.
        key: of random numbers, for stochastic rounding.
        one: see `once.py`.
    """

    def __init__(
        self,
        settings: Settings,
        traced: list[Array],
        key: PRNGKeyArray | None,
        one: Float32[Array, ""] | None,
    ):
        self.settings = settings
        self.traced = traced
        self.one = one
        self.target = Lookup(settings.rules)
        self.hashed = settings.source == "hash"
        self.start: Any = None  # of random words
        if settings.rounding == "stochastic":
            assert key is not None
            self.start = noise.seed(key) if self.hashed else key
        self.numbers: dict[Any, int] = {}  # of operations, by where they stand

    def constant(self, value: Any, kind: Any, walker: Walker, what: str = "constant") -> Any:
        """What the program gets from elsewhere, as a number of the format."""
        if self.settings.operations != "all" or not _floating(kind):
            return value
        operation = Operation(what, kind.dtype.name, scope(walker.within))
        return self._nearest(jnp.asarray(value, kind.dtype), operation)

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any] | None:
        """The results of an equation; None lets the walker enter it."""
        return _DOES[self._action(eqn, walker)](self, eqn, values, walker)

    def _action(self, eqn: core.JaxprEqn, walker: Walker) -> str:
        name, settings = eqn.primitive.name, self.settings
        if name in DESCENDED:
            return "enter"
        if not any(_floating(var.aval) for var in eqn.outvars):
            return "leave"
        if settings.sums == "sequential" and name in SUMS | UNORDERED:
            if self.target(self._operation(eqn, 0, walker)) is not None:
                return "write out"
        if name in COMPLEX and _complex(eqn.invars[0].aval):
            return "round"
        unknown = "round" if settings.rules.names(name) else "refuse"
        return ACTIONS.get(name, unknown)

    def _enter(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> None:
        if eqn.primitive.name == "shard_map" and self.start is not None and split_axes(eqn):
            raise UnsupportedPrimitiveError(
                f"'shard_map' on a mesh with axes {split_axes(eqn)}: every device would round its "
                "part by the same random words; pass rounding='nearest', or make the function for "
                "a mesh of one device"
            )

    def _leave(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        return bind(eqn, values)

    def _convert(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        does = self._round if self.settings.operations == "all" else self._leave
        return does(eqn, values, walker)

    def _write_out(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        name = eqn.primitive.name
        if name in UNORDERED:
            raise UnsupportedPrimitiveError(
                f"{name} adds in an order that is the compiler's; sums='sequential' knows "
                f"{sorted(SUMS)}: write it with those, or pass sums='result'"
            )
        return walker.run(trace(in_order(eqn), *values)[0], values)

    def _refuse(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        name = eqn.primitive.name
        raise UnsupportedPrimitiveError(
            f"emulate does not know what the primitive {name!r} computes; give it a rule of "
            f"its own: {{{name!r}: None, ...}} leaves its results, a format rounds them"
        )

    def _round(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> list[Any]:
        return [
            self._result(value, at, self._operation(eqn, at, walker), walker)
            if _floating(var.aval)
            else value
            for at, (var, value) in enumerate(zip(eqn.outvars, bind(eqn, values), strict=True))
        ]

    def _result(self, value: Array, at: int, operation: Operation, walker: Walker) -> Array:
        """A result of an operation that computes, or converts, rounded."""
        target = self.target(operation)
        if target is None:
            return value
        if self.start is None or operation.primitive in CONVERSIONS:
            number = self._nearest(value, operation)
        else:
            number = self._at_random(value, at, operation, walker)
        # Whole formats take some forty instructions: too many for every reader to repeat.
        whole = isinstance(target, Numbers) and operation.primitive in ARITHMETIC
        return once(number, self.one) if whole else number

    def _nearest(self, value: Array, operation: Operation) -> Array:
        target = self.target(operation)
        if target is None:
            return value
        check(target, operation.dtype, operation.primitive, random=False)
        return rounded(value, target, self.traced)

    def _at_random(self, value: Array, at: int, operation: Operation, walker: Walker) -> Array:
        target = self.target(operation)
        assert target is not None
        check(target, operation.dtype, operation.primitive, random=True)
        number = self.numbers.setdefault((*walker.site, at), len(self.numbers))
        shape = (2, *value.shape) if _complex(value) else value.shape
        return rounded(value, target, self.traced, self._words(shape, number, walker))

    def _words(self, shape: tuple[int, ...], number: int, walker: Walker) -> UInt32[Array, "..."]:
        """The random words of one operation, at this step of the loops around it."""
        fold: Any = noise.fold if self.hashed else jax.random.fold_in
        here = walker.share(
            "start", walker.steps, lambda: functools.reduce(fold, walker.steps, self.start)
        )
        if self.hashed:
            return noise.hashed(here, shape, number)
        return noise.words(jax.random.fold_in(here, number), shape, "threefry")

    def _operation(self, eqn: core.JaxprEqn, at: int, walker: Walker) -> Operation:
        """What rules are asked about: of the terms of a sum, the sum."""
        within = walker.within
        if self.settings.sums == "sequential":
            sums = (k for k, e in enumerate(within) if e.primitive.name in SUMS)
            last = next(sums, len(within) - 1)
            eqn, within = within[last], within[: last + 1]
        kind: Any = eqn.outvars[min(at, len(eqn.outvars) - 1)].aval
        return Operation(eqn.primitive.name, kind.dtype.name, scope(within))


_DOES: dict[str, Callable[..., Sequence[Any] | None]] = {
    "enter": Rounder._enter,
    "leave": Rounder._leave,
    "convert": Rounder._convert,
    "round": Rounder._round,
    "write out": Rounder._write_out,
    "refuse": Rounder._refuse,
}


def _floating(kind: Any) -> bool:
    return jnp.issubdtype(kind.dtype, jnp.inexact)


def _complex(kind: Any) -> bool:
    return jnp.issubdtype(kind.dtype, jnp.complexfloating)
