"""Refusals of arguments in words: what the argument is called, what it may be, and what it was."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax


def integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is no integer in a range, True and False included; `most=None`: without end.

    Raises:
        ValueError: it is not.

    Example:
        >>> integer("Grid.bits", 9, 2, 8)
        Traceback (most recent call last):
        ValueError: Grid.bits must be an int from 2 to 8, got 9
    """
    if not _is_integer(value) or value < least or (most is not None and value > most):  # type: ignore[operator]
        span = f"from {least} on" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an int {span}, got {value!r}")


def integer_or_none(name: str, value: object) -> None:
    """Refuse what is neither an integer nor None. ValueError: it is neither."""
    if value is not None and not _is_integer(value):
        raise ValueError(f"{name} must be an int or None, got {value!r}")


def boolean(name: str, value: object) -> None:
    """Refuse what is neither True nor False. ValueError: it is neither."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Refuse what is not among these. ValueError: it is not."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def made_by(name: str, value: object, *types: type) -> None:
    """Refuse what is of none of these types. ValueError: it is of none.

    Example:
        >>> made_by("Grid.range", 3, int, float)
        >>> made_by("Grid.range", "3", int, float)
        Traceback (most recent call last):
        ValueError: Grid.range must be int() or float(), got '3'
    """
    if not isinstance(value, types):
        *first, last = (f"{kind.__name__}()" for kind in types)
        kinds = f"{', '.join(first)} or {last}" if first else last
        raise ValueError(f"{name} must be {kinds}, got {value!r:.200}")


def key(name: str, value: Any) -> None:
    """Refuse what is not one random key, new (`jax.random.key`) or old. ValueError: it is not.

    Example:
        >>> key("fit: key", jax.random.key(0))
        >>> key("fit: key", 0)
        Traceback (most recent call last):
        ValueError: fit: key must be one random key, such as jax.random.key(0), got int 0
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    new = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not new and not (dtype == "uint32" and shape in ((2,), (4,))):
        got = f"{type(value).__name__} {value!r:.60}" if dtype is None else f"{dtype} {shape}"
        raise ValueError(f"{name} must be one random key, such as jax.random.key(0), got {got}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
