"""The parameters of a decoder out of the tree of another library's class.

Each tensor is cut out of its array, turned, and given to `assemble` under Hugging Face's name: what
is missing, misshapen or left over is named before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jquant.errors import TreeError, near
from jquant.formats.qarrays import values_of
from jquant.models.assembly import Checkpoint, assemble
from jquant.models.decoder import Decoder
from jquant.models.families import HF
from jquant.models.hf_config import to_hf
from jquant.models.tree_names import LIBRARIES
from jquant.models.tree_places import Place, tensor, tree_of
from jquant.trees.lazy import Lazy, Window, realize
from jquant.weights.arguments import by_path

QARRAY = "/array/"
OUTER = "params/"  # MaxText's files have two of them, its states one or none


def from_tree(fn: Decoder, tree: Any, library: str) -> Any:
    """The parameters of a decoder from the tree of another library's class.

    Args:
        fn: the decoder, which says the sizes and whether layers are stacked.
        tree: the parameters as nested dicts, `Lazy` or not: of MaxText's with its outer keys
            `params` or without, layers stacked or apart; a `QArray` is a dict `array`, as Orbax
            gives it back.
        library: "tunix" or "maxtext".

    Returns:
        the parameters, in the dtype that all have in the tree, or else float32; `QArray`s as the
        float32 that they stand for.

    Raises:
        FormatError: no class of the library computes this decoder.
        TreeError: an array is missing, misshapen or left over.
        ValueError: there is no such library.

    Example: `params = from_tree(fn, jq.io.lazy_orbax("run/0/items"), "maxtext")`
    """
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, got {library!r:.80}")
    leaves = arrays_in(tree)
    scanned = any(path.startswith("decoder/layers/") for path in leaves)
    model_type = to_hf(fn.config)["model_type"]
    own = tree_of(library, model_type, fn.config, scanned)
    places = own.places()
    used = {name for at in places for name in _names(at, leaves)}
    if left := sorted(set(leaves) - used):
        raise TreeError(f"array {left[0]!r} is none of {own.own.name}'s for this decoder")
    tensors = {at.source.name: own.usual(at.source, tensor_in(at, leaves)) for at in places}
    shapes = {name: leaf.shape for name, leaf in tensors.items()}
    offset = HF[model_type].hf.norm_offset
    checkpoint = Checkpoint("hf", "the tree", shapes, tensors.__getitem__, offset)
    kinds = {leaf.dtype.name for leaf in tensors.values()}
    dtype = kinds.pop() if len(kinds) == 1 else "float32"
    return realize(assemble(fn.config, checkpoint, scan_layers=fn.scan_layers, param_dtype=dtype))


def arrays_in(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, without MaxText's outer keys."""
    return {path.replace(OUTER, ""): leaf for path, leaf in by_path(tree, "tree").items()}


def _names(at: Place, leaves: Mapping[str, Any]) -> list[str]:
    """The arrays that a tensor is made of.

    Raises:
        TreeError: there are none.
    """
    path = at.path.replace(OUTER, "")
    if path in leaves:
        return [path]
    names = [path + QARRAY + name for name in ("qvalue", "scale", "zero_point")]
    if names[0] not in leaves or names[1] not in leaves:
        raise TreeError(f"array {path!r} is missing; near: {near(path, leaves)}")
    return [name for name in names if name in leaves]


def tensor_in(at: Place, leaves: Mapping[str, Any]) -> Lazy:
    """A tensor as Hugging Face's files have it, out of a tree, when it is read."""
    names = _names(at, leaves)
    is_array = len(names) == 1
    first = leaves[names[0]]
    if tuple(first.shape) != at.shape:
        raise TreeError(f"array {names[0]!r} has shape {tuple(first.shape)}; expected {at.shape}")

    def values(window: Window) -> np.ndarray:
        parts = {name.rpartition("/")[2]: _part(at, leaves[name]) for name in names}
        array = next(iter(parts.values())) if is_array else values_of(parts)
        return tensor(at, array)[window]

    dtype = np.dtype(first.dtype) if is_array else np.dtype(np.float32)
    return Lazy(at.source.shape, dtype, values, f"{names[0]} of a tree")


def _part(at: Place, leaf: Any) -> np.ndarray:
    window = at.window(len(leaf.shape))
    return leaf[window] if isinstance(leaf, Lazy) else np.asarray(leaf)[window]
