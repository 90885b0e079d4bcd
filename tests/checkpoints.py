"""Small random checkpoints in both formats, written by the tools that other people use.

The reference is `transformers`' PyTorch model; GGUF files come from `gguf.GGUFWriter`, with the
reordering of q and k that llama.cpp's converter applies, written here the way llama.cpp writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

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
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
}  # fmt: skip


def torch_model(kind: str = "Llama", **settings: Any) -> Any:
    """A random `<kind>ForCausalLM` with lively weights, norms and biases."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
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


def write_gguf(
    path: Path,
    model: Any,
    types: dict[str, str] | None = None,
    *,
    tokenizer: dict[str, Any] | None = None,
    rope_freqs: np.ndarray | None = None,
    keys: dict[str, Any] | None = None,
) -> Path:
    """Write `model` as GGUF; 2-D weights take the type of the first matching key of `types`.

    `keys` are written besides, after the architecture's name and a dot.

    The model's own weights are rounded in place to what was written: it stays the reference.
    """
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    for key, value in (tokenizer or {}).items():
        getattr(writer, f"add_{key}")(value)
    for key, value in (keys or {}).items():
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(f"{arch}.{key}", value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name, parameter in model.named_parameters():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        value = parameter.detach().numpy()
        chosen = [kind for key, kind in (types or {}).items() if key in name and value.ndim == 2]
        kind = gguf.GGMLQuantizationType[(chosen or ["F32"])[0]]
        with torch.no_grad():
            stored = gguf.quants.quantize(value, kind)
            parameter.copy_(torch.as_tensor(np.array(gguf.quants.dequantize(stored, kind))))
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            stored = permute(stored, heads)
        writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
