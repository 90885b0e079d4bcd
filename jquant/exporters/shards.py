"""safetensors files written piece by piece: the header first, then each tensor at its place.

What a file will hold is told by shapes and dtypes, so its header is written before a value is read.
Then each piece (the tensors of one weight) is made, written and forgotten: memory is that of one.
Wide dtypes lie first in a file, which readers that map it need; pieces come in the model's order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jquant.errors import ExportError
from jquant.formats.base import Spec
from jquant.io.container import DTYPES, render_header

_NAMES = {np.dtype(name): theirs for theirs, (name, _) in DTYPES.items()}


class Piece(NamedTuple):
    """Tensors that are made together: what they will be, and what makes them."""

    specs: Mapping[str, Spec]
    make: Callable[[], Mapping[str, np.ndarray]]

    @property
    def nbytes(self) -> int:
        return sum(map(_size, self.specs.values()))


def write_shards(folder: Path, pieces: Sequence[Piece], most: int) -> int:
    """Write tensors to a folder as `model.safetensors`, or as shards with an index.

    Args:
        folder: where to.
        pieces: in order; names must not repeat.
        most: bytes of tensors that a file may have, unless one piece has more.

    Returns:
        the bytes of all tensors.

    Raises:
        OSError: as the system raises it, of a full disk for example.
    """
    shards = _cut(pieces, most)
    total = sum(piece.nbytes for piece in pieces)
    if len(shards) == 1:
        _write(folder / "model.safetensors", shards[0])
        return total
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / file, shard)
        places |= {name: file for piece in shard for name in piece.specs}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    return total


def _cut(pieces: Sequence[Piece], most: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _write(path: Path, shard: Sequence[Piece]) -> None:
    specs = {name: spec for piece in shard for name, spec in piece.specs.items()}
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)  # stable
    sizes = {n: (_NAMES[specs[n].dtype], specs[n].shape, _size(specs[n])) for n in order}
    header = render_header({"format": "pt"}, sizes)
    places, at = {}, len(header)
    for name in order:
        places[name] = at
        at += sizes[name][2]
    with open(path, "xb") as file:
        file.write(header)
        file.truncate(at)
        for piece in shard:
            _put(file, piece, places)
        file.flush()
        os.fsync(file.fileno())


def _put(file: BinaryIO, piece: Piece, places: Mapping[str, int]) -> None:
    tensors = piece.make()
    for name, spec in piece.specs.items():
        array = np.ascontiguousarray(tensors[name])
        got = Spec(tuple(tensors[name].shape), array.dtype)
        if got != spec:
            raise ExportError(f"tensor {name!r} came as {got}; {spec} was promised")
        file.seek(places[name])
        file.write(array.reshape(-1).view(np.uint8).data)


def _size(spec: Spec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize
