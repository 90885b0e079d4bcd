"""Weights that a checkpoint holds as codes, on their way into a parameter tree.

Such a weight is a `QTensor` whose arrays are `Lazy`, or, dequantized, one `Lazy`. What happens to a
tensor between a file and a leaf (rows sorted, transposed, cast, stacked) happens to both here:
codes and parameters have the weight's outputs as rows, and the rest is a matter of the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.axes.layout import Layout
from jquant.errors import CheckpointError
from jquant.formats.mlx import STACK, of_expert
from jquant.io.container import DTYPES, Entry, read_container
from jquant.io.files import FileState, naming
from jquant.trees.lazy import Lazy, Window, realize, stack
from jquant.weights.columns import Columns
from jquant.weights.qtensor import QTensor, dequantize_weight, is_qtensor

Leaf = Lazy | QTensor


def dequantized(q: QTensor, dtype: Any = np.float32) -> Lazy:
    """The array that a weight of lazy arrays stands for, dequantized when it is read.

    What belongs to the weight is in it (its low-rank term); how inputs are quantized is not.
    """
    codes: Any = q.codes
    whole = replace(q.only(lambda part: not part.alters), dtype=np.dtype(dtype))

    def values(window: Window) -> np.ndarray:
        return np.asarray(dequantize_weight(realize(whole)))[window]

    return Lazy(q.shape, whole.dtype, values, f"{codes.identity}, dequantized")


def checked(leaf: Leaf, what: str) -> Leaf:
    """The leaf, refused by name when it is read if its values are none."""
    if isinstance(leaf, QTensor):
        return jax.tree.map(lambda array: _named(array, what), leaf)

    def check(value: np.ndarray) -> np.ndarray:
        if not np.isfinite(value).all():
            raise CheckpointError(f"{what} holds NaN or infinity")
        return value

    return leaf.map(check, leaf.dtype, "finite")


def _named(leaf: Lazy, what: str) -> Lazy:
    """The same array; what is wrong with it begins with its name."""

    def values(window: Window) -> np.ndarray:
        with naming(what):
            return leaf[window]

    return Lazy(leaf.shape, leaf.dtype, values, leaf.identity)


def in_halves(leaf: Leaf, heads: int) -> Leaf:
    """Rows that are neighbouring channels (2i, 2i+1) of each head, sorted to (i, i + d/2)."""
    if isinstance(leaf, QTensor):  # rows are those of codes and parameters, not of other parts
        arrays = jax.tree.map(lambda array: in_halves(array, heads), (leaf.codes, leaf.params))
        return replace(leaf, codes=arrays[0], params=arrays[1])

    def values(window: Window) -> np.ndarray:
        pairs = leaf[...].reshape(heads, -1, 2, *leaf.shape[1:])
        return pairs.swapaxes(1, 2).reshape(leaf.shape)[window]

    return Lazy(leaf.shape, leaf.dtype, values, f"{leaf.identity}, rows in rotary halves")


def in_pairs(leaf: Lazy, heads: int) -> Lazy:
    """The inverse of `in_halves`, of an array."""

    def values(window: Window) -> np.ndarray:
        halves = leaf[...].reshape(heads, 2, -1, *leaf.shape[1:])
        return halves.swapaxes(1, 2).reshape(leaf.shape)[window]

    return Lazy(leaf.shape, leaf.dtype, values, f"{leaf.identity}, rows in rotary pairs")


def kernel(leaf: Leaf) -> Leaf:
    """A weight `[*batch, out, in]` as `[*batch, in, out]`; codes stay where they are."""
    if isinstance(leaf, QTensor):
        *batch, rows, inner = leaf.shape
        at = len(batch)
        shape = (*batch, inner, rows)
        return replace(leaf, layout=Layout.of(shape, batch_axes=range(at), in_axes=(at,)))
    return leaf.mT


def cast(leaf: Leaf, dtype: Any) -> Leaf:
    """The leaf in another dtype; of codes, the dtype of the array they stand for."""
    return replace(leaf, dtype=dtype) if isinstance(leaf, QTensor) else leaf.astype(dtype)


def stacked(leaves: Sequence[Any], what: str) -> Leaf:
    """Leaves along a new first axis.

    Raises:
        CheckpointError: they are not alike: some are codes and others are not, or of another type.
    """
    if not any(map(is_qtensor, leaves)):
        return stack(leaves)
    leaves = _ordered_alike(leaves)
    structures = {jax.tree.structure(leaf) for leaf in leaves}
    if len(structures) > 1:
        kinds = sorted({str(getattr(leaf, "grid", "an array")) for leaf in leaves})
        raise CheckpointError(
            f"{what}: layers differ ({', '.join(kinds)}), so their codes are no stack; pass "
            "scan_layers=False, or quantized='dequantize'"
        )
    whole = jax.tree.map(lambda *arrays: stack(arrays), *leaves)
    roles = ["batch", *(factors[0].role for factors in leaves[0].layout.axes)]
    batch, inner = ([k for k, own in enumerate(roles) if own == role] for role in ("batch", "in"))
    shape = (len(leaves), *leaves[0].shape)
    return replace(whole, layout=Layout.of(shape, batch_axes=batch, in_axes=inner))


def _ordered_alike(leaves: Sequence[Any]) -> Sequence[Any]:
    """Leaves that all have an order of their columns, if any of them has one."""
    ordered = [is_qtensor(leaf) and _is_ordered(leaf) for leaf in leaves]
    if not any(ordered):
        return leaves
    return [
        leaf if has or not is_qtensor(leaf) else replace(leaf, transforms=(_in_order(leaf),))
        for leaf, has in zip(leaves, ordered, strict=True)
    ]


def _is_ordered(q: QTensor) -> bool:
    return any(isinstance(part, Columns) for part in q.transforms)


def _in_order(q: QTensor) -> Columns:
    """The columns in the order of the inputs."""
    width = np.arange(q.codes.shape[-1], dtype=np.int32)
    order: Any = Lazy(width.shape, width.dtype, lambda window: width[window], "in order")
    return Columns(order)


def tensors_of(path: Path) -> dict[str, Lazy]:
    """The tensors of a safetensors file as they are stored, of all its dtypes.

    Raises:
        CheckpointError: the file is not what its header claims.
    """
    with path.open("rb") as file, naming(path.name):
        _, entries = read_container(file)
        state = FileState.of(path, file)
    return {name: _stored(state, name, entry) for name, entry in entries.items()}


def experts_apart(stored: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Tensors with MLX's stacks of experts taken apart, under the names of single experts."""
    apart: dict[str, Lazy] = {}
    for name, leaf in stored.items():
        if STACK not in name or not leaf.size:
            apart[name] = leaf
            continue
        for expert in range(leaf.shape[0]):
            apart[of_expert(name, expert)] = _one(leaf, expert)
    return apart


def _one(leaf: Lazy, index: int) -> Lazy:
    def values(window: Window) -> np.ndarray:
        return leaf[(index, *window)]

    return Lazy(leaf.shape[1:], leaf.dtype, values, f"{leaf.identity}[{index}]")


def _stored(state: FileState, name: str, entry: Entry) -> Lazy:
    dtype = np.dtype(DTYPES[entry.dtype][0])

    def values(window: Window) -> np.ndarray:
        rows, rest = window[:1], (slice(None), *window[1:])
        count = max(entry.shape[0] if entry.shape else 1, 1)
        size = (entry.end - entry.begin) // count  # of a row, of which only those are read
        first, last = (rows[0].start, rows[0].stop) if rows else (0, 1)
        raw = np.empty((last - first) * size, np.uint8)
        with state.open() as file:
            file.seek(entry.begin + first * size)
            if file.readinto(raw.data) != raw.size:
                raise CheckpointError(f"tensor {name!r}: the file ended while it was read")
        some = raw.view(dtype).reshape((last - first, *entry.shape[1:]) if rows else ())
        return some[rest] if rows else some

    return Lazy(entry.shape, dtype, values, f"{state.identity}, tensor {name!r}")
