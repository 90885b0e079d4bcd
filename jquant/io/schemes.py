"""Static choices (grids, groups, layouts, dtypes) as JSON, and back, without running any code.

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
from jquant.axes.groups import Groups
from jquant.axes.layout import Factor, Layout
from jquant.errors import CheckpointError, near
from jquant.io.leaves import JAX_DTYPES
from jquant.weights.activations import Activations, Percentile

# What files call by another name than the code does: they keep the words in which version 1 was
# first written, so that old files are read, and new ones by older versions of jquant.
_WORDS: Mapping[Any, str] = {
    "Groups": "Blocks", "groups": "blocks", "compute": "path", "fake_quant": "simulated",
}  # fmt: skip
_NAMES: Mapping[Any, str] = {word: name for name, word in _WORDS.items()}

# Fields that files of version 1 may lack, with what they mean then.
ADDED: Mapping[str, Mapping[str, Any]] = {
    "Float": {"negative_zero": False, "macro": None, "four_six": False, "tensor_scale": True}
}

FLOATS = tuple(name for name, dtype in JAX_DTYPES.items() if jnp.issubdtype(dtype, jnp.floating))


def word(name: str) -> str:
    """The word in files for a class, a field or a value of one."""
    return _WORDS.get(name, name)


@functools.cache
def classes() -> Mapping[str, type]:
    """The classes a file may name, by their words: of grids, `axes/` and `activations.py`."""
    exported = [getattr(grids, name) for name in grids.__all__]
    own = [c for c in exported if isinstance(c, type) and dataclasses.is_dataclass(c)]
    return {word(c.__name__): c for c in (*own, Groups, Factor, Layout, Activations, Percentile)}


def to_json(value: Any) -> Any:
    """A static value as JSON.

    Raises:
        ValueError: the value, or one inside it, is of a kind that cannot be read back.

    Example:
        >>> to_json(Groups("in", 64))  # called Blocks when the format was made
        {'Blocks': {'axis': 'in', 'size': 64}}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return _WORDS.get(value, value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [to_json(value.real), to_json(value.imag)]}
    if _names_dtype(value):
        # A dtype and the scalar type of the same name are equal but hash apart: keep which it was.
        return {"dtype" if isinstance(value, np.dtype) else "scalar": jnp.dtype(value).name}
    kind = type(value)
    if classes().get(word(kind.__name__)) is kind:
        return {word(kind.__name__): _fields_json(value)}
    if kind is tuple:
        return [to_json(item) for item in value]
    raise ValueError(
        f"{value!r} ({kind.__name__}) cannot be stored: static fields may hold None, bool, int, "
        f"float, str, dtypes, tuples, and {', '.join(classes())}"
    )


def _names_dtype(value: Any) -> bool:
    """Whether a value is a dtype, or a scalar type of NumPy's or JAX's."""
    scalar = isinstance(value, type) and issubclass(value, np.generic)
    return scalar or isinstance(value, (np.dtype, type(jnp.float32)))


def _fields_json(value: Any) -> dict[str, Any]:
    """The fields of an instance of one of `classes`, but those that an older file would lack."""
    added = ADDED.get(word(type(value).__name__), {})
    fields = {field: getattr(value, field) for field in _fields(type(value))}
    return {
        word(field): to_json(own)
        for field, own in fields.items()
        if field not in added or added[field] != own
    }


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
        return _NAMES.get(data, data)
    if len(data) != 1:
        raise CheckpointError(f"a scheme must name one class, got {sorted(data)[:4]}")
    ((name, value),) = data.items()
    if name in _SCALARS:
        return _SCALARS[name](value)
    if name not in classes() or not isinstance(value, dict):
        raise _no_class(name)
    kind = classes()[name]
    value = {**ADDED.get(name, {}), **value}
    names = {word(field): field for field in _fields(kind)}
    if set(value) != set(names):
        raise CheckpointError(
            f"{name} has the fields {list(names)}, the file has {sorted(value)[:16]}"
        )
    fields = {names[key]: from_json(item) for key, item in value.items()}
    try:
        return kind(**fields)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} refuses the values in the file: {error}") from error


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
