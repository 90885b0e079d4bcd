"""Checkpoints that Orbax wrote, as trees of `Lazy` leaves.

Orbax says what a checkpoint holds; TensorStore, in whose formats Orbax keeps arrays, reads windows
of them. A window costs the chunks that it touches. Orbax makes each array one chunk unless told
otherwise (`ocp.SaveArgs(chunk_byte_size=...)`), or one for each device it was spread over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.errors import CheckpointError, ExportError
from jquant.io.files import FileState
from jquant.io.fitting import check_places
from jquant.trees.lazy import Lazy, Window
from jquant.weights.arguments import by_path, replaced


def lazy_orbax(path: str | os.PathLike[str], *, like: Any = None) -> Any:
    """The tree of a checkpoint written by Orbax, with a `Lazy` in place of every array and number.

    Args:
        path: the folder that `StandardCheckpointer.save` or `PyTreeCheckpointer.save` was given; or
            a `CheckpointManager`'s, of which the latest step is taken, or that of a step, of which
            the only item is taken, or the one called "default"; or that of an item.
        like: a tree whose structure the result is to have, such as an NNX state or what
            `jax.eval_shape` makes of `model.init`: the leaves of the checkpoint take the places of
            its leaves, path by path, in the dtypes of `like`. A state and its pure dict have the
            same paths: the last key `value` of a Flax variable counts for nothing. None: as stored.

    Returns:
        the tree as Orbax describes it (dicts with string keys, and lists, for tuples as well), or
        that of `like`.

    Raises:
        CheckpointError: there is no such checkpoint, or several that may be meant, or it holds
            something else than arrays and numbers. Reading a leaf raises it if data are missing or
            damaged, or the checkpoint has been replaced.
        TreeError: `like` has not the paths of the checkpoint, or a leaf of another shape.

    Example: `params = jq.io.lazy_orbax("run")`, which is that of `"run/300/default"` where 300 is
    the latest step. `jq.io.restore(jq.io.lazy_orbax("run"))` is what `jq.io.plain` was given.
    """
    import orbax.checkpoint as ocp

    folder = _tree_in(Path(path).absolute())
    state = FileState.of(folder / "_METADATA")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            described: Any = checkpointer.metadata(folder).item_metadata
        options = json.loads((folder / "_METADATA").read_text("utf-8"))
        complete = bool(options.get("store_array_data_equal_to_fill_value"))
        tree, driver = described.tree, "zarr3" if described.use_zarr3 else "zarr"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: malformed Orbax metadata: {error!s:.200}") from error

    def leaf(keys: Any, array: Any) -> Lazy:
        if getattr(array, "shape", None) is None or getattr(array, "dtype", None) is None:
            at = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise CheckpointError(f"{folder}: {at!r} is no array: {type(array).__name__}")
        # Where zeros are stored too, what is missing is lost; elsewhere it is zeros.
        spec = {
            "driver": driver,
            "kvstore": _store(folder, array.name),
            "fill_missing_data_reads": not complete,
        }
        return _leaf(state, array.name, tuple(array.shape), np.dtype(array.dtype), spec)

    stored = jax.tree_util.tree_map_with_path(leaf, tree)
    return stored if like is None else _into(like, stored, folder)


def save_orbax(folder: Path, tree: Any) -> None:
    """Write arrays as a checkpoint of Orbax, which `lazy_orbax` opens.

    Args:
        folder: which must not be there.
        tree: of NumPy or JAX arrays.

    Raises:
        ExportError: Orbax cannot store one of them; says why.
        OSError: as the system raises it, of a full disk for example.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute(), tree)
            checkpointer.wait_until_finished()
    except (TypeError, ValueError) as error:
        raise ExportError(f"Orbax cannot store this tree: {error!s:.300}") from error


def _into(like: Any, stored: Any, folder: Path) -> Any:
    """The stored leaves in the places of `like`, cast to the dtypes there."""
    leaves = {_variable(path): leaf for path, leaf in by_path(stored).items()}
    wanting = {path: (_variable(path), leaf) for path, leaf in by_path(like, "like").items()}
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    check_places(dict(wanting.values()), shapes, f"the checkpoint {folder}")
    return replaced(
        like, {path: leaves[at].astype(leaf.dtype) for path, (at, leaf) in wanting.items()}
    )


def _variable(path: str) -> str:
    """The path of a Flax variable: of the array in it, without its last key."""
    return path.removesuffix("/value")


def _tree_in(folder: Path) -> Path:
    """The folder of a tree: this one, or the one that is meant by a step's or a manager's folder.

    What Orbax has not finished writing has another name until it has.
    """
    if (folder / "_METADATA").is_file():
        return folder
    trees = {tree.parent.name for tree in folder.glob("*/_METADATA")}
    items = {tree.parent.parent.name for tree in folder.glob("*/*/_METADATA")}
    inside = sorted(name for name in trees | items if ".orbax-checkpoint-tmp" not in name)
    is_step = (folder / "_CHECKPOINT_METADATA").is_file()  # then what is in it are items
    meant = (None if is_step else _latest_step(inside)) or _only_item(inside)
    if meant is not None:
        return _tree_in(folder / meant)
    advice = f"; pass one of what is in it: {', '.join(inside)}" if inside else ""
    raise CheckpointError(f"{folder}: no Orbax checkpoint of a tree{advice}")


def _latest_step(names: Sequence[str]) -> str | None:
    """The name of the highest number, if all are numbers behind one prefix."""
    steps = [re.fullmatch(r"(.*_)?(\d+)", name) for name in names]
    numbers = {name: int(step[2]) for name, step in zip(names, steps, strict=True) if step}
    prefixes = {step[1] for step in steps if step}
    if len(numbers) < len(names) or len(prefixes) != 1:
        return None
    return max(numbers, key=numbers.__getitem__)


def _only_item(names: Sequence[str]) -> str | None:
    """The name "default", or the only one."""
    if "default" in names:
        return "default"
    return names[0] if len(names) == 1 else None


def _store(folder: Path, name: str) -> dict[str, Any]:
    """Where TensorStore finds an array: inside one database of all, or in a folder of its own."""
    if (folder / "manifest.ocdbt").is_file():
        base = {"driver": "file", "path": f"{folder}/"}
        return {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return {"driver": "file", "path": f"{folder / name}/"}


def _leaf(
    state: FileState, name: str, shape: tuple[int, ...], dtype: np.dtype, spec: dict[str, Any]
) -> Lazy:
    def read(window: Window) -> np.ndarray:
        import tensorstore

        with state.open():  # it names the checkpoint's time of writing
            try:
                store = tensorstore.open(spec, open=True, read=True).result()
                return np.asarray(store[window].read().result())
            except (KeyError, OSError, RuntimeError, ValueError) as error:
                raise CheckpointError(f"array {name!r} cannot be read: {error!s:.300}") from error

    return Lazy(shape, dtype, read, f"{state.identity}, array {name!r}")
