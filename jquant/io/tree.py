"""The tree of a checkpoint: from a pytree to JSON nodes and tensors, and back with every check.

Trees are made of dicts, lists, tuples, None, arrays, numbers, random keys, and the dataclasses of
`weights/qtensor.py`; nothing else is written, so nothing else can be read. Any other pytree node (a
FrozenDict, an NNX State, a module, a NamedTuple) is written as the dict of its children by their
keys. Reading runs twice over the same nodes with another function at the leaves: first with
abstract arrays, which verifies the whole file without reading or allocating, then with the arrays
themselves, or with what will read them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.errors import CheckpointError, TreeError
from jquant.io.leaves import claim, describe
from jquant.io.schemes import from_json, to_json, word
from jquant.io.soundness import REFUSALS, check_weight
from jquant.trees.lazy import Lazy
from jquant.trees.paths import path_of
from jquant.weights.arguments import named_leaf, refusal_of
from jquant.weights.columns import Columns
from jquant.weights.inputs import Inputs
from jquant.weights.parts import Part
from jquant.weights.qtensor import LowRank, QTensor
from jquant.weights.rotated import Rotated

_MAX_DEPTH = 64
_SEQUENCES = {"list": list, "tuple": tuple}
_ARRAYS = (jax.Array, np.ndarray, Lazy)

# The dataclasses with arrays inside that a file may name: weights, and the parts of weights. The
# classes of their static fields are those of `schemes.classes`.
_KINDS = (QTensor, LowRank, Inputs, Rotated, Columns)
NODES: dict[str, type] = {kind.__name__: kind for kind in _KINDS}


def _fields(kind: type) -> tuple[list[str], list[str]]:
    """The names of the fields with arrays, and of the static ones."""
    fields = dataclasses.fields(kind)
    static = [f.name for f in fields if f.metadata.get("static")]
    return [f.name for f in fields if f.name not in static], static


def _optional(kind: type) -> set[str]:
    """The fields that are left out of a file where they are None or an empty tuple."""
    return {f.name for f in dataclasses.fields(kind) if f.default is None or f.default == ()}


def _is_empty(value: Any) -> bool:
    return value is None or (type(value) is tuple and not value)


class Encoder:
    """Builds the JSON of a pytree, and gathers its tensors and its distinct static choices.

    `describe` makes a tensor of an array: anything with a `node`, the JSON that stands for it.
    """

    def __init__(
        self, tree: Any, describe: Callable[..., Any] = describe, reserved: str = "__metadata__"
    ) -> None:
        self.tree, self.describe = tree, describe
        self.tensors: dict[str, Any] = {}
        self.statics: list[Any] = []
        self._index: dict[Any, int] = {}
        self._names = {reserved}  # "__metadata__" is what a safetensors header keeps for itself
        self.root = self.node(tree, ())

    def node(self, value: Any, path: tuple[str, ...], grid: Any = None) -> Any:
        """The node of a value at `path`; `grid` is that of the `QTensor` it is a field of.

        Raises:
            TreeError: it is of a kind that is not stored, or its keys are not distinct as words.
        """
        if value is None:
            return None
        if len(path) > _MAX_DEPTH:
            raise TreeError(f"{_at(path)}: trees of more than {_MAX_DEPTH} levels are not stored")
        if type(value) is dict and all(type(key) in (str, int) for key in value):
            items = value.items()
            return {"dict": [[k, self.node(v, (*path, str(k)), grid)] for k, v in items]}
        if type(value) in (list, tuple):
            items = enumerate(value)
            return {type(value).__name__: [self.node(v, (*path, str(i)), grid) for i, v in items]}
        if NODES.get(type(value).__name__) is type(value):
            return self._dataclass(value, path)
        if isinstance(value, (*_ARRAYS, np.generic)):
            return self._array(value, path, getattr(grid, "codes", None))
        return self._other(value, path)

    def _other(self, value: Any, path: tuple[str, ...]) -> Any:
        """The node of a value of a kind that is none of ours, or of a number."""
        if isinstance(value, Part):
            raise TreeError(
                f"{_at(path)}: parts of the class {type(value).__name__} are not stored; leave the "
                "transform out, or store jq.dequantize(qparams)"
            )
        children = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is not value)[0]
        if [keys for keys, _ in children] != [()]:  # a node: what is none is its own only leaf
            return {"dict": self._children(children, path)}
        refusal = refusal_of(value, self.tree)
        if refusal is None and isinstance(value, jax.ShapeDtypeStruct):
            refusal = "only described by a ShapeDtypeStruct. Pass arrays"
        if refusal is not None:
            raise TreeError(f"{named_leaf('the tree', '/'.join(path))} is {refusal}")
        return {"number": to_json(value)}

    def _children(self, children: Sequence[Any], path: tuple[str, ...]) -> list[Any]:
        names = [path_of(keys) for keys, _ in children]
        if len(set(names)) < len(names):
            raise TreeError(f"{_at(path)}: two keys are the same as words, among {names[:8]}")
        return [
            [name, self.node(child, (*path, name))]
            for name, (_, child) in zip(names, children, strict=True)
        ]

    def _dataclass(self, value: Any, path: tuple[str, ...]) -> Any:
        arrays, static = _fields(type(value))
        choices = tuple(getattr(value, name) for name in static)
        try:
            if choices not in self._index:
                words = map(word, static)
                self.statics.append({n: to_json(c) for n, c in zip(words, choices, strict=True)})
                self._index[choices] = len(self.statics) - 1
        except ValueError as error:
            raise ValueError(f"{_at(path)}: {error}") from None
        absent = {n for n in _optional(type(value)) if _is_empty(getattr(value, n))}
        fields = {n: self._field(value, n, path) for n in arrays if n not in absent}
        return {"class": type(value).__name__, "static": self._index[choices], "fields": fields}

    def _field(self, value: Any, name: str, path: tuple[str, ...]) -> Any:
        field, grid = getattr(value, name), getattr(value, "grid", None)
        if name != "codes" or not isinstance(value, QTensor):
            return self.node(field, (*path, name), grid)
        if not isinstance(field, _ARRAYS) or not jnp.issubdtype(field.dtype, jnp.integer):
            kind = getattr(field, "dtype", type(field).__name__)
            raise ValueError(f"{_at(path)}: codes must be an array of integers, got {kind}")
        low, high = value.grid.codes
        refusal = f"{_at(path)}: codes outside {low}..{high}, the range of {value.grid}"
        return self._array(field, (*path, name), (low, high), refusal)

    def _array(
        self, value: Any, path: tuple[str, ...], codes: tuple[int, int] | None, refusal: str = ""
    ) -> Any:
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = self._array(jax.random.key_data(value), path, None)
            return {"key": str(jax.random.key_impl(value)), "data": data}
        name = unique("/".join(path) or "array", self._names)
        self._names.add(name)
        try:
            self.tensors[name] = self.describe(value, name, codes, refusal)
        except ValueError as error:
            raise TreeError(f"{_at(path)}: {error}") from None
        return self.tensors[name].node


class Decoder:
    """Builds the pytree of a file's nodes, from tensors that `entries` place in it.

    `claim` says which shape and dtype a node and its entry promise, and refuses what does not fit;
    with `streams`, codes must be bit streams of their grid's width.
    """

    def __init__(
        self,
        entries: Mapping[str, Any],
        statics: Any,
        claim: Callable[[Mapping[str, Any], Any], jax.ShapeDtypeStruct] = claim,
        *,
        streams: bool = True,
    ):
        self.entries, self.claim, self.streams = entries, claim, streams
        self.top: dict[str, int] = {}  # tensor of codes: its largest code less its smallest
        self.ranges: dict[str, tuple[int, int]] = {}  # array of codes: its grid's
        self.statics: list[dict[str, Any]] = []
        if not isinstance(statics, list) or not all(isinstance(s, dict) for s in statics):
            raise CheckpointError("the list of schemes is malformed")
        for scheme in statics:
            self.statics.append({name: from_json(value) for name, value in scheme.items()})
        # Equal weights are traced once.
        self._sound = functools.lru_cache(maxsize=None)(check_weight)

    def check(self, root: Any) -> None:
        """Verify every node, and that every tensor is used exactly once.

        Raises:
            CheckpointError: something does not fit.
        """
        used: set[str] = set()

        def leaf(node: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
            name = node["array"]
            if not isinstance(name, str) or name not in self.entries or name in used:
                raise CheckpointError(f"tensor {name!r:.80} is missing, or used twice")
            used.add(name)
            return self.claim(node, self.entries[name])

        self._build(root, leaf, check=True)
        if len(used) != len(self.entries):
            unused = sorted(set(self.entries) - used)
            raise CheckpointError(f"{len(unused)} tensors belong to no leaf, such as {unused[:3]}")

    def abstract(self, node: Any) -> Any:
        """The tree below a node that `check` accepted, with `ShapeDtypeStruct` leaves."""
        return self._build(node, lambda n: self.claim(n, self.entries[n["array"]]))

    def read(self, node: Any, reader: Callable[[Any], Any]) -> Any:
        """The tree below a node that `check` accepted, with what `reader` makes of each array."""
        return self._build(node, reader)

    def size(self, node: Any) -> int:
        """The bytes in the file of everything below a node."""
        entries = [self.entries[name] for name in _arrays(node)]
        return sum(entry.end - entry.begin for entry in entries)

    def leaves(self, root: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
        """The node of every array and weight, by the path of its keys."""
        if root is None:
            return {}
        if not root.keys() & {"dict", "list", "tuple"}:
            return {"/".join(path): root}
        nodes: dict[str, Any] = {}
        for key, child in _children(root):
            for name, node in self.leaves(child, (*path, key)).items():
                nodes[unique(name, nodes)] = node
        return nodes

    def _build(
        self, node: Any, leaf: Callable[[Any], Any], *, check: bool = False, depth: int = 0
    ) -> Any:
        if node is None:
            return None
        if not isinstance(node, dict) or depth > _MAX_DEPTH:
            raise CheckpointError("the tree is malformed, or nested too deeply")

        def build(child: Any) -> Any:
            return self._build(child, leaf, check=check, depth=depth + 1)

        if "array" in node:
            return leaf(node)
        if "number" in node:
            return _number(node)
        if "key" in node:
            return _random_key(node, build)
        if "class" in node:
            built = self._dataclass(node, build)
            if check:
                self._check_weight(built, node)
            return built
        if check:
            _check_container(node)
        if "dict" in node:
            return {key: build(child) for key, child in node["dict"]}
        ((name, children),) = node.items()
        return _SEQUENCES[name](build(child) for child in children)

    def _dataclass(self, node: Any, build: Callable[[Any], Any]) -> Any:
        kind, index, fields = NODES.get(str(node["class"])), node.get("static"), node.get("fields")
        if kind is None or set(node) != {"class", "static", "fields"}:
            raise CheckpointError(f"the tree names the unknown class {node['class']!r:.80}")
        arrays, static = _fields(kind)
        if type(index) is not int or not 0 <= index < len(self.statics):
            raise CheckpointError(f"a {kind.__name__} names no scheme of the file")
        names, choices = {word(name): name for name in static}, self.statics[index]
        if (
            not isinstance(fields, dict)
            or not set(arrays) - _optional(kind) <= set(fields) <= set(arrays)
            or set(choices) != set(names)
        ):
            raise CheckpointError(f"a {kind.__name__} has not the fields {arrays + static}")
        static = {names[key]: choice for key, choice in choices.items()}
        return kind(**{name: build(child) for name, child in fields.items()}, **static)

    def _check_weight(self, weight: Any, node: Any) -> None:
        """Whether a weight of abstract arrays dequantizes to the shape and dtype it claims.

        Of a low-rank term, whether it has factors that can be multiplied.
        """
        leaves, tree = jax.tree.flatten(weight)
        try:
            if not all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
                raise TypeError("it holds another weight")
            self._sound(tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
            if not isinstance(weight, QTensor):
                return
            low, high = weight.grid.codes
        except REFUSALS as error:
            raise CheckpointError(f"a weight of the file makes no sense: {error!s:.200}") from error
        codes = node["fields"]["codes"]
        self.ranges[str(codes.get("array"))] = low, high
        if not self.streams:
            return
        if codes.get("low") != low or codes.get("bits") != max(1, (high - low).bit_length()):
            raise CheckpointError(
                f"tensor {codes['array']!r} is not a stream of codes {low}..{high}"
            )
        self.top[codes["array"]] = high - low


def _check_container(node: dict[str, Any]) -> None:
    if len(node) != 1:
        raise CheckpointError("the tree has a node of no known kind")
    ((name, children),) = node.items()
    if name not in ("dict", "list", "tuple") or not isinstance(children, list):
        raise CheckpointError(f"the tree has a node of the unknown kind {name!r:.80}")
    if name == "dict":
        pairs = all(
            isinstance(p, list) and len(p) == 2 and type(p[0]) in (str, int) for p in children
        )
        if not pairs or len({p[0] for p in children}) != len(children):
            raise CheckpointError("the tree has a dict with malformed or repeated keys")


def _children(node: dict[str, Any]) -> list[tuple[str, Any]]:
    """The children of a checked container, with their keys as strings."""
    if "dict" in node:
        return [(str(key), child) for key, child in node["dict"]]
    ((_, children),) = node.items()
    return [(str(i), child) for i, child in enumerate(children)]


def _number(node: dict[str, Any]) -> bool | int | float | complex:
    number = from_json(node["number"])
    if len(node) != 1 or not isinstance(number, (bool, int, float, complex)):
        raise CheckpointError("the tree has a malformed number")
    return number


def _random_key(node: dict[str, Any], build: Callable[[Any], Any]) -> Any:
    """The random keys that a node holds the data of, of such as are only described likewise."""
    kind, inner = node.get("key"), node.get("data")
    if len(node) != 2 or type(kind) is not str or type(inner) is not dict or "array" not in inner:
        raise CheckpointError("the tree has a malformed random key")
    data = build(inner)
    wrap = functools.partial(jax.random.wrap_key_data, impl=kind)
    try:
        if isinstance(data, jax.ShapeDtypeStruct):
            return jax.eval_shape(wrap, data)
        return wrap(jnp.asarray(data[...] if isinstance(data, Lazy) else data))
    except REFUSALS as error:
        raise CheckpointError(f"the tree has a random key of no kind: {error!s:.200}") from error


def _arrays(node: Any) -> list[str]:
    """The names of the tensors below a checked node."""
    if node is None or "number" in node:
        return []
    if "array" in node:
        return [node["array"]]
    if "key" in node:
        return _arrays(node["data"])
    children = node["fields"].values() if "class" in node else [c for _, c in _children(node)]
    return [name for child in children for name in _arrays(child)]


def unique(name: str, taken: Any) -> str:
    """`name`, or the first of `name~2`, `name~3`, … that is not taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}~{number}"
    return candidate


def _at(path: tuple[str, ...]) -> str:
    return f"at {'/'.join(path)!r}" if path else "at the root of the tree"
