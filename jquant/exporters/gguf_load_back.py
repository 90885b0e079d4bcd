"""Reading a GGUF file back, and comparing it with what was to be written, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.errors import ExportError
from jquant.exporters.load_back import reading_back
from jquant.models import load
from jquant.models.decoder import Decoder
from jquant.models.hf_config import unlike
from jquant.trees.lazy import realize
from jquant.weights.arguments import by_path
from jquant.weights.qtensor import QTensor, dequantize_weight

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
    one, two = (np.asarray(_values(value), np.float32) for value in (leaf, other))
    if isinstance(leaf, QTensor):
        return np.array_equal(one, two)
    return any(
        np.array_equal(one.astype(jax.numpy.dtype(_DTYPES[kind])).astype(np.float32), two)
        for kind in ("F32", plain)
    )


def _values(leaf: Any) -> Any:
    held = realize(leaf)
    return dequantize_weight(held) if isinstance(held, QTensor) else held
