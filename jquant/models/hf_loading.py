"""A Hugging Face folder as a function and its parameters, in one of two ways.

The reference decoder where it serves: it needs no PyTorch. Otherwise the model's own code of
`transformers`, run by torchax, which needs the extra `torch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jquant.errors import CheckpointError
from jquant.formats.config import claimed
from jquant.models.assembly import Checkpoint, assemble
from jquant.models.config import from_hf
from jquant.models.decoder import Decoder
from jquant.models.families import HF
from jquant.models.hf_coded import coded_tensors
from jquant.models.hf_folder import HFFolder, read_json
from jquant.models.tokenizing import tokenizer_from_hf, tokenizer_named
from jquant.models.torch_fit import fit
from jquant.models.torch_function import TorchFunction
from jquant.models.torch_module import TorchConfig, need_layers, need_torch

Backend = Literal["auto", "jax", "torch"]
Quantized = Literal["dequantize", "keep"]
_HEAD = "lm_head.weight"


class Choices(NamedTuple):
    """How a folder is loaded; see `jquant.models.load`."""

    scan_layers: bool
    dtype: str
    param_dtype: str
    tokenizer: str | Path | None
    backend: Backend
    architecture: str | None
    quantized: Quantized


def load_folder(path: Path, choices: Choices) -> tuple[Any, dict[str, Any], Any]:
    """`(fn, params, tokenizer)`, the parameters `Lazy`.

    Raises:
        CheckpointError: see `jquant.models.load`.
        MissingPackageError: `backend="torch"` without the extra `torch`.
    """
    try:
        claims = dict(read_json(path / "config.json"))
        quantization = claimed(claims)
        reference = _reference(claims, choices)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    folder = HFFolder.open(path, claims)
    if isinstance(reference, Decoder):
        fn, params = reference, _of_decoder(reference, folder, quantization, choices)
    elif quantization is not None:
        why = f"{reference}; b" if reference else "b"
        raise CheckpointError(
            f"{folder.name}: {why}y its own PyTorch code, quantized checkpoints are not read; pass "
            "the checkpoint it was made from"
        )
    else:
        fn, params = _own_code(folder, choices, reference)
    named = choices.tokenizer
    tokens = tokenizer_from_hf(path) if named is None else tokenizer_named(named)
    return fn, params, tokens


def _reference(claims: Mapping[str, Any], choices: Choices) -> Decoder | CheckpointError | None:
    """The reference decoder; why it does not serve; or None where it is ruled out."""
    if choices.backend not in ("auto", "jax", "torch"):
        raise ValueError(f"backend = {choices.backend!r}; supported: 'auto', 'jax', 'torch'")
    if choices.backend == "torch" or choices.architecture is not None:
        if choices.backend == "jax":
            raise ValueError(
                f"backend='jax' is the reference decoder, architecture={choices.architecture!r} a "
                "class of transformers; leave out one"
            )
        need_torch()
        return None
    try:
        return Decoder(from_hf(claims), choices.scan_layers, choices.dtype)
    except CheckpointError as refusal:
        if choices.backend == "jax":
            raise
        try:
            need_torch()
        except ImportError as error:
            raise CheckpointError(f"{refusal}; for its own PyTorch code: {error}") from refusal
        return refusal


def _own_code(
    folder: HFFolder, choices: Choices, refusal: CheckpointError | None
) -> tuple[TorchFunction, dict[str, Any]]:
    """The model's own code, with its parameters; `refusal`: why it is not the decoder."""
    try:
        if choices.scan_layers:
            raise CheckpointError("scan_layers=True is of the reference decoder only; leave it out")
        config = TorchConfig.of(folder.config, choices.architecture)
        need_layers(config, len(folder.shapes))
        fn = TorchFunction.of(config, choices.dtype)
    except CheckpointError as error:
        reasons = f"{refusal}; by its own PyTorch code: {error}" if refusal else str(error)
        raise CheckpointError(f"{folder.name}: {reasons}") from error
    partly = choices.architecture is not None
    return fn, fit(config, folder, param_dtype=choices.param_dtype, partly=partly)


def _of_decoder(
    fn: Decoder, folder: HFFolder, quantization: Any, choices: Choices
) -> dict[str, Any]:
    shapes, tensor = folder.shapes, folder.tensor
    if quantization is not None:
        leaves = coded_tensors(folder, quantization, keep=choices.quantized == "keep")
        shapes, tensor = {name: leaf.shape for name, leaf in leaves.items()}, leaves.__getitem__
    needed = {
        name: shape
        for name, shape in shapes.items()
        # older files carry the rotary table, tied ones may repeat the head
        if not name.endswith("rotary_emb.inv_freq") and not (fn.config.tied and name == _HEAD)
    }
    offset = HF[folder.config["model_type"]].hf.norm_offset
    checkpoint = Checkpoint("hf", folder.name, needed, tensor, offset)
    scan = choices.scan_layers
    return assemble(fn.config, checkpoint, scan_layers=scan, param_dtype=choices.param_dtype)
