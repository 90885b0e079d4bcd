"""Classes that look like arrays and are none: all that arrays can do is refused, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jquant.errors import QuantizedWeightError

_Class = TypeVar("_Class", bound=type)


def no_array(cls: _Class) -> _Class:
    """Have a class refuse all that arrays can do, in words.

    It looks like an array (`shape`, `dtype`), so it ends up where one is wanted, most often in a
    function that was called without `apply`. Pytrees, `==`, `bool` and the attributes it has are
    left as they are.
    """

    def refused(what: str) -> Callable[..., Any]:
        def refuse(self: Any, *_: Any, **__: Any) -> Any:
            raise QuantizedWeightError(
                f"a quantized weight {self.dtype}{list(self.shape)} was used as an array ({what}): "
                "call jq.apply(fn)(qparams, ...) in place of fn(qparams, ...), or take plain "
                "arrays from jq.dequantize(qparams)"
            )

        return refuse

    def missing(self: Any, name: str) -> Any:
        if name not in _OF_ARRAYS:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        refused(f".{name}")(self)

    for name in _OPERATORS:
        setattr(cls, f"__{name}__", refused(f"__{name}__"))
    setattr(cls, "__getattr__", missing)  # noqa: B010
    return cls


_BINARY = "add sub mul truediv floordiv mod divmod pow matmul lshift rshift and or xor".split()
_OPERATORS = (
    *_BINARY, *(f"r{name}" for name in _BINARY),
    *"lt le gt ge neg pos abs invert getitem array jax_array float int complex index".split(),
)  # fmt: skip
_OF_BOTH = {"shape", "ndim", "size", "dtype"}
_OF_ARRAYS = {name for name in dir(jax.Array) if not name.startswith("_")} - _OF_BOTH
