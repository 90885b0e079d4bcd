"""The tree of a checkpoint: from a pytree to JSON nodes and tensors, and back with every check.

Trees are made of dicts, lists, tuples, None, arrays, and the dataclasses of `qtensor.py`; nothing
else is written, so nothing else can be read. Reading runs twice over the same nodes with another
function at the leaves: first with abstract arrays, which verifies the whole file without reading
or allocating, then with the arrays themselves, or with what will read them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant import qtensor
from jquant.activations import Activations
from jquant.errors import CheckpointError
from jquant.io.container import Entry
from jquant.io.leaves import Tensor, claim, describe
from jquant.io.schemes import from_json, to_json
from jquant.lazy import Lazy

_MAX_DEPTH = 64
_SEQUENCES = {"list": list, "tuple": tuple}
_ARRAYS = (jax.Array, np.ndarray, Lazy)

# The dataclasses with arrays inside that a file may name.
NODES: Mapping[str, type] = {
    name: value
    for name, value in vars(qtensor).items()
    if dataclasses.is_dataclass(value)
    and isinstance(value, type)
    and value.__module__ == qtensor.__name__
}


def _fields(kind: type) -> tuple[list[str], list[str]]:
    """The names of the fields with arrays, and of the static ones."""
    fields = dataclasses.fields(kind)
    static = [f.name for f in fields if f.metadata.get("static")]
    return [f.name for f in fields if f.name not in static], static


def _optional(kind: type) -> set[str]:
    """The fields that are left out of a file where they are None."""
    return {f.name for f in dataclasses.fields(kind) if f.default is None}


class Encoder:
    """Builds the JSON of a pytree, and gathers its tensors and its distinct static choices."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.statics: list[Any] = []
        self._index: dict[Any, int] = {}
        self._names = {"__metadata__"}  # which a safetensors header keeps for itself

    def node(self, value: Any, path: tuple[str, ...], grid: Any = None) -> Any:
        """The node of a value at `path`; `grid` is that of the `QTensor` it is a field of.

        Raises:
            ValueError: the value is of a kind that is not stored.
        """
        if value is None:
            return None
        if type(value) is dict:
            if not all(type(key) in (str, int) for key in value):
                raise ValueError(
                    f"{_at(path)}: dict keys must be str or int, got {list(value)[:4]}"
                )
            items = value.items()
            return {"dict": [[k, self.node(v, (*path, str(k)), grid)] for k, v in items]}
        if type(value) in (list, tuple):
            items = enumerate(value)
            return {type(value).__name__: [self.node(v, (*path, str(i)), grid) for i, v in items]}
        if NODES.get(type(value).__name__) is type(value):
            return self._dataclass(value, path)
        if isinstance(value, _ARRAYS):
            return self._array(value, path, getattr(grid, "codes", None))
        raise ValueError(f"{_at(path)}: {type(value).__name__} cannot be stored. {_advice(value)}")

    def _dataclass(self, value: Any, path: tuple[str, ...]) -> Any:
        arrays, static = _fields(type(value))
        choices = tuple(getattr(value, name) for name in static)
        try:
            if choices not in self._index:
                self.statics.append({n: to_json(c) for n, c in zip(static, choices, strict=True)})
                self._index[choices] = len(self.statics) - 1
        except ValueError as error:
            raise ValueError(f"{_at(path)}: {error}") from None
        absent = {n for n in _optional(type(value)) if getattr(value, n) is None}
        fields = {n: self._field(value, n, path) for n in arrays if n not in absent}
        return {"class": type(value).__name__, "static": self._index[choices], "fields": fields}

    def _field(self, value: Any, name: str, path: tuple[str, ...]) -> Any:
        field, grid = getattr(value, name), getattr(value, "grid", None)
        if name != "codes" or not isinstance(value, qtensor.QTensor):
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
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            raise ValueError(f"{_at(path)}: an array spread over processes; gather it first")
        name = unique("/".join(path) or "array", self._names)
        self._names.add(name)
        try:
            self.tensors[name] = describe(value, name, codes, refusal)
        except ValueError as error:
            raise ValueError(f"{_at(path)}: {error}. {_advice(value)}") from None
        return self.tensors[name].node


class Decoder:
    """Builds the pytree of a file's nodes, from tensors that `entries` place in it."""

    def __init__(self, entries: Mapping[str, Entry], statics: Any):
        self.entries = entries
        self.top: dict[str, int] = {}  # tensor of codes: its largest code less its smallest
        self.statics: list[dict[str, Any]] = []
        if not isinstance(statics, list) or not all(isinstance(s, dict) for s in statics):
            raise CheckpointError("the list of schemes is malformed")
        for scheme in statics:
            self.statics.append({name: from_json(value) for name, value in scheme.items()})
        self._sound = functools.lru_cache(maxsize=None)(_sound)  # equal weights are traced once

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
            return claim(node, self.entries[name])

        self._build(root, leaf, check=True)
        if len(used) != len(self.entries):
            unused = sorted(set(self.entries) - used)
            raise CheckpointError(f"{len(unused)} tensors belong to no leaf, such as {unused[:3]}")

    def abstract(self, node: Any) -> Any:
        """The tree below a node that `check` accepted, with `ShapeDtypeStruct` leaves."""
        return self._build(node, lambda n: claim(n, self.entries[n["array"]]))

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
        if "array" in root or "class" in root:
            return {"/".join(path): root}
        found: dict[str, Any] = {}
        for key, child in _children(root):
            for name, node in self.leaves(child, (*path, key)).items():
                found[unique(name, found)] = node
        return found

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
        choices = self.statics[index]
        if (
            not isinstance(fields, dict)
            or not set(arrays) - _optional(kind) <= set(fields) <= set(arrays)
            or set(choices) != set(static)
        ):
            raise CheckpointError(f"a {kind.__name__} has not the fields {arrays + static}")
        return kind(**{name: build(child) for name, child in fields.items()}, **choices)

    def _check_weight(self, weight: Any, node: Any) -> None:
        """Whether a weight of abstract arrays dequantizes to the shape and dtype it claims.

        Of a low-rank term, whether it has factors that can be multiplied.
        """
        leaves, tree = jax.tree.flatten(weight)
        try:
            if not all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
                raise TypeError("it holds another weight")
            self._sound(tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
            if not isinstance(weight, qtensor.QTensor):
                return
            low, high = weight.grid.codes
        except _REFUSALS as error:
            raise CheckpointError(f"a weight of the file makes no sense: {error!s:.200}") from error
        codes = node["fields"]["codes"]
        if codes.get("low") != low or codes.get("bits") != max(1, (high - low).bit_length()):
            raise CheckpointError(
                f"tensor {codes['array']!r} is not a stream of codes {low}..{high}"
            )
        self.top[codes["array"]] = high - low


# What the code of grids and layouts may raise when it is traced with a hostile file's values.
_REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def _sound(tree: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> None:
    """Raise if a weight of this structure cannot be what it says; nothing is computed."""
    weight = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(s, d) for s, d in leaves])
    if isinstance(weight, qtensor.LowRank):
        _sound_factors(weight)
        return
    if isinstance(weight, qtensor.Inputs):
        _sound_inputs(weight)
        return
    layout, codes = weight.layout, weight.codes
    factors = [factor for axis in layout.axes for factor in axis]
    if not all(f.role in ("batch", "out", "in") and f.size >= 0 <= f.place for f in factors):
        raise ValueError("malformed layout")
    if codes.shape[-2:] != (layout.size("out"), layout.size("in")):
        raise ValueError(f"codes {codes.shape} do not fit the layout")
    if len(codes.shape) - 2 > layout.batch_rank:
        raise ValueError(f"codes {codes.shape} have more batch axes than the layout")
    if not jnp.issubdtype(codes.dtype, jnp.integer) or not isinstance(weight.grid.codes[0], int):
        raise TypeError("codes must be integers")
    low = weight.compensation
    if low is not None and (
        not isinstance(low, qtensor.LowRank) or tuple(low.shape) != tuple(codes.shape)
    ):
        raise ValueError(f"its compensation does not fit codes {codes.shape}")
    inputs = weight.activations
    if inputs is not None:
        if not isinstance(inputs, qtensor.Inputs):
            raise TypeError("its inputs' quantization is none")
        inputs.choice.way(weight.grid, weight.blocks)
        if any(leaf.shape != codes.shape[:-2] for leaf in jax.tree.leaves(inputs.params)):
            raise ValueError(f"its inputs' ranges do not fit codes {codes.shape}")
    whole = jax.eval_shape(qtensor.dequantize_weight, weight)
    if whole.shape != weight.shape or whole.dtype != weight.dtype:
        raise ValueError(f"it dequantizes to {whole.shape}, not to {weight.shape}")


def _sound_factors(low: qtensor.LowRank) -> None:
    for factor in (low.left, low.right):
        if not isinstance(factor, jax.ShapeDtypeStruct | qtensor.QTensor):
            raise TypeError("a factor must be an array or a weight")
        if isinstance(factor, qtensor.QTensor) and (
            factor.compensation is not None or factor.shape != factor.codes.shape
        ):
            raise ValueError("a quantized factor must lie as it is used")
        if not jnp.issubdtype(factor.dtype, jnp.floating):
            raise TypeError("factors must be floats")
    left, right = low.left.shape, low.right.shape
    if len(left) < 2 or left[:-2] != right[:-2] or left[-1] != right[-2]:
        raise ValueError(f"factors {left} and {right} have no product")


def _sound_inputs(inputs: qtensor.Inputs) -> None:
    choice, params = inputs.choice, inputs.params
    if not isinstance(choice, Activations):
        raise TypeError("inputs are quantized by no Activations")
    wanted: Any = None
    if choice.granularity == "static":
        shape = jax.tree.leaves(params)[0].shape
        end = jax.ShapeDtypeStruct(shape, jnp.float32)
        wanted = dict(jax.eval_shape(choice.fit, end, end))
    if jax.tree.map(lambda x: (x.shape, x.dtype), params) != jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    ):
        raise ValueError("ranges of inputs do not fit their grid")


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


def _arrays(node: Any) -> list[str]:
    """The names of the tensors below a checked node."""
    if node is None:
        return []
    if "array" in node:
        return [node["array"]]
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


def _advice(value: Any) -> str:
    """What to pass instead of a value that is not stored."""
    module = type(value).__module__.split(".")[0]
    if isinstance(value, jax.Array):
        return "Store random keys as jax.random.key_data(key)"
    if module == "flax":
        return "Pass flax.nnx.to_pure_dict(state), or flax.core.unfreeze(params) for a FrozenDict"
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return "Pass jnp.asarray(value)"
    return "Pass dicts, lists and tuples of jquant.QTensor, jax.Array and numpy.ndarray"
