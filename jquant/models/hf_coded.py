"""The tensors of a Hugging Face folder whose modules are quantized, as the weights they mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from jquant.errors import CheckpointError
from jquant.formats.base import Spec
from jquant.formats.config import is_mlx, quantized_modules
from jquant.io.files import naming
from jquant.models.coded import Leaf, checked, dequantized, experts_apart, tensors_of
from jquant.models.hf_folder import HFFolder
from jquant.trees.lazy import Lazy
from jquant.weights.inputs import Inputs


def coded_tensors(folder: HFFolder, quantization: Any, *, keep: bool) -> dict[str, Leaf]:
    """The tensors by the names that they have in a folder that is not quantized.

    Args:
        folder: where they lie.
        quantization: the `quantization_config` of `config.json`.
        keep: whether weights stay codes (a `QTensor` of lazy arrays) or are dequantized when read.

    Raises:
        CheckpointError: a format without codec, or tensors that are not what it says.
    """
    try:
        return _tensors(folder, quantization, keep)
    except CheckpointError as error:
        raise CheckpointError(f"{folder.name}: {error}") from error


def _tensors(folder: HFFolder, quantization: Any, keep: bool) -> dict[str, Leaf]:
    stored: dict[str, Lazy] = {}
    for file in sorted(set(folder.files.values())):
        stored |= tensors_of(folder.path / file)
    if is_mlx(quantization):
        stored = experts_apart(stored)
    specs = {name: Spec(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    leaves: dict[str, Leaf] = {}
    for name, module in quantized_modules(quantization, specs).items():
        with naming(f"module {name!r}"):
            if keep and module.refusal:
                raise CheckpointError(f"{module.refusal}; pass quantized='dequantize'")
            q = module.codec.lazy({own: stored.pop(full) for own, full in module.tensors.items()})
            if module.inputs is not None:
                q = replace(q, activations=Inputs(module.inputs))
        told: Any = checked(q, f"{folder.name}: module {name!r}")
        leaves[f"{name}.weight"] = q if keep else dequantized(told)
        for unused in module.unused:
            stored.pop(unused)
    for name, leaf in stored.items():
        if leaf.dtype.name not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(f"tensor {name!r} has dtype {leaf.dtype}, and no module needs it")
        leaves[name] = leaf.astype(np.float32)
    return leaves
