"""A file that is read piece by piece over a long time, and must stay the file it was.

What is lazy opens its file anew for every read, so that no handle is left open and a file may be
replaced while leaves of it are alive. Then they say so: size and time of change are compared with
those at the time its header was checked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import BinaryIO

from jquant.errors import CheckpointError


@dataclass(frozen=True)
class FileState:
    """A file's path, its size, and when it was last changed."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str], file: BinaryIO | None = None) -> FileState:
        """The state of the file at `path`; where it is open already, of what is open."""
        stat = os.stat(path) if file is None else os.fstat(file.fileno())
        return cls(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)

    @property
    def identity(self) -> str:
        """What says which bytes these are."""
        return f"{self.path} of {self.size} bytes, changed at {self.mtime_ns} ns"

    @contextlib.contextmanager
    def open(self) -> Iterator[BufferedReader]:
        """The file, open for reading; errors about what is read from it begin with its name.

        Raises:
            CheckpointError: it is gone, or has changed.
        """
        with naming(self.path):
            try:
                file = open(self.path, "rb")
            except OSError as error:
                raise CheckpointError(f"cannot be read any more: {error.strerror}") from error
            with file:
                if FileState.of(self.path, file) != self:
                    raise CheckpointError("the file has changed since it was loaded; load it again")
                yield file


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about a file begin with its name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
