"""`load(source)`: a decoder, its parameters and its tokenizer from wherever they lie.

A GGUF file, a Hugging Face directory of safetensors (one file or shards with an index), or a hub
id, which is downloaded to such a directory first. Each ends in the same three things. Nothing here
unpickles, and nothing is returned unless all of it was there and fitted. Parameters are put
together as `Lazy` leaves; to load is to read them all, unless the caller would rather do that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from jquant.errors import CheckpointError
from jquant.formats.base import Spec
from jquant.formats.config import quantized_modules
from jquant.io.files import FileState, naming
from jquant.models.assembly import Checkpoint, assemble
from jquant.models.coded import Leaf, dequantized, in_halves, tensors_of
from jquant.models.config import MAX_HEAD_DIM, DecoderConfig, from_gguf, from_hf
from jquant.models.decoder import Decoder
from jquant.models.gguf_file import NUMBERS, GGUFFile, read_gguf
from jquant.models.quantized import CHECKPOINT, is_quantized, load_quantized
from jquant.models.tokenizing import tokenizer_from_gguf, tokenizer_from_hf, tokenizer_named
from jquant.trees.lazy import Lazy, Window, realize
from jquant.weights.inputs import Inputs

Quantized = Literal["dequantize", "keep"]

_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = ("F32", "F16", "BF16")
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
) -> tuple[Decoder, dict[str, Any], Any]:
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

    Returns:
        The decoder, its parameters as a nested dict, and a `transformers` tokenizer; None in its
        place if the checkpoint holds none.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, incomplete or of an unsupported kind,
            or no tokenizer is where `tokenizer` says; or weights are to be kept whose format has no
            codec, or whose layers are to be stacked and differ.
            Reading a lazy leaf raises it if the values are damaged, or the file has changed.

    Example: `fn, params, tokenizer = load("model.gguf", dtype="bfloat16")`
    """
    if quantized not in get_args(Quantized):
        raise ValueError(f"quantized must be one of {get_args(Quantized)}, got {quantized!r}")
    path = Path(source)
    if path.name == CHECKPOINT and path.is_file():
        path = path.parent
    if is_quantized(path):
        return load_quantized(path, tokenizer, lazy=lazy)
    if path.is_file() and path.suffix in (".safetensors", ".json", ".bin", ".pth", ".pt"):
        raise CheckpointError(f"{source}: a file of a Hugging Face model; pass its folder")
    keep = quantized == "keep"
    if path.is_file():
        config, checkpoint, tokens = _open_gguf(path, tokenizer, keep)
    else:
        folder = path if path.is_dir() else _download(str(source))
        config, checkpoint, tokens = _open_directory(folder, tokenizer, keep)
    params = assemble(config, checkpoint, scan_layers=scan_layers, param_dtype=param_dtype)
    fn = Decoder(config, scan_layers, dtype)
    return fn, params if lazy else realize(params), tokens


def quantized_as(source: str | Path) -> tuple[str, ...]:
    """How a GGUF file or a local folder holds its quantized weights; nothing where it holds none.

    GGUF's block types, or the `quant_method` of a `config.json`.

    Raises:
        CheckpointError: the file is none.
    """
    path = Path(source)
    if path.is_file():
        kinds = {info.kind for info in read_gguf(path).tensors.values()} - {*NUMBERS}
        return tuple(sorted(kind.name for kind in kinds))
    said = _json(path / "config.json").get("quantization_config") if path.is_dir() else None
    return (str(said.get("quant_method")),) if isinstance(said, Mapping) else ()


def _open_gguf(
    path: Path, tokenizer: str | Path | None, keep: bool
) -> tuple[DecoderConfig, Checkpoint, Any]:
    file = read_gguf(path)
    try:
        if (parts := file.metadata.get("split.count", 1)) != 1:
            raise CheckpointError(f"split.count = {parts}; join the model's GGUF files first")
        shapes = {name: info.shape for name, info in file.tensors.items()}
        factors = None
        if (shape := shapes.pop(_ROPE_FACTORS, None)) is not None:
            if len(shape) != 1 or shape[0] > MAX_HEAD_DIM:
                raise CheckpointError(f"tensor {_ROPE_FACTORS!r} has shape {shape}")
            factors = file.tensor(_ROPE_FACTORS)[...]
        config = from_gguf(file.metadata, shapes, factors)
        tokens = (
            tokenizer_from_gguf(file.metadata) if tokenizer is None else tokenizer_named(tokenizer)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    tensor: Callable[[str], Leaf] = file.codes if keep else file.tensor
    if _is_permuted(file):
        tensor = _unpermuted(tensor, config)
    return config, Checkpoint("gguf", path.name, shapes, tensor), tokens


def _is_permuted(file: GGUFFile) -> bool:
    return file.metadata["general.architecture"] == "llama"


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


def _open_directory(
    path: Path, tokenizer: str | Path | None, keep: bool
) -> tuple[DecoderConfig, Checkpoint, Any]:
    try:
        said = dict(_json(path / "config.json"))
        quantization = said.pop("quantization_config", None)
        config = from_hf(said)
        files = _tensor_files(path)
        if quantization is not None:
            tensors = _coded(path, files, quantization, keep)
            shapes = {name: leaf.shape for name, leaf in tensors.items()}
            checkpoint = Checkpoint("hf", path.name, _needed(shapes, config), tensors.__getitem__)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    if quantization is None:
        checkpoint = _plain(path, files, config)
    tokens = tokenizer_from_hf(path) if tokenizer is None else tokenizer_named(tokenizer)
    return config, checkpoint, tokens


def _needed(
    shapes: Mapping[str, tuple[int, ...]], config: DecoderConfig
) -> dict[str, tuple[int, ...]]:
    """The tensors without those that a decoder makes itself."""
    # Older files carry the rotary table, tied ones may repeat the head.
    left = {n: s for n, s in shapes.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tied:
        left.pop("lm_head.weight", None)
    return left


def _coded(path: Path, files: Mapping[str, str], quantization: Any, keep: bool) -> dict[str, Leaf]:
    """The tensors of a folder with quantized modules; each weight as codes or dequantized."""
    stored: dict[str, Lazy] = {}
    for file in sorted(set(files.values())):
        _open(path / file)  # says in words what is missing
        stored |= tensors_of(path / file)
    if missing := sorted(set(files) - set(stored)):
        raise CheckpointError(f"tensor {missing[0]!r} is missing; the index says it is there")
    specs = {name: Spec(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    leaves: dict[str, Leaf] = {}
    for name, module in quantized_modules(quantization, specs).items():
        with naming(f"module {name!r}"):
            if keep and module.refusal:
                raise CheckpointError(f"{module.refusal}; pass quantized='dequantize'")
            q = module.codec.lazy({own: stored.pop(full) for own, full in module.tensors.items()})
            if module.inputs is not None:
                q = replace(q, activations=Inputs(module.inputs))
        leaves[f"{name}.weight"] = q if keep else dequantized(q)
        for unused in module.unused:
            stored.pop(unused)
    for name, leaf in stored.items():
        if leaf.dtype.name not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(f"tensor {name!r} has dtype {leaf.dtype}, and no module needs it")
        leaves[name] = leaf.astype(np.float32)
    return leaves


def _plain(path: Path, files: Mapping[str, str], config: DecoderConfig) -> Checkpoint:
    """The tensors of a folder of floats."""
    states: dict[str, FileState] = {}
    handles: dict[str, Any] = {}
    held: dict[str, set[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, file in files.items():
        if file not in handles:
            handles[file] = _open(path / file)
            states[file] = FileState.of(path / file)
            held[file] = set(handles[file].keys())
        if name not in held[file]:
            raise CheckpointError(f"{file}: tensor {name!r} is missing; the index says it is there")
        shapes[name] = _shape(handles[file], name, file)

    def tensor(name: str) -> Lazy:
        return _tensor(states[files[name]], name, shapes[name])

    return Checkpoint("hf", path.name, _needed(shapes, config), tensor)


def _tensor(state: FileState, name: str, shape: tuple[int, ...]) -> Lazy:
    """A tensor of a safetensors file, as float32."""

    def read(window: Window) -> np.ndarray:
        with state.open():  # only to see that it is still the same file
            return np.asarray(_open(Path(state.path)).get_slice(name)[window], np.float32)

    return Lazy(shape, np.dtype(np.float32), read, f"{state.identity}, tensor {name!r}")


def _tensor_files(path: Path) -> dict[str, str]:
    """Tensor name to the file in `path` that holds it."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = _json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{index.name}: 'weight_map' is missing or no object")
        for file in set(map(str, files.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{index.name}: {file!r} is no file of this directory")
        return files
    if not (path / "model.safetensors").exists():
        pickled = " (pickled weights are never read)" if any(path.glob("*.bin")) else ""
        raise CheckpointError(
            "neither model.safetensors nor model.safetensors.index.json is there" + pickled
        )
    return dict.fromkeys(_open(path / "model.safetensors").keys(), "model.safetensors")


def _open(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path.parent.name}: {path.name} is missing")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: not a readable safetensors file: {error}") from error


def _shape(handle: Any, name: str, file: str) -> tuple[int, ...]:
    view = handle.get_slice(name)
    if view.get_dtype() not in _DTYPES:
        supported = ", ".join(_DTYPES)
        raise CheckpointError(
            f"{file}: tensor {name!r} has dtype {view.get_dtype()}; supported: {supported}"
        )
    return tuple(view.get_shape())


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing; expected a Hugging Face model directory")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: expected an object, got {type(value).__name__}")
    return value


def _download(name: str) -> Path:
    """The local snapshot of a hub id, downloaded where it is not there yet."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise CheckpointError(f"{name!r}: no such file or directory, and not a hub id 'owner/name'")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is neither a local path nor a model that could be fetched from the hub "
            f"({type(error).__name__}); check the name and the network, or pass a local path"
        ) from error
