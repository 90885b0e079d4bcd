"""A Hugging Face folder: its `config.json`, and the tensors of its safetensors files.

One file or shards with an index. Opening a folder reads headers only, and verifies that every
tensor which the index names is where the index says; each tensor is a `Lazy` from then on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jquant.errors import CheckpointError
from jquant.io.files import FileState
from jquant.trees.lazy import Lazy, Window

_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class HFFolder:
    """The tensors of a folder.

    Attributes:
        path: the folder.
        config: what `config.json` says.
        files: tensor name → the file that holds it.
        shapes: tensor name → shape.
        dtypes: tensor name → dtype, by safetensors' name ("F32", "BF16", ...).
        states: file → its state when it was opened.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    states: Mapping[str, FileState]

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any]) -> HFFolder:
        """Read the headers of a folder's files.

        Raises:
            CheckpointError: a file is missing or damaged, or a tensor is not where the index says.
        """
        try:
            files = _tensor_files(path)
        except CheckpointError as error:
            raise CheckpointError(f"{path.name}: {error}") from error
        handles = {file: _open(path / file) for file in dict.fromkeys(files.values())}
        states = {file: FileState.of(path / file) for file in handles}
        names = {file: set(handle.keys()) for file, handle in handles.items()}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for name, file in files.items():
            if name not in names[file]:
                raise CheckpointError(
                    f"{file}: tensor {name!r} is missing; the index says it is there"
                )
            view = handles[file].get_slice(name)
            shapes[name], dtypes[name] = tuple(view.get_shape()), view.get_dtype()
        return cls(path, config, files, shapes, dtypes, states)

    @property
    def name(self) -> str:
        """What to call the folder in errors."""
        return self.path.name

    def tensor(self, name: str) -> Lazy:
        """A tensor as float32.

        Raises:
            CheckpointError: its dtype is not supported, and when the leaf is read: its file has
                changed.
        """
        file, dtype = self.files[name], self.dtypes[name]
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name!r} has dtype {dtype}; supported: {', '.join(_DTYPES)}"
            )
        state = self.states[file]

        def read(window: Window) -> np.ndarray:
            with state.open():  # only to see that it is still the same file
                return np.asarray(_open(Path(state.path)).get_slice(name)[window], np.float32)

        identity = f"{state.identity}, tensor {name!r}"
        return Lazy(self.shapes[name], np.dtype(np.float32), read, identity)


def read_json(path: Path) -> Mapping[str, Any]:
    """The object of a JSON file of a model's folder.

    Raises:
        CheckpointError: it is not there, or no object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; expected a Hugging Face model directory")
    try:
        value = json.loads(path.read_text("utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: expected an object, got {type(value).__name__}")
    return value


def _constant(name: str) -> float:
    """Infinity, which some configurations have; NaN, which JSON has no more, is no setting."""
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def _tensor_files(path: Path) -> dict[str, str]:
    """Tensor name to the file in `path` that holds it."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{index.name}: 'weight_map' is missing or no object")
        for file in set(map(str, files.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{index.name}: {file!r} is no file of this directory")
        return files
    if not (path / "model.safetensors").exists():
        pickled = " (pickled weights are never read)" if any(path.glob("*.bin")) else ""
        raise CheckpointError(
            "neither model.safetensors nor model.safetensors.index.json is there" + pickled
        )
    return dict.fromkeys(_open(path / "model.safetensors").keys(), "model.safetensors")


def _open(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path.parent.name}: {path.name} is missing")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: not a readable safetensors file: {error}") from error
