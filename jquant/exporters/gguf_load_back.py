"""Reading a GGUF file back, and comparing it with what was to be written, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.errors import ExportError
from jquant.exporters.load_back import reading_back, same_bits
from jquant.formats.base import formula
from jquant.models import load
from jquant.models.decoder import Decoder
from jquant.models.hf_config import unlike
from jquant.trees.lazy import read
from jquant.weights.arguments import by_path
from jquant.weights.qtensor import QTensor

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def need_same_file(path: Path, fn: Decoder, qparams: Mapping[str, Any], plain: str) -> None:
    """Raise unless a file holds these parameters and this network.

    Args:
        path: of the file.
        fn: the decoder.
        qparams: its parameters.
        plain: the type of matrices that are not quantized.

    Raises:
        ExportError: it holds others; names the first.
    """
    with reading_back():
        again, leaves, _ = load(path, lazy=True, quantized="keep", scan_layers=fn.scan_layers)
        if difference := unlike(fn.config, again.config):
            raise ExportError(f"it is of another network ({difference})")
        theirs = by_path(leaves)
        for name, leaf in by_path(qparams).items():
            if not _same(leaf, theirs.pop(name, None), plain):
                raise ExportError(f"parameter {name!r} has other values")
        if theirs:
            raise ExportError(f"parameter {min(theirs)!r} is there besides")


def _same(leaf: Any, other: Any, plain: str) -> bool:
    if isinstance(leaf, QTensor) != isinstance(other, QTensor):
        return False
    if isinstance(leaf, QTensor):
        return _same_weight(leaf, other)
    one, two = (np.asarray(read(value), np.float32) for value in (leaf, other))
    return any(
        np.array_equal(one.astype(jax.numpy.dtype(_DTYPES[kind])).astype(np.float32), two)
        for kind in ("F32", plain)
    )


def _same_weight(one: QTensor, other: QTensor) -> bool:
    """Whether codes and parameters are the same, those of wider groups repeated."""
    if formula(one.grid) != formula(other.grid) or set(one.params) != set(other.params):
        return False
    pairs = [(one.codes, other.codes), *((one.params[k], other.params[k]) for k in one.params)]
    for mine, theirs in pairs:
        ours, read_back = np.asarray(read(mine)), np.asarray(read(theirs))
        repeats = read_back.shape[-1] // max(ours.shape[-1], 1)
        if repeats > 1:
            ours = np.repeat(ours, repeats, -1)
        if not same_bits(ours, read_back):
            return False
    return True
