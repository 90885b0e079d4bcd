"""A folder in which a job leaves every finished stage, so that it can be killed at any moment.

`job.json` says which job it is: a digest of everything that the result depends on, item by item, so
that a job of another kind is refused with the reason. `stage-00012.safetensors` holds the quantized
weights of one stage and their outcomes; it appears whole or not at all. What was alive between the
stages is not kept: the finished stages are run again with their quantized weights, which gives the
same bits, and costs no more than a forward. `learning.safetensors` is what a learning on the whole
network goes on from, as of its last look.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jquant.errors import CheckpointError, WorkDirError
from jquant.io import load, read_header, save
from jquant.io.container import replace_file
from jquant.layerwise.outcome import Outcome
from jquant.learning.trace import Trace
from jquant.trees.lazy import Lazy
from jquant.trees.processes import differing, from_all, on_all, one_token, whole
from jquant.weights.qtensor import QTensor

_JOB, _STAGE, _LEARNING = "job.json", "stage-{:05d}.safetensors", "learning.safetensors"
_VERSION = 1
# What a process that is killed while it writes leaves behind; see `replace_file`.
_LEFTOVER = re.compile(r"\.(job\.json|(stage-\d+|learning)\.safetensors)\.[0-9a-f]+\.tmp")

Record = dict[str, tuple[QTensor, Outcome]]  # by the name of the weight, or of the layer of it


@dataclass(frozen=True)
class WorkDir:
    """The records of one job; see `open_work_dir`.

    Attributes:
        shared: whether it is that of several processes: the first writes for all.
    """

    path: Path
    shared: bool = False

    def finished(self, stage: int, names: Collection[str]) -> Record | None:
        """The record of a stage, its arrays to be read when they are needed; None if not there.

        Args:
            stage: its number, from 0.
            names: of its weights.

        Raises:
            CheckpointError: the record is damaged; an array's damage shows when it is read.
        """
        file = self.path / _STAGE.format(stage)
        if not self._all_see(file):
            return None
        with _saying_what_to_do():
            told = read_header(file).metadata.get("outcomes", "{}")
            weights = load(file, lazy=True)
            outcomes = {
                name: Outcome(**values | {"told": tuple(values.get("told", ()))})
                for name, values in json.loads(told).items()
            }
            if not outcomes.keys() == set(weights) == set(names):
                raise CheckpointError(f"{file}: not the record of stage {stage + 1}")
        weights = jax.tree.map(_guarded, weights)
        return {name: (weights[name], outcomes[name]) for name in weights}

    def _all_see(self, file: Path) -> bool:
        """Whether a record is there, for all processes.

        Raises:
            WorkDirError: for some it is not.
        """
        is_there = file.exists()
        if self.shared and differing(from_all(str(is_there))):
            raise WorkDirError(
                f"{self.path}: some processes see {file.name} and others do not; pass a folder "
                "that all processes share"
            )
        return is_there

    def finish(self, stage: int, record: Record) -> Record:
        """Write the record of a stage, and return it as `finished` would.

        Raises:
            WorkDirError: it cannot be written.
        """
        outcomes = {name: dataclasses.asdict(outcome) for name, (_, outcome) in record.items()}
        weights = {name: q for name, (q, _) in record.items()}
        if self.shared:  # gathered by all; a record does not tell how many processes there were
            weights = jax.tree.map(whole, weights)
        try:
            file = self.path / _STAGE.format(stage)
            with on_all(self.shared, f"write the record of stage {stage + 1}"):
                if not self.shared or jax.process_index() == 0:
                    save(file, weights, metadata={"outcomes": json.dumps(outcomes)})
        except OSError as error:
            raise WorkDirError(
                f"{self.path}: the record of stage {stage + 1} cannot be written "
                f"({error.strerror or error}); all stages before it are kept: make room, and "
                "start the same job again with this work_dir"
            ) from error
        written = self.finished(stage, record)
        assert written is not None
        return written

    def keep(self, state: PyTree, trace: Trace) -> None:
        """Write what a learning goes on from, in place of what was there.

        Raises:
            WorkDirError: it cannot be written.
        """
        leaves = {f"{k:06}": leaf for k, leaf in enumerate(jax.tree.leaves(state))}
        try:
            metadata = {"trace": json.dumps(dataclasses.asdict(trace))}
            save(self.path / _LEARNING, leaves, metadata=metadata)
        except OSError as error:
            raise WorkDirError(
                f"{self.path}: what was learned up to step {len(trace.loss)} cannot be written "
                f"({error.strerror or error}): make room, and start the same job again with this "
                "work_dir"
            ) from error

    def restore(self, like: PyTree) -> tuple[Any, Trace] | None:
        """What `keep` has written, with the sharding of `like`; None if there is nothing.

        Raises:
            CheckpointError: it is damaged, or of another learning.
        """
        file = self.path / _LEARNING
        if not file.exists():
            return None
        with _saying_what_to_do():
            trace = Trace(**json.loads(read_header(file).metadata.get("trace", "{}")))
            stored = load(file)
            leaves, structure = jax.tree.flatten(like)
            if len(stored) != len(leaves) or any(
                stored[f"{k:06}"].shape != leaf.shape for k, leaf in enumerate(leaves)
            ):
                raise CheckpointError(f"{file}: not the record of this learning")
        trace = dataclasses.replace(
            trace,
            names=tuple(trace.names),
            looks={int(step): loss for step, loss in trace.looks.items()},
        )
        placed = [jax.device_put(stored[f"{k:06}"], leaf.sharding) for k, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, placed), trace


def open_work_dir(
    path: str | os.PathLike[str], fingerprint: Mapping[str, str], shared: bool = False
) -> WorkDir:
    """The work directory of the job with this fingerprint, made if it is not there.

    Args:
        path: the folder.
        fingerprint: of the job.
        shared: whether the job is one of several processes, which all call this.

    Raises:
        WorkDirError: it cannot be written to, belongs to another job, or is not a work directory;
            or processes do not share it.
        ProcessError: another process could not open it.
    """
    folder = Path(path)
    token = one_token() if shared else ""
    with on_all(shared, f"open the work directory {folder}"):
        if not shared or jax.process_index() == 0:
            _open(folder, fingerprint, token)
    if not shared:
        return WorkDir(folder)
    with on_all(shared, f"see the work directory {folder} that process 0 has"):
        try:
            run = json.loads((folder / _JOB).read_bytes()).get("run")
        except (OSError, ValueError, AttributeError):
            run = None
        if run != token:
            raise WorkDirError(
                f"{folder} is not the folder that process 0 has; pass one that all processes share"
            )
    return WorkDir(folder, shared)


def _open(folder: Path, fingerprint: Mapping[str, str], token: str) -> None:
    job = folder / _JOB
    try:
        folder.mkdir(parents=True, exist_ok=True)
        leftovers = [name for name in os.listdir(folder) if _LEFTOVER.fullmatch(name)]
        if job.exists():
            _compare(folder, job, fingerprint)
        elif len(os.listdir(folder)) > len(leftovers):
            raise WorkDirError(
                f"{folder} holds files but no {_JOB}, so it is not a work directory; pass an empty "
                "or a new folder"
            )
        for name in leftovers:
            (folder / name).unlink(missing_ok=True)
        # Written again in any case: that it can be is found out now, not after the first stage.
        with replace_file(job) as file:
            contents: dict[str, Any] = {"version": _VERSION, "fingerprint": dict(fingerprint)}
            contents |= {"run": token} if token else {}
            file.write(json.dumps(contents, indent=1).encode())
    except OSError as error:
        raise WorkDirError(
            f"{folder} cannot be used as a work directory ({error.strerror or error}); pass a "
            "folder that can be written to"
        ) from error


def _compare(folder: Path, job: Path, fingerprint: Mapping[str, str]) -> None:
    try:
        contents = json.loads(job.read_bytes())
        version, old = contents["version"], dict(contents["fingerprint"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WorkDirError(
            f"{job} is damaged ({error}); pass a new work_dir, or delete this one"
        ) from error
    if version != _VERSION:
        raise WorkDirError(
            f"{folder} was written by another version of jquant; pass a new work_dir"
        )
    changed = [name for name in fingerprint if old.get(name) != fingerprint[name]]
    if changed:
        told = [
            name
            if _is_digest(fingerprint[name])
            else f"{name} (was {old.get(name)}, is {fingerprint[name]})"
            for name in changed
        ]
        raise WorkDirError(
            f"{folder} belongs to another job: {', '.join(told)} changed since it was begun; pass "
            "a new work_dir, or delete this one"
        )


@contextlib.contextmanager
def _saying_what_to_do() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; delete that file, and the same job with this work_dir does its stage again"
        ) from error


def _guarded(leaf: Lazy) -> Lazy:
    """The leaf of a record; if it turns out to be damaged, it says what to do."""

    def read(window: Any) -> np.ndarray:
        with _saying_what_to_do():
            return leaf.read(window)

    return dataclasses.replace(leaf, read=read)


def _is_digest(value: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", value) is not None


def version_of(package: str) -> str:
    """The installed version of a package, for a fingerprint."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a folder of sources
        return "unknown: not installed"


def digest(items: Iterable[str | bytes]) -> str:
    """SHA-256 of strings and bytes, one after the other."""
    total = hashlib.sha256()
    for item in items:
        raw = item.encode() if isinstance(item, str) else item
        total.update(len(raw).to_bytes(8, "little"))
        total.update(raw)
    return total.hexdigest()


def leaf_digest(leaf: Any) -> Iterable[str | bytes]:
    """What tells a leaf from others: its bytes, or which bytes it is of a file."""
    yield f"{leaf.shape} {leaf.dtype}"
    if isinstance(leaf, Lazy):
        yield leaf.identity
    elif isinstance(leaf, np.memmap) and leaf.filename is not None:
        base: Any = leaf  # `leaf` may be a part of it, at the same offset
        while isinstance(base.base, np.ndarray):
            base = base.base
        begin = leaf.ctypes.data - base.ctypes.data
        stat = os.stat(leaf.filename)
        yield f"{leaf.filename} {stat.st_size} {stat.st_mtime_ns}"
        yield f"{leaf.offset} {begin} {leaf.strides}"
    elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        yield np.asarray(jax.random.key_data(leaf)).tobytes()
    else:
        held = whole(leaf) if isinstance(leaf, jax.Array) else leaf
        yield np.ascontiguousarray(held).tobytes()
