"""What stays and what is trained, put together into the tree that a function takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from jquant.adapters.adapt import Frozen
from jquant.errors import TreeError
from jquant.weights.arguments import by_path, replaced


def merge(frozen: Frozen, trainable: Mapping[str, Mapping[str, Any]]) -> PyTree:
    """The tree that both together stand for, of the structure of the tree that was adapted.

    Quantized weights are `QTensor`s, low-rank terms parts of them: `apply` runs it, `save` stores
    it, exporters that hold such weights write it. It may be made inside `jit`, `grad` and `vmap`.

    Args:
        frozen, trainable: as of `adapt`; the arrays may have been trained, and be of any floating
            dtype.

    Raises:
        TypeError: `frozen` is something else.
        TreeError: an array is missing, too many, of another shape, or holds no floats.

    Example:
        >>> import jax, jquant as jq
        >>> params = {"b": jnp.zeros(2)}
        >>> frozen, trainable = jq.adapt(params, {"b": jq.adapters.Whole()})
        >>> merge(frozen, jax.tree.map(lambda x: x + 1.0, trainable))
        {'b': Array([1., 1.], dtype=float32)}
    """
    check_fit(frozen, trainable)
    leaves, layouts = by_path(frozen.params, "frozen.params"), dict(frozen.layouts)
    names: dict[str, dict[str, Any]] = {path: {} for path, _ in frozen.choices}
    for path, name, _ in frozen.shapes:
        names[path][name] = trainable[path][name]
    merged: dict[str, Any] = {}
    for path, adapters in frozen.choices:
        leaf = leaves[path]
        for adapter in adapters:
            own = {n: a for n, a in names[path].items() if adapter.trains(n)}
            leaf = adapter.joined(leaf, own, layouts.get(path))
        merged[path] = leaf
    return replaced(frozen.params, merged)


def check_fit(frozen: Frozen, trainable: Any) -> None:
    """Refuse arrays that are not those of a `Frozen`.

    Raises:
        TypeError, TreeError: they are not.
    """
    if not isinstance(frozen, Frozen):
        raise TypeError(
            f"merge takes what jq.adapt returned, frozen first, got {type(frozen).__name__}"
        )
    shapes = {(path, name): shape for path, name, shape in frozen.shapes}
    given = _by_name(trainable)
    for here, there, what in (
        (shapes, given, "is missing from trainable"),
        (given, shapes, "is no trainable array of frozen"),
    ):
        for path, name in here:
            if (path, name) not in there:
                raise TreeError(
                    f"{path!r}, {name!r} {what}; pass the two results of one jq.adapt, trained "
                    "arrays in the place of those they came from"
                )
    for (path, name), array in given.items():
        _check_array(path, name, array, shapes[path, name])


def _by_name(trainable: Any) -> dict[tuple[str, str], Any]:
    """The arrays by path and name."""
    nested = isinstance(trainable, Mapping) and all(
        isinstance(arrays, Mapping) for arrays in trainable.values()
    )
    if not nested:
        raise TreeError(
            f"trainable must be path → name → array, as jq.adapt returned it, got "
            f"{type(trainable).__name__}"
        )
    return {(path, name): a for path, arrays in trainable.items() for name, a in arrays.items()}


def _check_array(path: str, name: str, array: Any, shape: tuple[int, ...]) -> None:
    dtype: Any = getattr(array, "dtype", None)
    fits = getattr(array, "shape", None) == shape
    if not fits or not jnp.issubdtype(dtype, jnp.floating):
        raise TreeError(
            f"trainable at {path!r}, {name!r} must be floats {shape}, got "
            f"{getattr(array, 'shape', None)} of {dtype}; pass what was trained beside this "
            "frozen tree"
        )
