"""How far a checkpoint stretches rotary positions: one divisor for the frequency of every pair.

Every way of stretching that is supported divides the frequency of pair `i` by a constant, so all of
them become one tuple: `theta ** (-2 i / head_dim) / divisors[i]`. Llama 3 ships the divisors as a
formula (Hugging Face) or as a tensor (GGUF); linear scaling repeats one. Any other key that either
dialect has for positions is refused by name: positions that are a little wrong look like a model
that is a little worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jquant.errors import CheckpointError
from jquant.models.claims import nothing_else, number, only, unsupported

Divisors = tuple[float, ...] | None

_TRAINED = "original_max_position_embeddings"
# What Hugging Face's object may say besides, by its `rope_type`; the values of 1 change nothing.
_ALWAYS: dict[str, tuple[int, ...] | None] = dict.fromkeys(
    ("rope_type", "type", "rope_theta", _TRAINED)
)
_ALWAYS |= {"partial_rotary_factor": (1,), "attention_factor": (1,)}
_HF = {
    "default": _ALWAYS | {"factor": (1,)},
    "linear": _ALWAYS | {"factor": None},
    "llama3": _ALWAYS | dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor")),
}
# What GGUF may say under `<architecture>.rope.`; the values listed change nothing.
_GGUF: dict[str, tuple[int, ...] | None] = dict.fromkeys(
    "dimension_count freq_base scale_linear scaling.type scaling.factor "
    "scaling.original_context_length scaling.finetuned".split()
)
_GGUF |= {"scaling.attn_factor": (1, 0), "scaling.yarn_attn_factor": (1,)}
_GGUF |= {"scaling.yarn_ext_factor": (0,), "scaling.yarn_log_multiplier": (0,)}


def hf_rope(config: Mapping[str, Any], head_dim: int, context: int) -> tuple[float, Divisors]:
    """The base of the frequencies and their divisors, from a `config.json`.

    transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`.

    Raises:
        CheckpointError: the two spellings contradict each other, or ask for what is not supported.
    """
    rope = _agreed(
        rope_parameters=config.get("rope_parameters") or {},
        rope_scaling=config.get("rope_scaling") or {},
        config={key: config.get(key) for key in ("rope_theta", "partial_rotary_factor", _TRAINED)},
    )
    theta = number(rope, "rope_theta", 10000.0)
    kind = only(rope, "rope_type", tuple(_HF), default=rope.get("type", "default"))
    only(rope, "type", (kind,), default=kind)  # the older name of the same key
    nothing_else(rope, "", _HF[kind], f"rope_type {kind!r}")
    if kind == "default":
        return theta, None
    factor = number(rope, "factor")
    if kind == "linear":
        return theta, (factor,) * (head_dim // 2)
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if low == high:
        raise unsupported("high_freq_factor", high, f"a number other than low_freq_factor ({low})")
    original = number(rope, _TRAINED, context)
    # How often a pair turns in the original context decides: often, left alone; seldom, divided.
    turns = original / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return theta, tuple(float(d) for d in 1.0 / ((1.0 - smooth) / factor + smooth))


def _agreed(**places: Any) -> dict[str, Any]:
    """What several places say together; null says nothing, and no two may contradict each other."""
    agreed: dict[str, tuple[str, Any]] = {}
    for place, settings in places.items():
        if not isinstance(settings, Mapping) or any(
            isinstance(v, Mapping) for v in settings.values()
        ):
            raise unsupported(place, settings, "one object for all layers")
        for key, value in settings.items():
            if value is None:
                continue
            other, before = agreed.setdefault(key, (place, value))
            if before != value:
                raise CheckpointError(
                    f"{other}: {key} = {str(before)[:80]!r} and {place}: {key} = "
                    f"{str(value)[:80]!r} contradict each other; leave only the right one"
                )
    return {key: value for key, (_, value) in agreed.items()}


def gguf_rope(
    metadata: Mapping[str, Any], head_dim: int, factors: np.ndarray | None
) -> tuple[float, Divisors]:
    """The base of the frequencies and their divisors, from a GGUF file.

    As the format's specification and llama.cpp have it: a factor scales unless the type is "none",
    under its older name `scale_linear` too; 0 is none; the tensor's divisors come on top.

    Args:
        metadata: the file's.
        head_dim: channels per head.
        factors: the values of `rope_freqs.weight`, `[head_dim / 2]`, if the file has it.

    Raises:
        CheckpointError: two keys contradict each other, or ask for what is not supported.
    """
    prefix = f"{metadata['general.architecture']}.rope."
    kind = only(metadata, f"{prefix}scaling.type", ("none", "linear"), default="linear")
    nothing_else(metadata, prefix, _GGUF, "linear rotary positions, which alone are supported")
    only(metadata, f"{prefix}dimension_count", (head_dim,), default=head_dim)
    theta = number(metadata, f"{prefix}freq_base", 10000.0)
    told = {
        key: number(metadata, key)
        for key in (f"{prefix}scaling.factor", f"{prefix}scale_linear")
        if np.any(metadata.get(key, 0))
    }
    if len(set(told.values())) > 1:
        conflict = " and ".join(f"{key} = {value}" for key, value in told.items())
        raise CheckpointError(f"{conflict} contradict each other")
    scale = 1.0 if kind == "none" else next(iter(told.values()), 1.0)
    if factors is None:
        return theta, None if scale == 1.0 else (scale,) * (head_dim // 2)
    return theta, tuple(float(d) * scale for d in factors.reshape(-1))
