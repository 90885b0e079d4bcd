"""A packet as the bytes that are sent: no more than codes, scales and 28 bytes.

    "jqx1" | fingerprint, 8 bytes | form, 8 bytes | the arrays of every leaf | checksum, 8 bytes

Leaves come in the order of the tree: of a `QTensor` the codes as a dense bit stream of the grid's
width, then its parameters by name; everything else as its bytes. There is no description of the
tree: who receives holds the same tree, so the *form* is a digest of paths, shapes, dtypes and
grids, and bytes of another form are refused. Nothing that was sent decides how much is read or
made. The checksum, of all before it, is verified before anything is decoded. Both digests are the
first bytes of a SHA-256: they guard against damage and mistakes, not against forgery, for which a
transport that authenticates is there. For a file that describes itself there is `jq.save`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.errors import PacketError, WeightError
from jquant.exchange.packet import Packet
from jquant.grids.base import code_dtype
from jquant.io.bitstream import pack_bits, stream_bytes, unpack_bits
from jquant.numerics import require
from jquant.trees.placement import transferring
from jquant.weights.arguments import by_path, replaced
from jquant.weights.qtensor import QTensor, is_qtensor

_MAGIC, _DIGEST = b"jqx1", 8

OVERHEAD = len(_MAGIC) + 8 + 2 * _DIGEST
"""Bytes of a packet beside those of its leaves."""


def wire_bytes(packet: Packet) -> int:
    """The length of `to_bytes(packet)`, from shapes and dtypes alone.

    `OVERHEAD` and, for each floating leaf of n entries in k groups on a grid of b bits,
    `ceil(n b / 8)` and the bytes of k times the grid's parameters.

    Args:
        packet: a packet, or what `jax.eval_shape` gives of a function that makes one.

    Example:
        >>> import jquant as jq
        >>> grid = jq.grids.Uniform(4, symmetric=True, convention="S3", scale_dtype="float16")
        >>> packet = jax.eval_shape(lambda: jq.compress(jnp.ones(300), grid, jax.random.key(0)))
        >>> wire_bytes(packet) == OVERHEAD + 300 // 2 + 3 * 2
        True
    """
    require.made_by("wire_bytes: packet", packet, Packet)
    return OVERHEAD + sum(
        _size(*array) for leaf in by_path(packet.tree).values() for array in _arrays(leaf)
    )


@transferring
def to_bytes(packet: Packet) -> bytes:
    """The bytes of a packet, `wire_bytes(packet)` of them; `from_bytes` gives back every bit.

    Raises:
        WeightError: scales are NaN or infinite: a leaf was so, inside a compiled program, where it
            could not be refused.

    Example:
        >>> import jquant as jq
        >>> grid = jq.grids.Uniform(4, symmetric=True, convention="S3")
        >>> packet = jq.compress({"w": jnp.ones(8)}, grid, jax.random.key(0))
        >>> data = to_bytes(packet)
        >>> len(data), jq.decompress(from_bytes(data, packet))["w"].tolist()[:2]
        (36, [1.0, 1.0])
    """
    require.made_by("to_bytes: packet", packet, Packet)
    body = [_MAGIC, np.asarray(packet.fingerprint).astype("<u4").tobytes(), form(packet)]
    for path, leaf in by_path(packet.tree).items():
        for array, bits, low in _arrays(leaf):
            host = np.asarray(array)
            if is_qtensor(leaf) and bits is None and not _finite(host):
                raise WeightError(
                    f"tree, at {path!r}, held NaN or infinite values when it was compressed; skip "
                    "this update, or repair it: jnp.nan_to_num"
                )
            body.append(_encoded(host, bits, low))
    data = b"".join(body)
    return data + hashlib.sha256(data).digest()[:_DIGEST]


@transferring
def from_bytes(data: bytes, like: Packet) -> Packet:
    """The packet of bytes that `to_bytes` made.

    Args:
        data: the bytes.
        like: a packet of the same form, whose numbers do not matter: of the receiver's own tree,
            or `jax.eval_shape(lambda tree: jq.compress(tree, grid, key), tree)`.

    Raises:
        PacketError: the bytes are truncated, damaged, or of another form; nothing was decoded. Or
            they hold what no packet holds.

    Example:
        >>> import jquant as jq
        >>> packet = jq.compress({"w": jnp.ones(8)}, jq.grids.NF4(), jax.random.key(0))
        >>> from_bytes(to_bytes(packet)[:-1], packet)
        Traceback (most recent call last):
        jquant.errors.PacketError: 35 bytes are damaged or truncated: their checksum does not match
    """
    require.made_by("from_bytes: like", like, Packet)
    require.made_by("from_bytes: data", data, bytes, bytearray, memoryview)
    data = bytes(data)
    if data[: len(_MAGIC)] != _MAGIC:
        raise PacketError(f"{len(data)} bytes are no packet: they begin with {data[:4]!r}")
    if hashlib.sha256(data[:-_DIGEST]).digest()[:_DIGEST] != data[-_DIGEST:]:
        raise PacketError(
            f"{len(data)} bytes are damaged or truncated: their checksum does not match"
        )
    start = len(_MAGIC) + 8
    if data[start : start + _DIGEST] != form(like) or len(data) != wire_bytes(like):
        raise PacketError(
            f"a packet of {len(data)} bytes is of another form than like, of {wire_bytes(like)}: "
            "sender and receiver need equal paths, shapes, dtypes, grid, group and rotation"
        )
    mark = np.frombuffer(data, "<u4", 2, len(_MAGIC)).astype(np.uint32)
    leaves, at = {}, start + _DIGEST
    for path, leaf in by_path(like.tree).items():
        arrays = []
        for array, bits, low in _arrays(leaf):
            size = _size(array, bits, low)
            raw = np.frombuffer(data, np.uint8, size, at)
            arrays.append(_decoded(raw, array, bits, low, path, leaf))
            at += size
        leaves[path] = _joined(leaf, arrays)
    return Packet(replaced(like.tree, leaves), jnp.asarray(mark))


def form(packet: Packet) -> bytes:
    """A digest of all that is not sent: equal where packets can be added."""
    return hashlib.sha256("\n".join(described(packet).values()).encode()).digest()[:_DIGEST]


def described(packet: Packet) -> dict[str, str]:
    """Every leaf in words, by path: what it is of, and how its bytes are to be read."""
    lines = {}
    for path, leaf in by_path(packet.tree, "packet.tree").items():
        shapes = [(str(array.dtype), tuple(array.shape)) for array, _, _ in _arrays(leaf)]
        lines[path] = f"{path!r}: {jnp.dtype(leaf.dtype).name} {tuple(leaf.shape)} {shapes}"
        if is_qtensor(leaf):
            lines[path] += f" {leaf.grid!r} {leaf.groups!r} {leaf.transforms!r}"
    return lines


_Array = tuple[Any, int | None, int]


def _arrays(leaf: Any) -> Iterator[_Array]:
    """The arrays of a leaf in their order, each with the width of its codes, and their least.

    None: it is sent as its bytes.
    """
    if not is_qtensor(leaf):
        yield leaf, None, 0
        return
    bits, low = leaf.grid.bits, leaf.grid.codes[0]
    yield leaf.codes, bits, low
    for name in sorted(leaf.params):
        array = leaf.params[name]
        same = array.dtype == code_dtype(leaf.grid)  # a zero point, which is a code
        yield array, bits if same else None, low


def _size(array: Any, bits: int | None, low: int) -> int:
    if bits is not None:
        return stream_bytes(array.size, bits)
    return array.size * jnp.dtype(array.dtype).itemsize


def _encoded(array: np.ndarray, bits: int | None, low: int) -> bytes:
    if bits is None:
        return np.ascontiguousarray(array).tobytes()
    codes = array.astype(np.int32) - low
    return pack_bits(codes.astype(np.uint16 if bits > 8 else np.uint8), bits).tobytes()


def _decoded(
    raw: np.ndarray, like: Any, bits: int | None, low: int, path: str, leaf: Any
) -> np.ndarray:
    if bits is not None:
        codes = unpack_bits(raw, bits, like.size).astype(np.int32) + low
        if codes.size and codes.max() > leaf.grid.codes[1]:
            raise PacketError(f"at {path!r}: code {codes.max()} is off the grid {leaf.grid}")
        return codes.reshape(like.shape)
    dtype = jnp.dtype(like.dtype)
    if dtype == np.bool_ and raw.size and raw.max() > 1:
        raise PacketError(f"at {path!r}: a bool that is neither 0 nor 1")
    array = raw.view(dtype).reshape(like.shape)
    if is_qtensor(leaf) and not _finite(array):
        raise PacketError(f"at {path!r}: a scale is NaN or infinite")
    return array


def _joined(leaf: Any, arrays: list[np.ndarray]) -> Any:
    """The leaf with these arrays; 64-bit ones stay NumPy's where JAX would cut them."""
    if not is_qtensor(leaf):
        (array,) = arrays
        kept = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
        return jnp.asarray(array) if kept else array.copy()
    assert isinstance(leaf, QTensor)
    codes, *rest = arrays
    params = {
        name: jnp.asarray(array).astype(leaf.params[name].dtype)
        for name, array in zip(sorted(leaf.params), rest, strict=True)
    }
    return replace(leaf, codes=jnp.asarray(codes).astype(leaf.codes.dtype), params=params)


def _finite(array: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite; integers never are."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    return bool(np.isfinite(array.astype(np.float32)).all())
