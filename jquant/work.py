"""A folder in which a job leaves every finished stage, so that it can be killed at any moment.

`job.json` says which job it is: a digest of everything that the result depends on, item by item, so
that a job of another kind is refused with the reason. `stage-00012.safetensors` holds the quantized
weights of one stage and their outcomes; it appears whole or not at all. What was alive between the
stages is not kept: the finished stages are run again with their quantized weights, which gives the
same bits, and costs no more than a forward.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.errors import CheckpointError, WorkDirError
from jquant.io import load, read_header, save
from jquant.io.container import replace_file
from jquant.lazy import Lazy
from jquant.qtensor import QTensor
from jquant.solve import Outcome

_JOB, _STAGE = "job.json", "stage-{:05d}.safetensors"
_VERSION = 1

Record = dict[str, tuple[QTensor, Outcome]]  # by the name of the weight, or of the layer of it


@dataclass(frozen=True)
class WorkDir:
    """The records of one job; see `open_work_dir`."""

    path: Path

    def finished(self, stage: int) -> Record | None:
        """The record of a stage, its arrays to be read when they are needed; None if not there.

        Raises:
            CheckpointError: the record is damaged.
        """
        file = self.path / _STAGE.format(stage)
        if not file.exists():
            return None
        said = read_header(file).metadata.get("outcomes", "{}")
        weights = load(file, lazy=True)
        outcomes = {name: Outcome(**values) for name, values in json.loads(said).items()}
        if outcomes.keys() != weights.keys():
            raise CheckpointError(f"{file}: not the record of a stage; delete it to do it again")
        return {name: (weights[name], outcomes[name]) for name in weights}

    def finish(self, stage: int, record: Record) -> Record:
        """Write the record of a stage, and return it as `finished` would.

        Raises:
            WorkDirError: it cannot be written.
        """
        outcomes = {name: dataclasses.asdict(outcome) for name, (_, outcome) in record.items()}
        weights = {name: q for name, (q, _) in record.items()}
        try:
            file = self.path / _STAGE.format(stage)
            save(file, weights, metadata={"outcomes": json.dumps(outcomes)})
        except OSError as error:
            raise WorkDirError(
                f"{self.path}: the record of stage {stage + 1} cannot be written "
                f"({error.strerror or error}); all stages before it are kept: make room, and "
                "start the same job again with this work_dir"
            ) from error
        found = self.finished(stage)
        assert found is not None
        return found


def open_work_dir(path: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> WorkDir:
    """The work directory of the job with this fingerprint, made if it is not there.

    Raises:
        WorkDirError: it cannot be written to, belongs to another job, or is not a work directory.
    """
    folder = Path(path)
    job = folder / _JOB
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if job.exists():
            _compare(folder, json.loads(job.read_text("utf-8")), fingerprint)
            with replace_file(folder / "writable"):  # found out now, not after the first stage
                pass
            (folder / "writable").unlink()
            return WorkDir(folder)
        if any(folder.iterdir()):
            raise WorkDirError(
                f"{folder} holds files but no {_JOB}, so it is not a work directory; pass an empty "
                "or a new folder"
            )
        with replace_file(job) as file:
            said = {"version": _VERSION, "fingerprint": dict(fingerprint)}
            file.write(json.dumps(said, indent=1).encode())
    except OSError as error:
        raise WorkDirError(
            f"{folder} cannot be used as a work directory ({error.strerror or error}); pass a "
            "folder that can be written to"
        ) from error
    except json.JSONDecodeError as error:
        raise WorkDirError(f"{job} is damaged ({error}); pass a new work_dir") from error
    return WorkDir(folder)


def _compare(folder: Path, said: Any, fingerprint: Mapping[str, str]) -> None:
    if not isinstance(said, dict) or said.get("version") != _VERSION:
        raise WorkDirError(
            f"{folder} was written by another version of jquant; pass a new work_dir"
        )
    old = said["fingerprint"]
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


def _is_digest(value: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", value) is not None


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
    elif isinstance(leaf, np.memmap):
        stat = os.stat(str(leaf.filename))
        yield f"{leaf.filename} {stat.st_size} {stat.st_mtime_ns} {leaf.offset}"
    elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        yield np.asarray(jax.random.key_data(leaf)).tobytes()
    else:
        yield np.ascontiguousarray(leaf).tobytes()
