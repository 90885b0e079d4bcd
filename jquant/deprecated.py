"""Names that have changed: an old one works as before, and warns of the new one.

`RENAMED` has a row for each place that names belong to: a module (its attributes), a function or a
class (its keywords, by which a class's fields are read too), or one keyword (its values).
`attribute`, `keywords` and `current` are what such a place uses. The warning points at the line
outside jquant that has the old name.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

# Place → old name → new name.
RENAMED: Mapping[str, Mapping[str, Any]] = {
    "jquant": {"Blocks": "Groups"},
    "jquant.axes": {"Blocks": "Groups"},
    "jquant.grids": {"Params": "GridParams"},
    "jquant.learning.objectives": {"Stagewise": "Reconstruction"},
    "Scheme": {"blocks": "groups"},
    "QTensor": {"blocks": "groups"},
    "Stored": {"blocks": "groups"},
    "Activations": {"path": "compute"},
    "Activations.compute": {"simulated": "fake_quant"},
    "LoRC.metric": {"plain": "frobenius", "evidence": "hessian"},
    "a rounding": {"blocks": "groups"},
    "quantize": {"granularity": "sequential"},
    "quantize.sequential": {"all": None},
}

_Target = TypeVar("_Target", bound=Callable[..., Any])


def current(place: str, name: Any) -> Any:
    """What a name of `place` is now; a `DeprecationWarning` where it was renamed.

    Example:
        >>> current("Scheme", "rounding")
        'rounding'
    """
    renamed = RENAMED[place]
    if not isinstance(name, str) or name not in renamed:
        return name
    message = f"{place}: {name!r} is deprecated, write {renamed[name]!r}"
    warnings.warn(message, DeprecationWarning, stacklevel=_levels_inside())
    return renamed[name]


def attribute(module: str, name: str) -> Any:
    """The attribute of a module by an old name; partially applied it is a module's `__getattr__`.

    Raises:
        AttributeError: it never had such a name.
    """
    if name not in RENAMED[module]:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(sys.modules[module], current(module, name))


def keywords(place: str) -> Callable[[_Target], _Target]:
    """Decorates a function or class: keywords may have their old names, fields are read by them.

    Of a field that is given by both names the old one counts, since `dataclasses.replace(x, old=1)`
    adds the new one.
    """

    def decorate(target: Any) -> Any:
        if not isinstance(target, type):
            return _renaming(place, target)
        for old in RENAMED[place]:
            setattr(target, old, _field(place, old))
        setattr(target, "__init__", _renaming(place, target.__init__))  # noqa: B010
        return target

    return decorate


def _renaming(place: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for old in RENAMED[place].keys() & kwargs:
            kwargs[current(place, old)] = kwargs.pop(old)
        return function(*args, **kwargs)

    return call


def _field(place: str, old: str) -> property:
    def read(value: Any) -> Any:
        return getattr(value, current(place, old))

    return property(read, doc=f"The field `{RENAMED[place][old]}`, by its old name.")


def _levels_inside() -> int:
    """How many frames up from the caller the first one is that is none of jquant's."""
    frame, levels = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "jquant":
        frame, levels = frame.f_back, levels + 1
    return levels
