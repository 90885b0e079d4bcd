"""The steps from a tensor of a file to an array of a weight, each with its inverse.

A format stores codes as words of a bit stream, transposed, with an offset, as the bit patterns of
floats. Each of these is a small value that `read`s and `write`s; and because steps in a row have
their inverses in the reverse row as inverse, reading and writing a tensor is the identity on bytes
by construction. `stored` says of a result's shape and dtype which ones it is read from, `given` the
other way round which shape; so a tensor is checked before a byte of it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from jquant.errors import CheckpointError, FormatError
from jquant.formats.base import Spec
from jquant.grids import Float
from jquant.io.bitstream import pack_bits, unpack_bits

Shape = tuple[int, ...]


class Step(Protocol):
    """An invertible step from what is stored to an array.

    A step that is `by_rows` treats every row of an array by itself.
    """

    by_rows: ClassVar[bool]

    def stored(self, spec: Spec) -> Spec:
        """What a result of this shape and dtype is read from."""
        ...

    def given(self, shape: Shape) -> Shape:
        """The shape, or the largest one, of what is read from this shape."""
        ...

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        """The result, of shape and dtype `spec`. CheckpointError: there is none."""
        ...

    def write(self, array: np.ndarray) -> np.ndarray:
        """The inverse. FormatError: there is none."""
        ...


@dataclass(frozen=True)
class Transposed:
    """The other way round."""

    by_rows: ClassVar[bool] = False

    def stored(self, spec: Spec) -> Spec:
        return spec._replace(shape=spec.shape[::-1])

    def given(self, shape: Shape) -> Shape:
        return shape[::-1]

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        return array.T

    def write(self, array: np.ndarray) -> np.ndarray:
        return array.T


@dataclass(frozen=True)
class Single:
    """One number for the whole weight, `[1, 1]`, stored as `[1]`."""

    by_rows: ClassVar[bool] = False

    def stored(self, spec: Spec) -> Spec:
        return spec._replace(shape=(1,))

    def given(self, shape: Shape) -> Shape:
        return (1, 1)

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        return array.reshape(1, 1)

    def write(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(1)


@dataclass(frozen=True)
class Stream:
    """Unsigned codes as a dense stream of bits for each row, lowest bits first, in whole words."""

    by_rows: ClassVar[bool] = True

    bits: int
    word: str = "int32"

    @property
    def _size(self) -> int:
        return np.dtype(self.word).itemsize

    def stored(self, spec: Spec) -> Spec:
        *rows, count = spec.shape
        return Spec((*rows, -(-count * self.bits // (8 * self._size))), np.dtype(self.word))

    def given(self, shape: Shape) -> Shape:
        return (*shape[:-1], shape[-1] * 8 * self._size // self.bits)

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        *rows, count = spec.shape
        stream = np.ascontiguousarray(array).view(np.uint8).reshape(math.prod(rows), -1)
        codes = -(-stream.shape[1] * 8 // self.bits)
        codes += -codes % 8  # eight codes end with a byte, so that all rows are one stream
        stream = _wide(stream, codes * self.bits // 8)
        values = unpack_bits(stream.reshape(-1), self.bits, len(stream) * codes)
        values = values.reshape(*rows, codes)
        if values[..., count:].any():
            raise CheckpointError("bits behind the last code of a row are not zero")
        return values[..., :count]

    def write(self, array: np.ndarray) -> np.ndarray:
        *rows, count = array.shape
        codes = _wide(array.astype(np.uint8, copy=False).reshape(-1, count), count + -count % 8)
        stream = pack_bits(codes, self.bits).reshape(len(codes), -1)
        spec = self.stored(Spec(array.shape, array.dtype))
        stream = _wide(stream, spec.shape[-1] * self._size)
        return stream.view(spec.dtype).reshape(spec.shape)


def _wide(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows of another width, zeros at the end."""
    more = max(0, width - rows.shape[1])
    return np.ascontiguousarray((np.pad(rows, ((0, 0), (0, more))) if more else rows)[:, :width])


@dataclass(frozen=True)
class Shifted:
    """Integers that are stored less `by`, in another dtype; results are from `low` to `high`."""

    by_rows: ClassVar[bool] = True

    by: int
    word: str
    low: int
    high: int

    def stored(self, spec: Spec) -> Spec:
        return spec._replace(dtype=np.dtype(self.word))

    def given(self, shape: Shape) -> Shape:
        return shape

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        ends = (int(array.min()) + self.by, int(array.max()) + self.by) if array.size else ()
        if ends and not (self.low <= ends[0] and ends[1] <= self.high):
            raise CheckpointError(f"codes outside {self.low} .. {self.high}")
        return (array.view(np.uint8) + self._turn).view(np.int8 if self.low < 0 else np.uint8)

    def write(self, array: np.ndarray) -> np.ndarray:
        return (array.view(np.uint8) - self._turn).view(self.word)

    @property
    def _turn(self) -> np.uint8:
        """The distance around a byte: both ends lie in one."""
        return np.uint8(self.by % 256)


@dataclass(frozen=True)
class Patterns:
    """Bit patterns of floats, sign first, as codes of a grid with a negative zero."""

    by_rows: ClassVar[bool] = True

    grid: Float

    def stored(self, spec: Spec) -> Spec:
        return spec._replace(dtype=np.dtype(np.uint8))

    def given(self, shape: Shape) -> Shape:
        return shape

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        sign = 1 << (self.grid.bits - 1)
        rank = (array & np.uint8(sign - 1)).astype(np.int16)
        if rank.size and int(rank.max()) > self.grid.codes[1]:
            raise CheckpointError("numbers that are NaN or infinite")
        below = np.where(rank == 0, self.grid.codes[0], -rank)
        return np.where(array >= sign, below, rank).astype(np.int16)

    def write(self, array: np.ndarray) -> np.ndarray:
        code = array.astype(np.int16)
        rank = np.where(code == self.grid.codes[0], 0, np.abs(code)).astype(np.uint8)
        return rank | np.where(code < 0, 1 << (self.grid.bits - 1), 0).astype(np.uint8)


@dataclass(frozen=True)
class Viewed:
    """The same bits under another dtype."""

    by_rows: ClassVar[bool] = True

    word: str

    def stored(self, spec: Spec) -> Spec:
        return spec._replace(dtype=np.dtype(self.word))

    def given(self, shape: Shape) -> Shape:
        return shape

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        return np.ascontiguousarray(array).view(spec.dtype)

    def write(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array).view(self.word)


@dataclass(frozen=True)
class Ordered:
    """Columns that are stored in another order, alike in every run of them.

    `order[i]` is the column of a run that stands at its place i.
    """

    by_rows: ClassVar[bool] = True

    order: tuple[int, ...]

    def stored(self, spec: Spec) -> Spec:
        return spec

    def given(self, shape: Shape) -> Shape:
        return shape

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        return self._by(array, np.argsort(self.order))

    def write(self, array: np.ndarray) -> np.ndarray:
        return self._by(array, np.asarray(self.order))

    def _by(self, array: np.ndarray, order: np.ndarray) -> np.ndarray:
        return array.reshape(*array.shape[:-1], -1, len(order))[..., order].reshape(array.shape)


@dataclass(frozen=True)
class OneLess:
    """Numbers of some bits that are stored less one, the least as the greatest.

    In words of several (`together`), one is taken off all numbers of a word at once, with borrows,
    as GPTQModel does.
    """

    by_rows: ClassVar[bool] = True

    bits: int
    together: bool

    def stored(self, spec: Spec) -> Spec:
        return spec

    def given(self, shape: Shape) -> Shape:
        return shape

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        return self._moved(array, 1)

    def write(self, array: np.ndarray) -> np.ndarray:
        return self._moved(array, -1)

    def _moved(self, array: np.ndarray, by: int) -> np.ndarray:
        if not self.together:
            return ((array.astype(np.int16) + by) & ((1 << self.bits) - 1)).astype(np.uint8)
        ones = np.uint32(sum(1 << k for k in range(0, 32, self.bits)))
        words = np.ascontiguousarray(array).view(np.uint32)
        return (words + ones if by > 0 else words - ones).view(np.int32)


@dataclass(frozen=True)
class Repeated:
    """Rows of which each is stored once for `size` neighbours; the last ones may be fewer."""

    by_rows: ClassVar[bool] = False

    size: int

    def stored(self, spec: Spec) -> Spec:
        rows, *rest = spec.shape
        return spec._replace(shape=(-(-rows // self.size), *rest))

    def given(self, shape: Shape) -> Shape:
        rows, *rest = shape
        return (rows * self.size, *rest)

    def read(self, array: np.ndarray, spec: Spec) -> np.ndarray:
        return np.repeat(array, self.size, axis=0)[: spec.shape[0]]

    def write(self, array: np.ndarray) -> np.ndarray:
        kept = array[:: self.size]
        again = np.repeat(kept, self.size, axis=0)[: len(array)]
        if not np.array_equal(again.view(np.uint8), np.ascontiguousarray(array).view(np.uint8)):
            raise FormatError(f"parameters of {self.size} neighbouring rows differ; they share one")
        return kept
