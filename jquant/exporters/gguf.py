"""A quantized decoder as a GGUF file, which llama.cpp and all that is built on it run.

Codes are written as they are: what `apply` computes with is what the file holds, to the bit, and
what a block type cannot hold is refused before anything is written. Names are those of the table
that reading uses, the metadata is the inverse of what reading makes of it, and rows of q and k go
back into llama.cpp's order. Tensors are read, encoded and written one after the other into a file
beside the target, which takes its place when it is complete.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from jquant.errors import ExportError, FormatError
from jquant.exporters.beside import beside, clear, room
from jquant.exporters.described import Described, Holding
from jquant.exporters.gguf_load_back import need_same_file
from jquant.exporters.gguf_metadata import Description, describe
from jquant.exporters.gguf_tokenizer import tokenizer_metadata
from jquant.exporters.targets import TARGETS, held
from jquant.formats.block_types import KINDS, TENSOR
from jquant.models.decoder import Decoder
from jquant.models.disassembly import Tensor as Disassembled
from jquant.models.disassembly import disassemble
from jquant.models.gguf_file import read_gguf
from jquant.models.tokenizing import tokenizer_named
from jquant.trees.lazy import Lazy, read
from jquant.weights.qtensor import QTensor

Plain = Literal["F32", "F16", "BF16"]
# llama.cpp's `general.file_type`, by the type of most weights.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 12, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32, "MXFP4": 38,
}  # fmt: skip


class Tensor(NamedTuple):
    """One tensor of the file: how it is called, of what type, and how its bytes are made.

    `shape` is that of the bytes where the type is one of blocks, `path` that of the leaf it is of.
    """

    name: str
    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


class Written(NamedTuple):
    """A file that was written, and its tensors."""

    path: Path
    tensors: tuple[Tensor, ...]


def write_gguf(
    path: str | Path,
    fn: Decoder,
    qparams: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    like: str | Path | None = None,
    plain: Plain = "F16",
    architecture: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Written:
    """The file at `path`, a GGUF file of version 3 that holds a decoder and its codes.

    `jquant.export(..., format="gguf")` is the same with the defaults of `plain` and `architecture`.

    Args:
        path: where it is to be.
        fn: the reference decoder, of any of the families that GGUF has.
        qparams: its parameters, quantized or not, in memory or `Lazy`, in layers or stacked.
        tokenizer: a `transformers` tokenizer, byte-level BPE or SentencePiece's; None (default): no
            tokenizer, unless `like` has one.
        like: a GGUF file whose tokenizer, name and licence are taken over as they are; `tokenizer`
            is then not looked at.
        plain: the type of matrices that are not quantized, "F16" (default, as llama.cpp's
            converter has it), "F32" or "BF16". Norms, biases and routers are float32.
        architecture: `general.architecture`; default: the one that says most of the network.
        overwrite: whether a file that is there may be replaced.
        verify: whether the file is read back and compared before it takes its place.

    Raises:
        FormatError: no architecture says the network; a weight is on a grid, in groups or of a
            width that no block type holds (the message names it, and the nearest type), has a
            low-rank term or quantized inputs, or numbers beyond float16; the tokenizer has no words
            in GGUF. Nothing is left behind.
        ExportError: the disk has no room, or what was read back is not what was to be written.
        TreeError: the parameters are not those of `fn`.
        FileExistsError: there is a file.

    Example: `write_gguf("model-q4_k.gguf", fn, qparams, tokenizer)`, after `quantize` with the
    scheme `jq.presets.q4_k_qep()`.
    """
    path = Path(path)
    _need_sense(path, fn, plain, overwrite)
    taken = {} if like is None else _taken(like)
    architecture = architecture or taken.pop("general.architecture", None)
    description = describe(fn.config, architecture)
    tensors = list(_tensors(fn, qparams, description, plain))
    if like is None and tokenizer is not None:
        taken = tokenizer_metadata(tokenizer, fn.config.vocab)
    if not any(key.startswith("tokenizer.") for key in taken):
        taken["tokenizer.ggml.model"] = "no_vocab"
    kinds = [tensor.kind for tensor in tensors if tensor.kind in KINDS] or [plain]
    metadata = {
        **description.metadata,
        "general.file_type": _FILE_TYPES[max(sorted(set(kinds)), key=kinds.count)],
        "general.quantization_version": 2,
        **taken,
    }
    nbytes = sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in tensors)
    with room(path, nbytes), _new_file(path) as part:
        _write(part, metadata, tensors)
        if verify:
            need_same_file(part, fn, qparams, plain)
    return Written(path, tuple(tensors))


def _need_sense(path: Path, fn: Any, plain: str, overwrite: bool) -> None:
    """Raise if the arguments of `write_gguf` make none."""
    if plain not in get_args(Plain):
        raise ValueError(f"plain must be one of {get_args(Plain)}, got {plain!r}")
    if not isinstance(fn, Decoder):
        raise FormatError(
            f"GGUF files are written of the reference decoder, got {type(fn).__name__}; load the "
            "model with backend='jax'"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True, or another path")


def export_gguf(
    path: Path, fn: Any, qparams: Any, tokenizer: Any, like: Any, flags: tuple[bool, bool]
) -> tuple[str, int, dict[str, str], tuple[str, ...]]:
    """What `export` does for GGUF; `flags` are its `force` and `verify`.

    Returns:
        of `Exported`, all but the place.
    """
    force, verify = flags
    if path.exists() and (path.is_dir() or not force):
        advice = "" if path.is_dir() else "pass force=True (--force) to replace it, or "
        raise ExportError(f"{path} is there already; {advice}give another name, of a file")
    if like is not None and not Path(like).is_file():
        tokenizer, like = tokenizer_named(like) if tokenizer is None else tokenizer, None
    written = write_gguf(path, fn, qparams, tokenizer, like=like, overwrite=force, verify=verify)
    weights = {t.path: t.kind for t in written.tensors if t.kind in KINDS}
    kept = tuple(t.name for t in written.tensors if t.kind not in KINDS)
    return "gguf", path.stat().st_size, weights, kept


def _taken(like: str | Path) -> dict[str, Any]:
    """What is taken over of the metadata of another file."""
    metadata = read_gguf(like).metadata
    left = ("general.file_type", "general.quantization_version", "general.alignment")
    return {
        key: value
        for key, value in metadata.items()
        if key.startswith(("tokenizer.", "general.")) and key not in left
    }


def _tensors(
    fn: Decoder, qparams: Mapping[str, Any], description: Description, plain: str
) -> Iterator[Tensor]:
    """Every tensor of the file, checked, its values still where they are."""
    for name, values in description.tensors.items():
        yield Tensor(name, "", "F32", values.shape, values.dtype, lambda values=values: values)
    for one in disassemble(fn.config, qparams, "gguf", scan_layers=fn.scan_layers):
        heads = 0
        if description.permuted and one.name.rsplit(".", 2)[1] in ("attn_q", "attn_k"):
            heads = fn.config.heads if ".attn_q." in one.name else fn.config.kv_heads
        leaf = one.leaf
        yield (
            _coded(one, leaf, heads)
            if isinstance(leaf, QTensor)
            else _plain(one, leaf, heads, plain)
        )


def _coded(one: Disassembled, leaf: QTensor, heads: int) -> Tensor:
    """A quantized weight; rows of `heads` heads are to be in llama.cpp's order, 0: they stay."""
    shape = tuple(leaf.shape)
    holding = held(TARGETS["gguf"], one.path, Described.of(leaf))
    if tuple(leaf.codes.shape) != shape:
        raise FormatError(f"weight {one.path!r} has codes {leaf.codes.shape}; GGUF stores {shape}")
    kind = holding.settings
    nbytes = shape[-1] // KINDS[kind].weights * KINDS[kind].nbytes

    def make() -> np.ndarray:
        rows = jax.tree.map(lambda array: _in_pairs(np.asarray(read(array)), heads), leaf)
        return _encoded(rows, holding, shape)

    return Tensor(one.name, one.path, kind, (*shape[:-1], nbytes), np.dtype(np.uint8), make)


def _plain(one: Disassembled, leaf: Lazy, heads: int, plain: str) -> Tensor:
    """An array: matrices of type `plain`, all others and routers float32."""
    shape = tuple(leaf.shape)
    kind = plain if len(shape) > 1 and "ffn_gate_inp" not in one.name else "F32"
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[kind]

    def make() -> np.ndarray:
        rows = _in_pairs(np.asarray(leaf[...], np.float32), heads)
        return _as_plain(rows, kind, one.path)

    return Tensor(one.name, one.path, kind, shape, np.dtype(dtype), make)


def _in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads from halves (i, i + d/2) to neighbours (2i, 2i + 1); 0 heads: as they are."""
    if not heads:
        return rows
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _as_plain(array: np.ndarray, kind: str, path: str) -> np.ndarray:
    """An array of numbers in a type of numbers.

    Raises:
        FormatError: a number is beyond the type.
    """
    if kind == "F32":
        return np.ascontiguousarray(array)
    import ml_dtypes

    with np.errstate(over="ignore"):
        stored = array.astype(np.float16 if kind == "F16" else ml_dtypes.bfloat16)
    if not np.isfinite(stored.astype(np.float32)).all():
        raise FormatError(f"{path!r} has numbers beyond {kind}; pass plain='F32'")
    return np.ascontiguousarray(stored).view(np.uint16 if kind == "BF16" else np.float16)


def _encoded(q: QTensor, holding: Holding, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a weight in memory; of experts one matrix after the other."""
    assert holding.codec is not None
    stacks = np.shape(q.codes)[:-2]
    parts = []
    for at in np.ndindex(*stacks):
        params = {name: np.asarray(leaf)[at] for name, leaf in q.params.items()}
        one = holding.stored(replace(q, codes=np.asarray(q.codes)[at], params=params))
        parts.append(holding.codec.encode(one)[TENSOR])
    return np.stack(parts).reshape(*shape[:-1], -1) if stacks else parts[0]


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A file that becomes `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path)
    with beside(path, "part", lambda place: place.touch(exist_ok=False)) as part:
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _write(path: Path, metadata: Mapping[str, Any], tensors: list[Tensor]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _put(writer, key, value)
    for t in tensors:
        nbytes = int(np.prod(t.shape)) * t.dtype.itemsize
        dtype = np.dtype(np.float32) if t.kind == "BF16" else t.dtype  # uint8 alone means bytes
        writer.add_tensor_info(t.name, t.shape, dtype, nbytes, GGMLQuantizationType[t.kind])
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            array = t.make()
            assert array.shape == tuple(t.shape) and array.dtype == t.dtype, t.name
            writer.write_tensor_data(array)
        for file in writer.fout or ():
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(Exception):
            writer.close()


def _put(writer: Any, key: str, value: Any) -> None:
    """A value of the metadata, of the type that llama.cpp has for its kind."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
