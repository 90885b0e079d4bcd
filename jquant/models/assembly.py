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

from jquant.errors import CheckpointError, near
from jquant.models.coded import Leaf, cast, checked, kernel, stacked
from jquant.models.config import DecoderConfig

Format = Literal["gguf", "hf"]

# our leaf: (name in GGUF, name in Hugging Face, its axes as stored)
_TOP = {
    "embed/embedding": ("token_embd.weight", "model.embed_tokens.weight", "vd"),
    "norm/scale": ("output_norm.weight", "model.norm.weight", "d"),
    "head/kernel": ("output.weight", "lm_head.weight", "vd"),
}
_BLOCK = {
    "attention_norm/scale": ("attn_norm.weight", "input_layernorm.weight", "d"),
    "attention/q/kernel": ("attn_q.weight", "self_attn.q_proj.weight", "qd"),
    "attention/q/bias": ("attn_q.bias", "self_attn.q_proj.bias", "q"),
    "attention/k/kernel": ("attn_k.weight", "self_attn.k_proj.weight", "kd"),
    "attention/k/bias": ("attn_k.bias", "self_attn.k_proj.bias", "k"),
    "attention/v/kernel": ("attn_v.weight", "self_attn.v_proj.weight", "kd"),
    "attention/v/bias": ("attn_v.bias", "self_attn.v_proj.bias", "k"),
    "attention/out/kernel": ("attn_output.weight", "self_attn.o_proj.weight", "dq"),
    "attention/out/bias": ("attn_output.bias", "self_attn.o_proj.bias", "d"),
    "mlp_norm/scale": ("ffn_norm.weight", "post_attention_layernorm.weight", "d"),
    "mlp/gate/kernel": ("ffn_gate.weight", "mlp.gate_proj.weight", "fd"),
    "mlp/up/kernel": ("ffn_up.weight", "mlp.up_proj.weight", "fd"),
    "mlp/down/kernel": ("ffn_down.weight", "mlp.down_proj.weight", "df"),
}
_PREFIX = ("blk.{}.", "model.layers.{}.")


class Source(NamedTuple):
    """One tensor a checkpoint must hold, and the leaf it fills (in layer `layer`, if any)."""

    name: str
    shape: tuple[int, ...]
    leaf: str
    layer: int | None


def sources(config: DecoderConfig, form: Format) -> Iterator[Source]:
    """Every tensor that a checkpoint of this network holds, in order.

    Example:
        >>> config = DecoderConfig(vocab=32, width=8, hidden=16, layers=2, heads=4, kv_heads=2)
        >>> next(sources(config, "gguf"))
        Source(name='token_embd.weight', shape=(32, 8), leaf='embed/embedding', layer=None)
    """
    column = 0 if form == "gguf" else 1
    sizes = {
        "v": config.vocab,
        "d": config.width,
        "f": config.hidden,
        "q": config.heads * config.head_dim,
        "k": config.kv_heads * config.head_dim,
    }
    absent = {"head/kernel"} if config.tied else set()
    absent |= set() if config.out_bias else {"attention/out/bias"}
    absent |= set() if config.qkv_bias else {f"attention/{x}/bias" for x in "qkv"}
    for leaf, row in _TOP.items():
        if leaf not in absent:
            yield Source(row[column], tuple(sizes[axis] for axis in row[2]), leaf, None)
    for layer in range(config.layers):
        prefix = _PREFIX[column].format(layer)
        for leaf, row in _BLOCK.items():
            if leaf not in absent:
                shape = tuple(sizes[axis] for axis in row[2])
                yield Source(prefix + row[column], shape, f"layers/{leaf}", layer)


class Checkpoint(NamedTuple):
    """The tensors of a checkpoint.

    Attributes:
        form: whose names they have.
        origin: what to call the checkpoint in errors.
        shapes: name to shape of every tensor.
        tensor: gives one tensor as float32, or as codes, as stored (`[out, in]`), rows in rotary
            half-split order.
    """

    form: Format
    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    tensor: Callable[[str], Leaf]


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
    form, origin, shapes, tensor = checkpoint
    left = dict(shapes)
    needed: list[Source] = []
    for source in sources(config, form):  # stops at the first absence: a count may be a lie
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
    leaves: dict[str, list[Leaf]] = {}
    dtype = jax.dtypes.canonicalize_dtype(param_dtype)
    for source in needed:
        leaf = checked(tensor(source.name), f"{origin}: tensor {source.name!r}")
        leaf = kernel(leaf) if source.leaf.endswith("/kernel") else leaf
        path = source.leaf
        if not scan_layers:
            path = path.replace("layers/", f"layers/{source.layer}/", 1)
        leaves.setdefault(path, []).append(cast(leaf, dtype))
    stacks = {path: scan_layers and path.startswith("layers/") for path in leaves}
    return _nested({
        path: stacked(parts, f"{origin}: {path}") if stacks[path] else parts[0]
        for path, parts in leaves.items()
    })  # fmt: skip


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
