"""jquant's own file: a pytree of quantized weights and arrays in one safetensors file, bit-exact.

Every array is one tensor. Float arrays are stored as they are; codes as a bit stream of the grid's
width (`bitstream.py`), less the grid's lowest code; so are integer parameters that are codes
themselves, such as zero points. The header's metadata holds, as versioned JSON, the tree (dicts,
lists, tuples), and for each quantized weight its grid, groups, layout and dtype (`schemes.py`):

    {"version": 1, "tree": node, "static": [scheme, ...]}
    node = null | {"dict": [[key, node], ...]} | {"list": [node, ...]} | {"tuple": [node, ...]}
         | {"class": "QTensor", "static": index, "fields": {name: node}}
         | {"number": number} | {"key": kind of random key, "data": node}
         | {"array": name, "crc32": hex}                                        stored as it is
         | {"array": name, "crc32": hex, "dtype": d, "shape": s, "bits": b, "low": l}  bit stream
         | {"array": name, "crc32": hex, "dtype": d, "shape": s}       a dtype safetensors has not

Reading trusts nothing: the container, every node, and what each weight would dequantize to are
checked before the first array is read; each tensor has a CRC-32, and so has the header (5 GB/s,
where SHA-256 takes 1.7: it guards against damage, not against forgery).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jquant import deprecated
from jquant.errors import CheckpointError
from jquant.io import shards
from jquant.io.container import parse_json, read_container, render_header, replace_file
from jquant.io.files import FileState, naming
from jquant.io.fitting import check_places
from jquant.io.leaves import Reader
from jquant.io.placing import Shardings, place
from jquant.io.tree import Decoder, Encoder
from jquant.trees.lazy import realize
from jquant.trees.placement import transferring
from jquant.trees.processes import is_spread, on_all, one_token
from jquant.weights.arguments import replaced, value_of
from jquant.weights.qtensor import QTensor

VERSION = 1


@deprecated.keywords("Stored")
@dataclass(frozen=True)
class Stored:
    """One weight or array of a file.

    Attributes:
        shape, dtype: of the array, or of the one that a quantized weight stands for.
        bytes: in the file.
        grid, groups: of a quantized weight, else None.
        rank: of its low-rank term, 0 where there is none.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    grid: Any = None
    groups: Any = None
    rank: int = 0


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        version: of the format.
        leaves: path → `Stored`.
        metadata: the strings that `save` was given.
        file_bytes: the size of the file.
    """

    version: int
    leaves: Mapping[str, Stored]
    metadata: Mapping[str, str]
    file_bytes: int


@transferring
def save(
    path: str | os.PathLike[str], qparams: Any, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a pytree of `QTensor`s and arrays to one file; `load` gives back every bit of it.

    The file appears whole or not at all: it is written under another name in the same folder,
    flushed, and renamed over `path`. One leaf at a time is taken into memory and checked, so leaves
    that are `Lazy` or memory maps may be more than memory holds. (Lazy integers among a weight's
    parameters are read twice: their values decide how they are stored.)

    Of arrays that are spread over the devices of several processes each process writes what lies on
    its own: every one must call `save`, with a folder that they share as `path`. `load` reads that
    folder on any number of processes and devices. It has an index, which is written last, so a
    folder is a whole checkpoint or none.

    Args:
        path: the file; a file that is there is replaced, its folder must exist.
        qparams: any pytree of `QTensor`s, arrays of any JAX dtype (`Lazy` or not), numbers and
            random keys. Dicts with str or int keys, lists, tuples and None come back as they are.
            Any other node (a FrozenDict, an NNX State, an Equinox module, a dataclass, a
            NamedTuple) is stored as the dict of its children by the last keys of their paths, and
            comes back as that, or as what it was by `load(path, like=tree)`.
        metadata: strings to keep beside it; `read_header` returns them.

    Raises:
        TreeError: a leaf of another kind, naming its path and the way out.
        ValueError: codes outside their grid; a class of grid that is not jquant's.
        CheckpointError: processes do not share the folder.
        ProcessError: another process could not write its shard.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> path = tempfile.mkdtemp() + "/w.safetensors"
        >>> save(path, {"w": jnp.arange(3.0)})
        >>> load(path)["w"].tolist()
        [0.0, 1.0, 2.0]
    """
    user = {f"user.{key}": value for key, value in (metadata or {}).items()}
    if is_spread(qparams):
        _save_spread(Path(path), qparams, user)
        return
    encoder = Encoder(qparams)
    _write(path, encoder.root, encoder.statics, encoder.tensors, user)


def _write(
    path: str | os.PathLike[str],
    root: Any,
    statics: list[Any],
    tensors: Mapping[str, Any],
    user: Mapping[str, str],
) -> None:
    tree = {"version": VERSION, "tree": root, "static": statics}
    sizes = {name: (t.stored_dtype, t.stored_shape, t.size) for name, t in tensors.items()}
    with replace_file(path) as file:
        # Checksums come last but have a fixed width, so the header keeps its length.
        file.write(_header(tree, user, sizes))
        for tensor in tensors.values():
            tensor.write(file)
        file.seek(0)
        file.write(_header(tree, user, sizes))


def _save_spread(folder: Path, qparams: Any, user: Mapping[str, str]) -> None:
    """A folder with a file from each process; the index comes when all of them have written."""
    encoder, token, me = shards.encoded(qparams), one_token(), jax.process_index()
    names = [shards.name_of(token, process) for process in range(jax.process_count())]

    def write_mine() -> None:
        folder.mkdir(exist_ok=True)
        tensors = shards.tensors_of(encoder, me)
        root = {"dict": [[key, tensor.node] for key, tensor in tensors.items()]}
        _write(folder / names[me], root, [], tensors, {})

    def write_index() -> None:
        if me:
            return
        lost = [name for name in names if not (folder / name).is_file()]
        if lost:
            raise CheckpointError(
                f"{folder}: process 0 does not see {', '.join(lost)[:200]}, which other processes "
                "have written; pass a folder that all processes share"
            )
        shards.write_index(folder, encoder, names, user)

    try:
        with on_all(jax.process_count() > 1, f"write its shard of {folder}"):
            write_mine()
        with on_all(jax.process_count() > 1, f"write the index of {folder}"):
            write_index()
    except (OSError, ValueError):  # what was there before is as it was
        (folder / names[me]).unlink(missing_ok=True)
        raise


@transferring
def load(
    path: str | os.PathLike[str],
    *,
    lazy: bool = False,
    like: Any = None,
    shardings: Shardings | None = None,
) -> Any:
    """Read back what `save` wrote: the same tree, codes, parameters, layouts and dtypes.

    Arrays come as JAX arrays; 64-bit ones as NumPy arrays where JAX is not in its 64-bit mode,
    because it would cut them.

    Args:
        path: the file, or the folder that several processes have written.
        lazy: return a `Lazy` for every array, also inside each `QTensor`. The header is verified
            now, an array's bytes when it is read: `CheckpointError` if they are corrupt, or if the
            file has changed since.
        like: a tree whose structure the result is to have, such as the parameters before they were
            quantized, or `jax.eval_shape` of what makes them: the leaves of the file take the
            places of its leaves, path by path. Dtypes are those of the file. None: as stored.
        shardings: where the arrays go, straight from the file, as for `jq.io.place`: one
            `Sharding`, `{regular expression: Sharding}`, or a function of path and shape. Each
            process reads what its devices hold (and, once per array, all its bytes for the
            checksum). None: the default device.

    Raises:
        CheckpointError: the file is truncated, corrupt, hostile or of a newer version, or a shard
            is missing. Nothing of it is returned.
        TreeError: `like` has not the paths of the file, or a leaf of another shape; a sharding does
            not fit a leaf, or there is none for it.
        ValueError: `lazy` and `shardings` together; an expression matches no path.
        FileNotFoundError: there is no such file.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from typing import NamedTuple
        >>> class Pair(NamedTuple):
        ...     a: object
        ...     b: object
        >>> path = tempfile.mkdtemp() + "/w.safetensors"
        >>> save(path, Pair(jnp.zeros(2), 1e-5))
        >>> load(path)
        {'a': Array([0., 0.], dtype=float32), 'b': 1e-05}
        >>> load(path, like=Pair(jnp.ones(2), 0.0))
        Pair(a=Array([0., 0.], dtype=float32), b=1e-05)
    """
    if shardings is not None:
        if lazy:
            raise ValueError("lazy=True leaves arrays in the file, shardings place them; pass one")
        return place(load(path, lazy=True, like=like), shardings)
    if shards.are_in(Path(path)):
        index = shards.Index(Path(path), functools.partial(load, lazy=True))
        with naming(path):
            tree = _read(index.decoder, index.root, like, index.lazy)
        return tree if lazy else realize(tree)
    with open(path, "rb") as file, naming(path):
        decoder, root, _ = _open(file)
        read: Callable[[Any], Any] = _reader(file, decoder)
        if lazy:
            state = FileState.of(path, file)
            reader = Reader(state.open, decoder.entries, decoder.top)
            read = functools.partial(reader.lazy, identity=state.identity)
        return _read(decoder, root, like, read)


def _read(decoder: Decoder, root: Any, like: Any, read: Callable[[Any], Any]) -> Any:
    """The tree with what `read` makes of each array, in the structure of `like`."""
    if like is None:
        return decoder.read(root, read)
    nodes = _fitting(decoder, root, like)
    return replaced(like, {at: decoder.read(node, read) for at, node in nodes.items()})


def load_matching(path: str | os.PathLike[str], pattern: str) -> dict[str, Any]:
    """The leaves whose path matches the regular expression in full: `{path: QTensor or array}`.

    Reads only their bytes; a path is the `/`-joined keys, as in `find_weights`.

    Raises:
        CheckpointError: as `load`.
        ValueError: `pattern` matches no path.
    """
    with open(path, "rb") as file, naming(path):
        decoder, root, _ = _open(file)
        reader = _reader(file, decoder)
        paths = decoder.leaves(root)
        leaves = {p: decoder.read(n, reader) for p, n in paths.items() if re.fullmatch(pattern, p)}
    if not leaves:
        raise ValueError(f"{pattern!r} matches none of {len(paths)} paths in {os.fspath(path)!r}")
    return leaves


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a file holds, without reading an array.

    Raises:
        CheckpointError: the header is corrupt, or the file has not the size it claims.
    """
    with open(path, "rb") as file, naming(path):
        decoder, root, metadata = _open(file)
        leaves = {p: _stored(decoder, node) for p, node in decoder.leaves(root).items()}
        user = {k[5:]: v for k, v in metadata.items() if k.startswith("user.")}
        return Header(VERSION, leaves, user, os.fstat(file.fileno()).st_size)


def _fitting(decoder: Decoder, root: Any, like: Any) -> dict[str, Any]:
    """The nodes of a file's leaves by path, if they fit the places of another tree."""
    nodes = decoder.leaves(root)
    check_places(like, {path: np.shape(decoder.abstract(node)) for path, node in nodes.items()})
    return nodes


def _header(tree: Any, user: Mapping[str, str], sizes: Mapping[str, Any]) -> bytes:
    body = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    metadata = {"format": "jquant", "jquant": body, **user}
    metadata["jquant.crc32"] = _checksum(
        metadata, {n: (d, list(s)) for n, (d, s, _) in sizes.items()}
    )
    return render_header(metadata, sizes)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> str:
    """CRC-32 of what the header says, however its JSON is written."""
    covered = {k: v for k, v in metadata.items() if k != "jquant.crc32"}
    return f"{zlib.crc32(json.dumps([covered, tensors], sort_keys=True).encode()):08x}"


def _open(file: BinaryIO) -> tuple[Decoder, Any, dict[str, str]]:
    """Check all of an open file but its tensors' bytes."""
    metadata, entries = read_container(file)
    if metadata.get("format") != "jquant" or "jquant" not in metadata:
        raise CheckpointError(
            "a safetensors file that jquant did not write; "
            "jquant.models.load reads models of other tools"
        )
    checksum = _checksum(metadata, {n: (e.dtype, list(e.shape)) for n, e in entries.items()})
    body = parse_json(metadata["jquant"], "the jquant metadata")
    if not isinstance(body, dict) or body.get("version") != VERSION:
        version = body.get("version") if isinstance(body, dict) else None
        raise CheckpointError(
            f"format version {version!r:.20}; this jquant reads version {VERSION}: "
            "write the file again, or use the version of jquant that wrote it"
        )
    if metadata.get("jquant.crc32") != checksum:
        raise CheckpointError("the header is corrupt: its checksum does not match")
    decoder = Decoder(entries, body.get("static"))
    decoder.check(body.get("tree"))
    return decoder, body.get("tree"), metadata


def _reader(file: BufferedReader, decoder: Decoder) -> Reader:
    """What reads the arrays of a file that stays open."""
    return Reader(lambda: contextlib.nullcontext(file), decoder.entries, decoder.top)


def _stored(decoder: Decoder, node: Any) -> Stored:
    leaf = decoder.abstract(node)
    size = decoder.size(node)
    if isinstance(leaf, QTensor):
        rank = 0 if leaf.compensation is None else leaf.compensation.rank
        dtype = jax.numpy.dtype(leaf.dtype).name
        return Stored(leaf.shape, dtype, size, leaf.grid, leaf.groups, rank)
    leaf = value_of(leaf)
    return Stored(leaf.shape, str(leaf.dtype), size)
