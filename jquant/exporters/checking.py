"""An export that lies on a disk, looked at: whether its files are those that were written, and
what is in them.

It is read by jquant's own readers, which do not know who wrote it: every tensor is decoded once,
so codes outside their grid, numbers that are none and damaged files show here, not in an engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.errors import CheckpointError
from jquant.exporters.folder import SIDECAR, edited
from jquant.exporters.trees import ITEM
from jquant.formats.base import Spec
from jquant.formats.config import claimed, is_mlx, quantized_modules
from jquant.io.orbax import lazy_orbax
from jquant.trees.lazy import Lazy, read
from jquant.trees.paths import path_of
from jquant.weights.qtensor import QTensor


@dataclass(frozen=True)
class CheckedTensor:
    """A tensor that was read.

    Attributes:
        name: in the file; of a quantized weight, the name it has in a model that is not.
        held: how it is held: a format ("pack-quantized"), a block type ("Q4_K"), or a dtype.
        shape: of the array that it stands for.
        nbytes: in the file, scales and zero points too.
    """

    name: str
    held: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Checked:
    """What an export holds.

    Attributes:
        path: the folder, or the file, of GGUF.
        edited: names of files that are not what was written, or not there.
        has_checksums: whether there are any to say so: GGUF files have none.
        tensors: all of them, in the order of their names.
    """

    path: Path
    edited: tuple[str, ...]
    has_checksums: bool
    tensors: tuple[CheckedTensor, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def check(
    path: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None
) -> Checked:
    """What an export holds, every tensor of it read and decoded once; memory is that of one.

    Args:
        path: a folder that `export` wrote, a Hugging Face folder of others, or a GGUF file.
        progress: is told how many tensors are read, and of how many; default: nobody is.

    Returns:
        the files that were edited since, and every tensor with what holds it, its shape and its
        bytes. Whether the files say so of themselves is the caller's matter: an edited
        `config.json` may be meant.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is not what the configuration says,
            or holds codes outside their grid, NaN or infinity; names it, and the edited files.
        MissingPackageError: the extra `models` is not installed.

    Example: `check("model-ct").edited` is `()` after `jquant.export(fn, qparams, "model-ct")`.
    """
    place = Path(path)
    if not place.exists():
        raise CheckpointError(f"{place}: there is no such folder or file")
    signed = (place / SIDECAR).is_file()
    changed = tuple(edited(place)) if signed else ()
    try:
        tensors = _of_file(place) if place.is_file() else _of_folder(place)
        rows = tuple(_all(tensors, progress))
    except CheckpointError as error:
        if not changed:
            raise
        files = ", ".join(changed)
        raise CheckpointError(f"{error}; edited since they were written: {files}") from error
    return Checked(place, changed, signed, rows)


Tensors = list[tuple[CheckedTensor, Lazy | QTensor]]


def _all(
    tensors: Tensors, progress: Callable[[int, int], object] | None
) -> Iterator[CheckedTensor]:
    """The rows, when their tensors are read."""
    for done, (row, leaf) in enumerate(sorted(tensors, key=lambda pair: pair[0].name)):
        _need_numbers(row.name, leaf)
        yield row
        if progress is not None:
            progress(done + 1, len(tensors))


def _need_numbers(name: str, leaf: Lazy | QTensor) -> None:
    """CheckpointError: a tensor cannot be read. Codecs look at their own parameters."""
    try:
        if isinstance(leaf, Lazy):
            if not np.isfinite(np.asarray(leaf[...], np.float32)).all():
                raise CheckpointError("it holds NaN or infinity")
            return
        for array in (leaf.codes, *leaf.params.values()):
            read(array)
    except CheckpointError as error:
        raise CheckpointError(f"tensor {name!r}: {error}") from error


def _of_folder(folder: Path) -> Tensors:
    if (folder / ITEM / "_METADATA").is_file():
        return _of_tree(folder)
    from jquant.models.coded import experts_apart, tensors_of
    from jquant.models.hf_coded import coded_tensors
    from jquant.models.hf_folder import HFFolder, read_json

    config = dict(read_json(folder / "config.json"))
    quantization: Any = claimed(config)
    opened = HFFolder.open(folder, config)
    specs: dict[str, Spec] = {}
    for file in sorted(set(opened.files.values())):
        stored = tensors_of(folder / file)
        if is_mlx(quantization):
            stored = experts_apart(stored)
        specs |= {name: Spec(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    if quantization is None:
        return [
            (CheckedTensor(name, *_plain(specs[name])), opened.tensor(name))
            for name in opened.shapes
        ]
    modules = quantized_modules(quantization, specs)
    tensors: Tensors = []
    for name, leaf in coded_tensors(opened, quantization, keep=True).items():
        module = modules.get(name.removesuffix(".weight"))
        if module is None or not isinstance(leaf, QTensor):
            tensors.append((CheckedTensor(name, *_plain(specs[name])), leaf))
            continue
        size = sum(_nbytes(specs[own]) for own in module.tensors.values())
        row = CheckedTensor(name, module.codec.name, tuple(leaf.codes.shape), size)
        tensors.append((row, leaf))
    return tensors


def _of_tree(folder: Path) -> Tensors:
    """The arrays of a checkpoint of Orbax, which are of no model."""
    leaves = jax.tree_util.tree_leaves_with_path(lazy_orbax(folder))
    arrays = ((path_of(keys), leaf) for keys, leaf in leaves if isinstance(leaf, Lazy))
    return [
        (CheckedTensor(name, *_plain(Spec(leaf.shape, np.dtype(leaf.dtype)))), leaf)
        for name, leaf in arrays
    ]


def _of_file(path: Path) -> Tensors:
    from jquant.models.gguf_file import read_gguf

    file = read_gguf(path)
    return [
        (CheckedTensor(name, info.kind.name, tuple(info.shape), info.nbytes), file.codes(name))
        for name, info in file.tensors.items()
    ]


def _plain(spec: Spec) -> tuple[str, tuple[int, ...], int]:
    """How an array is held, its shape and its bytes."""
    return spec.dtype.name, spec.shape, _nbytes(spec)


def _nbytes(spec: Spec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize
