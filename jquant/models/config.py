"""What a decoder of the Llama family is, in one frozen dataclass.

Two dialects describe the same network: Hugging Face's `config.json` and the metadata of a GGUF
file. `from_hf` and `from_gguf` read them into `DecoderConfig`; nothing after this file knows which
of the two it was. Whatever a dialect can say that the decoder does not do (another activation,
sliding windows, experts, YaRN) is refused by name, before any tensor is read. Rotary positions, of
which both say most, are read in `rope.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jquant.errors import CheckpointError
from jquant.models.claims import integer, nothing_else, number, only, unsupported
from jquant.models.rope import gguf_rope, hf_rope

HF_TYPES = ("llama", "mistral", "qwen2")
GGUF_TYPES = ("llama", "qwen2")
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
    only(config, "model_type", HF_TYPES)
    only(config, "hidden_act", ("silu",), default="silu")
    only(config, "mlp_bias", (False,), default=False)
    only(config, "quantization_config", (None,), default=None)
    model = config["model_type"]
    context = integer(config, "max_position_embeddings", 2048)
    window = config.get("sliding_window")
    if model == "qwen2" and not config.get("use_sliding_window", False):
        window = None
    if not _never_cuts(window, context):
        raise unsupported("sliding_window", window, "none (null)")
    heads, width = integer(config, "num_attention_heads"), integer(config, "hidden_size")
    head_dim = integer(config, "head_dim", width // heads, MAX_HEAD_DIM)
    theta, divisors = hf_rope(config, head_dim, context)
    bias = bool(config.get("attention_bias", False))
    return _build(
        vocab=integer(config, "vocab_size"),
        width=width,
        hidden=integer(config, "intermediate_size"),
        layers=integer(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=integer(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        context=context,
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_divisors=divisors,
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
    only(metadata, "general.architecture", GGUF_TYPES)
    arch = metadata["general.architecture"]
    for key, neutral in _GGUF_NEUTRAL.items():
        only(metadata, f"{arch}.{key}", neutral, default=neutral[0])
    nothing_else(metadata, f"{arch}.attention.", _GGUF_ATTENTION, "attention of these networks")
    context = integer(metadata, f"{arch}.context_length", 2048)
    window = metadata.get(f"{arch}.attention.sliding_window")
    if not _never_cuts(window, context):
        raise unsupported(f"{arch}.attention.sliding_window", window, "none (0)")
    width = integer(metadata, f"{arch}.embedding_length")
    heads = integer(metadata, f"{arch}.attention.head_count")
    key_length = f"{arch}.attention.key_length"
    head_dim = integer(metadata, key_length, width // heads, MAX_HEAD_DIM)
    only(metadata, f"{arch}.attention.value_length", (head_dim,), default=head_dim)
    theta, divisors = gguf_rope(metadata, head_dim, rope_factors)
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError(f"tensor 'token_embd.weight': expected 2 axes, got {embedding}")
    return _build(
        vocab=embedding[0],
        width=width,
        hidden=integer(metadata, f"{arch}.feed_forward_length"),
        layers=integer(metadata, f"{arch}.block_count"),
        heads=heads,
        kv_heads=integer(metadata, f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        context=context,
        norm_eps=number(metadata, f"{arch}.attention.layer_norm_rms_epsilon", 1e-5),
        rope_theta=theta,
        rope_divisors=divisors,
        tied="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
    )


def _never_cuts(window: object, context: int) -> bool:
    """Whether a sliding window is none, or as wide as the context."""
    return window is None or isinstance(window, int) and (window >= context or window == 0)


def _build(**fields: Any) -> DecoderConfig:
    try:
        return DecoderConfig(**fields)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
