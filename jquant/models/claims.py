"""Reading what a checkpoint says of its network: a value that is allowed, or an error by name.

Both dialects (a `config.json`, the metadata of a GGUF file) are mappings from keys to whatever was
written there. Each function takes one key out of one, checks it, and raises a `CheckpointError`
that names the key, what stands there and what is supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jquant.errors import CheckpointError

_REQUIRED: Any = object()


def unsupported(key: str, got: object, supported: str) -> CheckpointError:
    """The error that a key asks for what the decoder does not do."""
    return CheckpointError(f"{key} = {str(got)[:80]!r} is not supported; supported: {supported}")


def only(
    values: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any = _REQUIRED
) -> Any:
    """The value at `key`, which must be one of `allowed`."""
    if key not in values and default is _REQUIRED:
        raise CheckpointError(f"{key} is missing; supported: {', '.join(map(str, allowed))}")
    got = values.get(key, default)
    if isinstance(got, np.ndarray) or got not in allowed:
        raise unsupported(key, got, ", ".join(map(str, allowed)))
    return got


def nothing_else(
    values: Mapping[str, Any], prefix: str, supported: Mapping[str, tuple[Any, ...] | None], of: str
) -> None:
    """Refuse whatever stands under `prefix` and is not known: ignored, it would change the network.

    Args:
        values: the mapping; other keys in it are not looked at, and None is no value.
        prefix: what the keys begin with.
        supported: the rest of a key to the values it may have, None where another function checks
            it.
        of: what the keys are of, for the message.
    """
    for key, got in values.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or got is None:
            continue
        if name not in supported:
            raise CheckpointError(
                f"{key} = {str(got)[:80]!r} is not supported: {of} has no such key; supported: "
                f"{', '.join(supported)}"
            )
        allowed = supported[name]
        if allowed is not None:
            only(values, key, allowed)


def integer(
    values: Mapping[str, Any], key: str, default: int | None = None, most: int = 1 << 26,
    least: int = 1,
) -> int:  # fmt: skip
    """The whole number from `least` to `most` at `key`."""
    got = values.get(key)
    got = default if got is None else got
    if not isinstance(got, int) or isinstance(got, bool) or not least <= got <= most:
        raise CheckpointError(
            f"{key} = {str(got)[:80]}; expected an integer from {least} to {most}"
        )
    return got


def number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The positive number at `key`."""
    got: Any = values.get(key)
    got = default if got is None else got
    is_number = isinstance(got, int | float) and not isinstance(got, bool)
    if not is_number or not 0 < got < 1e300:  # NaN and integers past any float end here too
        raise CheckpointError(f"{key} = {str(got)[:80]}; expected a positive number")
    return float(got)


def flag(values: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    """The truth value at `key`."""
    got = values.get(key)
    return only({key: default if got is None else got}, key, (True, False))
