"""What public functions are given, checked where they are given it: parameters and batches.

Parameters are any pytree whose leaves are JAX values; jquant knows a leaf by its path, the
`/`-joined keys, so no two may share one. A batch is what a function takes beside them: a tuple is
its inputs, anything else (a NamedTuple too: it is one value with names inside) its only input.

A JAX value is what `jax.jit` takes: an array of numbers, also one that is only described (`Lazy`,
`jax.ShapeDtypeStruct`), a random key, or a number. Numbers keep what JAX calls a weak type: next to
a bfloat16 array they are bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jquant.errors import TreeError
from jquant.trees.paths import path_of
from jquant.trees.placement import typed
from jquant.weights.qtensor import is_qtensor, type_of

Inputs = tuple[Any, ...]


def by_path(tree: PyTree, what: str = "params") -> dict[str, Any]:
    """The leaves of a tree of parameters by their paths, in its order; a `QTensor` is one leaf.

    Numbers come as the arrays that JAX makes of them.

    Args:
        tree: any pytree.
        what: its name in messages.

    Raises:
        TreeError: a leaf is no JAX value, or two have one path; names the paths and the way out.

    Example:
        >>> by_path({"a": [jax.numpy.zeros(2), 1e-5]})
        {'a/0': Array([0., 0.], dtype=float32), 'a/1': Array(1.e-05, dtype=float32, weak_type=True)}
    """
    leaves: dict[str, Any] = {}
    keys_of: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)[0]:
        path = path_of(keys)
        if path in leaves:
            one, two = (jax.tree_util.keystr(k) for k in (keys_of[path], keys))
            raise TreeError(
                f"{what}{one} and {what}{two} have one path, {path!r}, by which leaves are known; "
                "rename a key of either"
            )
        refusal = refusal_of(leaf, tree)
        if refusal is not None:
            raise TreeError(f"{named_leaf(what, path)} is {refusal}")
        leaves[path], keys_of[path] = value_of(leaf), keys
    return leaves


def replaced(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The tree with other leaves at some paths.

    Example:
        >>> replaced({"a": 1, "b": [2, 3]}, {"b/1": 4})
        {'a': 1, 'b': [2, 4]}
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    return jax.tree.unflatten(structure, [leaves.get(path_of(k), leaf) for k, leaf in pairs])


def inputs_of(batch: Any, number: int | None = None) -> Inputs:
    """The inputs of a function that a batch holds.

    Args:
        batch: a tuple of inputs, or the only one; each any pytree of JAX values.
        number: which batch it is, for messages.

    Raises:
        TreeError: an input holds something else, or is a list of numbers: JAX would take it for as
            many arrays. Names batch, input and the way out.

    Example:
        >>> x = jax.numpy.zeros(2)
        >>> len(inputs_of((x, x))), len(inputs_of([x, x]))
        (2, 1)
    """
    inputs = batch if type(batch) is tuple else (batch,)
    where = "" if number is None else f"batch {number}: "
    for position, value in enumerate(inputs):
        name = f"{where}input {position}"
        for keys, leaf in jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_list)[0]:
            if _is_list(leaf):
                raise TreeError(
                    f"{named_leaf(name, path_of(keys))} is a list of numbers, which JAX takes for "
                    f"{len(jax.tree.leaves(leaf))} arrays. Pass one array: numpy.asarray(…), or "
                    "several inputs as a tuple"
                )
            refusal = refusal_of(leaf, value)
            if refusal is not None:
                raise TreeError(f"{named_leaf(name, path_of(keys))} is {refusal}")
    return inputs


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype, weak type and sharding, where that is part of its type, that JAX gives a value.

    Example:
        >>> shape_of(0.5)
        ShapeDtypeStruct(shape=(), dtype=float32, weak_type=True)
    """
    if is_qtensor(leaf):
        return type_of(leaf)
    leaf = value_of(leaf)
    weak, dtype = bool(getattr(leaf, "weak_type", False)), leaf.dtype
    if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, weak_type=weak, sharding=typed(leaf))


def shapes_of(params: PyTree, inputs: Inputs) -> tuple[PyTree, Inputs]:
    """Both with a `jax.ShapeDtypeStruct` in the place of every leaf, a `QTensor` being one.

    Raises:
        TreeError: as `by_path` and `inputs_of`.
    """
    by_path(params)
    inputs_of(inputs)
    return jax.tree.map(shape_of, params, is_leaf=is_qtensor), jax.tree.map(shape_of, inputs)


def value_of(leaf: Any) -> Any:
    """A number as the array that JAX makes of it; any other value as it is."""
    return jax.device_put(leaf) if _is_number(leaf) else leaf


def _is_number(leaf: Any) -> bool:
    """Whether it is a number of Python's (those of NumPy have a shape and a dtype)."""
    return isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic)


def _is_list(node: Any) -> bool:
    """Whether it is a list of numbers, or of lists of them."""
    if not isinstance(node, list) or not node:
        return False
    return all(_is_number(x) or isinstance(x, np.generic) or _is_list(x) for x in node)


def refusal_of(leaf: Any, tree: PyTree) -> str | None:
    """What a leaf of a tree is that is no JAX value, and the way out; None if it is one."""
    what = _no_value(leaf)
    return None if what is None else f"{what}. {_advice(leaf, tree)}"


def _no_value(leaf: Any) -> str | None:
    """What a leaf is that is no JAX value; None if it is one."""
    if _is_number(leaf):
        try:
            value_of(leaf)
        except OverflowError:
            return f"the number {leaf:.3e}, which is beyond JAX's integers"
        return None
    dtype = getattr(leaf, "dtype", None)
    if not isinstance(getattr(leaf, "shape", None), tuple) or dtype is None:
        return f"no array but {type(leaf).__name__} {leaf!r:.60}"
    if any(jax.dtypes.issubdtype(dtype, k) for k in (np.number, np.bool_, jax.dtypes.extended)):
        return None
    return f"an array of {dtype}, which holds no numbers"


def named_leaf(name: str, path: str) -> str:
    """How messages call the leaf at a path of the tree with this name."""
    return f"{name}, at {path!r}," if path else name


def _advice(leaf: Any, tree: Any) -> str:
    """How to get rid of a leaf that is no JAX value."""
    if isinstance(leaf, (str, bytes)) or getattr(leaf, "dtype", np.dtype("O")).kind in "US":
        return "Pass the tokens of a text: tokenizer(text, return_tensors='np')['input_ids']"
    made_by = set(_makers(tree))
    if "equinox" in made_by:
        return (
            "Pass params, static = eqx.partition(model, eqx.is_array) and the function "
            "lambda params, x: eqx.combine(params, static)(x)"
        )
    if "flax" in made_by:
        return (
            "Pass graph, params, rest = nnx.split(model, nnx.Param, ...) and the function "
            "lambda params, x: nnx.merge(graph, params, rest)(x)"
        )
    return "Pass arrays and numbers only: numpy.asarray(…), or let the function close over it"


def _makers(tree: Any) -> Iterator[str]:
    """The packages whose classes the nodes of a tree are of, or inherit from."""
    nodes: list[type] = []
    jax.tree.leaves(tree, is_leaf=lambda node: nodes.append(type(node)) or False)
    for kind in nodes:
        yield from (parent.__module__.split(".")[0] for parent in kind.__mro__)
