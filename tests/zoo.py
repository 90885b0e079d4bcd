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


def zoo(width: int = 32) -> dict[str, tuple[str, dict[str, Any]]]:
    """Architecture → the class of its configuration, and settings for two layers of a width."""
    hidden, sizes = 3 * width // 2, dict(num_attention_heads=4, num_hidden_layers=2)
    text = dict(vocab_size=VOCAB, hidden_size=width, intermediate_size=hidden, **sizes)
    text |= dict(max_position_embeddings=64)
    grouped = dict(**text, num_key_value_heads=2)
    heads = dict(**grouped, head_dim=width // 4)
    experts = dict(**heads, num_experts_per_tok=2)
    old = dict(hidden_size=width, vocab_size=VOCAB)
    return {
        "LlamaForCausalLM": ("LlamaConfig", grouped),
        "MistralForCausalLM": ("MistralConfig", dict(**grouped, sliding_window=4)),
        "Qwen2ForCausalLM": ("Qwen2Config", grouped),
        "Qwen3ForCausalLM": ("Qwen3Config", heads),
        "Gemma2ForCausalLM": ("Gemma2Config", dict(**heads, sliding_window=4)),
        "Gemma3ForCausalLM": ("Gemma3TextConfig", dict(**heads, sliding_window=4)),
        "Phi3ForCausalLM": ("Phi3Config", dict(**grouped, pad_token_id=0)),
        "GraniteForCausalLM": ("GraniteConfig", grouped),
        "Olmo2ForCausalLM": ("Olmo2Config", grouped),
        "GPT2LMHeadModel": (
            "GPT2Config",
            dict(n_embd=width, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64),
        ),
        "GPTNeoXForCausalLM": ("GPTNeoXConfig", text),
        "OPTForCausalLM": (
            "OPTConfig",
            dict(
                **old, **sizes, ffn_dim=hidden, word_embed_proj_dim=width,
                max_position_embeddings=64,
            ),
        ),
        "BloomForCausalLM": ("BloomConfig", dict(**old, n_layer=2, n_head=4)),
        "FalconForCausalLM": ("FalconConfig", dict(**old, **sizes)),
        "MambaForCausalLM": ("MambaConfig", dict(**old, num_hidden_layers=2, state_size=8)),
        "MixtralForCausalLM": ("MixtralConfig", dict(**grouped, num_local_experts=4)),
        "Qwen3MoeForCausalLM": (
            "Qwen3MoeConfig",
            dict(**experts, num_experts=4, moe_intermediate_size=width),
        ),
        "GptOssForCausalLM": (
            "GptOssConfig",
            dict(**experts, num_local_experts=4, sliding_window=4),
        ),
        "BertForMaskedLM": ("BertConfig", text),
        "BertModel": ("BertConfig", text),
        "RobertaForMaskedLM": ("RobertaConfig", text),
        "MPNetModel": ("MPNetConfig", text),
        "T5ForConditionalGeneration": (
            "T5Config",
            dict(
                d_model=width, d_kv=width // 4, d_ff=hidden, num_layers=2, num_heads=4,
                vocab_size=VOCAB,
            ),
        ),
        "WhisperForConditionalGeneration": (
            "WhisperConfig",
            dict(
                vocab_size=VOCAB, d_model=width, encoder_layers=2, decoder_layers=2,
                encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=hidden,
                decoder_ffn_dim=hidden, num_mel_bins=16, max_source_positions=32,
                max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=3,
            ),
        ),
        "ViTForImageClassification": (
            "ViTConfig",
            dict(
                hidden_size=width, intermediate_size=hidden, **sizes, image_size=16, patch_size=4,
            ),
        ),
    }  # fmt: skip


def zoo_model(architecture: str, width: int = 32) -> Any:
    """The PyTorch model, in evaluation mode."""
    kind, settings = zoo(width)[architecture]
    config = getattr(transformers, kind)(**settings)
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
    """PyTorch's own output for the inputs of a `TorchFunction`, or of a module's function."""
    arrays = [torch.as_tensor(x.astype(np.int64) if x.dtype.kind == "i" else x) for x in inputs]
    with torch.no_grad():
        if not hasattr(fn, "inputs"):
            return model(*arrays).numpy()
        named = dict(zip(fn.inputs, arrays, strict=True))
        return model(**named, return_dict=True)[fn.output].numpy()


def linear_names(model: Any) -> set[str]:
    """The parameters that are matrices of linear layers, convolutions and experts."""
    kinds = ("Linear", "FalconLinear", "Conv1D", "Conv1d", "Conv2d")
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if any(kind.__name__ in kinds for kind in type(module).__mro__)
    }
    experts = {n for n, x in model.named_parameters() if ".experts." in n and x.ndim == 3}
    return (names | experts) & {name for name, _ in model.named_parameters()}
