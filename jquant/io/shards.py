"""A tree that is spread over processes, as a folder: a file from each process, and an index.

Every process writes the parts of arrays that lie on its devices, no part twice, into a file of
`native.py`'s kind. The index, which comes last, has the tree and says of each array which box of it
stands where; a folder without an index is none. Reading needs neither the processes nor the mesh of
writing: a window of an array is put together of the boxes that it meets.

    {"version": 1, "tree": node, "static": [scheme, ...], "files": [name, ...], "user": {str: str},
     "boxes": {array: [[file, key in it, [start, ...], [stop, ...]], ...]}}

The index is JSON, with its CRC-32 beside it; the nodes are those of `tree.py` with a dtype and a
shape for every array. The boxes of an array are the cells of a grid, each once.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jquant.errors import CheckpointError
from jquant.io.container import naturals, parse_json, replace_file
from jquant.io.files import naming
from jquant.io.leaves import JAX_DTYPES, Tensor, describe, within
from jquant.io.tree import Decoder, Encoder
from jquant.trees.lazy import Lazy, Window

INDEX = "jquant.index.json"
VERSION = 1
_SHARD = "shard-{}-{:05d}.safetensors"
_MOST = 64 << 20  # bytes of an index that are parsed

Ends = tuple[tuple[int, ...], tuple[int, ...]]  # where a box starts and stops, along each axis


class Box(NamedTuple):
    """A part of an array, and the tensor that holds it."""

    file: int
    key: str
    start: tuple[int, ...]
    stop: tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """An array on its way into the files of several processes, and its node.

    Attributes:
        codes: the range that its integers keep to, or None.
        refusal: what to say if they do not.
    """

    array: Any
    node: dict[str, Any]
    codes: tuple[int, int] | None
    refusal: str

    def boxes(self) -> list[tuple[int, Ends]]:
        """Of each part of the array the process that writes it; the same on every process."""
        if not isinstance(self.array, jax.Array) or self.array.is_fully_addressable:
            return [(0, ((0,) * self.array.ndim, tuple(self.array.shape)))]
        owners: dict[Ends, int] = {}
        places = self.array.sharding.devices_indices_map(self.array.shape)
        for device, index in sorted(places.items(), key=lambda item: item[0].id):
            owners.setdefault(_ends(index, self.array.shape), device.process_index)
        return [(owner, ends) for ends, owner in sorted(owners.items())]

    def part(self, ends: Ends) -> Any:
        """The box, which lies on a device of this process."""
        if not isinstance(self.array, jax.Array) or self.array.is_fully_addressable:
            return self.array
        shards = self.array.addressable_shards
        return next(s.data for s in shards if _ends(s.index, self.array.shape) == ends)


def _ends(index: Sequence[slice], shape: Sequence[int]) -> Ends:
    cuts = [at.indices(size) for at, size in zip(index, shape, strict=True)]
    return tuple(cut[0] for cut in cuts), tuple(cut[1] for cut in cuts)


def are_in(folder: Path) -> bool:
    """Whether a path is a folder of shards, finished or not."""
    return (folder / INDEX).is_file() or (
        folder.is_dir() and any(folder.glob("shard-*.safetensors"))
    )


def encoded(tree: Any) -> Encoder:
    """The nodes and the arrays of a tree, and what `save` raises of it."""
    return Encoder(tree, _describe)


def _describe(
    leaf: Any, name: str, codes: tuple[int, int] | None = None, refusal: str = ""
) -> Spread:
    dtype = leaf.dtype
    if not isinstance(dtype, np.dtype) or JAX_DTYPES.get(dtype.name) != dtype:
        raise ValueError(f"dtype {dtype} is none of JAX's; nothing but arrays of numbers is stored")
    node = {"array": name, "dtype": dtype.name, "shape": list(leaf.shape)}
    return Spread(leaf, node, codes if refusal else None, refusal)


def tensors_of(encoder: Encoder, process: int) -> dict[str, Tensor]:
    """The tensors of the file that a process writes."""
    mine: dict[str, Tensor] = {}
    for _, key, ends, spread in _parts(encoder, process):
        mine[key] = describe(spread.part(ends), key, spread.codes, spread.refusal)
    return mine


def _parts(encoder: Encoder, process: int | None = None) -> Iterator[tuple[int, str, Ends, Spread]]:
    """Process, key, ends and array of all parts, or of those that one process writes."""
    for name, spread in encoder.tensors.items():
        for number, (owner, ends) in enumerate(spread.boxes()):
            if process is None or owner == process:
                yield owner, f"{name}:{number}", ends, spread


def name_of(token: str, process: int) -> str:
    """The name of the file of a process; another for each writing."""
    return _SHARD.format(token, process)


def write_index(
    folder: Path, encoder: Encoder, files: Sequence[str], user: Mapping[str, str]
) -> None:
    """Make a folder of these files a checkpoint; files of one that it was are removed."""
    boxes: dict[str, list[Any]] = {name: [] for name in encoder.tensors}
    for owner, key, ends, spread in _parts(encoder):
        boxes[spread.node["array"]].append([owner, key, *map(list, ends)])
    body = json.dumps(
        {
            "version": VERSION, "tree": encoder.root, "static": encoder.statics,
            "files": list(files), "user": dict(user), "boxes": boxes,
        },
        separators=(",", ":"), allow_nan=False,
    )  # fmt: skip
    with replace_file(folder / INDEX) as file:
        file.write(json.dumps({"crc32": _sum(body), "jquant": body}).encode())
    for old in folder.glob("shard-*.safetensors"):
        if old.name not in files:
            old.unlink(missing_ok=True)


def _sum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


class Index:
    """The index of a folder, checked: `tree` gives its leaves, lazily.

    Args:
        folder: of the checkpoint.
        opener: gives the tensors of a file in it, lazily, by name.

    Raises:
        CheckpointError: there is none, a file of it is missing, or it is damaged.
    """

    def __init__(self, folder: Path, opener: Any) -> None:
        with naming(folder / INDEX):
            body = _read(folder / INDEX)
            files, self.user = body.get("files"), body.get("user")
            _check_names(files, self.user)
            assert isinstance(files, list)
            self.files = [_opened(folder, name, len(files), opener) for name in files]
            boxes = body.get("boxes")
            if not isinstance(boxes, dict):
                raise CheckpointError("the boxes are malformed")
            self._boxes: dict[str, Any] = boxes
            self.decoder = Decoder(self._boxes, body.get("static"), self._claim, streams=False)
            self.root = body.get("tree")
            self.decoder.check(self.root)

    def lazy(self, node: Mapping[str, Any]) -> Lazy:
        """The array of a node, which reads of a window the boxes that it meets."""
        name, kind = node["array"], self._claim(node, self._boxes[node["array"]])
        cells = [_box(claim) for claim in self._boxes[name]]
        leaves = [self.files[cell.file][cell.key] for cell in cells]
        low, high = self.decoder.ranges.get(name, (0, 0))

        def read(window: Window) -> np.ndarray:
            value = _assembled(window, cells, leaves, np.dtype(kind.dtype))
            if low < high and not within(value, (low, high)):
                raise CheckpointError(f"tensor {name!r}: codes outside {low}..{high}")
            return value

        identity = "; ".join(sorted({leaf.identity for leaf in leaves}))
        return Lazy(kind.shape, np.dtype(kind.dtype), read, f"{name!r} of {identity}")

    def _claim(self, node: Mapping[str, Any], claims: Any) -> jax.ShapeDtypeStruct:
        """The shape and dtype that a node and its boxes promise, if they fit together."""
        name, shape = node["array"], node.get("shape")
        dtype = JAX_DTYPES.get(str(node.get("dtype")))
        if set(node) != {"array", "dtype", "shape"} or dtype is None or not naturals(shape):
            raise CheckpointError(f"array {name!r}: its description is malformed")
        assert shape is not None
        cells = [_box(claim) for claim in claims] if isinstance(claims, list) else []
        if not _fills(cells, tuple(shape)):
            raise CheckpointError(f"array {name!r}: its boxes do not fill its shape {shape}")
        for cell in cells:
            leaf = self.files[cell.file].get(cell.key) if cell.file < len(self.files) else None
            size = tuple(b - a for a, b in zip(cell.start, cell.stop, strict=True))
            if leaf is None or leaf.shape != size or np.dtype(leaf.dtype) != dtype:
                raise CheckpointError(f"array {name!r}: no file holds its box {cell.key!r:.80}")
        return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} is a folder without an index: no checkpoint, or one that was not "
            "finished; give the file, or save it again"
        )
    if path.stat().st_size > _MOST:
        raise CheckpointError(f"an index of more than {_MOST} bytes")
    outer = parse_json(path.read_bytes(), "the index")
    body = outer.get("jquant") if isinstance(outer, dict) else None
    if not isinstance(body, str) or outer.get("crc32") != _sum(body):
        raise CheckpointError("the index is corrupt: its checksum does not match")
    inner = parse_json(body, "the index")
    if not isinstance(inner, dict) or inner.get("version") != VERSION:
        raise CheckpointError(f"not an index of version {VERSION}, which this jquant reads")
    return inner


def _check_names(files: Any, user: Any) -> None:
    plain = isinstance(files, list) and all(
        isinstance(f, str) and f == os.path.basename(f) and f.startswith("shard-") for f in files
    )
    strings = isinstance(user, dict) and all(isinstance(v, str) for v in user.values())
    if not plain or not strings:
        raise CheckpointError("the names of files, or the metadata, are malformed")


def _opened(folder: Path, name: str, count: int, opener: Any) -> Mapping[str, Lazy]:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"the shard {name} is missing, one of {count}; copy it from where the process that "
            "wrote it has its disk, or save the tree again"
        )
    held = opener(path)
    if not isinstance(held, dict) or not all(isinstance(leaf, Lazy) for leaf in held.values()):
        raise CheckpointError(f"{path}: not a shard of a checkpoint")
    return held


def _box(claim: Any) -> Box:
    fits = isinstance(claim, list) and len(claim) == 4 and naturals([claim[0]])
    if not fits or not isinstance(claim[1], str) or not naturals(claim[2]):
        raise CheckpointError(f"a malformed box {claim!r:.80}")
    if not naturals(claim[3]) or len(claim[2]) != len(claim[3]):
        raise CheckpointError(f"a malformed box {claim!r:.80}")
    return Box(claim[0], claim[1], tuple(claim[2]), tuple(claim[3]))


def _fills(cells: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes are the cells of a grid over the shape, each of them once."""
    starts = {cell.start for cell in cells}
    if not cells or len(starts) != len(cells) or {len(at) for at in starts} != {len(shape)}:
        return False
    after = []  # along each axis, where a cell stops that starts there
    for axis, size in enumerate(shape):
        cuts = sorted({start[axis] for start in starts})
        if cuts[0] != 0 or cuts[-1] > size:
            return False
        after.append(dict(itertools.pairwise([*cuts, size])))
    return len(cells) == math.prod(map(len, after)) and all(
        cell.stop == tuple(after[axis][at] for axis, at in enumerate(cell.start)) for cell in cells
    )


def _assembled(
    window: Window, cells: Sequence[Box], leaves: Sequence[Lazy], dtype: np.dtype
) -> np.ndarray:
    """A window of the array that lies in boxes."""
    for cell, leaf in zip(cells, leaves, strict=True):  # one holds it: no copy
        ends = list(zip(window, cell.start, cell.stop, strict=True))
        if all(start <= at.start and at.stop <= stop for at, start, stop in ends):
            return leaf[tuple(slice(at.start - start, at.stop - start) for at, start, _ in ends)]
    out = np.empty([at.stop - at.start for at in window], dtype)
    for cell, leaf in zip(cells, leaves, strict=True):
        ends = list(zip(window, cell.start, cell.stop, strict=True))
        both = [(max(at.start, a), min(at.stop, b)) for at, a, b in ends]
        if all(first < last for first, last in both):
            into = tuple(
                slice(a - at.start, b - at.start) for (a, b), at in zip(both, window, strict=True)
            )
            out[into] = leaf[
                tuple(slice(a - s, b - s) for (a, b), s in zip(both, cell.start, strict=True))
            ]
    return out
