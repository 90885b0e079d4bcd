"""A folder that appears when it is complete, and says of itself what it holds.

It is written under another name beside its place, and renamed; what a process that dies leaves
behind, the next export to that name deletes (`beside.py`). In it lies `jquant_export.json` with the
length and the CRC-32 of every file: it tells an export of jquant from a folder of others, which is
never replaced, and shows whether a file was edited since.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from jquant.errors import CheckpointError, ExportError
from jquant.exporters.beside import beside, clear, delete, locked
from jquant.io.container import parse_json

SIDECAR = "jquant_export.json"
_CHUNK = 1 << 20


def need_place(target: Path, force: bool) -> None:
    """ExportError: there is something at `target` that is not to be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / SIDECAR).is_file():
        raise ExportError(f"{target} is there already, and no export of jquant; give another name")
    if not force:
        raise ExportError(
            f"{target} is an earlier export; pass force=True (--force) to replace it, or give "
            "another name"
        )


@contextlib.contextmanager
def new_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends well, and vanishes when it does not.

    Raises:
        ExportError: see `need_place`.
    """
    target = target.resolve()
    clear(target)
    need_place(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with beside(target, "tmp", Path.mkdir) as temporary:
        before = temporary.with_suffix(".old")
        try:
            yield temporary
            need_place(target, force)  # all this time somebody may have put something there
            with locked(target):
                if target.exists():
                    os.replace(target, before)
                os.replace(temporary, target)
        except BaseException:  # Ctrl-C too: nothing half-written stays behind
            if before.exists() and not target.exists():
                os.replace(before, target)
            delete(temporary)
            raise
        delete(before)


def write_sidecar(folder: Path, form: str) -> None:
    """Write down what the files of a folder are, those of folders inside too."""
    inside = (file for file in sorted(folder.rglob("*")) if file.is_file())
    files = {file.relative_to(folder).as_posix(): _told(file) for file in inside}
    told = {"jquant": own_version(), "format": form, "files": files}
    (folder / SIDECAR).write_text(json.dumps(told, indent=1), "utf-8")


def own_version() -> str:
    """The version of jquant."""
    try:
        return importlib.metadata.version("jquant-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a folder of sources
        return "unknown: not installed"


def edited(folder: str | os.PathLike[str]) -> list[str]:
    """The names of an export's files that are not what was written, or not there; none: all are.

    Raises:
        CheckpointError: the folder is no export of jquant.

    Example: `edited("model-ct")` is `[]` after `jquant.export(fn, qparams, "model-ct")`.
    """
    path = Path(folder)
    if not (path / SIDECAR).is_file():
        raise CheckpointError(f"{path}: {SIDECAR} is missing; it is no export of jquant")
    told = parse_json((path / SIDECAR).read_text("utf-8"), SIDECAR)
    files = told.get("files") if isinstance(told, dict) else None
    if not isinstance(files, dict) or not all(map(_is_inside, files)):
        raise CheckpointError(f"{path}: {SIDECAR} lists no files of this folder")
    return [
        name for name, entry in files.items()
        if not (path / name).is_file() or _told(path / name) != entry
    ]  # fmt: skip


def _is_inside(name: str) -> bool:
    """Whether a name is of a file in a folder, or in one inside it."""
    parts = name.split("/")
    return all(part == Path(part).name and part not in ("", "..") for part in parts)


def _told(file: Path) -> dict[str, object]:
    checksum, buffer = 0, memoryview(bytearray(_CHUNK))
    with file.open("rb") as stream:
        while size := stream.readinto(buffer):
            checksum = zlib.crc32(buffer[:size], checksum)
    return {"bytes": file.stat().st_size, "crc32": f"{checksum:08x}"}
