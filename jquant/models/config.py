"""What a decoder of the Llama family is, in one frozen dataclass.

Two dialects describe the same network: Hugging Face's `config.json` and the metadata of a GGUF
file. `from_hf` and `from_gguf` read them into `DecoderConfig`; nothing after this file knows which
of the two it was. Whatever a dialect can say that the decoder does not do (another activation,
sliding windows, experts, YaRN) is refused here by name, before any tensor is read.

Every way of stretching rotary positions that is supported divides the frequency of pair `i` by a
constant, so all of them become one field: `theta ** (-2 i / head_dim) / rope_divisors[i]`. Llama 3
ships the divisors as a formula (Hugging Face) or as a tensor (GGUF); linear scaling repeats one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jquant.errors import CheckpointError

HF_TYPES = ("llama", "mistral", "qwen2")
GGUF_TYPES = ("llama", "qwen2")
MAX_HEAD_DIM = 1 << 14  # a tuple of half that length is made before any tensor confirms it


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and switches of one decoder. Static and hashable; raises `ValueError` if unfit.

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
    head_dim: int = 0  # 0: width // heads
    context: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        for field in ("vocab", "width", "hidden", "layers", "heads", "kv_heads", "context"):
            _require(getattr(self, field) > 0, field, getattr(self, field), "a positive integer")
        _require(self.heads % self.kv_heads == 0, "kv_heads", self.kv_heads, "a divisor of heads")
        if self.head_dim == 0:
            _require(self.width % self.heads == 0, "heads", self.heads, "a divisor of width")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        even = self.head_dim > 0 and self.head_dim % 2 == 0
        _require(even, "head_dim", self.head_dim, "an even number")
        for field in ("norm_eps", "rope_theta"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value > 0, field, value, "a positive number")
        if self.rope_divisors is not None:
            fit = len(self.rope_divisors) == self.head_dim // 2
            fit = fit and all(math.isfinite(d) and d > 0 for d in self.rope_divisors)
            expected = f"{self.head_dim // 2} positive numbers"
            _require(fit, "rope_divisors", self.rope_divisors, expected)

    def rope_frequencies(self) -> np.ndarray:
        """The rotation per position of each pair of channels: float32 `[head_dim / 2]`."""
        powers = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        frequencies = 1.0 / np.float32(self.rope_theta) ** powers
        if self.rope_divisors is not None:
            frequencies = frequencies / np.asarray(self.rope_divisors, np.float32)
        return frequencies.astype(np.float32)


def _require(fit: bool, field: str, got: object, expected: str) -> None:
    if not fit:
        raise ValueError(f"decoder config: {field} = {got!r}; expected {expected}")


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the dict of a Hugging Face `config.json`.

    Raises:
        CheckpointError: a key is missing, malformed, or asks for what the decoder does not do.
    """
    _only(config, "model_type", HF_TYPES)
    _only(config, "hidden_act", ("silu",), default="silu")
    _only(config, "mlp_bias", (False,), default=False)
    _only(config, "quantization_config", (None,), default=None)
    model = config["model_type"]
    context = _integer(config, "max_position_embeddings", 2048)
    window = config.get("sliding_window")
    if model == "qwen2" and not config.get("use_sliding_window", False):
        window = None
    if not (
        window is None or isinstance(window, int) and window >= context
    ):  # a window as wide as the context never cuts
        raise _unsupported("sliding_window", window, "none (null)")
    heads, width = _integer(config, "num_attention_heads"), _integer(config, "hidden_size")
    head_dim = _integer(config, "head_dim", width // heads, MAX_HEAD_DIM)
    # transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        raise _unsupported("rope_parameters", rope, "one object for all layers")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    bias = bool(config.get("attention_bias", False))
    return _build(
        vocab=_integer(config, "vocab_size"),
        width=width,
        hidden=_integer(config, "intermediate_size"),
        layers=_integer(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_integer(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        context=context,
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=_number({"rope_theta": theta}, "rope_theta"),
        rope_divisors=_hf_divisors(rope, theta, head_dim, context),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or model == "qwen2",
        out_bias=bias and model == "llama",
    )


def from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None = None,
) -> DecoderConfig:
    """Read GGUF metadata, and the tensors' shapes for what only they tell (vocabulary, biases).

    Args:
        metadata: key to value, arrays as lists or NumPy arrays.
        shapes: tensor name to shape, outermost axis first.
        rope_factors: the values of `rope_freqs.weight`, `[head_dim / 2]`, if the file has it.

    Raises:
        CheckpointError: a key is missing, malformed, or asks for what the decoder does not do.
    """
    _only(metadata, "general.architecture", GGUF_TYPES)
    arch = metadata["general.architecture"]
    _only(metadata, f"{arch}.expert_count", (0,), default=0)
    scaling = f"{arch}.rope.scaling"
    _only(metadata, f"{scaling}.type", ("none", "linear"), default="none")
    width = _integer(metadata, f"{arch}.embedding_length")
    heads = _integer(metadata, f"{arch}.attention.head_count")
    key_length = f"{arch}.attention.key_length"
    head_dim = _integer(metadata, key_length, width // heads, MAX_HEAD_DIM)
    _only(metadata, f"{arch}.attention.value_length", (head_dim,), default=head_dim)
    _only(metadata, f"{arch}.rope.dimension_count", (head_dim,), default=head_dim)
    divisors = None
    if rope_factors is not None:
        divisors = tuple(float(d) for d in rope_factors.reshape(-1))
    elif metadata.get(f"{scaling}.type") == "linear":
        divisors = (_number(metadata, f"{scaling}.factor"),) * (head_dim // 2)
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError(f"tensor 'token_embd.weight': expected 2 axes, got {embedding}")
    return _build(
        vocab=embedding[0],
        width=width,
        hidden=_integer(metadata, f"{arch}.feed_forward_length"),
        layers=_integer(metadata, f"{arch}.block_count"),
        heads=heads,
        kv_heads=_integer(metadata, f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        context=_integer(metadata, f"{arch}.context_length", 2048),
        norm_eps=_number(metadata, f"{arch}.attention.layer_norm_rms_epsilon", 1e-5),
        rope_theta=_number(metadata, f"{arch}.rope.freq_base", 10000.0),
        rope_divisors=divisors,
        tied="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
    )


def _hf_divisors(
    rope: Mapping[str, Any], theta: float, head_dim: int, context: int
) -> tuple[float, ...] | None:
    """The divisors of the rotary frequencies that a Hugging Face `rope_parameters` asks for."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    _only({"rope_type": kind}, "rope_type", ("default", "linear", "llama3"))
    _only(rope, "partial_rotary_factor", (1, 1.0, None), default=None)
    if kind == "default":
        return None
    factor = _number(rope, "factor")
    if kind == "linear":
        return (factor,) * (head_dim // 2)
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if low == high:
        raise _unsupported("high_freq_factor", high, f"a number other than low_freq_factor ({low})")
    original = _number(rope, "original_max_position_embeddings", context)
    # How often a pair turns in the original context decides: often, left alone; seldom, divided.
    turns = original / (2 * math.pi * float(theta) ** (np.arange(0, head_dim, 2) / head_dim))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple(float(d) for d in 1.0 / ((1.0 - smooth) / factor + smooth))


def _build(**fields: Any) -> DecoderConfig:
    try:
        return DecoderConfig(**fields)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _unsupported(key: str, got: object, supported: str) -> CheckpointError:
    return CheckpointError(f"{key} = {str(got)[:80]!r} is not supported; supported: {supported}")


_REQUIRED: Any = object()


def _only(
    values: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any = _REQUIRED
) -> None:
    if key not in values and default is _REQUIRED:
        raise CheckpointError(f"{key} is missing; supported: {', '.join(map(str, allowed))}")
    got = values.get(key, default)
    if isinstance(got, list | dict | np.ndarray) or got not in allowed:
        raise _unsupported(key, got, ", ".join(map(str, allowed)))


def _integer(
    values: Mapping[str, Any], key: str, default: int | None = None, most: int = 1 << 26
) -> int:
    got = values.get(key)
    got = default if got is None else got
    if not isinstance(got, int) or isinstance(got, bool) or not 0 < got <= most:
        raise CheckpointError(f"{key} = {str(got)[:80]}; expected an integer from 1 to {most}")
    return got


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    got: Any = values.get(key)
    got = default if got is None else got
    number = isinstance(got, int | float) and not isinstance(got, bool)
    if not number or not 0 < got < 1e300:  # NaN and integers past any float end here too
        raise CheckpointError(f"{key} = {str(got)[:80]}; expected a positive number")
    return float(got)
