"""One array of a checkpoint: how it is written, what is claimed of it, and how it is read back.

An array is in memory only while it is written or read, so a tree of `Lazy` leaves passes through
one at a time.

Three encodings. *Raw*: the array's bytes under a dtype that safetensors has. *Stream*: integers of
1 to 16 bits, less `low`, as a dense bit stream. *Opaque*: the bytes of a dtype safetensors has not.
The last two are U8 tensors whose real dtype and shape stand in the node. A node is the JSON that
describes the array; `native.py` lists the forms.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BufferedReader
from types import EllipsisType
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from jquant.errors import CheckpointError
from jquant.io.bitstream import pack_bits, stream_bytes, unpack_bits
from jquant.io.container import DTYPES, Entry, naturals
from jquant.trees.lazy import Lazy, Window, read, span

# Every dtype JAX can make arrays of, by name: versions differ. The excluded ones it only names.
JAX_DTYPES: Mapping[str, np.dtype] = {
    name: jnp.dtype(scalar)
    for name, scalar in vars(jnp).items()
    if isinstance(scalar, type(jnp.float32))
    and jnp.dtype(scalar).name == name
    and name not in ("int1", "uint1", "float6_e2m3fn", "float6_e3m2fn")
} | {"bool": jnp.dtype(jnp.bool_)}

# The numbers that integers of less than a byte can be.
_SMALL = {"int2": (-2, 1), "uint2": (0, 3), "int4": (-8, 7), "uint4": (0, 15)}
_SAFETENSORS_NAME = {dtype: name for name, (dtype, _) in DTYPES.items()}


_CHUNK = 1 << 20  # bytes at a time, where a checksum is all that is wanted of them

Leaf = np.ndarray | jax.Array | Lazy


@dataclass(frozen=True)
class Tensor:
    """An array on its way into a file. `node` is its JSON; writing adds the checksum to it.

    A tensor of codes has the range they must keep to, which shows when it is written, and what to
    say if they do not.
    """

    array: Leaf
    node: dict[str, Any]
    codes: tuple[int, int] | None = None
    refusal: str = ""

    @property
    def size(self) -> int:
        """Bytes in the file."""
        if "bits" in self.node:
            return stream_bytes(self.array.size, self.node["bits"])
        return self.array.size * np.dtype(self.array.dtype).itemsize

    @property
    def stored_dtype(self) -> str:
        """The safetensors dtype."""
        return "U8" if "dtype" in self.node else _SAFETENSORS_NAME[self.array.dtype.name]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the safetensors header."""
        return (self.size,) if "dtype" in self.node else tuple(self.array.shape)

    def write(self, file: BinaryIO) -> None:
        """Append the tensor's bytes to `file`, and its CRC-32 to the node.

        Raises:
            ValueError: codes are outside their range.
        """
        array = _host(self.array)
        if "bits" in self.node:
            if self.codes is not None and not within(array, self.codes):
                raise ValueError(self.refusal)
            data = pack_bits(_unsigned(array, self.node["low"]), self.node["bits"])
        else:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.node["crc32"] = f"{zlib.crc32(data.data):08x}"
        file.write(data.data)


def _host(leaf: Leaf) -> np.ndarray:
    """The leaf in NumPy's hands, for a moment.

    A JAX array keeps what `np.asarray` made of it, a byte for each of its 4-bit codes, until it
    dies; the copy dies here.
    """
    value = read(leaf)
    return np.asarray(value.copy() if isinstance(value, jax.Array) else value)


def describe(
    array: Leaf, name: str, codes: tuple[int, int] | None = None, refusal: str = ""
) -> Tensor:
    """The tensor for an array. Integers within the range `codes` become a stream of its width.

    With `refusal`, the message of a `ValueError`, they are taken to be within it until they are
    written; without, they are looked at now.

    Raises:
        ValueError: JAX has no such dtype, or the array is spread over processes.
    """
    dtype = array.dtype  # of a random key, this is no NumPy dtype
    if not isinstance(dtype, np.dtype) or JAX_DTYPES.get(dtype.name) != dtype:
        raise ValueError(f"dtype {dtype} is none of JAX's; nothing but arrays of numbers is stored")
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            "an array spread over processes; gather it on each, by jax.experimental."
            "multihost_utils.process_allgather(array, tiled=True), and save it on one; or have "
            "Orbax save jq.io.plain(qparams)"
        )
    node: dict[str, Any] = {"array": name, "crc32": "00000000"}
    stream = None
    if dtype.name.startswith(("int", "uint")):
        if codes is not None and (refusal or within(_host(array), codes)):
            stream = {"bits": _width(codes), "low": codes[0]}
        elif jnp.iinfo(dtype).bits < 8:
            stream = {"bits": jnp.iinfo(dtype).bits, "low": int(jnp.iinfo(dtype).min)}
    if stream is not None or dtype.name not in _SAFETENSORS_NAME:
        node |= {"dtype": dtype.name, "shape": list(array.shape), **(stream or {})}
    return Tensor(array, node, codes if refusal else None, refusal)


def within(values: np.ndarray, codes: tuple[int, int]) -> bool:
    """Whether all integers lie in the range, both ends included."""
    if values.dtype.name in _SMALL:  # which NumPy compares slowly, and often need not be
        least, most = _SMALL[values.dtype.name]
        if codes[0] <= least and most <= codes[1]:
            return True
        values = values.astype(np.uint8 if least == 0 else np.int8)
    return not values.size or bool(codes[0] <= values.min() and values.max() <= codes[1])


def claim(node: Mapping[str, Any], entry: Entry) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the array that a node and its tensor promise, if they fit together.

    Raises:
        CheckpointError: they do not.
    """
    name = node["array"]
    if not isinstance(node.get("crc32"), str):
        raise CheckpointError(f"tensor {name!r}: no checksum")
    extra = set(node) - {"array", "crc32"}
    if not extra:
        return jax.ShapeDtypeStruct(entry.shape, JAX_DTYPES[DTYPES[entry.dtype][0]])
    dtype, shape = JAX_DTYPES.get(str(node.get("dtype"))), node.get("shape")
    if dtype is None or not isinstance(shape, list) or not naturals(shape) or len(shape) > 32:
        raise CheckpointError(f"tensor {name!r}: malformed dtype or shape")
    size, promised = entry.end - entry.begin, jax.ShapeDtypeStruct(tuple(shape), dtype)
    encoded = _ENCODED.get(frozenset(extra), lambda node, promised: None)
    if entry.dtype != "U8" or encoded(node, promised) != size:
        raise CheckpointError(f"tensor {name!r}: its encoding does not fit its {size} bytes")
    return promised


def _opaque_bytes(node: Mapping[str, Any], promised: jax.ShapeDtypeStruct) -> int:
    return promised.size * promised.dtype.itemsize


def _stream_bytes(node: Mapping[str, Any], promised: jax.ShapeDtypeStruct) -> int | None:
    """The size of a stream; None if its dtype has no integers of so many bits from `low` on."""
    dtype, bits, low = promised.dtype, node["bits"], node["low"]
    if type(bits) is not int or type(low) is not int or not jnp.issubdtype(dtype, jnp.integer):
        return None
    # The last values of the width may lie beyond the dtype: -3..3 as int3 has a spare code.
    starts = jnp.iinfo(dtype).min <= low <= jnp.iinfo(dtype).max
    narrow = 1 <= bits <= min(16, 8 * dtype.itemsize)
    return stream_bytes(promised.size, bits) if starts and narrow else None


# The fields of a node beside its name and checksum → the bytes that the tensor must have.
_ENCODED: Mapping[frozenset[str], Callable[..., int | None]] = {
    frozenset({"dtype", "shape"}): _opaque_bytes,
    frozenset({"dtype", "shape", "bits", "low"}): _stream_bytes,
}


class Reader:
    """Reads arrays from a file, one at a time, checking each.

    `open` gives the file, open, for one read. `top` gives, for tensors that are streams of codes,
    the largest code less the smallest.
    """

    def __init__(
        self,
        open: Callable[[], AbstractContextManager[BufferedReader]],
        entries: Mapping[str, Entry],
        top: Mapping[str, int],
    ):
        self.open, self.entries, self.top = open, entries, top
        self._verified: set[str] = set()

    def __call__(self, node: Mapping[str, Any]) -> jax.Array | np.ndarray:
        """The array of a node that `claim` has accepted.

        Raises:
            CheckpointError: the bytes are not those that were written, or codes are off the grid.
        """
        array = self.window(node, ...)
        # In its 32-bit mode, JAX would cut 64-bit arrays.
        kept = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
        return jnp.asarray(array) if kept else array

    def lazy(self, node: Mapping[str, Any], identity: str) -> Lazy:
        """The array of such a node, to be read when it is indexed; then it raises the same.

        The checksum covers all of a tensor, so the first window of it runs through all its bytes.
        """
        name, promised = node["array"], claim(node, self.entries[node["array"]])

        def read(window: Window) -> np.ndarray:
            return self.window(node, window)

        identity = f"{identity}, tensor {name!r} with CRC-32 {node['crc32']}"
        return Lazy(promised.shape, np.dtype(promised.dtype), read, identity)

    def window(self, node: Mapping[str, Any], window: Window | EllipsisType) -> np.ndarray:
        """A window of the array, from the bytes that hold it and as few others as can be."""
        name = node["array"]
        entry, promised = self.entries[name], claim(node, self.entries[name])
        whole = tuple(slice(0, size) for size in promised.shape)
        first, block, inner = span(promised.shape, whole if window is ... else window)
        count = math.prod(block)
        bits = node.get("bits", 8 * promised.dtype.itemsize)
        spare = first % 8 if "bits" in node else 0  # of a stream, each eighth code begins a byte
        begin = entry.begin + (first - spare) * bits // 8
        size = stream_bytes(spare + count, bits)
        with self.open() as file:
            if size == entry.end - entry.begin:
                data = _bytes(file, name, begin, size)
                _check_sum(node, zlib.crc32(data.data))
            else:
                self._verify(file, node, entry)
                data = _bytes(file, name, begin, size)
            array = self._decode(node, promised, data, spare, count)
        return array.reshape(block)[inner]

    def _verify(self, file: BufferedReader, node: Mapping[str, Any], entry: Entry) -> None:
        """Run through a tensor's bytes, the first time a part of it is read."""
        name = node["array"]
        if name in self._verified:
            return
        crc = 0
        for begin in range(entry.begin, entry.end, _CHUNK):
            crc = zlib.crc32(_bytes(file, name, begin, min(_CHUNK, entry.end - begin)).data, crc)
        _check_sum(node, crc)
        self._verified.add(name)

    def _decode(
        self,
        node: Mapping[str, Any],
        promised: jax.ShapeDtypeStruct,
        data: np.ndarray,
        spare: int,
        count: int,
    ) -> np.ndarray:
        """The `count` elements in these bytes; `spare` codes stand before them."""
        name = node["array"]
        if "bits" in node:
            data = unpack_bits(data, node["bits"], spare + count)[spare:]
            low, bits = node["low"], node["bits"]
            most = (1 << bits) - 1
            top = min(self.top.get(name, most), int(jnp.iinfo(promised.dtype).max) - low)
            if top < most and data.size and int(data.max()) > top:
                raise CheckpointError(
                    f"tensor {name!r}: code {low + int(data.max())} is off its grid"
                )
            return _signed(data, low, promised.dtype)
        if promised.dtype == np.bool_ and data.size and int(data.max()) > 1:
            raise CheckpointError(f"tensor {name!r}: a bool that is neither 0 nor 1")
        return data.view(promised.dtype)


def _bytes(file: BufferedReader, name: str, begin: int, size: int) -> np.ndarray:
    data = np.empty(size, np.uint8)
    file.seek(begin)
    if file.readinto(data.data) != size:
        raise CheckpointError(f"tensor {name!r}: the file ended while it was read")
    return data


def _check_sum(node: Mapping[str, Any], crc: int) -> None:
    if f"{crc:08x}" != node["crc32"]:
        raise CheckpointError(f"tensor {node['array']!r} is corrupt: its checksum does not match")


def _width(codes: tuple[int, int]) -> int:
    return max(1, (codes[1] - codes[0]).bit_length())


def _unsigned(array: np.ndarray, low: int) -> np.ndarray:
    """Integers less `low`, which all fit in 16 bits, as uint8 or uint16.

    Arithmetic on unsigned words wraps, so it is right for signed ones as well.
    """
    if array.dtype.itemsize == 1:
        signed = array.astype(np.int8 if not array.dtype.name.startswith("u") else np.uint8)
        return signed.view(np.uint8) - np.uint8(low & 0xFF)
    return array.astype(np.uint16) - np.uint16(low & 0xFFFF)


def _signed(codes: np.ndarray, low: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of `_unsigned`."""
    if dtype.itemsize == 1:
        shifted = codes + np.uint8(low & 0xFF)
        return (shifted if dtype.name.startswith("u") else shifted.view(np.int8)).astype(dtype)
    if dtype.itemsize == 2:
        return (codes.astype(np.uint16) + np.uint16(low & 0xFFFF)).view(dtype)
    return (codes.astype(np.int64) + low).astype(dtype)
