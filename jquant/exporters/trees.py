"""Trees of parameters as Orbax checkpoints, of any function: jquant's own arrays, or qwix's.

Nothing is asked of the function, since the names are those of the tree. The checkpoint lies in the
folder `default`, which Orbax takes for an item. Orbax wants all arrays at once, so each is written
to a scratch file first and mapped from there: memory is that of one weight.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.errors import ExportError, FormatError
from jquant.exporters.described import Described, Holding
from jquant.exporters.folder import new_folder, write_sidecar
from jquant.exporters.qwix import qarray_of
from jquant.exporters.targets import Target, held
from jquant.formats.qarrays import values_of
from jquant.io.orbax import lazy_orbax, save_orbax
from jquant.io.plain import plain_arrays
from jquant.trees.lazy import read, realize
from jquant.weights.qtensor import QTensor, dequantize_weight, is_qtensor

ITEM = "default"
_SCRATCH = ".arrays"
_CHUNK = 1 << 20
_NORMAL = np.finfo(np.float32).tiny
Keep = Callable[[Any], np.ndarray]
New = Callable[[tuple[int, ...], np.dtype], np.ndarray]  # an array to be filled


def export_tree(
    place: Path,
    target: Target,
    qparams: Any,
    beside: Callable[[Path], None],
    flags: tuple[bool, bool],
) -> tuple[str, int, dict[str, str], tuple[str, ...]]:
    """What `export` does for trees; `flags` are its `force` and `verify`.

    Returns:
        of `Exported`, all but the place.

    Raises:
        FormatError, ExportError: see `export`.
    """
    leaves = _by_path(qparams)
    holdings = {
        path: held(target, path, Described.of(leaf))
        for path, leaf in leaves.items() if isinstance(leaf, QTensor)
    }  # fmt: skip
    if not holdings:
        raise FormatError(f"nothing is quantized; {target.name} is for weights that are")

    def make(new: New) -> Any:
        return _arrays(target, qparams, functools.partial(_kept, new))

    def check(folder: Path) -> None:
        if target.name == "qwix":
            _need_numbers(folder, leaves, holdings)

    nbytes = write_tree(place, target.name, (make, check), beside, flags)
    kept = tuple(path for path in leaves if path not in holdings)
    return target.name, nbytes, {path: one.name for path, one in holdings.items()}, kept


def write_tree(
    place: Path,
    name: str,
    content: tuple[Callable[[New], Any], Callable[[Path], None]],
    beside: Callable[[Path], None],
    flags: tuple[bool, bool],
) -> int:
    """Write a folder with a checkpoint of Orbax.

    Args:
        place: see `export`.
        name: of the format.
        content: makes the tree of arrays, by a function that gives empty ones; checks the folder.
        beside: writes what lies beside the checkpoint.
        flags: `force` and `verify`.

    Returns:
        the bytes of all files.
    """
    (make, check), (force, verify) = content, flags
    with new_folder(place, force) as temporary:
        scratch = temporary / _SCRATCH
        scratch.mkdir()
        arrays = make(_on_disk(scratch))
        save_orbax(temporary / ITEM, arrays)
        if verify:
            need_equal(temporary, arrays)
            check(temporary)
        shutil.rmtree(scratch)
        beside(temporary)
        write_sidecar(temporary, name)
        files = [file for file in temporary.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)


def need_equal(folder: Path, arrays: Any) -> None:
    """ExportError: what Orbax gives back is not what it was given; one array after the other."""
    before, after = _by_path(arrays), _by_path(lazy_orbax(folder))
    if set(before) != set(after):
        raise fault(f"array {min(set(before) ^ set(after))!r} is there once only")
    for path, mine in before.items():
        theirs = np.asarray(read(after[path]))
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise fault(
                f"array {path!r} is {theirs.dtype} {theirs.shape}, and was {mine.dtype} "
                f"{mine.shape}"
            )
        if mine.tobytes() != theirs.tobytes():
            raise fault(f"array {path!r} has other values")


def _need_numbers(folder: Path, leaves: Mapping[str, Any], holdings: Mapping[str, Holding]) -> None:
    """ExportError: a `QArray` in a folder does not stand for the numbers of its weight."""
    back = _by_path(lazy_orbax(folder))
    for path in holdings:
        stem = f"{path}/array/" if path else "array/"
        own = {name.removeprefix(stem): read(leaf) for name, leaf in back.items()
               if name.startswith(stem)}  # fmt: skip
        weight = realize(leaves[path])
        whole = np.asarray(dequantize_weight(weight)).astype(np.float32)
        stands = values_of(own).astype(weight.dtype).astype(np.float32)
        stands[np.abs(stands) < _NORMAL] = 0  # as XLA has it
        if not np.array_equal(np.where(np.abs(whole) < _NORMAL, 0, whole), stands):
            raise fault(f"weight {path!r} stands for other numbers")


def fault(difference: str) -> ExportError:
    return ExportError(
        f"what was written is not what is read back, so nothing is left of it: {difference}; this "
        "is a fault of jquant, please report it"
    )


def _arrays(target: Target, qparams: Any, keep: Keep) -> Any:
    if target.name == "orbax":
        return plain_arrays(qparams, keep)

    def leaf(value: Any) -> Any:
        if not isinstance(value, QTensor):
            return keep(read(value))
        arrays = {name: keep(array) for name, array in qarray_of(value).items()}
        return {"array": {"zero_point": None, **arrays}}  # Orbax stores that there is none

    return jax.tree.map(leaf, qparams, is_leaf=is_qtensor)


def _on_disk(folder: Path) -> New:
    """Gives arrays that lie in files of a folder."""
    numbers = itertools.count()

    def new(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nbytes, path = math.prod(shape) * dtype.itemsize, folder / str(next(numbers))
        _reserve(path, nbytes)
        raw = np.memmap(path, np.uint8, "r+", shape=(nbytes,))
        return np.asarray(raw).view(dtype).reshape(shape)

    return new


def _reserve(path: Path, nbytes: int) -> None:
    """Make a file of so many bytes; OSError: there is no room. A page of a file that has none when
    it is written to would end the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return
        for start in range(0, nbytes, _CHUNK):
            file.write(bytes(min(_CHUNK, nbytes - start)))


def _kept(new: New, array: Any) -> np.ndarray:
    """An array as a new one; what no file holds as it is."""
    values = np.asarray(array)
    if not values.size or values.dtype.hasobject or values.dtype.kind in "SU":
        return values
    kept = new(values.shape, values.dtype)
    kept[...] = values
    return kept


def _by_path(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_qtensor)
    return {jax.tree_util.keystr(key, simple=True, separator="/"): leaf for key, leaf in pairs}
