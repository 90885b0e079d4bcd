"""What is written beside its place, under a hidden name, until it is complete; and room for it.

A process that is killed leaves `.NAME.….tmp` (a folder), `.NAME.….part` (a file), `.NAME.….old` (an
export that was just then being replaced) or `.NAME.….gone` (what was being deleted) behind. Who
writes holds a lock on what it writes, and a lock dies with its process: so the next export of that
name sees which of these nobody writes any more. It puts an old export back where there is none, and
deletes the rest. Where there are no such locks (Windows, some network drives) nothing is deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from jquant.errors import ExportError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def beside(target: Path, ending: str, make: Callable[[Path], object]) -> Iterator[Path]:
    """A hidden name beside a target, at which `make` has made a file or folder, locked.

    Args:
        target: a path; its folder must be there.
        ending: "tmp" or "part".
        make: makes an empty file or folder. FileExistsError: there is one.
    """
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{ending}")
        make(path)
        with locked(path) as is_mine:
            if is_mine is not False:
                yield path
                return


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """A lock on a file or folder for as long as the block runs, and whether it could be had.

    False: another process has it, or the path is there no more. None: there are no locks here.
    """
    try:
        handle = None if fcntl is None else os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(path, handle)
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path, handle: int | None) -> bool | None:
    if fcntl is None or handle is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None


def clear(target: Path) -> None:
    """Deletes what killed processes have left of exports to a target; puts an old export back."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(tmp|part|old|gone)")
    for path in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
        match = name.fullmatch(path.name)
        if match is None:
            continue
        with locked(path) as is_mine:
            if not is_mine:
                continue
            if match[1] == "old" and not target.exists():
                os.replace(path, target)
            else:
                delete(path)


def delete(path: Path) -> None:
    """Deletes a hidden file or folder, if it is there and can be. A folder gets another name first:
    half of an old export must not be taken for one."""
    if path.is_dir():
        gone = path.with_suffix(".gone")
        with contextlib.suppress(OSError):
            path = path.rename(gone)
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def room(target: Path, nbytes: int) -> Iterator[None]:
    """A block that writes so many bytes to a target.

    Raises:
        ExportError: there is less room on the drive, or it is full before all is written. Nothing
            is left where the block sees to that.
    """
    folder = target.resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ExportError(f"{target}: {nbytes} bytes are to be written, and {free} are free")
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ExportError(
            f"{target}: the disk is full ({error.strerror}); {nbytes} bytes were to be written, "
            f"and {free} were free; nothing of it is left"
        ) from error
