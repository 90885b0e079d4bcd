"""Environments of other packages, each in a folder, made again when what it is to hold changes.

An environment may lie over another, a base: it sees the base through a line in its own packages,
and what it installs itself goes before what the base has. What pip says, with the output of what it
builds, is in `FOLDER.log` beside the environment. One that was not completed is made anew; pip
keeps the wheels that it built and downloaded, so what took long is not done twice.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MINUTES = 15  # for whatever is run
INSTALLING = 240  # minutes for an installation: packages that are compiled take one or two hours


class Failed(Exception):
    """Something outside jquant did not do what it was asked to; the message is for the table."""


def interpreter(version: str) -> Path:
    """A Python of this version, on PATH or from pyenv.

    Raises:
        Failed: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    named = [shutil.which(f"python{version}"), sys.executable]
    ask = f"import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    for candidate in filter(None, (*named, *pyenv.glob(f"{version}.*/bin/python"))):
        if subprocess.run([str(candidate), "-c", ask], capture_output=True).returncode == 0:
            return Path(candidate)
    raise Failed(f"no Python {version} on PATH or among pyenv's")


def made(
    folder: Path, version: str, asked: list[str], requirements: Sequence[str],
    bare: Sequence[str] = (), base: Path | None = None,
) -> Path:  # fmt: skip
    """The interpreter of an environment, which is made where it is not as it should be.

    Args:
        folder: of the environment.
        version: of Python.
        asked: what it depends on; it is made anew where this has changed.
        requirements: for pip.
        bare: installed after them, without dependencies.
        base: the interpreter of an environment whose packages it sees.

    Raises:
        Failed: there is no such Python, or pip cannot install what is asked.
    """
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    if stamp.exists() and json.loads(stamp.read_text()) == asked:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    run([str(interpreter(version)), "-m", "venv", str(folder)])
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "install", "--verbose", "--progress-bar=off"]
    pip += ["--disable-pip-version-check"]
    if base is not None:
        own, below = (_packages(path) for path in (python, base))
        Path(own, "base.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    if requirements:
        logged([*pip, *requirements], log)
    if bare:
        logged([*pip, "--no-deps", *bare], log)
    stamp.write_text(json.dumps(asked))
    return python


def _packages(python: Path) -> str:
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return run([str(python), "-c", ask]).strip()


def run(command: list[str], minutes: float = MINUTES, **options: Any) -> str:
    """What a command prints.

    Raises:
        Failed: it takes too long or fails; with the line of its complaint that says most.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * minutes, cwd=ROOT, **options
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"took more than {minutes} minutes") from None
    if done.returncode:
        raise Failed(reason(done.stderr) or f"ended with status {done.returncode}")
    return done.stdout


def logged(command: list[str], log: Path, minutes: float = INSTALLING) -> None:
    """Runs a command whose output is added to a file, as it comes.

    Raises:
        Failed: it takes too long, and is ended with all that it started, or it fails; with the line
            of its complaint that says most, and the file.
    """
    with log.open("a+", encoding="utf-8", errors="replace") as out:
        began = out.tell()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = child.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            raise Failed(f"took more than {minutes:g} minutes; see {_short(log)}") from None
        finally:
            _end(child)
        out.seek(began)
        if status:
            said = reason(out.read()) or f"ended with status {status}"
            raise Failed(f"{said}; see {_short(log)}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started: pip's compilers would go on without it."""
    if child.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()


def _short(path: Path) -> str:
    return str(path).replace(f"{ROOT}{os.sep}", "")


def reason(text: str) -> str:
    """The line of a program's complaint that says most: its last that is an error, or the last.

    Example:
        >>> reason("Traceback:\\n  x\\nValueError: no such axis\\n----\\nJAX has removed frames")
        'ValueError: no such axis'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "ERROR"))]
    return (errors or lines or [""])[-1].replace(str(ROOT), ".")[:400]
