"""Leaves straight into their places on a mesh: of each, the windows that devices here need.

Where a leaf goes is said by a sharding, by regular expressions of paths, or by a function. All of
it is decided before the first byte is read. A quantized weight is placed as the array that it
stands for: its codes and group parameters are spread along, where the mesh divides them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding
from jaxtyping import PyTree

from jquant.errors import TreeError, near
from jquant.trees.lazy import into_place, is_lazy, realize
from jquant.trees.paths import path_of
from jquant.trees.placement import transferring
from jquant.weights.qtensor import is_qtensor, shardings_of

Shape = tuple[int, ...]
Chooser = Callable[[str, Shape], Sharding | None]
Shardings = Sharding | Mapping[str, Sharding] | Chooser


@transferring
def place(tree: PyTree, shardings: Shardings, *, lazy: bool = False) -> PyTree:
    """The tree with its arrays on the devices of shardings; lazy ones are read there.

    Of a `Lazy` leaf or a memory map, each process reads the windows that its devices hold, one leaf
    at a time, and nothing is in memory as a whole that does not lie on one device as a whole.

    Args:
        tree: arrays, lazy or not, and `QTensor`s of them; numbers stay as they are.
        shardings: where each leaf goes. One `Sharding` for all, or regular expressions that match
            paths in full, of which the first that matches decides, or a function of path and shape.
            None from a function leaves a leaf to JAX. A `QTensor` has the path and the shape of the
            weight it stands for; of its arrays, axes that the mesh does not divide lie everywhere.
        lazy: leave `Lazy` leaves unread; they know their place from then on. `quantize` reads them
            there when their stage comes.

    Raises:
        TreeError: a leaf is not to be placed so: no expression matches its path, or the sharding
            does not fit its shape. Nothing has been read then.
        ValueError: an expression matches no path.
        CheckpointError: what is read is damaged.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> from jquant import Lazy
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> import numpy as np
        >>> leaf = Lazy((2,), np.dtype("float32"), np.ones(2, np.float32).__getitem__, "ones")
        >>> placed = place({"w": leaf}, {"w": NamedSharding(mesh, P("model"))})
        >>> placed["w"].sharding.mesh.shape["model"], placed["w"].sharding.spec[0]
        (1, 'model')
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    leaves = {path_of(keys): leaf for keys, leaf in pairs}
    choose = _chooser(shardings, {p: leaf for p, leaf in leaves.items() if _has_shape(leaf)})
    targets = [_target(path_of(keys), leaf, choose) for keys, leaf in pairs]
    placed = [_put_all(leaf, at, lazy) for (_, leaf), at in zip(pairs, targets, strict=True)]
    return jax.tree.unflatten(structure, placed)


def _has_shape(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "shape", None), tuple)


def _chooser(shardings: Shardings, leaves: Mapping[str, Any]) -> Chooser:
    """The function of path and shape that shardings stand for."""
    if isinstance(shardings, Sharding):
        return lambda path, shape: shardings
    if not isinstance(shardings, Mapping):
        return shardings
    for pattern in shardings:
        if not any(re.fullmatch(pattern, path) for path in leaves):
            raise ValueError(
                f"shardings[{pattern!r}] matches no path (it must match the whole path); near "
                f"paths: {near(pattern, leaves)}"
            )

    def choose(path: str, shape: Shape) -> Sharding:
        for pattern, sharding in shardings.items():
            if re.fullmatch(pattern, path):
                return sharding
        raise TreeError(
            f"no pattern of shardings matches {path!r} of shape {shape}; add one, or '.*' as the "
            "last for all others"
        )

    return choose


def _target(path: str, leaf: Any, choose: Chooser) -> Any:
    """Where a leaf goes: a sharding, of a `QTensor` a tree of them; None: where JAX puts it."""
    if not _has_shape(leaf):
        return None
    sharding = choose(path, tuple(leaf.shape))
    if sharding is None:
        return None
    if not isinstance(sharding, Sharding):
        raise TreeError(
            f"shardings give {type(sharding).__name__} for {path!r}; pass a jax.sharding.Sharding, "
            "such as NamedSharding(mesh, PartitionSpec('model'))"
        )
    if not _fits(sharding, tuple(leaf.shape)):
        raise TreeError(
            f"{path!r} of shape {tuple(leaf.shape)} cannot lie as {_in_words(sharding)}: it must "
            "have the axes that are named, and the mesh must divide them; leave an axis out (it "
            "lies everywhere then), or take another mesh"
        )
    if not is_qtensor(leaf):
        return sharding
    if isinstance(sharding, NamedSharding):
        return shardings_of(leaf, sharding)
    if sharding.is_fully_replicated:
        return jax.tree.map(lambda _: sharding, leaf)
    raise TreeError(
        f"the quantized weight {path!r} cannot lie as {_in_words(sharding)}, which has no named "
        "axes; pass a NamedSharding"
    )


def _fits(sharding: Sharding, shape: Shape) -> bool:
    """Whether an array of this shape can lie so."""
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        return False
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def _in_words(sharding: Sharding) -> str:
    if not isinstance(sharding, NamedSharding):
        return str(sharding)
    return f"{sharding.spec} on the mesh {dict(sharding.mesh.shape)}"


def _put(leaf: Any, target: Any, lazy: bool) -> Any:
    if lazy and is_lazy(leaf):
        return dataclasses.replace(leaf, sharding=target)
    if target is None:
        return realize(leaf)
    return jax.device_put(leaf, target) if isinstance(leaf, jax.Array) else into_place(leaf, target)


def _put_all(leaf: Any, target: Any, lazy: bool) -> Any:
    if is_qtensor(leaf) and target is not None:
        return jax.tree.map(lambda part, at: _put(part, at, lazy), leaf, target)
    return jax.tree.map(lambda part: _put(part, target, lazy), leaf)
