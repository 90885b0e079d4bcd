"""`load(source)`: a function, its parameters and its tokenizer from wherever they lie.

A GGUF file, a Hugging Face directory (`hf_loading`), or a hub id, which is downloaded to such a
directory first. Each ends in the same three things. Nothing here unpickles, and nothing is returned
unless all of it was there and fitted. Parameters are put together as `Lazy` leaves; to load is to
read them all, unless the caller would rather do that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from jquant.errors import CheckpointError
from jquant.formats.config import claimed
from jquant.io import read_header
from jquant.models.assembly import Checkpoint, assemble
from jquant.models.coded import Leaf, in_halves
from jquant.models.config import MAX_HEAD_DIM, DecoderConfig, from_gguf
from jquant.models.decoder import Decoder
from jquant.models.families import GGUF
from jquant.models.gguf_file import NUMBERS, GGUFFile, read_gguf
from jquant.models.hf_folder import read_json
from jquant.models.hf_loading import Backend, Choices, Quantized, load_folder
from jquant.models.quantized import CHECKPOINT, is_quantized, load_quantized
from jquant.models.tokenizing import tokenizer_from_gguf, tokenizer_named
from jquant.models.torch_function import TorchFunction
from jquant.trees.lazy import realize

_INTEGERS = {"I8", "I16", "I32", "I64"}
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def load(
    source: str | Path,
    *,
    scan_layers: bool = False,
    dtype: str = "float32",
    param_dtype: str = "float32",
    tokenizer: str | Path | None = None,
    lazy: bool = False,
    quantized: Quantized = "dequantize",
    backend: Backend = "auto",
    architecture: str | None = None,
) -> tuple[Any, dict[str, Any], Any]:
    """`(fn, params, tokenizer)` with `fn(params, tokens[B, T]) -> logits[B, T, V]` (float32).

    Args:
        source: a GGUF file, a directory with `config.json` and safetensors, a directory that
            `save_quantized` wrote (all but `tokenizer` is then as it was saved), or a hub id.
        scan_layers: stack the layers' parameters `[L, ...]` and run them in a scan.
        dtype: compute dtype, "float32" or "bfloat16" (matmul inputs; results stay float32).
        param_dtype: dtype the parameters are kept in.
        tokenizer: take the tokenizer from this instead: a directory with one, its
            `tokenizer.json`, another GGUF file, or a hub id.
        lazy: leave the parameters in their files: each leaf is a `Lazy`, and of a stack `[L, ...]`
            the window `[l]` reads one layer's tensor. Names and shapes are verified now, bytes when
            they are read; the files must stay as they are until then.
        quantized: what becomes of weights that the checkpoint holds as codes: "dequantize" gives
            the arrays they stand for, "keep" a `QTensor` each, with the codes and scales of the
            file (see `jquant.formats`), to be run by `jquant.apply(fn)`. How inputs are quantized
            is kept with them, and left out of arrays.
        backend: "jax" is the reference decoder, which knows the families of Llama, Mistral and
            Qwen2 and needs no PyTorch. "torch" is the model's own code in `transformers`, for any
            directory or hub id whose architecture `transformers` has. "auto" is the reference
            decoder where it serves, else "torch".
        architecture: the class of `transformers` to run (then by "torch"), such as "BertModel";
            default: the one `config.json` names. Tensors that the class has no place for are left
            out if it is given, and refused if not. A directory that `save_quantized` wrote runs as
            the class that it was saved as, and no other.

    Returns:
        The function, its parameters, and a `transformers` tokenizer; None in its place if the
        checkpoint holds none. The reference decoder is a `Decoder`, its parameters a nested dict.
        A model's own code is a `TorchFunction`, its parameters a flat dict under Hugging Face's
        names; what it takes and returns depends on the architecture, see there.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, incomplete or of an unsupported kind,
            or no tokenizer is where `tokenizer` says; or weights are to be kept whose format has no
            codec, or whose layers are to be stacked and differ.
            Reading a lazy leaf raises it if the values are damaged, or the file has changed.
        MissingPackageError: `backend="torch"` without the extra `torch`.

    Example: `fn, params, tokenizer = load("model.gguf", dtype="bfloat16")`
    """
    if quantized not in get_args(Quantized):
        raise ValueError(f"quantized must be one of {get_args(Quantized)}, got {quantized!r}")
    path = _local(source)
    if is_quantized(path):
        saved = load_quantized(path, tokenizer, lazy=lazy)
        _need_saved_as(saved[0], architecture, source)
        return saved
    if path.is_file():
        if backend == "torch" or architecture is not None:
            raise CheckpointError(
                f"{source}: a GGUF file is for the reference decoder; pass the model's Hugging "
                "Face folder for its own PyTorch code"
            )
        config, checkpoint, tokens = _open_gguf(path, tokenizer, quantized == "keep")
        params = assemble(config, checkpoint, scan_layers=scan_layers, param_dtype=param_dtype)
        fn = Decoder(config, scan_layers, dtype)
    else:
        folder = path if path.is_dir() else _download(str(source))
        choices = Choices(
            scan_layers, dtype, param_dtype, tokenizer, backend, architecture, quantized
        )
        fn, params, tokens = load_folder(folder, choices)
    return fn, params if lazy else realize(params), tokens


def _local(source: str | Path) -> Path:
    """Where a source lies if it is no hub id.

    Raises:
        CheckpointError: it is one file of a folder.
    """
    path = Path(source)
    if path.name == CHECKPOINT and path.is_file():
        return path.parent
    if path.is_file() and path.suffix in (".safetensors", ".json", ".bin", ".pth", ".pt"):
        raise CheckpointError(f"{source}: a file of a Hugging Face model; pass its folder")
    return path


def _need_saved_as(fn: Any, architecture: str | None, source: str | Path) -> None:
    """CheckpointError: a function that was saved is not of the class that is asked for."""
    own = fn.config.architecture if isinstance(fn, TorchFunction) else "the reference decoder"
    if architecture not in (None, own):
        raise CheckpointError(
            f"{source} was saved as {own}, and cannot run as {architecture!r}; leave out "
            "architecture (--architecture)"
        )


def quantized_as(source: str | Path) -> tuple[str, ...]:
    """How a source that `load` takes holds its quantized weights; nothing where it holds none.

    GGUF's block types; what the `quantization_config` of a `config.json` is called; the grids of a
    directory that `save_quantized` wrote. No weight is read, and of a hub id no more is fetched
    than its `config.json`.

    Raises:
        CheckpointError: there is no such source, or it is damaged.
    """
    path = _local(source)
    if is_quantized(path):
        grids = [leaf.grid for leaf in read_header(path / CHECKPOINT).leaves.values()]
        kinds = (f"{type(grid).__name__} of {grid.bits} bits" for grid in grids if grid is not None)
        return tuple(sorted(set(kinds)))
    if path.is_file():
        names = {info.kind.name for info in read_gguf(path).tensors.values()}
        return tuple(sorted(names - {kind.name for kind in NUMBERS} - _INTEGERS))
    folder = path if path.is_dir() else _download(str(source), ["config.json"])
    config = claimed(dict(read_json(folder / "config.json")))
    if not isinstance(config, Mapping):
        return () if config is None else (f"quantization_config: {config!s:.40}",)
    words = [str(config.get("quant_method", "no quant_method"))]
    words += [str(config[key]) for key in ("format", "quant_algo", "mode") if config.get(key)]
    words += [f"{config['bits']} bits"] if "bits" in config else []
    return (" ".join(word[:40] for word in words),)


def _open_gguf(
    path: Path, tokenizer: str | Path | None, keep: bool
) -> tuple[DecoderConfig, Checkpoint, Any]:
    file = read_gguf(path)
    try:
        if (parts := file.metadata.get("split.count", 1)) != 1:
            raise CheckpointError(f"split.count = {parts}; join the model's GGUF files first")
        shapes = {name: info.shape for name, info in file.tensors.items()}
        config = from_gguf(file.metadata, shapes, _rope_tensors(file, shapes))
        tokens = (
            tokenizer_from_gguf(file.metadata) if tokenizer is None else tokenizer_named(tokenizer)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    tensor: Callable[[str], Leaf] = file.codes if keep else file.tensor
    if _is_permuted(file):
        tensor = _unpermuted(tensor, config)
    return config, Checkpoint("gguf", path.name, shapes, tensor), tokens


def _rope_tensors(file: GGUFFile, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The values of the file's tensors of rotary divisors, which are taken out of `shapes`."""
    family = GGUF.get(file.metadata.get("general.architecture", ""))
    tensors = {}
    for name in () if family is None else family.rope.tensors:
        if (shape := shapes.pop(name, None)) is not None:
            if len(shape) != 1 or shape[0] > MAX_HEAD_DIM:
                raise CheckpointError(f"tensor {name!r} has shape {shape}")
            tensors[name] = file.tensor(name)[...]
    return tensors


def _is_permuted(file: GGUFFile) -> bool:
    dialect = GGUF[file.metadata["general.architecture"]].gguf
    return dialect is not None and dialect.permuted


def _unpermuted(tensors: Callable[[str], Leaf], config: DecoderConfig) -> Callable[[str], Leaf]:
    """The tensors of a file with llama.cpp's reordering of the rows of q and k undone.

    For this architecture llama.cpp rotates neighbouring channels (2i, 2i+1) where the decoder
    rotates halves (i, i + d/2), and its converter sorts the rows of each head to match.
    """

    def tensor(name: str) -> Leaf:
        stored, stem = tensors(name), name.rsplit(".", 2)[1]
        if stem not in ("attn_q", "attn_k"):
            return stored
        return in_halves(stored, config.heads if stem == "attn_q" else config.kv_heads)

    return tensor


def _download(name: str, files: Sequence[str] = _HUB_FILES) -> Path:
    """The local snapshot of such files of a hub id, downloaded where it is not there yet."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise CheckpointError(f"{name!r}: no such file or directory, and not a hub id 'owner/name'")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*files]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is neither a local path nor a model that could be fetched from the hub "
            f"({type(error).__name__}); check the name and the network, or pass a local path"
        ) from error
