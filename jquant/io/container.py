"""The file itself: a safetensors container, read with suspicion and written atomically.

A file is 8 bytes of header length (little-endian), a JSON header, and the tensors' bytes:

    {"__metadata__": {str: str}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}

Reading checks everything the header claims against the size of the file before anything is
allocated by it: lengths, dtypes, `product(shape) × itemsize = end - begin`, and that the tensors
lie one after the other without gaps or overlaps up to the end of the file. Tensors are read with
`read`, not mapped: a file that shrinks under a mapping kills the process, a short read is an error.

Writing goes to a new file beside the target, which is flushed to disk and then renamed over it: at
any moment the target is the old file or the new one, whole. A killed process can leave a
`.name.….tmp` behind and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jquant.errors import CheckpointError

# The safetensors names every reader knows, with the NumPy/JAX dtype and size of each. Other dtypes
# travel as U8.
DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

# A header's JSON becomes objects some ten times its size; 16 MiB hold about 20,000 quantized
# weights, and a file that claims more is refused before it is parsed.
MAX_HEADER = 16 << 20
_MAX_RANK = 32


@dataclass(frozen=True)
class Entry:
    """One tensor: its safetensors dtype, its shape, and where in the file its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_container(file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the tensors' places of an open file; no tensor is read.

    Raises:
        CheckpointError: the file is not a safetensors file whose claims all hold.
    """
    total = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(MAX_HEADER, total - 8):
        raise CheckpointError(
            f"not a safetensors file, or a truncated one: {total} bytes, of which the header "
            f"claims {length} (at most {MAX_HEADER} are accepted)"
        )
    header = parse_json(file.read(length), "the header")
    if not isinstance(header, dict):
        raise CheckpointError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("the header's __metadata__ is not an object of strings")
    entries = {name: _entry(name, claim, 8 + length) for name, claim in header.items()}
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise CheckpointError(f"tensor {name!r} begins at byte {entry.begin}, expected {at}")
        at = entry.end
    if at != total:
        raise CheckpointError(f"the tensors end at byte {at}, the file has {total}")
    return metadata, entries


def _entry(name: str, claim: Any, start: int) -> Entry:
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"tensor {name!r}: unknown dtype {dtype!r:.40}")
    if not naturals(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(f"tensor {name!r}: malformed shape {shape!r:.80}")
    if not naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"tensor {name!r}: malformed data_offsets {offsets!r:.80}")
    needed = math.prod(shape) * DTYPES[dtype][1]
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"tensor {name!r}: {dtype} {shape} takes {needed} bytes, data_offsets are {offsets}"
        )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def naturals(value: Any) -> bool:
    """Whether a JSON value is a list of integers from 0 to 2**47 (no file is longer)."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 47 for n in value)


def parse_json(raw: bytes | str, what: str) -> Any:
    """JSON from an untrusted source: depth, duplicates and digits cannot hurt.

    Raises:
        CheckpointError: it does not parse, repeats a key, or is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            raise CheckpointError(f"{what} repeats a key")
        return parsed

    try:
        return json.loads(raw, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except ValueError as error:  # malformed JSON or UTF-8, or an integer of thousands of digits
        raise CheckpointError(f"{what} is not JSON: {error!s:.200}") from None


def render_header(
    metadata: Mapping[str, str], sizes: Mapping[str, tuple[str, tuple[int, ...], int]]
) -> bytes:
    """The length and the header of a file, padded so that the tensors begin on 8 bytes.

    `sizes` maps name to (safetensors dtype, shape, bytes), in the order of the file.

    Raises:
        ValueError: the header would be longer than `read_container` accepts.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape, size) in sizes.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise ValueError(
            f"the tree needs a header of {len(raw)} bytes, at most {MAX_HEADER} are supported: "
            "stack layers or experts of equal shape into one array"
        )
    return len(raw).to_bytes(8, "little") + raw


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that becomes `path` when the block ends well, and vanishes when it does not."""
    target = Path(path).resolve()  # through a link, the file it points at is replaced
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # Ctrl-C too: nothing half-written stays behind
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk; Windows cannot open folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
