"""Quantized trees for the savers of others, as a flat dict of arrays that any of them takes.

Orbax, Flax, `numpy.savez`, HDF5 keep trees of arrays, but not quantized weights, and few of them
every dtype: Orbax's storage has no unsigned integers of 2 or 4 bits, NumPy's none that JAX adds. So
`plain` gives every array by its path, those of a dtype that NumPy lacks as the unsigned integers of
their bits, of which codes narrower than a byte share one; and what is no array as JSON in the bytes
of one more. `restore` needs nothing else. All of it runs where the arrays are: what is sharded
stays so (2- and 4-bit codes not along their last axis where the mesh's axes are explicit).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jquant.errors import CheckpointError
from jquant.io.container import naturals, parse_json
from jquant.io.leaves import JAX_DTYPES
from jquant.io.tree import Decoder, Encoder
from jquant.trees.lazy import read

VERSION = 1
_SAID = "jquant"  # the entry that holds the JSON


def plain(qparams: Any) -> dict[str, Any]:
    """A flat dict of arrays with the dtypes of NumPy, from which `restore` makes the tree again.

    Args:
        qparams: what `save` takes; arrays may be sharded, also over processes.

    Returns:
        path → array, with one more entry, `"jquant"`, uint8.

    Raises:
        TreeError, ValueError: as `save`.

    Example:
        >>> plain({"w": jnp.arange(3, dtype=jnp.uint4)})["w"].tolist()
        [16, 2]
    """
    return plain_arrays(qparams, lambda array: array)


def plain_arrays(qparams: Any, keep: Callable[[Any], Any]) -> dict[str, Any]:
    """The same with `keep(array)` in place of every array, one after the other."""

    def describe(leaf: Any, name: str, codes: Any = None, refusal: str = "") -> _Plain:
        one = _describe(leaf, name, codes, refusal)
        return replace(one, stored=keep(one.stored))

    encoder = Encoder(qparams, describe, reserved=_SAID)
    header = {"version": VERSION, "tree": encoder.root, "static": encoder.statics}
    raw = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    arrays = {name: tensor.stored for name, tensor in encoder.tensors.items()}
    return arrays | {_SAID: np.frombuffer(raw, np.uint8)}


def restore(arrays: Mapping[str, Any]) -> Any:
    """The tree that `plain` made these arrays of, bit for bit, in the structure `load` gives.

    Args:
        arrays: what came out of the saver, JAX or NumPy arrays.

    Raises:
        CheckpointError: these are no such arrays, or some of them have changed shape or dtype.

    Example:
        >>> restore(plain({"w": jnp.arange(3, dtype=jnp.uint4), "eps": 1e-5}))
        {'w': Array([0, 1, 2], dtype=uint4), 'eps': 1e-05}
    """
    if _SAID not in arrays:
        raise CheckpointError(
            f"no arrays that jq.io.plain made: {_SAID!r} is not among {sorted(arrays)[:8]}"
        )
    header = parse_json(np.asarray(arrays[_SAID], np.uint8).tobytes(), f"the entry {_SAID!r}")
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise CheckpointError(f"the entry {_SAID!r} is not of version {VERSION}; write it again")
    held = {name: array for name, array in arrays.items() if name != _SAID}
    decoder = Decoder(held, header.get("static"), _claim, streams=False)
    decoder.check(header.get("tree"))

    def array(node: Mapping[str, Any]) -> Any:
        return _restored(held[node["array"]], JAX_DTYPES[node["dtype"]], tuple(node["shape"]))

    return decoder.read(header.get("tree"), array)


@dataclass(frozen=True)
class _Plain:
    """An array as it is given away, and the node that says what it was."""

    stored: Any
    node: dict[str, Any]


def _describe(leaf: Any, name: str, codes: Any = None, refusal: str = "") -> _Plain:
    array, dtype = read(leaf), np.dtype(leaf.dtype)
    if JAX_DTYPES.get(dtype.name) != dtype:
        raise ValueError(f"dtype {dtype} is none of JAX's; nothing but arrays of numbers is stored")
    node = {"array": name, "dtype": dtype.name, "shape": list(array.shape)}
    return _Plain(array if _native(dtype) else _bits(_whole_rows(array)), node)


def _whole_rows(array: Any) -> Any:
    """Codes that are to share bytes, not spread along their last axis over a mesh of explicit axes.

    There JAX leaves it to us where the parts of a split axis go, and they need not fit.
    """
    at = getattr(array, "sharding", None)
    if _width(array.dtype) >= 8 or not isinstance(at, NamedSharding) or not array.ndim:
        return array
    if AxisType.Explicit not in at.mesh.axis_types or len(at.spec) < array.ndim:
        return array
    return jax.device_put(array, NamedSharding(at.mesh, PartitionSpec(*at.spec[:-1])))


def _native(dtype: np.dtype) -> bool:
    """Whether NumPy has this dtype by itself, and has not been taught it."""
    return dtype.isbuiltin == 1


def _width(dtype: np.dtype) -> int:
    """Bits of an element."""
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


def _word(dtype: np.dtype) -> Any:
    """The unsigned integers that elements are given away as; several to one below 8 bits."""
    return {8: jnp.uint8, 16: jnp.uint16}[max(8, _width(dtype))]


def _stored_shape(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    if _native(dtype) or _width(dtype) >= 8:
        return shape
    *batch, last = shape or (1,)
    return (*batch, -(-last * _width(dtype) // 8))


@jax.jit
def _bits(array: Any) -> Any:
    dtype, width = array.dtype, _width(array.dtype)
    if width >= 8:
        return lax.bitcast_convert_type(array, _word(dtype))
    if jnp.issubdtype(dtype, jnp.floating):
        array = lax.bitcast_convert_type(array, jnp.uint4)
    together, codes = 8 // width, jnp.atleast_1d(array.astype(jnp.int8).astype(jnp.uint8))
    codes = codes & jnp.uint8((1 << width) - 1)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % together)])
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // together, together)
    return functools.reduce(
        jnp.bitwise_or, (parts[..., k] << jnp.uint8(k * width) for k in range(together))
    )


def _restored(array: Any, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    if not _native(dtype):
        return _elements(jnp.asarray(array), dtype, shape)
    kept = jax.dtypes.canonicalize_dtype(dtype) == dtype  # in its 32-bit mode JAX would cut others
    return jnp.asarray(array) if kept else np.asarray(array)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _elements(words: Any, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    """The inverse of `_bits`."""
    width = _width(dtype)
    if width >= 8:
        return lax.bitcast_convert_type(words, dtype)
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)
    codes = (words[..., None] >> shifts) & jnp.uint8((1 << width) - 1)
    whole = (*words.shape[:-1], words.shape[-1] * len(shifts))
    codes = codes.reshape(whole)[..., : (shape or (1,))[-1]].reshape(shape)
    if jnp.issubdtype(dtype, jnp.floating):
        return lax.bitcast_convert_type(codes.astype(jnp.uint4), dtype)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return codes.astype(dtype)
    sign = jnp.uint8(1 << (width - 1))
    return lax.bitcast_convert_type((codes ^ sign) - sign, jnp.int8).astype(dtype)


def _claim(node: Mapping[str, Any], array: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the array that a node and what is held for it promise."""
    name, dtype, shape = node["array"], JAX_DTYPES.get(str(node.get("dtype"))), node.get("shape")
    if set(node) != {"array", "dtype", "shape"} or dtype is None or not naturals(shape):
        raise CheckpointError(f"array {name!r}: its description is malformed")
    assert shape is not None
    promised = (
        _stored_shape(dtype, tuple(shape)),
        dtype if _native(dtype) else np.dtype(_word(dtype)),
    )
    actual = tuple(array.shape), np.dtype(array.dtype)
    if actual != promised:
        raise CheckpointError(
            f"array {name!r} was {promised[1]} {promised[0]} when jq.io.plain made it, and is "
            f"{actual[1]} {actual[0]}; restore it as it was"
        )
    return jax.ShapeDtypeStruct(tuple(shape), dtype)
