"""Reading the outside of a GGUF file without trusting it.

    "GGUF" version tensor_count kv_count | kv... | tensor infos... | padding | tensor data

Every number in that header is a claim about a file whose size is known. Each count is compared with
the bytes that are left before anything of that size is made, so a truncated, bit-flipped or hostile
file costs a bounded scan and ends in one `CheckpointError`, never in a huge allocation. Tensors
stay in the file; `GGUFFile.tensor` gives one as a `Lazy`, which is float32 once it is read.

(The `gguf` package's own reader believes counts and offsets, and builds several arrays for each
token of a vocabulary; only its dequantization tables are used here.)
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from jaxtyping import Float, UInt8

from jquant.errors import CheckpointError
from jquant.formats import gguf
from jquant.formats.block_types import KINDS, TENSOR
from jquant.io.files import FileState, naming
from jquant.trees.lazy import Lazy, Window, span
from jquant.weights.qtensor import QTensor

VERSIONS = (2, 3)
# No vocabulary, merge list or network comes near these; a larger count is an attack or damage.
MAX_STRINGS, MAX_ENTRIES, MAX_AXES, MAX_NAME = 1 << 21, 1 << 16, 4, 1 << 10

_SCALARS = {  # GGUF value type to the struct format of its little-endian bytes
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
NUMBERS = tuple(GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16"))


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` outermost axis first, `start` in bytes from the file's."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """A validated GGUF file: `metadata` (arrays as lists or NumPy arrays) and `tensors` by name."""

    state: FileState
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def tensor(self, name: str) -> Lazy:
        """The tensor `name` as float32, dequantized when it is read; a window reads whole rows.

        Raises:
            CheckpointError: the tensor's type is not one that can be dequantized; and when it is
                read, if the file has changed.
        """
        info = self.tensors[name]
        if not _is_decodable(info.kind):
            raise CheckpointError(
                f"{self.state.path}: tensor {name!r} has type {info.kind.name}, which the gguf "
                "package cannot dequantize; convert the file to F16, Q8_0, Q4_0, Q4_K or the like"
            )

        def read(window: Window) -> np.ndarray:
            return self._rows(info, window[:-1])[..., window[-1]]

        return Lazy(
            info.shape, np.dtype(np.float32), read, f"{self.state.identity}, tensor {name!r}"
        )

    def codes(self, name: str) -> Lazy | QTensor:
        """The tensor `name` as a weight of lazy codes; as `tensor` has it if it is not quantized.

        Raises:
            CheckpointError: its type has no codec.
        """
        info = self.tensors[name]
        if info.kind in NUMBERS or len(info.shape) != 2:
            return self.tensor(name)
        if info.kind.name not in KINDS:
            raise CheckpointError(
                f"tensor {name!r} has type {info.kind.name}, which cannot be kept as codes; kept "
                f"are {', '.join(KINDS)}; pass quantized='dequantize'"
            )
        stored = (info.shape[0], info.nbytes // info.shape[0])

        def read(window: Window) -> np.ndarray:
            return self._bytes(info, window, stored)

        identity = f"{self.state.identity}, tensor {name!r}"
        return gguf(info.kind.name).lazy({TENSOR: Lazy(stored, np.dtype(np.uint8), read, identity)})

    def _bytes(
        self, info: TensorInfo, window: Window, stored: tuple[int, ...]
    ) -> UInt8[np.ndarray, " ..."]:
        """A window of a tensor's bytes, rows of which `stored` has."""
        first, block, inner = span(stored, window)
        with self.state.open() as file:
            raw = np.empty(block, np.uint8)
            file.seek(info.start + first)
            if file.readinto(raw.data) != raw.size:
                raise CheckpointError(f"tensor {info.name!r}: the file ended while it was read")
        return np.ascontiguousarray(raw[inner])

    def _rows(self, info: TensorInfo, window: Window) -> Float[np.ndarray, " ..."]:
        """A window along all axes but the innermost, along which blocks run."""
        row = info.nbytes // math.prod(info.shape[:-1])
        raw = self._bytes(info, (*window, slice(0, row)), (*info.shape[:-1], row))
        with naming(self.state.path):
            if info.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
                dtype = "<f4" if info.kind == GGMLQuantizationType.F32 else "<f2"
                return raw.view(dtype).astype(np.float32)
            with np.errstate(all="ignore"):  # damaged scales overflow; the reader checks values
                return dequantize(raw, info.kind)


@functools.cache
def _is_decodable(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package makes numbers of this type; it says so only when it is asked to."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def read_gguf(path: str | Path) -> GGUFFile:
    """Open and validate the GGUF file at `path`; no tensor is read yet.

    Raises:
        CheckpointError: not a little-endian GGUF file of version 2 or 3, or any part of it lies.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise CheckpointError(f"{path.name}: {size} bytes; a GGUF header alone has 24")
        state = FileState.of(path, file)
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    cursor = _Cursor(data, path.name)
    if bytes(data[:4]) != b"GGUF":
        raise cursor.error(f"starts with {bytes(data[:4])!r}; a GGUF file starts with b'GGUF'")
    cursor.at = 4
    version = cursor.scalar("<I", "the version")
    if version not in VERSIONS:
        big = version & 0xFFFF == 0 and version >> 16 != 0
        hint = " (big-endian files are not supported)" if big else ""
        raise cursor.error(f"GGUF version {version}; supported: 2, 3{hint}")
    tensor_count = cursor.count("tensors", limit=MAX_ENTRIES, least_bytes=24)
    kv_count = cursor.count("metadata entries", limit=MAX_ENTRIES, least_bytes=13)
    metadata: dict[str, Any] = {}
    for _ in range(kv_count):
        key = cursor.string("a metadata key", MAX_NAME)
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.scalar("<I", f"the type of {key!r}"), key)
    infos = [cursor.tensor() for _ in range(tensor_count)]
    tensors = _placed(infos, metadata, cursor)
    return GGUFFile(state, metadata, tensors)


def _placed(
    infos: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any], cursor: _Cursor
) -> dict[str, TensorInfo]:
    """Check each tensor's type, size and place against the file."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment = {alignment!r}; expected a power of two")
    base = -(-cursor.at // alignment) * alignment
    placed: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in infos:
        if name in placed:
            raise cursor.error(f"tensor {name!r} appears twice")
        try:
            kind = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise cursor.error(f"tensor {name!r} has the unknown type {kind}") from None
        if shape[-1] % block:
            raise cursor.error(
                f"tensor {name!r}: {shape[-1]} columns; {kind.name} packs blocks of {block}"
            )
        start, nbytes = base + offset, math.prod(shape) // block * block_bytes
        if offset % alignment or start + nbytes > cursor.size:
            raise cursor.error(
                f"tensor {name!r} claims bytes {start} to {start + nbytes} of a file of "
                f"{cursor.size}, aligned to {alignment}; the file is truncated or damaged"
            )
        placed[name] = TensorInfo(name, shape, kind, start, nbytes)
    in_order = sorted(placed.values(), key=lambda info: info.start)
    for one, other in zip(in_order, in_order[1:], strict=False):
        if one.start + one.nbytes > other.start:
            raise cursor.error(f"tensors {one.name!r} and {other.name!r} overlap")
    return placed


class _Cursor:
    """A position in the file's bytes that refuses to pass their end."""

    def __init__(self, data: np.ndarray, name: str):
        self.data, self.name, self.at, self.size = data, name, 0, data.size
        self.buffer = data.data
        self.strings = 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}")

    def take(self, nbytes: int, what: str) -> int:
        """The start of the next `nbytes` bytes, and step over them."""
        start = self.at
        if nbytes > self.size - start:
            raise self.error(
                f"{what} needs {nbytes} bytes at {start}, the file has {self.size}; "
                "it is truncated or damaged"
            )
        self.at = start + nbytes
        return start

    def scalar(self, form: str, what: str) -> Any:
        return struct.unpack_from(form, self.buffer, self.take(struct.calcsize(form), what))[0]

    def count(self, what: str, limit: int, least_bytes: int) -> int:
        """A count of things of at least `least_bytes` each: bounded by what is left of the file."""
        got = self.scalar("<Q", f"the number of {what}")
        if got > min(limit, (self.size - self.at) // least_bytes):
            raise self.error(
                f"claims {got} {what}, with {self.size - self.at} bytes left (and at most {limit} "
                "supported); the file is truncated or damaged"
            )
        return got

    def string(self, what: str, most: int | None = None) -> str:
        length = self.scalar("<Q", what)
        if most is not None and length > most:
            raise self.error(f"{what} claims {length} bytes; supported: {most}")
        start = self.take(length, what)
        try:
            return str(self.buffer[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at byte {start} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], repr(key))
        if kind == _STRING:
            return self.string(repr(key))
        if kind != _ARRAY:
            raise self.error(f"metadata {key!r} has the unknown type {kind}")
        kind = self.scalar("<I", repr(key))
        if kind == _STRING:
            count = self.count(f"strings in {key!r}", MAX_STRINGS - self.strings, least_bytes=8)
            self.strings += count
            return [self.string(repr(key)) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.error(f"metadata {key!r} is an array of type {kind}; supported: flat arrays")
        dtype = np.dtype(_SCALARS[kind])
        count = self.count(f"numbers in {key!r}", self.size, dtype.itemsize)
        start = self.take(count * dtype.itemsize, repr(key))
        return np.frombuffer(self.buffer, dtype, count, start)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """The name, shape (outermost axis first), type number and offset of the next tensor."""
        name = self.string("a tensor's name", MAX_NAME)
        axes = self.scalar("<I", f"the axes of {name!r}")
        if not 1 <= axes <= MAX_AXES:
            raise self.error(f"tensor {name!r} has {axes} axes; supported: 1 to {MAX_AXES}")
        dims = [self.scalar("<Q", f"the shape of {name!r}") for _ in range(axes)]
        if min(dims) < 1 or max(dims) > 2**40:
            raise self.error(f"tensor {name!r} has the shape {dims}")
        kind = self.scalar("<I", f"the type of {name!r}")
        # GGUF writes the fastest axis first.
        return name, tuple(reversed(dims)), kind, self.scalar("<Q", f"the offset of {name!r}")
