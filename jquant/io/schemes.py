"""Static choices (grids, blocks, layouts, dtypes) as JSON, and back, without running any code.

A choice is a frozen dataclass of plain values, so it is written as `{"ClassName": {field: value}}`,
a tuple as a list, a dtype as `{"dtype": name}`, and scalars as they are. Reading looks the name up
in a fixed table (the grids jquant exports, the classes of `axes/` and `weights/activations.py`): a
file can name a class only if it stands there, and can only call it with values of the kinds above.
Every field is written, defaults too, so a file means the same when a default changes; but for those
that a class has got later (`ADDED`), whose value in older files is known.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant import grids
from jquant.axes.groups import Blocks
from jquant.axes.layout import Factor, Layout
from jquant.errors import CheckpointError, near
from jquant.io.leaves import JAX_DTYPES
from jquant.weights.activations import Activations, Percentile

# Fields that files of version 1 may lack, with what they mean then.
ADDED: Mapping[str, Mapping[str, Any]] = {"Float": {"negative_zero": False}}

FLOATS = tuple(name for name, dtype in JAX_DTYPES.items() if jnp.issubdtype(dtype, jnp.floating))


@functools.cache
def classes() -> Mapping[str, type]:
    """The classes a file may name: dataclasses of grids, `axes/groups.py`, `activations.py`."""
    exported = [getattr(grids, name) for name in grids.__all__]
    own = [c for c in exported if isinstance(c, type) and dataclasses.is_dataclass(c)]
    return {c.__name__: c for c in (*own, Blocks, Factor, Layout, Activations, Percentile)}


def to_json(value: Any) -> Any:
    """A static value as JSON.

    Raises:
        ValueError: the value, or one inside it, is of a kind that cannot be read back.

    Example:
        >>> to_json(Blocks("in", 64))
        {'Blocks': {'axis': 'in', 'size': 64}}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [to_json(value.real), to_json(value.imag)]}
    if isinstance(value, (np.dtype, type(jnp.float32))) or (
        isinstance(value, type) and issubclass(value, np.generic)
    ):
        # A dtype and the scalar type of the same name are equal but hash apart: keep which it was.
        return {"dtype" if isinstance(value, np.dtype) else "scalar": jnp.dtype(value).name}
    kind = type(value)
    if classes().get(kind.__name__) is kind:
        return {kind.__name__: {n: to_json(field) for n, field in _written(value).items()}}
    if isinstance(value, tuple) and kind is tuple:
        return [to_json(item) for item in value]
    raise ValueError(
        f"{value!r} ({kind.__name__}) cannot be stored: static fields may hold None, bool, int, "
        f"float, str, dtypes, tuples, and {', '.join(classes())}"
    )


def from_json(data: Any) -> Any:
    """The static value that `to_json` wrote.

    Raises:
        CheckpointError: an unknown class or kind, or values that the class itself refuses.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict):
        # Wider integers than a machine word belong to no choice, and could only make one hang.
        if isinstance(data, int) and abs(data) >= 1 << 63:
            raise CheckpointError(f"a scheme holds an integer of {data.bit_length()} bits")
        return data
    if len(data) != 1:
        raise CheckpointError(f"a scheme must name one class, got {sorted(data)[:4]}")
    ((name, value),) = data.items()
    if name in _SCALARS:
        return _SCALARS[name](value)
    if name not in classes() or not isinstance(value, dict):
        raise _no_class(name)
    kind = classes()[name]
    value = {**ADDED.get(name, {}), **value}
    if set(value) != set(_fields(kind)):
        raise CheckpointError(
            f"{name} has the fields {list(_fields(kind))}, the file has {sorted(value)[:16]}"
        )
    fields = {key: from_json(item) for key, item in value.items()}
    try:
        return kind(**fields)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} refuses the values in the file: {error}") from error


def _written(value: Any) -> dict[str, Any]:
    """The fields of a choice that a file holds: all but those that older files mean anyway."""
    fields = {name: getattr(value, name) for name in _fields(type(value))}
    added = ADDED.get(type(value).__name__, {})
    return {n: field for n, field in fields.items() if n not in added or added[n] != field}


def _no_class(name: str) -> CheckpointError:
    return CheckpointError(
        f"a scheme names {name!r}, which this version of jquant does not have; "
        f"nearest known: {near(name, classes())}"
    )


def _float(value: Any) -> float:
    if value not in ("inf", "-inf", "nan"):
        raise _no_class("float")
    return float(value)


def _complex(value: Any) -> complex:
    parts = from_json(value) if isinstance(value, list) and len(value) == 2 else ()
    if not parts or not all(isinstance(part, (int, float)) for part in parts):
        raise _no_class("complex")
    return complex(*parts)


def _scalar(value: Any) -> Any:
    if value not in FLOATS:
        raise CheckpointError(f"a scheme names the dtype {value!r}; a weight has a float dtype")
    return getattr(jnp, value)


# What is no class of ours: how to read it, by name.
_SCALARS: Mapping[str, Callable[[Any], Any]] = {
    "float": _float,
    "complex": _complex,
    "dtype": lambda value: jnp.dtype(_scalar(value)),
    "scalar": _scalar,
}


def _fields(kind: type) -> tuple[str, ...]:
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind) if field.init)
    return Factor._fields
