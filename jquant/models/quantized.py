"""A quantized model as a folder: what `jquant quantize` writes and `models.load` reads.

`jquant.safetensors` is a checkpoint of `jquant.io`: the parameters, and in its metadata, as JSON,
the function they belong to: "decoder" is the reference decoder, "torch" a model's own PyTorch code.
Beside it lie the tokenizer's own files. The checkpoint is written last, so a folder that has one is
complete.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from jquant.errors import CheckpointError
from jquant.io import Header, read_header
from jquant.io import load as load_checkpoint
from jquant.io import save as save_checkpoint
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.models.tokenizing import tokenizer_from_hf, tokenizer_named
from jquant.models.torch_function import TorchFunction, parameter_shapes
from jquant.models.torch_module import TorchConfig, need_layers
from jquant.weights.qtensor import is_qtensor

CHECKPOINT = "jquant.safetensors"


def is_quantized(folder: str | Path) -> bool:
    """Whether a folder is one that `save_quantized` wrote."""
    return (Path(folder) / CHECKPOINT).is_file()


def save_quantized(
    folder: str | Path, fn: Decoder | TorchFunction, qparams: Any, tokenizer: Any = None
) -> Path:
    """Write a quantized model and its tokenizer to a folder, made if it is not there.

    Args:
        folder: where to; what an earlier call wrote there is replaced.
        fn: the model's function, as `load` gave it.
        qparams: its parameters, quantized or not.
        tokenizer: a `transformers` tokenizer, or None.

    Returns:
        The path of the checkpoint.

    Raises:
        TypeError: a function that `load` does not give.
        ValueError: the parameters hold what `jquant.save` refuses.
    """
    if not isinstance(fn, Decoder | TorchFunction):
        raise TypeError(
            f"fn = a {type(fn).__name__}; a folder holds functions that models.load gives, and "
            "jquant.save the parameters of any"
        )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    kind = "decoder" if isinstance(fn, Decoder) else "torch"
    metadata = {kind: json.dumps(dataclasses.asdict(fn))}
    save_checkpoint(target / CHECKPOINT, qparams, metadata=metadata)
    return target / CHECKPOINT


def load_quantized(
    folder: str | Path, tokenizer: str | Path | None = None, *, lazy: bool = False
) -> tuple[Decoder | TorchFunction, Any, Any]:
    """`(fn, qparams, tokenizer)` as `save_quantized` got them.

    Run it by `jquant.apply(fn)(qparams, tokens)`. `tokenizer` names another folder, GGUF file
    or hub id to take the tokenizer from. With `lazy`, arrays stay in the file, see `jquant.load`.

    Raises:
        CheckpointError: the checkpoint is damaged, its parameters are not those of its decoder, or
            no tokenizer is where `tokenizer` says.
        MissingPackageError: it is a model's own PyTorch code, and the extra `torch` is not there.
    """
    path = Path(folder) / CHECKPOINT
    fn, expected = _function(path)
    qparams = load_checkpoint(path, lazy=lazy)
    shapes = _shapes(qparams)
    if shapes != expected:
        unlike = sorted(p for p in expected | shapes if expected.get(p) != shapes.get(p))
        raise CheckpointError(
            f"{path}: the parameters do not fit the decoder at {unlike[0]!r}: expected "
            f"{expected.get(unlike[0])}, found {shapes.get(unlike[0])}"
        )
    words = tokenizer_from_hf(folder) if tokenizer is None else tokenizer_named(tokenizer)
    return fn, qparams, words


def _function(path: Path) -> tuple[Decoder | TorchFunction, dict[str, tuple[int, ...]]]:
    """The function that a checkpoint's metadata describes, and the shapes of its parameters."""
    header = read_header(path)
    for kind, read in (("decoder", _decoder), ("torch", _torch)):
        if kind in header.metadata:
            try:
                return read(json.loads(header.metadata[kind]), header)
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: malformed {kind}: {error!s:.200}") from error
    raise CheckpointError(
        f"{path}: parameters without a decoder; jquant.load reads them, and `jquant evaluate "
        "--against package.module:make` measures them, where make() returns their function"
    )


def _decoder(fields: dict[str, Any], header: Header) -> tuple[Decoder, dict[str, tuple[int, ...]]]:
    config = fields.pop("config")
    lists = {key: tuple(value) for key, value in config.items() if isinstance(value, list)}
    fn = Decoder(DecoderConfig(**config | lists), **fields)
    # Layers are built one by one, so a lie about their number would take forever.
    if not fn.scan_layers and fn.config.layers > len(header.leaves):
        raise ValueError(f"{fn.config.layers} layers of {len(header.leaves)} parameters")
    return fn, _shapes(fn.shapes)


def _torch(
    fields: dict[str, Any], header: Header
) -> tuple[TorchFunction, dict[str, tuple[int, ...]]]:
    config = TorchConfig(**fields.pop("config"))
    need_layers(config, len(header.leaves))
    fn = TorchFunction(config, tuple(fields.pop("inputs")), **fields)
    return fn, parameter_shapes(config)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Path to shape of every parameter, quantized ones as what they stand for."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): tuple(v.shape) for k, v in leaves}
