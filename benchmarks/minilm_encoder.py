"""all-MiniLM-L6-v2 as a plain JAX function: tokens and mask in, unit sentence vectors out.

BERT: the sum of three embeddings, then six layers of attention and an exact-GELU MLP, each added to
its input and normalised after (not before); the mean over real tokens, scaled to length one, is the
sentence vector. Parameters are a nested dict whose kernels are stored `[in, out]`.

Nothing here knows of quantization. One thing is done for it: the input of every linear is zero on
padded positions. No real token can tell, as padding is never attended to and never pooled, and the
second moments that `jquant.capture` reads out then hold real tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

HEADS = 12
EPSILON = 1e-12  # of LayerNorm: float32 rounds it away unless a token has hardly any variance
LINEARS = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
}  # fmt: skip
NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
EMBEDDINGS = {"word": "word", "position": "position", "type": "token_type"}


def encode(
    params: Mapping[str, Any],
    tokens: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    heads: int = HEADS,
) -> Float[Array, "b d"]:
    """Unit sentence vectors of token sequences, one per row; `mask` is true on real tokens."""
    real = mask[..., None].astype(jnp.float32)
    table = params["embeddings"]
    x = table["word"][tokens] + table["position"][: tokens.shape[1]] + table["type"][0]
    x = norm(table["norm"], x) * real
    for k in range(len(params["layers"])):
        layer = params["layers"][str(k)]
        mixed = attention(layer, x, mask, heads) * real
        x = norm(layer["attention_norm"], x + linear(layer["out"], mixed)) * real
        hidden = jax.nn.gelu(linear(layer["up"], x), approximate=False) * real
        x = norm(layer["mlp_norm"], x + linear(layer["down"], hidden)) * real
    mean = jnp.sum(x, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def linear(p: Mapping[str, Array], x: Float[Array, "b t i"]) -> Float[Array, "b t o"]:
    return x @ p["kernel"] + p["bias"]


def norm(p: Mapping[str, Array], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + EPSILON) * p["scale"] + p["bias"]


def attention(
    layer: Mapping[str, Any], x: Float[Array, "b t d"], mask: Bool[Array, "b t"], heads: int
) -> Float[Array, "b t d"]:
    """Every position attends to all real ones."""
    q, k, v = (linear(layer[n], x).reshape(*x.shape[:2], heads, -1) for n in ("q", "k", "v"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    # The least float rather than -inf: a row of padding alone must not become NaN.
    scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)


def from_bert(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters for `encode` from tensors named as in `transformers.BertModel`.

    Token types other than the first, the pooler and the position numbers are not used.
    """

    def pair(stem: str, kind: str) -> dict[str, np.ndarray]:
        weight = tensors[f"{stem}.weight"]
        return {kind: weight.T if kind == "kernel" else weight, "bias": tensors[f"{stem}.bias"]}

    layers = {}
    while f"encoder.layer.{len(layers)}.output.dense.weight" in tensors:
        at = f"encoder.layer.{len(layers)}."
        layers[str(len(layers))] = {
            **{name: pair(at + stem, "kernel") for name, stem in LINEARS.items()},
            **{name: pair(at + stem, "scale") for name, stem in NORMS.items()},
        }
    embeddings = {
        name: tensors[f"embeddings.{stem}_embeddings.weight"] for name, stem in EMBEDDINGS.items()
    }
    embeddings["norm"] = pair("embeddings.LayerNorm", "scale")
    return jax.tree.map(jnp.asarray, {"embeddings": embeddings, "layers": layers})


def torch_vectors(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The same sentence vectors from a `transformers.BertModel`, in float32: the reference."""
    import torch

    ids = torch.as_tensor(np.asarray(tokens), dtype=torch.long)
    mask = torch.as_tensor(np.asarray(mask), dtype=torch.long)
    with torch.no_grad():
        hidden = model(ids, mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1).numpy()
