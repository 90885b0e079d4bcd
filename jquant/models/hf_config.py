"""The `config.json` of a decoder: what `from_hf` reads, written.

A decoder knows no family, so each row of the table is tried, first to last: its keys are filled
with the decoder's numbers, and the one whose object reads back as the very same decoder is the one.
What no row can say (divisors of rotary frequencies that came as a tensor, say) has no `config.json`
that could be told from the numbers; then the caller has to give one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jquant.errors import CheckpointError
from jquant.models.config import DecoderConfig, from_hf
from jquant.models.families import FAMILIES, SIZES, Family, Key

# All of Llama 3.1 to 3.3 but the factor, that of the pairs that turn the least.
_LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """A `config.json` that `from_hf` reads as this decoder, without `dtype`.

    Raises:
        CheckpointError: there is none.

    Example:
        >>> config = DecoderConfig(32, 8, 16, layers=2, heads=4, kv_heads=2, qkv_bias=True)
        >>> to_hf(config)["model_type"]
        'qwen2'
    """
    for family in FAMILIES:
        written = _written(family, config)
        try:
            if from_hf(written) == config:
                return written
        except CheckpointError:
            continue
    raise CheckpointError(
        "no config.json can be told from this decoder's numbers; pass like= (--like) with the "
        "Hugging Face folder of the model"
    )


def unlike(one: DecoderConfig, other: DecoderConfig) -> str:
    """The first field in which two decoders differ by more than rounding; empty: in none."""
    for field in one.__dataclass_fields__:
        mine, theirs = getattr(one, field), getattr(other, field)
        if not _close(mine, theirs):
            return f"{field}: {str(mine)[:60]} and {str(theirs)[:60]}"
    return ""


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * abs(one)
    return one == other


def _written(family: Family, config: DecoderConfig) -> dict[str, Any]:
    """What the family's `config.json` would say of this decoder, right or not."""
    dialect = family.hf
    named = dialect.name.removesuffix("_text").title().replace("_", "")
    written: dict[str, Any] = {"model_type": dialect.name}
    written["architectures"] = [f"{named}ForCausalLM"]
    written |= {key: values[0] for key, values in dialect.allowed.items()}
    written |= dict(dialect.defaults)
    for field, key in {**SIZES, **family.keys}.items():
        value = getattr(config, field)
        if key.hf is not None:
            written[key.hf] = None if value is None else _number(key, value)
    written |= {
        "vocab_size": config.vocab,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tied,
    }
    # Of layers without experts; where there are none, other readers want it all the same.
    written.setdefault("intermediate_size", config.hidden)
    if family.biased:
        written["attention_bias"] = config.out_bias
    return written | _rope(config) | _windows(family, config)


def _number(key: Key, value: Any) -> Any:
    """The number in a file that makes this field."""
    if key.made(value) == value:
        return value
    roots = (value**-2, round(value**-2)) if isinstance(value, float) else ()
    return next((root for root in roots if root and key.made(root) == value), value)


def _rope(config: DecoderConfig) -> dict[str, Any]:
    """Positions, in the spelling of transformers 5 and in the one before."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    divisors = config.rope_divisors
    if divisors is not None and len(set(divisors)) == 1:
        rope |= {"rope_type": "linear", "factor": divisors[0]}
    elif divisors is not None:
        rope |= {**_LLAMA3, "factor": max(divisors)}
    if config.rotary != config.head_dim:
        rope["partial_rotary_factor"] = config.rotary / config.head_dim
    if config.window_theta:
        local = {"rope_type": "default", "rope_theta": config.window_theta}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    older = {} if divisors is None else {"rope_scaling": rope}
    return {"rope_theta": config.rope_theta, "rope_parameters": rope, **older}


def _windows(family: Family, config: DecoderConfig) -> dict[str, Any]:
    slides = family.hf.slides
    if slides is None:
        return {"sliding_window": max(config.windows)} if config.windows else {}
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    some: Mapping[str, Any] = {"layer_types": kinds} if len(set(kinds)) > 1 else {}
    switch = (
        {"use_sliding_window": bool(kinds)} if "use_sliding_window" in family.hf.defaults else {}
    )
    return {"sliding_window": max(config.windows, default=0) or None, **some, **switch}
