"""What a decoder is, in one frozen dataclass of sizes and switches.

Two dialects describe the same network: Hugging Face's `config.json` and the metadata of a GGUF
file. `from_hf` and `from_gguf` read them into `DecoderConfig` by the rows of `families.py`; nothing
after this file knows which of the two it was, or which family. Whatever a dialect can say that the
decoder does not do (another activation, dense layers among experts, YaRN) is refused by name,
before any tensor is read. Rotary positions, of which both say most, are read in `rope.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jquant.errors import CheckpointError
from jquant.models.claims import integer, nothing_else, only, unsupported
from jquant.models.families import GGUF, HF, SIZES, Dialect, Family, Slides
from jquant.models.rope import gguf_rope, hf_rope

HF_TYPES, GGUF_TYPES = tuple(HF), tuple(GGUF)
# What GGUF files of these networks say of attention; the values listed leave it as it is here.
_GGUF_ATTENTION: dict[str, tuple[Any, ...] | None] = dict.fromkeys(
    "head_count head_count_kv key_length value_length layer_norm_rms_epsilon sliding_window".split()
)
_GGUF_ATTENTION |= {"layer_norm_epsilon": None, "scale": (0,), "causal": (True,)}
_GGUF_ATTENTION |= dict.fromkeys(("max_alibi_bias", "clamp_kqv", "shared_kv_layers"), (0,))
# Switches of other networks that llama.cpp's formats share, and the values that change nothing.
_GGUF_NEUTRAL = {
    "expert_count": (0,), "logit_scale": (0, 1), "residual_scale": (0, 1),
    "embedding_scale": (0, 1), "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,),
    "use_parallel_residual": (False,), "pooling_type": (0,), "nextn_predict_layers": (0,),
}  # fmt: skip
MAX_HEAD_DIM = 1 << 14  # a tuple of half that length is made before any tensor confirms it
MAX_WINDOWS = 1 << 14  # layers; so is a tuple of so many windows
_HF_USUAL = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_GGUF_USUAL = {"context_length": 2048, "attention.layer_norm_rms_epsilon": 1e-5}
_KINDS = {"sliding_attention": True, "full_attention": False, True: True, False: False}
_CHOICES = {
    "qk_norm": ("", "head", "all"),
    "norms": ("pre", "post", "both"),
    "activation": ("silu", "gelu_tanh"),
}


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and switches of one decoder. Static and hashable; raises `ValueError` if unfit.

    Attributes:
        vocab, width, hidden, layers: tokens, channels, channels inside the gated network (of one
            expert, where there are some), blocks.
        heads, kv_heads, head_dim: queries, the keys that share them, channels of each; a `head_dim`
            of 0 is `width // heads`.
        context: tokens that a text may have.
        norm_eps: added to mean squares.
        rope_theta: the base of rotary frequencies.
        rope_divisors: what divides them, one number per pair of channels.
        rotary: how many channels of a head turn, the first ones; 0 is all.
        rope_scale: what turned queries and keys are multiplied by.
        long_divisors, long_after: other divisors for texts of more than `long_after` tokens.
        window_theta: the base in layers that have a window; 0 is `rope_theta` and its divisors.
        windows: for each layer how many tokens its attention sees, itself among them; 0 is all, and
            `()` is all in every layer.
        attention_scale: what scores are multiplied by; None is `head_dim ** -0.5`.
        attention_cap, logits_cap: `cap * tanh(x / cap)` of scores and of logits; None leaves them.
        qk_norm: whether queries and keys are normalized, by heads ("head") or all together ("all").
        norms: before each of a block's two parts ("pre"), after it ("post"), or both.
        activation: of the gate, "silu" or "gelu_tanh".
        fused: whether q, k and v are one kernel, and gate and up another.
        tied: whether the head is the table of tokens.
        qkv_bias, out_bias: biases of q, k and v; of attention's output.
        embed_scale, residual_scale: what token vectors, and what each part adds, are multiplied by.
        logits_divisor: what logits are divided by.
        experts, experts_used: gated networks in each block, and how many a token goes through.
        renormalized: whether the weights of a token's experts sum to 1.

    Example:
        >>> DecoderConfig(vocab=32, width=8, hidden=16, layers=2, heads=4, kv_heads=2).head_dim
        2
    """

    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 0
    context: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    rotary: int = 0
    rope_scale: float = 1.0
    long_divisors: tuple[float, ...] | None = None
    long_after: int = 0
    window_theta: float = 0.0
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None
    attention_cap: float | None = None
    logits_cap: float | None = None
    qk_norm: Literal["", "head", "all"] = ""
    norms: Literal["pre", "post", "both"] = "pre"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    fused: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    experts: int = 0
    experts_used: int = 0
    renormalized: bool = True

    def __post_init__(self) -> None:
        for field in ("vocab", "width", "hidden", "layers", "heads", "kv_heads", "context"):
            _require(getattr(self, field) > 0, field, getattr(self, field), "a positive integer")
        _require(self.heads % self.kv_heads == 0, "kv_heads", self.kv_heads, "a divisor of heads")
        if self.head_dim == 0:
            _require(self.width % self.heads == 0, "heads", self.heads, "a divisor of width")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        even = self.head_dim > 0 and self.head_dim % 2 == 0
        _require(even, "head_dim", self.head_dim, "an even number")
        object.__setattr__(self, "rotary", self.rotary or self.head_dim)
        turns = 0 < self.rotary <= self.head_dim and self.rotary % 2 == 0
        _require(turns, "rotary", self.rotary, f"an even number up to {self.head_dim}")
        for field in ("norm_eps", "rope_theta", "rope_scale", "logits_divisor", "attention_scale",
                      "attention_cap", "logits_cap", "embed_scale", "residual_scale"):  # fmt: skip
            value = getattr(self, field)
            fit = value is None or math.isfinite(value) and value > 0
            _require(fit, field, value, "a positive number")
        for field in ("rope_divisors", "long_divisors"):
            value, expected = getattr(self, field), f"{self.rotary // 2} positive numbers"
            _require(value is None or _divisors(value, self.rotary // 2), field, value, expected)
        fit = len(self.windows) in (0, self.layers) and all(
            isinstance(w, int) and w >= 0 for w in self.windows
        )
        _require(fit, "windows", self.windows, f"{self.layers} sizes of windows, or none")
        for field, choices in _CHOICES.items():
            _require(getattr(self, field) in choices, field, getattr(self, field), str(choices))
        used = self.experts_used
        _require(bool(used) == bool(self.experts), "experts_used", used, "some, of some experts")
        _require(0 <= used <= self.experts, "experts_used", used, f"at most {self.experts}")

    def rope_frequencies(self, window: int = 0, length: int = 0) -> np.ndarray:
        """The rotation per position of each pair of channels: float32 `[rotary / 2]`.

        Args:
            window: of the layer; 0 is none.
            length: how many tokens the text may get to.
        """
        own = bool(window and self.window_theta)
        long = self.long_divisors is not None and length > self.long_after
        theta = self.window_theta if own else self.rope_theta
        divisors = None if own else self.long_divisors if long else self.rope_divisors
        powers = np.arange(0, self.rotary, 2, dtype=np.float32) / np.float32(self.rotary)
        frequencies = 1.0 / np.float32(theta) ** powers
        if divisors is not None:
            frequencies = frequencies / np.asarray(divisors, np.float32)
        return frequencies.astype(np.float32)


def _divisors(values: tuple[float, ...], count: int) -> bool:
    return len(values) == count and all(math.isfinite(d) and d > 0 for d in values)


def _require(fit: bool, field: str, got: object, expected: str) -> None:
    if not fit:
        raise ValueError(f"decoder config: {field} = {str(got)[:80]}; expected {expected}")


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the dict of a Hugging Face `config.json`.

    Raises:
        CheckpointError: a key is missing, malformed, or asks for what the decoder does not do.
    """
    family = HF[only(config, "model_type", HF_TYPES)]
    only(config, "quantization_config", (None,), default=None)
    for key, values in family.hf.allowed.items():
        only(config, key, values, default=values[0])
    settings = _filled({**family.hf.defaults, **_renamed(config, family.hf.aliases)}, _HF_USUAL)
    names = {field: key.hf for field, key in {**SIZES, **family.keys}.items()}
    fields = _numbers(settings, family, names, (None,))
    usual = fields["width"] // fields["heads"]
    fields["vocab"] = integer(settings, "vocab_size")
    fields["head_dim"] = integer(settings, "head_dim", usual, MAX_HEAD_DIM)
    fields["tied"] = bool(settings.get("tie_word_embeddings", False))
    if family.biased:
        fields["qkv_bias"] = fields["out_bias"] = bool(settings.get("attention_bias", False))
    fields |= hf_rope(config, family.rope, fields["head_dim"], fields["context"])
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if family.rope.window_theta is not None:  # without windows these layers would turn otherwise
        integer(settings, "sliding_window")
    where = _Windows("sliding_window", window, settings, settings.get("layer_types"))
    return _build(family, family.hf, fields, where)


def from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_tensors: Mapping[str, np.ndarray] | None = None,
) -> DecoderConfig:
    """Read GGUF metadata, and the tensors' shapes for what only they tell (vocabulary, biases).

    Args:
        metadata: key to value, arrays as lists or NumPy arrays.
        shapes: tensor name to shape, outermost axis first.
        rope_tensors: the values of the file's tensors of rotary divisors, `[rotary / 2]`, by name.

    Raises:
        CheckpointError: a key is missing, malformed, or asks for what the decoder does not do.
    """
    arch = only(metadata, "general.architecture", GGUF_TYPES)
    family, prefix = GGUF[arch], f"{arch}."
    dialect = family.gguf
    assert dialect is not None
    _only_done(metadata, prefix, family, dialect)
    settings = {prefix + key: value for key, value in dialect.defaults.items()} | dict(metadata)
    settings = _filled(settings, {prefix + key: value for key, value in _GGUF_USUAL.items()})
    keys = {**SIZES, **family.keys}
    names = {field: prefix + key.gguf for field, key in keys.items() if key.gguf}
    fields = _numbers(settings, family, names, (None, 0))
    usual = fields["width"] // fields["heads"]
    head_dim = integer(metadata, f"{prefix}attention.key_length", usual, MAX_HEAD_DIM)
    only(metadata, f"{prefix}attention.value_length", (head_dim,), default=head_dim)
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError(f"tensor 'token_embd.weight': expected 2 axes, got {embedding}")
    fields |= gguf_rope(metadata, family.rope, head_dim, rope_tensors or {})
    fields |= {
        "vocab": embedding[0],
        "head_dim": head_dim,
        "tied": "output.weight" not in shapes,
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "out_bias": "blk.0.attn_output.bias" in shapes,
    }
    key = f"{prefix}attention.sliding_window"
    pattern = settings.get(f"{key}_pattern")
    kinds = pattern if isinstance(pattern, np.ndarray) else None
    rule = {"sliding_window_pattern": pattern}
    return _build(family, dialect, fields, _Windows(key, settings.get(key), rule, kinds))


def _only_done(metadata: Mapping[str, Any], prefix: str, family: Family, dialect: Dialect) -> None:
    """Refuse what a GGUF file says of its network that the decoder would have to ignore."""
    claimed = {key.gguf for key in family.keys.values() if key.gguf}
    neutral = {key: values for key, values in _GGUF_NEUTRAL.items() if key not in claimed}
    for key, values in (neutral | dict(dialect.allowed)).items():
        only(metadata, prefix + key, values, default=values[0])
    more = {key.removeprefix("attention."): None for key in claimed}
    more |= {"sliding_window_pattern": None} if dialect.slides else {}
    allowed = _GGUF_ATTENTION | more
    nothing_else(metadata, f"{prefix}attention.", allowed, "attention of these networks")


def _renamed(config: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """With every key under one of its names."""
    renamed = dict(config)
    for alias, key in aliases.items():
        if alias in config and renamed.setdefault(key, config[alias]) != config[alias]:
            raise CheckpointError(
                f"{key} = {str(config[key])[:80]} and {alias} = {str(config[alias])[:80]} "
                "contradict each other; leave only the right one"
            )
    return renamed


def _filled(settings: dict[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """With what is usual where nothing, or null, is said."""
    return settings | {key: value for key, value in usual.items() if settings.get(key) is None}


def _numbers(
    settings: Mapping[str, Any], family: Family, names: Mapping[str, str | None], absent: tuple
) -> dict[str, Any]:
    """The fields that stand in a checkpoint as numbers, by the keys that they have there."""
    fields: dict[str, Any] = {}
    for field, name in names.items():
        key = {**SIZES, **family.keys}[field]
        got = None if name is None else settings.get(name)
        nothing = (None,) if field in SIZES else absent
        if name is None or key.optional and not isinstance(got, np.ndarray) and got in nothing:
            continue
        fields[field] = key.made(key.read(settings, name))
    fields.setdefault("kv_heads", fields["heads"])
    return fields


class _Windows(NamedTuple):
    """What a checkpoint says of windows: `kinds` is which layers have one, if it is told."""

    key: str
    window: object
    rule: Mapping[str, Any]
    kinds: Any

    def of_layers(self, slides: Slides | None, fields: Mapping[str, Any]) -> tuple[int, ...]:
        """For each layer its window, 0 for none; `()` if no text is long enough for any."""
        layers, context = fields["layers"], fields["context"]
        size = integer({self.key: self.window}, self.key, 0, least=0)
        if size == 0 or size >= context and not fields.get("window_theta"):
            return ()
        if slides is None:
            raise unsupported(self.key, size, "none (null, or 0 in GGUF)")
        if layers > MAX_WINDOWS:
            raise CheckpointError(f"{layers} layers; with windows at most {MAX_WINDOWS}")
        if self.kinds is None:
            return tuple(size * slides(self.rule, layer) for layer in range(layers))
        one_each = isinstance(self.kinds, list | np.ndarray) and len(self.kinds) == layers
        if not one_each or any(isinstance(k, dict | list) or k not in _KINDS for k in self.kinds):
            raise unsupported("the layers' kinds of attention", self.kinds, f"{layers} of {_KINDS}")
        return tuple(size * _KINDS[kind] for kind in self.kinds)


def _build(
    family: Family, dialect: Dialect, fields: dict[str, Any], windows: _Windows
) -> DecoderConfig:
    fields |= family.fields
    fields |= {field: made(fields) for field, made in dialect.computed.items()}
    fields["windows"] = windows.of_layers(dialect.slides, fields)
    try:
        return DecoderConfig(**fields)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
