"""Reading an export back, and comparing it with what was to be written, bit for bit.

It is read as any folder is, by the readers that do not know who wrote it. Of weights, codes and
parameters are compared; of arrays, their values; of the whole, which tensors there are, and what
network the configuration describes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jquant.errors import CheckpointError, ExportError
from jquant.formats.base import formula
from jquant.formats.config import claimed
from jquant.models import load
from jquant.models.decoder import Decoder
from jquant.models.hf_coded import coded_tensors
from jquant.models.hf_config import unlike
from jquant.models.hf_folder import HFFolder, read_json
from jquant.trees.lazy import Lazy, read
from jquant.weights.qtensor import QTensor


def need_same(folder: Path, fn: Any, expected: Mapping[str, Lazy | QTensor]) -> None:
    """Raise unless a folder holds these tensors and the network of `fn`.

    Args:
        folder: that was written.
        fn: the model's function.
        expected: name → array in the dtype it was written in, or weight `[out, in]`; read one by
            one.

    Raises:
        ExportError: it holds others; names the first.
    """
    with reading_back():
        config = dict(read_json(folder / "config.json"))
        quantization = claimed(config)
        opened = HFFolder.open(folder, config)
        if quantization is None:
            leaves: dict[str, Any] = {name: opened.tensor(name) for name in opened.shapes}
        else:
            leaves = coded_tensors(opened, quantization, keep=True)
        if set(leaves) != set(expected):
            raise ExportError(f"tensor {min(set(leaves) ^ set(expected))!r} is there once only")
        for name, leaf in expected.items():
            if difference := _difference(leaf, leaves[name]):
                raise ExportError(f"tensor {name!r} {difference}")
        if isinstance(fn, Decoder):
            again, _, _ = load(folder, lazy=True, backend="jax", quantized="keep")
            if difference := unlike(fn.config, again.config):
                raise ExportError(f"config.json is of another network ({difference})")


@contextlib.contextmanager
def reading_back() -> Iterator[None]:
    """What is not read back as it was to be written is a fault of jquant, and said to be one."""
    try:
        yield
    except (CheckpointError, ExportError) as error:
        raise ExportError(
            f"what was written is not what is read back, so nothing is left of it: {error}; this "
            "is a fault of jquant, please report it"
        ) from error


def _difference(one: Any, other: Any) -> str:
    """In what two leaves differ; empty: in nothing."""
    if isinstance(one, QTensor) != isinstance(other, QTensor):
        return "is quantized in one of both only"
    if not isinstance(one, QTensor):
        value = np.asarray(read(one)).astype(np.float32, copy=False)
        return "" if same_bits(value, np.asarray(read(other))) else "has other values"
    if formula(one.grid) != formula(other.grid):
        return f"is on {other.grid}, and was on {one.grid}"
    width = one.codes.shape[-1]
    if one.groups.group(width) != other.groups.group(width):
        return f"is in {other.groups}, and was in {one.groups}"
    if _inputs(one) != _inputs(other):
        return f"has inputs {_inputs(other)}, and had {_inputs(one)}"
    if set(one.params) != set(other.params):
        return f"has parameters {sorted(other.params)}, and had {sorted(one.params)}"
    arrays = {"codes": (one.codes, other.codes)}
    arrays |= {name: (one.params[name], other.params[name]) for name in one.params}
    for name, (mine, theirs) in arrays.items():
        if not same_bits(np.asarray(read(mine)), np.asarray(read(theirs))):
            return f"has other {name}"
    return ""


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays have one shape, one dtype and the same bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    mine, theirs = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (one, other))
    return bool(np.array_equal(mine, theirs))


def _inputs(q: QTensor) -> Any:
    if q.activations is None:
        return None
    choice = q.activations.choice
    return formula(choice.grid), choice.granularity
