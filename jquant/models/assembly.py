"""From the tensors of a checkpoint to the parameters of a `Decoder`.

One table says what each of our leaves is called in the two formats; one function does the rest for
both. It compares the whole list of names and shapes with what the configuration calls for *before*
it reads a value: a tensor that is missing, misshapen or left over is named and nothing is loaded.
Kernels are stored `[out, in]` in both formats and become `[in, out]`; with scanned layers each leaf
is an `[L, ...]` stack of them. All of this is written as `Lazy` leaves: what happens to a tensor
happens when it is read, and loading a network is reading every leaf, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jquant.errors import CheckpointError, near
from jquant.models.coded import Leaf, cast, checked, kernel, stacked
from jquant.models.config import DecoderConfig
from jquant.trees.lazy import Lazy
from jquant.trees.paths import nested

Format = Literal["gguf", "hf"]

Row = tuple[str, str, str]
# our leaf: (name in GGUF, name in Hugging Face, its axes as stored)
_TOP: dict[str, Row] = {
    "embed/embedding": ("token_embd.weight", "model.embed_tokens.weight", "vd"),
    "norm/scale": ("output_norm.weight", "model.norm.weight", "d"),
    "head/kernel": ("output.weight", "lm_head.weight", "vd"),
}
# The leaves of a block, by the switches of `DecoderConfig` that decide which of them there are.
_NORMS: dict[str, dict[str, Row]] = {
    "pre": {
        "attention_norm/scale": ("attn_norm.weight", "input_layernorm.weight", "d"),
        "mlp_norm/scale": ("ffn_norm.weight", "post_attention_layernorm.weight", "d"),
    },
    "post": {
        "attention_post_norm/scale": (
            "post_attention_norm.weight", "post_attention_layernorm.weight", "d",
        ),
        "mlp_post_norm/scale": ("post_ffw_norm.weight", "post_feedforward_layernorm.weight", "d"),
    },
}  # fmt: skip
_NORMS["both"] = {
    **_NORMS["pre"],
    "mlp_norm/scale": ("ffn_norm.weight", "pre_feedforward_layernorm.weight", "d"),
    **_NORMS["post"],
}
_QKV: dict[bool, dict[str, Row]] = {
    False: {
        "attention/q/kernel": ("attn_q.weight", "self_attn.q_proj.weight", "qd"),
        "attention/q/bias": ("attn_q.bias", "self_attn.q_proj.bias", "q"),
        "attention/k/kernel": ("attn_k.weight", "self_attn.k_proj.weight", "kd"),
        "attention/k/bias": ("attn_k.bias", "self_attn.k_proj.bias", "k"),
        "attention/v/kernel": ("attn_v.weight", "self_attn.v_proj.weight", "kd"),
        "attention/v/bias": ("attn_v.bias", "self_attn.v_proj.bias", "k"),
    },
    True: {
        "attention/qkv/kernel": ("attn_qkv.weight", "self_attn.qkv_proj.weight", "pd"),
        "attention/qkv/bias": ("attn_qkv.bias", "self_attn.qkv_proj.bias", "p"),
    },
}
_OUT: dict[str, Row] = {
    "attention/out/kernel": ("attn_output.weight", "self_attn.o_proj.weight", "dq"),
    "attention/out/bias": ("attn_output.bias", "self_attn.o_proj.bias", "d"),
}
_QK_NORM: dict[str, dict[str, Row]] = {
    kind: {
        "attention/q_norm/scale": ("attn_q_norm.weight", "self_attn.q_norm.weight", q),
        "attention/k_norm/scale": ("attn_k_norm.weight", "self_attn.k_norm.weight", k),
    }
    for kind, q, k in (("head", "h", "h"), ("all", "q", "k"))
}
_MLP: dict[str, dict[str, Row]] = {
    "gated": {
        "mlp/gate/kernel": ("ffn_gate.weight", "mlp.gate_proj.weight", "fd"),
        "mlp/up/kernel": ("ffn_up.weight", "mlp.up_proj.weight", "fd"),
        "mlp/down/kernel": ("ffn_down.weight", "mlp.down_proj.weight", "df"),
    },
    "fused": {
        "mlp/gate_up/kernel": ("ffn_up.weight", "mlp.gate_up_proj.weight", "gd"),
        "mlp/down/kernel": ("ffn_down.weight", "mlp.down_proj.weight", "df"),
    },
    "experts": {
        "mlp/router/kernel": ("ffn_gate_inp.weight", "mlp.gate.weight", "ed"),
        "mlp/gate/kernel": ("ffn_gate_exps.weight", "mlp.experts.{}.gate_proj.weight", "efd"),
        "mlp/up/kernel": ("ffn_up_exps.weight", "mlp.experts.{}.up_proj.weight", "efd"),
        "mlp/down/kernel": ("ffn_down_exps.weight", "mlp.experts.{}.down_proj.weight", "edf"),
    },
}
_PREFIX = ("blk.{}.", "model.layers.{}.")


class Source(NamedTuple):
    """One tensor a checkpoint must hold, and the leaf it fills: in layer `layer`, if any, and of
    one expert, where each has a tensor of its own. `axes` are letters of the table."""

    name: str
    shape: tuple[int, ...]
    leaf: str
    layer: int | None
    expert: int | None = None
    axes: str = ""


def sources(config: DecoderConfig, form: Format) -> Iterator[Source]:
    """Every tensor that a checkpoint of this network holds, in order.

    Example:
        >>> config = DecoderConfig(vocab=32, width=8, hidden=16, layers=2, heads=4, kv_heads=2)
        >>> next(sources(config, "gguf"))[:3]
        ('token_embd.weight', (32, 8), 'embed/embedding')
    """
    column = 0 if form == "gguf" else 1
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = {
        "v": config.vocab,
        "d": config.width,
        "e": config.experts,
        "f": config.hidden,
        "g": 2 * config.hidden,
        "h": config.head_dim,
        "q": queries,
        "k": keys,
        "p": queries + 2 * keys,
    }
    for leaf, row in _TOP.items():
        if leaf != "head/kernel" or not config.tied:
            shape = tuple(sizes[axis] for axis in row[2])
            yield Source(row[column], shape, leaf, None, axes=row[2])
    block = _block(config)
    for layer in range(config.layers):
        prefix = _PREFIX[column].format(layer)
        for leaf, row in block.items():
            name, shape = prefix + row[column], tuple(sizes[axis] for axis in row[2])
            if "{}" not in name:
                yield Source(name, shape, f"layers/{leaf}", layer, axes=row[2])
                continue
            for expert in range(config.experts):
                one = name.format(expert)
                yield Source(one, shape[1:], f"layers/{leaf}", layer, expert, row[2][1:])


def _block(config: DecoderConfig) -> dict[str, Row]:
    """The leaves of each of this network's blocks."""
    mlp = "experts" if config.experts else "fused" if config.fused else "gated"
    rows = _NORMS[config.norms] | _QKV[config.fused] | _OUT
    rows |= _QK_NORM.get(config.qk_norm, {}) | _MLP[mlp]
    biased = {"q": config.qkv_bias, "k": config.qkv_bias, "v": config.qkv_bias}
    biased |= {"qkv": config.qkv_bias, "out": config.out_bias}
    return {
        leaf: row
        for leaf, row in rows.items()
        if not leaf.endswith("/bias") or biased[leaf.split("/")[-2]]
    }


class Checkpoint(NamedTuple):
    """The tensors of a checkpoint.

    Attributes:
        form: whose names they have.
        origin: what to call the checkpoint in errors.
        shapes: name to shape of every tensor.
        tensor: gives one tensor as float32, or as codes, as stored (`[out, in]`), rows in rotary
            half-split order.
        norm_offset: what to add to the stored scales of norms.
    """

    form: Format
    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    tensor: Callable[[str], Leaf]
    norm_offset: float = 0.0


def assemble(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    *,
    scan_layers: bool = False,
    param_dtype: str = "float32",
) -> dict[str, Any]:
    """The parameters of `Decoder(config, scan_layers)`, every leaf `Lazy`, also inside a `QTensor`.

    A window of a stack reads only its layers' tensors. Reading a leaf raises `CheckpointError` if
    a tensor holds NaN or infinity.

    Raises:
        CheckpointError: a tensor is missing, misshapen or left over, or layers that are to be
            stacked are quantized differently.
    """
    needed = _needed(config, checkpoint)
    origin, tensor, offset = checkpoint.origin, checkpoint.tensor, checkpoint.norm_offset
    leaves: dict[str, list[Leaf]] = {}
    experts: list[Leaf] = []
    dtype = jax.dtypes.canonicalize_dtype(param_dtype)
    for source in needed:
        leaf = checked(tensor(source.name), f"{origin}: tensor {source.name!r}")
        leaf = kernel(leaf) if source.leaf.endswith("/kernel") else leaf
        if offset and source.leaf.endswith("/scale") and isinstance(leaf, Lazy):
            leaf = leaf.map(lambda scale: scale + np.float32(offset), leaf.dtype, f"+ {offset}")
        leaf = cast(leaf, dtype)
        if source.expert is not None:
            experts.append(leaf)
            if source.expert < config.experts - 1:
                continue
            leaf, experts = stacked(experts, f"{origin}: {source.leaf}"), []
        path = source.leaf
        if not scan_layers:
            path = path.replace("layers/", f"layers/{source.layer}/", 1)
        leaves.setdefault(path, []).append(leaf)
    stacks = {path: scan_layers and path.startswith("layers/") for path in leaves}
    return nested({
        path: stacked(parts, f"{origin}: {path}") if stacks[path] else parts[0]
        for path, parts in leaves.items()
    })  # fmt: skip


def _needed(config: DecoderConfig, checkpoint: Checkpoint) -> list[Source]:
    """The tensors that a decoder is made of, each of which the checkpoint has, and no other."""
    origin, shapes = checkpoint.origin, checkpoint.shapes
    left = dict(shapes)
    needed: list[Source] = []
    for source in sources(
        config, checkpoint.form
    ):  # stops at the first absence: a count may be a lie
        shape = left.pop(source.name, None)
        if shape is None:
            raise CheckpointError(
                f"{origin}: tensor {source.name!r} is missing; near: "
                + near(source.name, list(shapes)[:300])  # a hostile file may have many
            )
        if tuple(shape) != source.shape:
            raise CheckpointError(
                f"{origin}: tensor {source.name!r} has shape {tuple(shape)}; "
                f"the configuration calls for {source.shape}"
            )
        needed.append(source)
    if left:
        raise CheckpointError(
            f"{origin}: {len(left)} tensors that this decoder has no place for, such as "
            f"{min(left)!r}; the model is of another architecture than its configuration says"
        )
    return needed
