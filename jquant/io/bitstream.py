"""Integer codes as dense little-endian bit streams, for every width from 1 to 16.

Code `j` of width `b` takes bits `j*b … j*b + b-1` of the stream; bit `k` of a stream is bit `k % 8`
of byte `k // 8`. The stream of a tensor is flat (row-major) and padded with zero bits to a byte, so
`n` codes take exactly `ceil(n*b / 8)` bytes. At 3 bits this is the layout of GPTQ checkpoints,
and at 4 bits that of every nibble format with the low nibble first.

Eight codes are eight bytes, so one uint64; three shift-and-mask steps fold its lanes together
(8 bits apart, then 16, then 32), after which its lowest `b` bytes are the stream. Above 8 bits,
eight codes are two uint64: two steps fold each, and a third joins the two. Where `b` divides 8, the
codes of a byte are one word (of 4 bits, two a uint16), which shifts alone fold, several times as
fast. No step is per code. NumPy throughout, in chunks that stay in cache: memory is the stream plus
one chunk.
"""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 18  # codes at a time: a multiple of 8, small enough for a core's L2 cache
_STEPS = {8: (8, 16, 32), 16: (16, 32)}  # widths of the lanes that fold, of codes this far apart
# Where the width divides 8: the word that the codes of one byte are, and how far it is shifted over
# itself, so that its lowest byte is the stream's.
_FOLDS = {8: ("u1", ()), 4: ("<u2", (4,)), 2: ("<u4", (6, 12)), 1: ("<u8", (7, 14, 28))}


def stream_bytes(count: int, bits: int) -> int:
    """The bytes that `count` codes of width `bits` take.

    Example:
        >>> stream_bytes(3, 5)
        2
    """
    return -(-count * bits // 8)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """The bit stream of unsigned codes.

    Args:
        codes: uint8, or uint16 for more than 8 bits; any shape, read in row-major order; every one
            below `2**bits`.
        bits: width, 1 to 16.

    Returns:
        uint8 `[ceil(codes.size * bits / 8)]`.

    Raises:
        ValueError: `bits` is out of range, or a code does not fit in it.

    Example:
        >>> pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist()
        [33, 3]
    """
    _check_width(bits)
    flat = np.ascontiguousarray(codes, _word(bits)).reshape(-1)
    stream = np.empty(stream_bytes(flat.size, bits), np.uint8)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if int(chunk.max()) >> bits:
            raise ValueError(f"a code of {int(chunk.max())} does not fit in {bits} bits")
        if chunk.size % 8:
            chunk = np.pad(chunk, (0, -chunk.size % 8))
        at = start * bits // 8
        if bits in _FOLDS:
            packed = _folded(chunk, bits)
            stream[at : at + packed.size] = packed[: stream.size - at]
            continue
        lanes = chunk.view("<u8")
        lane = 8 * flat.itemsize
        gap = lane - bits  # the empty bits above each code; doubles as lanes join in pairs
        for width in _STEPS[lane]:
            low = _every(width, width)
            lanes = (lanes & low) | ((lanes & (low << np.uint64(width))) >> np.uint64(gap))
            gap *= 2
        if 8 < bits < 16:
            lanes = _join(lanes.reshape(-1, 2), np.uint64(4 * bits))
        packed = lanes.view(np.uint8).reshape(-1, lane)[:, :bits].reshape(-1)
        stream[at : at + packed.size] = packed[: stream.size - at]
    return stream


def unpack_bits(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The `count` unsigned codes of a bit stream: the inverse of `pack_bits`.

    Args:
        stream: uint8 `[ceil(count * bits / 8)]`.
        bits: width, 1 to 16.
        count: how many codes the stream holds.

    Returns:
        uint8 `[count]`, or uint16 for more than 8 bits.

    Raises:
        ValueError: `bits` is out of range, or the stream is not exactly that long.

    Example:
        >>> unpack_bits(np.array([33, 3], np.uint8), 4, 3).tolist()
        [1, 2, 3]
    """
    _check_width(bits)
    if stream.size != stream_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {stream_bytes(count, bits)} bytes, "
            f"got {stream.size}"
        )
    if bits in _FOLDS:
        return _unfolded(stream, bits)[:count]
    codes = np.empty(count, _word(bits))
    lane = 8 * codes.itemsize
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        at = start * bits // 8
        packed = stream[at : at + stream_bytes(size, bits)]
        wide = np.zeros((-(-size // 8), lane), np.uint8)
        whole = packed.size // bits
        wide[:whole, :bits] = packed[: whole * bits].reshape(whole, bits)
        wide[whole:, : packed.size - whole * bits] = packed[whole * bits :]
        lanes = wide.view("<u8").reshape(-1)
        if 8 < bits < 16:
            lanes = _part(lanes.reshape(-1, 2), np.uint64(4 * bits))
        for width in reversed(_STEPS[lane]):
            gap = (lane - bits) * width // lane
            low = _every(width - gap, width)
            lanes = (lanes & low) | ((lanes & (low << np.uint64(width - gap))) << np.uint64(gap))
        codes[start : start + size] = lanes.view(codes.dtype)[:size]
    return codes


def _folded(codes: np.ndarray, bits: int) -> np.ndarray:
    """The words of whole bytes of the stream, each in the lowest byte of its word."""
    word, shifts = _FOLDS[bits]
    words = codes.view(word)
    for shift in shifts:
        moved = words >> words.dtype.type(shift)
        words = np.bitwise_or(words, moved, out=moved)
    return words


def _unfolded(stream: np.ndarray, bits: int) -> np.ndarray:
    """All codes of a stream, those of the padding of its last byte too."""
    word, shifts = _FOLDS[bits]
    codes = np.empty(stream.size * (8 // bits), np.uint8)
    words = codes.view(word)
    mask = words.dtype.type(int.from_bytes(bytes([(1 << bits) - 1]) * words.itemsize, "little"))
    for start in range(0, words.size, _CHUNK // words.itemsize):
        chunk = words[start : start + _CHUNK // words.itemsize]
        chunk[:] = stream[start : start + chunk.size]
        for shift in reversed(shifts):
            chunk |= chunk << chunk.dtype.type(shift)
        chunk &= mask
    return codes


def _every(ones: int, width: int) -> np.uint64:
    """The lowest `ones` bits of every second lane of `width` bits, from the lowest lane on."""
    mask = 0
    for lane in range(0, 64, 2 * width):
        mask |= ((1 << ones) - 1) << lane
    return np.uint64(mask)


def _join(pairs: np.ndarray, bits: np.uint64) -> np.ndarray:
    """Pairs of words with `bits` bits in each, moved together."""
    low, high = pairs[:, 0], pairs[:, 1]
    return np.stack([low | (high << bits), high >> (np.uint64(64) - bits)], axis=1).reshape(-1)


def _part(pairs: np.ndarray, bits: np.uint64) -> np.ndarray:
    """The inverse of `_join`."""
    mask = (np.uint64(1) << bits) - np.uint64(1)
    high = (pairs[:, 0] >> bits) | (pairs[:, 1] << (np.uint64(64) - bits))
    return np.stack([pairs[:, 0] & mask, high & mask], axis=1).reshape(-1)


def _word(bits: int) -> np.dtype:
    """The dtype of codes of this width."""
    return np.dtype("<u2" if bits > 8 else np.uint8)


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be from 1 to 16, got {bits}")
