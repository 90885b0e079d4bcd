"""When two equations are the same computation: keys that do not see names or where code was traced.

Thirty equal blocks are thirty runs of equations that differ in their variables only. A key says all
that matters of an equation but its operands: the primitive and its parameters, with jaxprs inside
them keyed in the same way, variables numbered as they come. Keys are hashable; equal keys mean one
compiled program. `text` renders a key for a fingerprint that outlives the process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jquant.programs.calls import callee, close

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def equation_key(eqn: core.JaxprEqn) -> Hashable:
    """The primitive and its parameters.

    A call is what its body is: its other parameters say how to differentiate it.
    """
    body = callee(eqn)
    if body is not None:
        return eqn.primitive.name, jaxpr_key(body)
    return eqn.primitive.name, _params(eqn.params)


def literal_key(value: Any) -> Hashable:
    """A number or a small array, by its bits."""
    array = np.asarray(value)
    return array.dtype.name, array.shape, array.tobytes()


def const_key(array: Any) -> Hashable:
    """An array that is closed over, by a digest of its bits."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    bits = np.asarray(array)
    return bits.dtype.name, bits.shape, hashlib.sha256(bits.tobytes()).hexdigest()


def text(key: Hashable) -> str:
    """A key in words, the same in every process."""
    return _ADDRESS.sub("", repr(key))


def _params(params: Mapping[str, Any]) -> Hashable:
    return tuple((name, _value(params[name])) for name in sorted(params))


def _value(value: Any) -> Hashable:
    if isinstance(value, core.ClosedJaxpr):
        return jaxpr_key(value)
    if isinstance(value, core.Jaxpr):
        return jaxpr_key(close(value))
    if isinstance(value, np.ndarray):
        return literal_key(value)
    if isinstance(value, Mapping):
        return _params({str(key): item for key, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(map(_value, value))
    if isinstance(value, frozenset | set):  # whose order is another one in every process
        return type(value).__name__, tuple(sorted((_value(item) for item in value), key=repr))
    try:
        hash(value)
    except TypeError:
        return id(value), repr(value)  # told apart from all others: at worst, compiled twice
    return value


def jaxpr_key(closed: core.ClosedJaxpr) -> Hashable:
    """Equations, how they are wired, and the arrays they close over."""
    jaxpr = closed.jaxpr
    numbers: dict[Any, int] = {}

    def name(variables: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(
            literal_key(v.val)
            if isinstance(v, core.Literal)
            else (numbers.setdefault(v, len(numbers)), v.aval.shape, str(v.aval.dtype))
            for v in variables
        )

    head = name(jaxpr.constvars), name(jaxpr.invars)
    body = tuple((equation_key(e), name(e.invars), name(e.outvars)) for e in jaxpr.eqns)
    return head, body, name(jaxpr.outvars), tuple(map(const_key, closed.consts))
