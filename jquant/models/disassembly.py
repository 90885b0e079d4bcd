"""From the parameters of a `Decoder` to the tensors of a checkpoint: what `assembly` does, undone.

The same table of names, read the other way: a leaf is found under its path, stacks of layers and of
experts are taken apart, kernels become `[out, in]`, and what was added to the scales of norms is
taken off. Nothing is computed: codes and parameters of a quantized weight are sliced, and arrays
are read when they are written, one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jquant.axes.layout import Layout
from jquant.errors import TreeError, near
from jquant.models.assembly import Format, Source, sources
from jquant.models.coded import Leaf
from jquant.models.config import DecoderConfig
from jquant.trees.lazy import Lazy, Window, read
from jquant.weights.qtensor import QTensor, is_qtensor


class Tensor(NamedTuple):
    """A tensor that a checkpoint is to hold.

    Attributes:
        name: in the checkpoint.
        leaf: `[out, in]` as stored, of experts in one tensor `[experts, out, in]`: a `Lazy`, or a
            weight.
        path: of the leaf in the tree of parameters, with the layer and the expert taken out of it.
        linear: whether it is the weight of a linear layer.
    """

    name: str
    leaf: Leaf
    path: str
    linear: bool


def disassemble(
    config: DecoderConfig,
    params: Any,
    form: Format,
    *,
    scan_layers: bool = False,
    norm_offset: float = 0.0,
) -> list[Tensor]:
    """Every tensor of a decoder's checkpoint, in order; no array is read.

    Args:
        config: the decoder's.
        params: its parameters, quantized or not, lazy or not.
        form: whose names they get, "hf" or "gguf".
        scan_layers: whether the parameters of layers are stacked.
        norm_offset: what checkpoints leave out of the scales of norms.

    Raises:
        TreeError: a parameter is missing, misshapen, or left over.

    Example:
        >>> from jquant.models import Decoder
        >>> fn = Decoder(DecoderConfig(32, 8, 16, layers=2, heads=4, kv_heads=2))
        >>> params = fn.init(jax.random.key(0))
        >>> tensors = disassemble(fn.config, params, "hf")
        >>> tensors[-1].name, tensors[-1].leaf.shape, tensors[-1].path
        ('model.layers.1.mlp.down_proj.weight', (8, 16), 'layers/1/mlp/down/kernel')
    """
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)
    leaves = {jax.tree_util.keystr(key, simple=True, separator="/"): leaf for key, leaf in pairs}
    tensors, used = [], set()
    for source in sources(config, form):
        stacked = scan_layers and source.layer is not None
        path = source.leaf
        if source.layer is not None and not scan_layers:
            path = path.replace("layers/", f"layers/{source.layer}/", 1)
        if path not in leaves:
            raise TreeError(f"parameter {path!r} is missing; near: {near(path, leaves)}")
        used.add(path)
        leaf = lazy_leaf(leaves[path])
        told = path
        for index in ((source.layer,) if stacked else ()) + (source.expert,):
            if index is not None:
                leaf, told = _at(leaf, index, path), f"{told}[{index}]"
        tensors.append(_tensor(source, leaf, told, norm_offset))
    if left := sorted(set(leaves) - used):
        raise TreeError(f"parameter {left[0]!r} is none of this decoder's")
    return tensors


def _tensor(source: Source, leaf: Leaf, path: str, offset: float) -> Tensor:
    is_kernel = source.leaf.endswith("/kernel")
    shape = (*source.shape[:-2], *source.shape[:-3:-1]) if is_kernel else source.shape
    if tuple(leaf.shape) != shape:
        raise TreeError(f"parameter {path!r} has shape {tuple(leaf.shape)}; expected {shape}")
    if isinstance(leaf, Lazy):
        leaf = leaf.mT if is_kernel else leaf
        if offset and source.leaf.endswith("/scale"):
            leaf = leaf.astype(np.float32)
            leaf = leaf.map(lambda scale: scale - np.float32(offset), np.float32, f"- {offset}")
    elif is_kernel:  # its codes are `[out, in]` already
        rank = len(source.shape)
        layout = Layout.of(source.shape, in_axes=(rank - 1,), batch_axes=tuple(range(rank - 2)))
        leaf = replace(leaf, layout=layout)
    return Tensor(source.name, leaf, path, is_kernel)


def lazy_leaf(leaf: Any) -> Leaf:
    """Any leaf as one that is read when it is needed."""
    if isinstance(leaf, QTensor | Lazy):
        return leaf

    def values(window: Window) -> np.ndarray:
        return np.asarray(read(leaf))[window]

    return Lazy(tuple(leaf.shape), np.dtype(leaf.dtype), values, "in memory")


def _at(leaf: Any, index: int, path: str) -> Any:
    """One layer or expert of a stack."""
    if isinstance(leaf, QTensor):
        return jax.tree.map(lambda array: _at(array, index, path), leaf)
    if not leaf.shape or index >= leaf.shape[0]:
        raise TreeError(f"parameter {path!r} has shape {leaf.shape}, and no index {index}")

    def values(window: Window) -> np.ndarray:
        return np.asarray(read(leaf, index))[window]

    if isinstance(leaf, Lazy):  # only the bytes of this layer are read
        return Lazy(
            leaf.shape[1:], leaf.dtype, lambda window: leaf[(index, *window)],
            f"{leaf.identity}[{index}]",
        )  # fmt: skip
    return Lazy(tuple(leaf.shape[1:]), np.dtype(leaf.dtype), values, f"in memory[{index}]")
