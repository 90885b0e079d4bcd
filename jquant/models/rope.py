"""How a checkpoint turns its queries and keys: fields of `DecoderConfig` for rotary positions.

Every way of stretching that is supported divides the frequency of pair `i` by a constant, so all of
them become one tuple: `theta ** (-2 i / rotary) / divisors[i]`. Llama 3 ships the divisors as a
formula (Hugging Face) or as a tensor (GGUF); linear scaling repeats one; LongRoPE has two tuples,
one of them for texts longer than those it was trained on, and a factor on what is turned. Any other
key that either dialect has for positions is refused by name: positions that are a little wrong look
like a model that is a little worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jquant.errors import CheckpointError
from jquant.models.claims import integer, nothing_else, number, only, unsupported

Fields = dict[str, Any]

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
    "longrope": _ALWAYS
    | dict.fromkeys(("factor", "attention_factor", "short_factor", "long_factor")),
}
# What GGUF may say under `<architecture>.rope.`; the values listed change nothing.
_GGUF: dict[str, tuple[int, ...] | None] = dict.fromkeys(
    "dimension_count freq_base scale_linear scaling.type scaling.factor "
    "scaling.original_context_length scaling.finetuned".split()
)
_GGUF |= {"scaling.attn_factor": (1, 0), "scaling.yarn_attn_factor": (1,)}
_GGUF |= {"scaling.yarn_ext_factor": (0,), "scaling.yarn_log_multiplier": (0,)}
# The tensors of a GGUF file that hold divisors: for all texts, short ones, and long ones.
FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"


class RopeRules(NamedTuple):
    """What a family's checkpoints may say of positions.

    Attributes:
        kinds: the `rope_type`s of its `config.json`, and which of the ways here each one is.
        theta: the base of the frequencies where none is said.
        partial: whether only some channels of a head may turn.
        window_theta: the base in layers with a window where none is said; None: the same in all.
        trained: the context that LongRoPE was stretched from where none is said.
    """

    kinds: Mapping[str, str]
    theta: float = 10000.0
    partial: bool = False
    window_theta: float | None = None
    trained: int = 4096

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors of divisors that a GGUF file may hold."""
        return (SHORT, LONG) if "longrope" in self.kinds else (FREQS,)


LLAMA_ROPE = RopeRules({kind: kind for kind in ("default", "linear", "llama3")})


def hf_rope(config: Mapping[str, Any], rules: RopeRules, head_dim: int, context: int) -> Fields:
    """The fields of a decoder that a `config.json` gives to positions.

    transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`. Where
    layers with a window turn otherwise, it has one object for each kind of layer, or
    `rope_local_base_freq`.

    Raises:
        CheckpointError: the spellings contradict each other, or ask for what is not supported.
    """
    if rules.window_theta is None:
        return _hf_rope(config, rules, head_dim, context)
    objects = config.get("rope_parameters") or {}
    apart = isinstance(objects, Mapping) and "full_attention" in objects
    local = {"rope_theta": config.get("rope_local_base_freq")}
    if apart:
        local = objects.get("sliding_attention") or {}
        config = {**config, "rope_parameters": objects["full_attention"]}
    plain = RopeRules({"default": "default"}, rules.window_theta)
    window = _hf_rope({"rope_parameters": local}, plain, head_dim, context)
    return _hf_rope(config, rules, head_dim, context) | {"window_theta": window["rope_theta"]}


def _hf_rope(config: Mapping[str, Any], rules: RopeRules, head_dim: int, context: int) -> Fields:
    rope = _agreed(
        rope_parameters=config.get("rope_parameters") or {},
        rope_scaling=config.get("rope_scaling") or {},
        config={key: config.get(key) for key in ("rope_theta", "partial_rotary_factor", _TRAINED)},
    )
    theta = number(rope, "rope_theta", rules.theta)
    name = only(rope, "rope_type", tuple(rules.kinds), default=rope.get("type", "default"))
    only(rope, "type", (name,), default=name)  # the older name of the same key
    kind = rules.kinds[name]
    more = {"partial_rotary_factor": None} if rules.partial else {}
    nothing_else(rope, "", _HF[kind] | more, f"rope_type {name!r}")
    share = number(rope, "partial_rotary_factor", 1.0)
    if share > 1:
        raise unsupported("partial_rotary_factor", share, "at most 1")
    rotary = int(head_dim * share)
    fields = {"rope_theta": theta, "rotary": rotary}
    if kind == "linear":
        fields["rope_divisors"] = (number(rope, "factor"),) * (rotary // 2)
    elif kind == "llama3":
        fields["rope_divisors"] = _llama3(rope, theta, rotary, context)
    elif kind == "longrope":
        fields |= _longrope(rope, rules.trained, context)
    return fields


def _llama3(rope: Mapping[str, Any], theta: float, rotary: int, context: int) -> tuple[float, ...]:
    factor = number(rope, "factor")
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if low == high:
        raise unsupported("high_freq_factor", high, f"a number other than low_freq_factor ({low})")
    original = number(rope, _TRAINED, context)
    # How often a pair turns in the original context decides: often, left alone; seldom, divided.
    turns = original / (2 * math.pi * theta ** (np.arange(0, rotary, 2) / rotary))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple(float(d) for d in 1.0 / ((1.0 - smooth) / factor + smooth))


def _longrope(rope: Mapping[str, Any], usual_trained: int, context: int) -> Fields:
    trained = number(rope, _TRAINED, usual_trained)
    stretch = number(rope, "factor", context / trained)
    grown = stretch > 1 and trained > 1
    usual = math.sqrt(1 + math.log(stretch) / math.log(trained)) if grown else 1.0
    return {
        "rope_divisors": _numbers(rope, "short_factor"),
        "long_divisors": _numbers(rope, "long_factor"),
        "long_after": int(trained),
        "rope_scale": number(rope, "attention_factor", usual),
    }


def _numbers(rope: Mapping[str, Any], key: str) -> tuple[float, ...]:
    got = rope.get(key)
    if not isinstance(got, Sequence) or isinstance(got, str):
        raise CheckpointError(f"{key} = {str(got)[:80]}; expected a list of numbers")
    return tuple(number({key: value}, key) for value in got)


def _agreed(**places: Any) -> dict[str, Any]:
    """What several places say together; null says nothing, and no two may contradict each other."""
    agreed: dict[str, tuple[str, Any]] = {}
    for place, entries in places.items():
        if not isinstance(entries, Mapping) or any(
            isinstance(v, Mapping) for v in entries.values()
        ):
            raise unsupported(place, entries, "one object for all layers")
        for key, value in entries.items():
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
    metadata: Mapping[str, Any],
    rules: RopeRules,
    head_dim: int,
    tensors: Mapping[str, np.ndarray],
) -> Fields:
    """The fields of a decoder that a GGUF file gives to positions.

    As the format's specification and llama.cpp have it: a factor scales unless the type is "none",
    under its older name `scale_linear` too; 0 is none; the tensor's divisors come on top. In layers
    with a base of their own nothing scales.

    Args:
        metadata: the file's.
        rules: the family's.
        head_dim: channels per head.
        tensors: the values of those of `rules.tensors` that the file has, `[rotary / 2]`.

    Raises:
        CheckpointError: two keys contradict each other, or ask for what is not supported.
    """
    prefix = f"{metadata['general.architecture']}.rope."
    long = "longrope" in rules.kinds
    types = ("none", "linear", "longrope") if long else ("none", "linear")
    kind = only(metadata, f"{prefix}scaling.type", types, default="linear")
    more = {"freq_base_swa": None} if rules.window_theta is not None else {}
    more |= {"scaling.attn_factor": None} if long else {}
    nothing_else(
        metadata, prefix, _GGUF | more, "linear rotary positions, which alone are supported"
    )
    rotary = head_dim
    if rules.partial:
        rotary = integer(metadata, f"{prefix}dimension_count", head_dim, head_dim)
    only(metadata, f"{prefix}dimension_count", (rotary,), default=rotary)
    theta = number(metadata, f"{prefix}freq_base", 10000.0)
    fields = {"rope_theta": theta, "rotary": rotary}
    if rules.window_theta is not None:
        fields["window_theta"] = number(metadata, f"{prefix}freq_base_swa", rules.window_theta)
    scale = _gguf_scale(metadata, prefix)
    scale = scale if kind == "linear" else 1.0
    names = {FREQS: "rope_divisors", SHORT: "rope_divisors", LONG: "long_divisors"}
    for name, factors in tensors.items():
        fields[names[name]] = tuple(float(d) * scale for d in factors.reshape(-1))
    if LONG in tensors:
        fields["long_after"] = int(number(metadata, f"{prefix}scaling.original_context_length"))
        if np.any(metadata.get(f"{prefix}scaling.attn_factor", 0)):
            fields["rope_scale"] = number(metadata, f"{prefix}scaling.attn_factor")
    if scale != 1.0:
        fields.setdefault("rope_divisors", (scale,) * (rotary // 2))
    return fields


def _gguf_scale(metadata: Mapping[str, Any], prefix: str) -> float:
    """By what linear scaling divides, 1 if there is none."""
    scales = {
        key: number(metadata, key)
        for key in (f"{prefix}scaling.factor", f"{prefix}scale_linear")
        if np.any(metadata.get(key, 0))
    }
    if len(set(scales.values())) > 1:
        both = " and ".join(f"{key} = {value}" for key, value in scales.items())
        raise CheckpointError(f"{both} contradict each other")
    return next(iter(scales.values()), 1.0)
