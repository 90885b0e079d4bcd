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

from jquant.errors import FormatError, near
from jquant.exporters.gguf_metadata import Description, describe
from jquant.exporters.gguf_tokenizer import tokenizer_metadata
from jquant.formats import gguf as codec_of
from jquant.formats.base import formula
from jquant.formats.block_types import KINDS, TENSOR
from jquant.models.assembly import Source, sources
from jquant.models.decoder import Decoder
from jquant.models.gguf_file import read_gguf
from jquant.trees.lazy import read
from jquant.weights.arguments import by_path
from jquant.weights.inputs import Inputs
from jquant.weights.qtensor import QTensor

Plain = Literal["F32", "F16", "BF16"]
# By the bits of a grid, the types that are nearest to it.
_NEAREST = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}
# llama.cpp's `general.file_type`, by the type of most weights.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 12, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32, "MXFP4": 38,
}  # fmt: skip


class Tensor(NamedTuple):
    """One tensor of the file: how it is called, of what type, and how its bytes are made.

    `shape` is that of the bytes where the type is one of blocks.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


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
) -> Path:
    """The file at `path`, a GGUF file of version 3 that holds a decoder and its codes.

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

    Raises:
        FormatError: no architecture says the network; a weight is on a grid, in groups or of a
            width that no block type holds (the message names it, and the nearest type), has a
            low-rank term, or numbers beyond float16; the tokenizer has no words in GGUF. Nothing is
            left behind.
        FileExistsError: there is a file.

    Example: `write_gguf("model-q4_k.gguf", fn, qparams, tokenizer)`, after `quantize` with the
    scheme `jq.presets.q4_k_qep()`.
    """
    path = Path(path)
    if plain not in get_args(Plain):
        raise ValueError(f"plain must be one of {get_args(Plain)}, got {plain!r}")
    if not isinstance(fn, Decoder):
        raise FormatError(
            f"GGUF files are written of the reference decoder, got {type(fn).__name__}; load the "
            "model with backend='jax'"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True, or another path")
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
    _write(path, metadata, tensors)
    return path


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
    config = fn.config
    leaves = by_path(qparams)
    left = dict.fromkeys(leaves)
    for name, values in description.tensors.items():
        yield Tensor(name, "F32", values.shape, values.dtype, lambda values=values: values)
    for source in sources(config, "gguf"):
        path = source.leaf
        if source.layer is not None and not fn.scan_layers:
            path = path.replace("layers/", f"layers/{source.layer}/", 1)
        if path not in leaves:
            raise FormatError(f"{path!r} is missing of the parameters; near: {near(path, leaves)}")
        left.pop(path, None)
        layer = source.layer if fn.scan_layers else None
        heads = 0
        if description.permuted and source.name.rsplit(".", 2)[1] in ("attn_q", "attn_k"):
            heads = config.heads if ".attn_q." in source.name else config.kv_heads
        yield _tensor(leaves[path], path, source, _Place(layer, heads, plain))
    if left:
        raise FormatError(f"{min(left)!r} has no place in a file of this decoder")


class _Place(NamedTuple):
    """Where a tensor's values are in a leaf, and what it is if it is not quantized.

    Attributes:
        layer: of a stack; None: the leaf is of one layer.
        heads: whose rows are to be in llama.cpp's order; 0: they stay.
        plain: the type of matrices.
    """

    layer: int | None
    heads: int
    plain: str


def _tensor(leaf: Any, path: str, source: Source, place: _Place) -> Tensor:
    name, shape = source.name, source.shape
    if isinstance(leaf, QTensor):
        kind, repeats = _kind_of(leaf, path, shape)
        nbytes = shape[-1] // KINDS[kind].weights * KINDS[kind].nbytes
        return Tensor(
            name, kind, (*shape[:-1], nbytes), np.dtype(np.uint8),
            lambda: _encoded(_of_layer(leaf, place), kind, repeats, shape),
        )  # fmt: skip
    matrix, kernel = len(shape) > 1, path.endswith("/kernel")
    ours = (*shape[:-2], shape[-1], shape[-2]) if kernel else shape
    got = tuple(leaf.shape)[0 if place.layer is None else 1 :]
    if got != ours:
        raise FormatError(f"{path!r} is {got}, the decoder's is {ours}")
    kind = place.plain if matrix and "ffn_gate_inp" not in name else "F32"
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[kind]

    def make() -> np.ndarray:
        array = np.asarray(_of_layer(leaf, place), np.float32)
        array = array.swapaxes(-1, -2) if kernel else array
        return _as_plain(_in_pairs(array, place.heads), kind, path)

    return Tensor(name, kind, shape, np.dtype(dtype), make)


def _of_layer(leaf: Any, place: _Place) -> Any:
    """The leaf's own layer in memory; rows of codes and parameters in llama.cpp's order."""

    def one(array: Any) -> np.ndarray:
        return np.asarray(read(array) if place.layer is None else array[place.layer])

    if not isinstance(leaf, QTensor):
        return one(leaf)
    return jax.tree.map(lambda array: _in_pairs(one(array), place.heads), leaf)


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


def _encoded(q: QTensor, kind: str, repeats: int, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a weight in memory; of experts one matrix after the other."""
    codec = codec_of(kind)
    codes = np.asarray(q.codes)
    params = {name: np.repeat(np.asarray(leaf), repeats, -1) for name, leaf in q.params.items()}
    batch = codes.shape[:-2]
    parts = []
    for at in np.ndindex(*batch):
        own = {name: leaf[at] for name, leaf in params.items()}
        one = replace(
            q.only(lambda part: False), codes=codes[at], params=own, layout=_plain_layout(codes),
            grid=codec.grid, groups=codec.groups,
        )  # fmt: skip
        parts.append(codec.encode(one)[TENSOR])
    return np.ascontiguousarray(np.stack(parts).reshape(*shape[:-1], -1))


def _plain_layout(codes: np.ndarray) -> Any:
    from jquant.axes.layout import Layout

    return Layout.of(codes.shape[-2:], in_axes=(1,))


def _kind_of(q: QTensor, path: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """The block type that holds a weight, and how often it has to repeat each scale.

    Raises:
        FormatError: none does.
    """
    width = shape[-1]
    kind = _nearest(q.grid.bits, width)
    instead = (
        f"GGUF's nearest type is {kind}: quantize it with jq.Scheme(jq.grids.GGUF({kind!r}), ...)"
        if kind else f"no type of GGUF has rows of {width} inputs: keep it"
    )  # fmt: skip
    if parts := [type(p).__name__ for p in q.parts if not isinstance(p, Inputs)]:
        raise FormatError(f"weight {path!r} has {', '.join(parts)}, which GGUF has not; {instead}")
    own = tuple(q.codes.shape)[-len(shape) :]
    if own != shape or q.groups.axis != "in":
        raise FormatError(
            f"weight {path!r} has codes {own} with {q.groups}; GGUF stores {shape} with groups "
            f"along the inputs; {instead}"
        )
    for kind, row in KINDS.items():
        size, block = codec_of(kind).groups.group(width), q.groups.group(width)
        if formula(q.grid) != formula(row.grid) or width % row.weights or block % size:
            continue
        if size == block or row.weights == size and width % block == 0:
            return kind, block // size
    raise FormatError(
        f"weight {path!r} is on {q.grid} in {q.groups}, {width} inputs, which no block type of "
        f"GGUF holds; {instead}"
    )


def _nearest(bits: int, width: int) -> str | None:
    """The type of at least so many bits whose blocks divide a row."""
    if width % 32:
        return None
    kind = _NEAREST[min(max(bits, 2), 8)]
    small = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q4_0", "Q5_K": "Q5_0", "Q6_K": "Q8_0"}
    return kind if width % KINDS[kind].weights == 0 else small[kind]


def _write(path: Path, metadata: Mapping[str, Any], tensors: list[Tensor]) -> None:
    """The file, complete or not there."""
    from gguf import GGMLQuantizationType, GGUFWriter

    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    writer = GGUFWriter(beside, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _put(writer, key, value)
    for t in tensors:
        nbytes = int(np.prod(t.shape)) * t.dtype.itemsize
        dtype = np.dtype(np.float32) if t.kind == "BF16" else t.dtype  # uint8 alone means bytes
        writer.add_tensor_info(t.name, t.shape, dtype, nbytes, GGMLQuantizationType[t.kind])
    try:
        writer.write_header_to_file(beside)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            array = t.make()
            assert array.shape == tuple(t.shape) and array.dtype == t.dtype, t.name
            writer.write_tensor_data(array)
        for file in writer.fout or ():
            file.flush()
            os.fsync(file.fileno())
        writer.close()
        beside.replace(path)
    finally:
        with contextlib.suppress(Exception):
            writer.close()
        beside.unlink(missing_ok=True)


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
