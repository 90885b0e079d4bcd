"""What a GGUF file says of a decoder: the inverse of `models.config.from_gguf`, by the same table.

A `DecoderConfig` does not say which architecture it is of. Each row of `FAMILIES` is asked for the
metadata that it would have for these sizes, and `from_gguf` whether it reads the same configuration
from it; the row with the most in common is taken. So whatever a row cannot say (a cap, a window, a
base of positions) makes it none of this network's, and a network that none can say is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jquant.errors import CheckpointError, FormatError
from jquant.models.assembly import sources
from jquant.models.config import DecoderConfig, from_gguf
from jquant.models.families import FAMILIES, GGUF, SIZES, Family
from jquant.models.rope import FREQS, LONG, SHORT

Metadata = dict[str, Any]
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(DecoderConfig)
    if field.default is not dataclasses.MISSING
}


class Description(NamedTuple):
    """A network as GGUF has it: its architecture, its metadata, and tensors of rotary divisors."""

    architecture: str
    metadata: Metadata
    tensors: dict[str, np.ndarray]

    @property
    def permuted(self) -> bool:
        """Whether the rows of q and k are in llama.cpp's order."""
        dialect = GGUF[self.architecture].gguf
        return dialect is not None and dialect.permuted


def describe(config: DecoderConfig, architecture: str | None = None) -> Description:
    """The metadata of a decoder.

    Args:
        config: of the decoder; numbers are written as float32.
        architecture: `general.architecture`; default: the one that says most of it.

    Raises:
        FormatError: no architecture, or not this one, says what the decoder computes.

    Example:
        >>> config = DecoderConfig(vocab=32, width=8, hidden=16, layers=2, heads=4, kv_heads=2)
        >>> describe(config).metadata["llama.attention.head_count_kv"]
        2
    """
    if architecture not in (None, *GGUF):
        raise FormatError(f"architecture {architecture!r}; GGUF has {', '.join(GGUF)}")
    rows = [family for family in FAMILIES if family.gguf is not None]
    reasons = {}
    for family in sorted(rows, key=lambda row: -len(row.fields)):
        assert family.gguf is not None
        name = family.gguf.name
        if architecture not in (None, name):
            continue
        if (apart := _apart(config, family)) is not None:
            reasons[name] = apart
            continue
        for description in _spellings(config, family):
            read = _read(description, config)
            if isinstance(read, DecoderConfig) and _single(read) == _single(config):
                return description
            reasons[name] = str(read) if isinstance(read, str) else _difference(read, config)
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise FormatError(f"no architecture of GGUF is this decoder ({told})")


def _apart(config: DecoderConfig, family: Family) -> str | None:
    """What all networks of a family have, and this one has not."""
    for field, value in family.fields.items():
        if getattr(config, field) != value:
            return f"{field} is {value!r}, not {getattr(config, field)!r}"
    return None


def _read(description: Description, config: DecoderConfig) -> DecoderConfig | str:
    """What a reader makes of it, or what it says against it."""
    shapes = {source.name: source.shape for source in sources(config, "gguf")}
    try:
        return from_gguf(description.metadata, shapes, description.tensors)
    except CheckpointError as error:
        return str(error)


def _single(config: DecoderConfig) -> DecoderConfig:
    """The configuration with its numbers as float32."""

    def single(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(single, value))
        return float(np.float32(value)) if isinstance(value, float) else value

    fields = {f.name: single(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return DecoderConfig(**fields)


def _difference(read: DecoderConfig, config: DecoderConfig) -> str:
    names = [field.name for field in dataclasses.fields(config)]
    there, here = vars(_single(read)), vars(_single(config))
    name = next(name for name in names if there[name] != here[name])
    return f"{name} would be {str(there[name])[:60]}, not {str(here[name])[:60]}"


def _spellings(config: DecoderConfig, family: Family) -> Iterator[Description]:
    """The ways in which a family may say this network, the shortest first."""
    dialect = family.gguf
    assert dialect is not None
    sizes, tensors = _sizes(config, family, dialect.defaults), _divisors(config, family)
    for windows in _windows(config, family):
        own = {**sizes, **_positions(config, family, tensors), **windows}
        metadata = {f"{dialect.name}.{key}": value for key, value in own.items()}
        metadata = {"general.architecture": dialect.name, **metadata}
        yield Description(dialect.name, metadata, tensors)


def _sizes(config: DecoderConfig, family: Family, defaults: Mapping[str, Any]) -> Metadata:
    keys = {**SIZES, **family.keys}
    values: Metadata = {
        "vocab_size": config.vocab,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if config.experts:  # llama.cpp reads it of all architectures
        values["feed_forward_length"] = config.hidden
    for field, key in keys.items():
        value = getattr(config, field)
        if key.gguf is None:
            continue
        if value is None and key.gguf in defaults:
            values[key.gguf] = 0.0  # there is a default, and it is not meant
        elif value is not None and (field in SIZES or value != _DEFAULTS.get(field)):
            values[key.gguf] = value
    return values


def _divisors(config: DecoderConfig, family: Family) -> dict[str, np.ndarray]:
    """Tensors of what divides rotary frequencies, but where it is one number."""
    short, long = config.rope_divisors, config.long_divisors
    tensors = {LONG: long} if long is not None else {}
    if short is not None and (long is not None or len(set(short)) > 1):
        tensors[SHORT if "longrope" in family.rope.kinds else FREQS] = short
    return {name: np.asarray(values, np.float32) for name, values in tensors.items()}


def _positions(
    config: DecoderConfig, family: Family, tensors: Mapping[str, np.ndarray]
) -> Metadata:
    values: Metadata = {"rope.dimension_count": config.rotary, "rope.freq_base": config.rope_theta}
    if family.rope.window_theta is not None:
        values["rope.freq_base_swa"] = config.window_theta
    if LONG in tensors:
        values["rope.scaling.original_context_length"] = config.long_after
        values["rope.scaling.attn_factor"] = config.rope_scale
    elif config.rope_divisors is not None and not tensors:
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = config.rope_divisors[0]
    return values


def _windows(config: DecoderConfig, family: Family) -> Iterator[Metadata]:
    """The ways to say which layers have a window, llama.cpp's own rule first."""
    dialect = family.gguf
    assert dialect is not None
    key = "attention.sliding_window"
    size = max(config.windows, default=0)
    if not size:
        # where there is a default, a window as long as any text is none
        yield {key: config.context} if key in dialect.defaults else {}
        return
    yield {key: size}
    full = [i for i, window in enumerate(config.windows) if not window]
    if full:
        yield {key: size, f"{key}_pattern": full[0] + 1}
    yield {key: size, f"{key}_pattern": np.asarray(config.windows) > 0}
