"""The demo model as a Hugging Face folder, for the tools that want one.

    python -m benchmarks.rivals.export_hf FOLDER [--layers N]

Writes `config.json`, `model.safetensors` (float32, the embedding once: it is tied) and the
tokenizer. Then checks: jquant reads the same bits back out of it, and where PyTorch is installed,
transformers' `LlamaForCausalLM` gives the logits that jquant gives from the original.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant as jq
from benchmarks.rivals.child import KINDS
from jquant.models import Decoder, smollm2


def config_json(fn: Decoder, tokenizer: Any) -> dict[str, Any]:
    c = fn.config
    if c.rope_divisors is not None or c.qkv_bias or c.out_bias or not c.tied:
        raise ValueError("only plain rotary positions, no biases, tied embeddings")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def tensors(params: Any) -> dict[str, np.ndarray]:
    """Parameters under the names, and with the `[out, in]` linears, of transformers."""
    out = {
        "model.embed_tokens.weight": np.asarray(params["embed"]["embedding"]),
        "model.norm.weight": np.asarray(params["norm"]["scale"]),
    }
    for number, block in params["layers"].items():
        prefix = f"model.layers.{number}"
        out[f"{prefix}.input_layernorm.weight"] = np.asarray(block["attention_norm"]["scale"])
        out[f"{prefix}.post_attention_layernorm.weight"] = np.asarray(block["mlp_norm"]["scale"])
        for theirs, ours in KINDS.items():
            part, kind = ours.split("/")
            kernel = np.asarray(block[part][kind]["kernel"])
            out[f"{prefix}.{theirs}.weight"] = np.ascontiguousarray(kernel.T)
    return out


def export(folder: Path, layers: int | None = None) -> dict[str, Any]:
    """Write the folder; what the checks found."""
    from safetensors.numpy import save_file

    fn, params, tokenizer = jq.models.load(smollm2.fetch(progress=print))
    if layers is not None:
        fn = dataclasses.replace(fn, config=dataclasses.replace(fn.config, layers=layers))
        params = {**params, "layers": {str(i): params["layers"][str(i)] for i in range(layers)}}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(params), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    # Last: a folder that has it is complete.
    (folder / "config.json").write_text(json.dumps(config_json(fn, tokenizer), indent=1) + "\n")

    again, reread, _ = jq.models.load(folder)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(reread), strict=True)
    if again.config != fn.config or not all(np.array_equal(a, b) for a, b in pairs):
        raise ValueError("jquant does not read back what it exported")
    try:
        import torch
        import transformers
    except ImportError as error:
        return {"not_compared": str(error)}
    window = smollm2.text_windows(tokenizer)[1][:1]
    ours = np.asarray(jax.jit(fn)(params, window))
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(window.astype(np.int64))).logits.numpy()
    found = {
        "logits_max_abs_difference": float(np.abs(ours - theirs).max()),
        "logits_max_abs": float(np.abs(ours).max()),
    }
    if found["logits_max_abs_difference"] > 1e-3 * found["logits_max_abs"]:
        raise ValueError(f"transformers computes something else: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo model as a Hugging Face folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="only the first so many, for a quick try")
    options = parser.parse_args()
    print(export(options.folder, options.layers))


if __name__ == "__main__":
    main()
