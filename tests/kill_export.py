"""An export that is killed at moments spread over its duration: `python tests/kill_export.py 50`.

A copy of this process exports, and is killed without a chance to tidy up. Then what stands at the
place is looked at: nothing, the earlier export or the new one, each whole. In the end an export
goes through, and nothing that the killed ones left is there any more.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import jquant as jq
from jquant import exporters
from jquant.axes.layout import Layout
from jquant.exporters import gguf, load_back  # noqa: F401  (costly imports, before copies are made)
from jquant.grids import Uniform
from jquant.models import Decoder, DecoderConfig
from jquant.trees.paths import path_of
from jquant.weights.qtensor import QTensor

GRID, GROUP = Uniform(4, True, scale_dtype="float16"), 32


def model() -> tuple[Decoder, Any]:
    """A network of 14 M weights with random codes: NumPy alone, so that no thread is running."""
    import jax

    fn = Decoder(DecoderConfig(256, 512, 1536, layers=4, heads=8, kv_heads=4))
    rng = np.random.default_rng(0)

    def leaf(keys: Any, told: Any) -> Any:
        if not (path_of(keys).startswith("layers/") and path_of(keys).endswith("kernel")):
            return rng.normal(size=told.shape).astype(np.float32)
        layout = Layout.of(told.shape, in_axes=(0,))
        out, width = told.shape[::-1]
        codes: Any = rng.integers(-8, 8, (out, width), np.int8).astype("int4")
        scale: Any = rng.random((out, width // GROUP)).astype(np.float16)
        return QTensor(codes, {"scale": scale}, GRID, jq.Groups("in", GROUP), layout, told.dtype)

    return fn, jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(fn.init, jax.random.key(0)))


def copied(work: Callable[[], object], seconds: float | None = None) -> bool:
    """Whether work ends well in a copy of this process, which is killed after so many seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of copies, for its threads; none runs here
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def content(place: Path) -> Any:
    """The bytes of an export."""
    if place.is_file():
        return place.read_bytes()
    return {file.name: file.read_bytes() for file in place.iterdir()}


def main(count: int, form: str, folder: Path) -> dict[str, int]:
    """What stood at the place after each kill, by how often.

    Raises:
        AssertionError: something that is not whole, or an export afterwards that is not.
    """
    fn, qparams = model()
    other = {**qparams, "norm": {"scale": qparams["norm"]["scale"] + 1}}
    place = folder / "out"

    def export(params: Any, to: Path) -> Callable[[], object]:
        return lambda: jq.export(fn, params, to, format=form, force=True)

    assert copied(export(qparams, folder / "new")) and copied(export(other, folder / "old"))
    new, old = content(folder / "new"), content(folder / "old")
    start = time.monotonic()
    assert copied(export(qparams, place))
    duration = time.monotonic() - start
    seen: collections.Counter[str] = collections.Counter()
    for k in range(count):
        is_there = k % 2 == 1
        if is_there:
            assert copied(export(other, place))
        elif place.exists():
            os.replace(place, folder / f"away-{k}")
        copied(export(qparams, place), duration * (k + 0.5) / count)
        now = content(place) if place.exists() else None
        assert now in (None, old, new), f"kill {k}: half an export"
        moved = [path for path in folder.iterdir() if path.name.endswith(".old")]
        if now is None and is_there:
            assert any(content(path) == old for path in moved), f"kill {k}: the earlier is gone"
        seen["nothing" if now is None else "the new one" if now == new else "the earlier one"] += 1
        seen["left beside it"] += any(path.name.startswith(".out.") for path in folder.iterdir())
    assert copied(export(qparams, place)) and content(place) == new
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    if form != "gguf":
        assert exporters.edited(place) == []
    return {**seen, "kills": count, "milliseconds": round(1000 * duration)}


if __name__ == "__main__":
    kills, formats, *rest = (*sys.argv[1:2], sys.argv[2:3] or ["compressed-tensors"], *sys.argv[3:])
    with tempfile.TemporaryDirectory(dir=rest[0] if rest else None) as scratch:
        print(main(int(kills), formats[0], Path(scratch)))
