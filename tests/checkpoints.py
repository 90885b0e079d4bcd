"""Small random checkpoints in both formats, written by the tools that other people use.

The reference is `transformers`' PyTorch model; GGUF files come from `gguf.GGUFWriter`, with the
reordering of q and k that llama.cpp's converter applies, written here the way llama.cpp writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import formats
from jquant.axes.layout import Layout
from jquant.grids import code_dtype
from jquant.grids.grouped import Grouped

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
# What llama.cpp calls a family, and how it keeps q, k and norms.
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}
PERMUTED, OFFSET = ("llama", "granite"), ("gemma2", "gemma3")


def torch_model(kind: str = "Llama", **settings: Any) -> Any:
    """A random causal model of `<kind>Config` with lively weights, norms and biases."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return model


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def architecture_of(config: Any) -> str:
    return ARCHITECTURES.get(config.model_type) or config.model_type


def gguf_keys(config: Any) -> dict[str, Any]:
    """What llama.cpp's converters write of a configuration, after the architecture's name."""
    rope = config.rope_parameters
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if config.model_type not in ("granite", "phi3") and getattr(config, "head_dim", None):
        keys["attention.key_length"] = keys["attention.value_length"] = config.head_dim
    if config.model_type == "phi3":
        share = rope.get("partial_rotary_factor", 1.0)
        width = config.hidden_size // config.num_attention_heads
        keys["rope.dimension_count"] = int(width * share)
        original = config.original_max_position_embeddings
        keys["rope.scaling.original_context_length"] = original
        if "long_factor" in rope:
            stretch = math.log(config.max_position_embeddings / original) / math.log(original)
            keys["rope.scaling.attn_factor"] = math.sqrt(1 + stretch)
    for ours, theirs in {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }.items():
        if getattr(config, ours, None):
            keys[theirs] = float(getattr(config, ours))
    for ours, theirs in {
        "sliding_window": "attention.sliding_window",
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    }.items():
        if getattr(config, ours, None):
            keys[theirs] = getattr(config, ours)
    return keys


def gguf_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """The model's parameters under the names that gguf-py has for them; fused experts apart."""
    architecture = architecture_of(model.config)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        parts = [(name, parameter)]
        if name.endswith("experts.gate_up_proj"):
            halves = zip(("gate_proj", "up_proj"), parameter.detach().chunk(2, 1), strict=True)
            parts = [(name.replace("gate_up_proj", half), value) for half, value in halves]
        for part, value in parts:
            stem, _, suffix = part.rpartition(".")
            stem, suffix = (part, "weight") if suffix not in ("weight", "bias") else (stem, suffix)
            yield f"{names.get_name(stem)}.{suffix}", value


def write_gguf(
    path: Path,
    model: Any,
    types: dict[str, str] | None = None,
    *,
    tokenizer: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    keys: dict[str, Any] | None = None,
) -> Path:
    """Write `model` as GGUF; 2-D weights take the type of the first matching key of `types`.

    `keys` are written besides, after the architecture's name and a dot; None takes one out.

    The model's own weights are rounded in place to what was written: it stays the reference.
    """
    config = model.config
    arch = architecture_of(config)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (tokenizer or {}).items():
        getattr(writer, f"add_{key}")(value)
    for key, value in (gguf_keys(config) | (keys or {})).items():
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(f"{arch}.{key}", value)
    rope = {
        f"rope_factors_{kind}.weight": np.asarray(config.rope_parameters[f"{kind}_factor"])
        for kind in ("short", "long")
        if f"{kind}_factor" in config.rope_parameters
    }
    for name, value in (rope | (tensors or {})).items():
        writer.add_tensor(name, value.astype(np.float32))
    for name, parameter in gguf_tensors(model):
        value = parameter.detach().numpy()
        chosen = [kind for key, kind in (types or {}).items() if key in name and value.ndim == 2]
        kind = gguf.GGMLQuantizationType[(chosen or ["F32"])[0]]
        with torch.no_grad():
            stored = blocks_of(value, kind)
            parameter.copy_(torch.as_tensor(np.array(gguf.quants.dequantize(stored, kind))))
        if arch in PERMUTED and ("attn_q." in name or "attn_k." in name):
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            stored = permute(stored, heads)
        if arch in OFFSET and name.endswith("norm.weight"):
            stored = stored + np.float32(1)
        writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks_of(value: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The values as blocks of a type; those that gguf-py only reads, K-quants, are ours."""
    try:
        return gguf.quants.quantize(value, kind)
    except NotImplementedError:
        codec = formats.gguf(kind.name)
        grid, w = Grouped(codec.grid, codec.groups), jnp.asarray(value)
        params = grid.fit(w)
        codes = grid.nearest(w, params).astype(code_dtype(codec.grid))
        layout = Layout.of(w.shape, in_axes=(1,))
        weight = jq.QTensor(codes, params, codec.grid, codec.groups, layout, w.dtype)
        return codec.encode(weight)["weight"]


def byte_tokenizer() -> dict[str, Any]:
    """A byte-level vocabulary of 96 tokens: three control tokens, ASCII, a few merges."""
    characters = [chr(c) for c in range(33, 117)] + ["Ġ", "Ċ"]
    merges = ["t h", "th e", "1 2", "Ġ the", "Ġ a", "n d", "d d"]
    tokens = ["<s>", "</s>", "<pad>", *characters, *(m.replace(" ", "") for m in merges)]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": [3, 3, 3] + [1] * (len(tokens) - 3),
        "token_merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def piece_tokenizer(*text: str) -> dict[str, Any]:
    """SentencePiece's tables: bytes, two pieces of a user's own, joins of the words of `text`."""
    words = sorted({f"▁{word}" for line in text for word in line.split()})
    pieces = sorted({word[:end] for word in words for end in range(2, len(word) + 1)}, key=len)
    pieces += sorted({character for word in words for character in word})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "<|go|>", "▁▁▁"]
    return {
        "tokenizer_model": "llama",
        "token_list": [*tokens, *pieces],
        "token_types": [2, 3, 3] + [6] * 256 + [4, 4] + [1] * len(pieces),
        "token_scores": [0.0] * len(tokens) + [-float(i) for i in range(len(pieces))],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
