"""Small random models of `transformers`, one of each kind, and inputs for them.

The weights are lively: norms near one, everything else large enough that a mistake shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, STEPS = 64, 12
_TEXT = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
_TEXT |= dict(num_attention_heads=4, max_position_embeddings=64)
_GROUPED = dict(**_TEXT, num_key_value_heads=2)
_HEADS = dict(**_GROUPED, head_dim=8)
_WHISPER = dict(
    vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16,
    max_source_positions=32, max_target_positions=32, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=3,
)  # fmt: skip

# architecture: (class of its configuration, settings)
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", _GROUPED),
    "MistralForCausalLM": ("MistralConfig", dict(**_GROUPED, sliding_window=4)),
    "Qwen2ForCausalLM": ("Qwen2Config", _GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", _HEADS),
    "Gemma2ForCausalLM": ("Gemma2Config", dict(**_HEADS, sliding_window=4)),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", dict(**_HEADS, sliding_window=4)),
    "Phi3ForCausalLM": ("Phi3Config", dict(**_GROUPED, pad_token_id=0)),
    "GraniteForCausalLM": ("GraniteConfig", _GROUPED),
    "Olmo2ForCausalLM": ("Olmo2Config", _GROUPED),
    "GPT2LMHeadModel": (
        "GPT2Config",
        dict(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64),
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _TEXT),
    "OPTForCausalLM": (
        "OPTConfig",
        dict(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=VOCAB, word_embed_proj_dim=32, max_position_embeddings=64,
        ),
    ),
    "BloomForCausalLM": (
        "BloomConfig",
        dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB),
    ),
    "FalconForCausalLM": (
        "FalconConfig",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB),
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        dict(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, state_size=8),
    ),
    "MixtralForCausalLM": ("MixtralConfig", dict(**_GROUPED, num_local_experts=4)),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        dict(**_HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    ),
    "GptOssForCausalLM": (
        "GptOssConfig",
        dict(**_HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    ),
    "BertForMaskedLM": ("BertConfig", _TEXT),
    "BertModel": ("BertConfig", _TEXT),
    "RobertaForMaskedLM": ("RobertaConfig", _TEXT),
    "MPNetModel": ("MPNetConfig", _TEXT),
    "T5ForConditionalGeneration": (
        "T5Config",
        dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB),
    ),
    "WhisperForConditionalGeneration": ("WhisperConfig", _WHISPER),
    "ViTForImageClassification": (
        "ViTConfig",
        dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4,
        ),
    ),
}  # fmt: skip
EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM")


def zoo_model(architecture: str, **settings: Any) -> Any:
    """The PyTorch model, in evaluation mode."""
    kind, usual = ZOO[architecture]
    config = getattr(transformers, kind)(**{**usual, **settings})
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.1 * noise if "norm" in name.lower() else 0.15 * noise)
    return model.float().eval()


def inputs_of(architecture: str, rows: int = 2, seed: int = 0) -> tuple[np.ndarray, ...]:
    """What its function takes: tokens, and for some features or pixels."""
    random = np.random.default_rng(seed)
    tokens = random.integers(4, VOCAB, (rows, STEPS)).astype(np.int32)
    if architecture.startswith("ViT"):
        return (random.normal(size=(rows, 3, 16, 16)).astype(np.float32),)
    if architecture.startswith("Whisper"):
        return random.normal(size=(rows, 16, 64)).astype(np.float32), tokens
    if architecture.startswith("T5"):
        return tokens, tokens[:, :7]
    return (tokens,)


def torch_output(model: Any, fn: Any, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    """PyTorch's own output for the inputs of a `TorchFunction`."""
    arrays = {
        name: torch.as_tensor(x.astype(np.int64) if x.dtype.kind == "i" else x)
        for name, x in zip(fn.inputs, inputs, strict=True)
    }
    with torch.no_grad():
        return model(**arrays, return_dict=True)[fn.output].numpy()


def linear_names(model: Any) -> set[str]:
    """The parameters that are matrices of linear layers, convolutions and experts."""
    kinds = ("Linear", "NonDynamicallyQuantizableLinear", "FalconLinear", "Conv1D", "Conv1d")
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in (*kinds, "Conv2d")
    }
    experts = {n for n, x in model.named_parameters() if ".experts." in n and x.ndim == 3}
    return (names | experts) & {name for name, _ in model.named_parameters()}
