"""GGUF's block types as data: where in the bytes of a block the bits of each array lie.

A row of a tensor is a run of blocks, and a block the scales and codes of 32 or 256 weights. Codes
of 2 to 6 bits are spread over *planes*: a run of bytes whose fields of a few bits, taken at one
shift after the other, are neighbouring elements of an array, or their upper bits. With planes every
type is a row of `KINDS`, and reading and writing are two functions. Codes of symmetric types are
stored less their least one. The grids are `jquant/grids/gguf.py`'s and older ones.

References: llama.cpp, `ggml/src/ggml-common.h` (blocks), `gguf-py/gguf/quants.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jquant.axes.groups import Groups
from jquant.errors import CheckpointError, FormatError
from jquant.formats.base import Codec, Shape, Spec, plain
from jquant.formats.rows import by_rows, runs
from jquant.formats.steps import Patterns
from jquant.grids import GGUF, MX, Grid, Uniform, code_dtype

TENSOR = "weight"


class Plane(NamedTuple):
    """A part of the bits of an array's elements in a block.

    Attributes:
        start, stop: the bytes of the block.
        bits: of a field.
        chunk: bytes that are gone through at one shift before the next shift.
        shifts: where the fields of a byte begin; default: all of them.
        at: the array's element that the first field belongs to.
        up: the lowest bit of an element that it holds.
    """

    start: int
    stop: int
    bits: int
    chunk: int
    shifts: tuple[int, ...] = ()
    at: int = 0
    up: int = 0

    @property
    def places(self) -> tuple[int, ...]:
        return self.shifts or tuple(range(0, 8, self.bits))

    @property
    def count(self) -> int:
        """How many elements it has a part of."""
        return (self.stop - self.start) * len(self.places)

    def read(self, blocks: np.ndarray, elements: np.ndarray) -> None:
        """Put its bits into `elements`, uint8 `[…, n]`."""
        raw = self._raw(blocks)
        mask, into = np.uint8((1 << self.bits) - 1), self._part(elements)
        bits = np.empty(into.shape, np.uint8)
        for k, shift in enumerate(self.places):
            field = _shifted(raw, shift)
            field = field & mask if shift + self.bits < 8 else field
            self._at_once(bits, k)[...] = self._at_once(_shifted(field, -self.up))
        into |= bits

    def write(self, elements: np.ndarray, blocks: np.ndarray) -> None:
        """The inverse; other bits are left as they are."""
        mask, part = np.uint8((1 << self.bits) - 1), self._part(elements)
        total = np.zeros_like(self._raw(blocks))
        for k, shift in enumerate(self.places):
            field = np.ascontiguousarray(self._at_once(part, k)).view(np.uint8)
            field = _shifted(field.reshape(total.shape), self.up) & mask
            total |= _shifted(field, -shift)
        blocks[..., self.start : self.stop] |= total.reshape(*blocks.shape[:-1], -1)

    def _raw(self, blocks: np.ndarray) -> np.ndarray:
        """Its bytes `[…, chunks, chunk]`."""
        return blocks[..., self.start : self.stop].reshape(*blocks.shape[:-1], -1, self.chunk)

    def _part(self, elements: np.ndarray) -> np.ndarray:
        """Its elements, a view `[…, chunks, shifts, chunk]`."""
        part = elements[..., self.at : self.at + self.count]
        return part.reshape(*elements.shape[:-1], -1, len(self.places), self.chunk)

    def _at_once(self, chunks: np.ndarray, place: int | None = None) -> np.ndarray:
        """Chunks of bytes, or those at one place, as elements that NumPy moves in one go each: its
        loops over a few bytes take longer to begin than to run."""
        wide = chunks.view(f"V{self.chunk}")[..., 0]
        return wide if place is None else wide[..., place]


def _shifted(values: np.ndarray, right: int) -> np.ndarray:
    """Bytes shifted to the right, or to the left where that is negative."""
    if right == 0:
        return values
    return values >> np.uint8(right) if right > 0 else values << np.uint8(-right)


class Whole(NamedTuple):
    """An array whose elements are the bytes `start` to `stop`; `negated`: with the other sign."""

    start: int
    stop: int
    dtype: str
    negated: bool = False


class Planes(NamedTuple):
    """An array whose elements' bits lie in planes, stored less `low`, or as patterns of floats."""

    count: int
    dtype: str
    planes: tuple[Plane, ...]
    low: int = 0
    patterns: Patterns | None = None


class Kind(NamedTuple):
    """A block type: its weights, its bytes, its grid, and where its arrays lie."""

    weights: int
    nbytes: int
    grid: Grid
    arrays: Mapping[str, Whole | Planes]


def _codes(grid: Grid, weights: int, *planes: Plane) -> Planes:
    return Planes(weights, code_dtype(grid).name, planes, grid.codes[0])


def _half(start: int) -> Whole:
    return Whole(start, start + 2, "float16")


def _simple(bits: int, nbytes: int, *planes: Plane) -> Kind:
    """Groups of 32 with one scale: on a grid of all tools rather than on GGUF's equal one."""
    grid = Uniform(bits, symmetric=True, scale_dtype="float16")
    codes = _codes(grid, 32, *planes) if planes else Whole(2, nbytes, "int8")
    return Kind(32, nbytes, grid, {"scale": _half(0), "codes": codes})


def _affine(name: str, nbytes: int, *planes: Plane) -> Kind:
    """Groups of 32 with a scale and a least value."""
    grid, least = GGUF(name), Whole(2, 4, "float16", negated=True)
    arrays = {"scale": _half(0), "offset": least, "codes": _codes(grid, 32, *planes)}
    return Kind(32, nbytes, grid, arrays)


def _super(name: str, nbytes: int, arrays: Mapping[str, Whole | Planes], *planes: Plane) -> Kind:
    """Super-blocks of 256."""
    grid = GGUF(name)
    return Kind(256, nbytes, grid, {**arrays, "codes": _codes(grid, 256, *planes)})


# The six bits of eight scales and eight offsets in twelve bytes: four of each as they are, the low
# bits of the other four in the last bytes, their high bits above the first four.
_SIX = {
    "scale": _half(0),
    "offset": _half(2),
    "scale_code": Planes(8, "uint8", (
        Plane(4, 8, 6, 4, (0,)),
        Plane(12, 16, 4, 4, (0,), at=4), Plane(4, 8, 2, 4, (6,), at=4, up=4),
    )),
    "offset_code": Planes(8, "uint8", (
        Plane(8, 12, 6, 4, (0,)),
        Plane(12, 16, 4, 4, (4,), at=4), Plane(8, 12, 2, 4, (6,), at=4, up=4),
    )),
}  # fmt: skip
_MX = replace(MX(), negative_zero=True)

KINDS: dict[str, Kind] = {
    "Q4_0": _simple(4, 18, Plane(2, 18, 4, 16)),
    "Q5_0": _simple(5, 22, Plane(6, 22, 4, 16), Plane(2, 6, 1, 1, up=4)),
    "Q8_0": _simple(8, 34),
    "Q4_1": _affine("Q4_1", 20, Plane(4, 20, 4, 16)),
    "Q5_1": _affine("Q5_1", 24, Plane(8, 24, 4, 16), Plane(4, 8, 1, 1, up=4)),
    "MXFP4": Kind(32, 17, _MX, {
        "scale": Whole(0, 1, "float8_e8m0fnu"),
        "codes": Planes(32, "int4", (Plane(1, 17, 4, 16),), patterns=Patterns(_MX)),
    }),
    "Q2_K": _super("Q2_K", 84, {
        "scale": _half(80),
        "offset": _half(82),
        "scale_code": Planes(16, "uint4", (Plane(0, 16, 4, 16, (0,)),)),
        "offset_code": Planes(16, "uint4", (Plane(0, 16, 4, 16, (4,)),)),
    }, Plane(16, 80, 2, 32)),
    "Q3_K": _super("Q3_K", 110, {
        "scale": _half(108),
        "scale_code": Planes(
            16, "int8", (Plane(96, 104, 4, 8), Plane(104, 108, 2, 4, up=4)), low=-32
        ),
    }, Plane(32, 96, 2, 32), Plane(0, 32, 1, 32, up=2)),
    "Q4_K": _super("Q4_K", 144, _SIX, Plane(16, 144, 4, 32)),
    "Q5_K": _super("Q5_K", 176, _SIX, Plane(48, 176, 4, 32), Plane(16, 48, 1, 32, up=4)),
    "Q6_K": _super("Q6_K", 210, {
        "scale": _half(208),
        "scale_code": Whole(192, 208, "int8"),
    }, Plane(0, 128, 4, 64), Plane(128, 192, 2, 32, up=4)),
}  # fmt: skip


def gguf(kind: str) -> Codec:
    """The codec of a block type of GGUF; the one tensor of a weight is `"weight"`, its bytes.

    Args:
        kind: "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K" or
            "Q6_K".

    Raises:
        FormatError: it is another one.

    Values are those of `gguf.dequantize`, bit for bit; of MXFP4 below 2^-126 they are zero, as
    float32 arithmetic of XLA has it.

    Example:
        >>> q = gguf("Q6_K").decode({"weight": np.zeros((4, 210), np.uint8)})
        >>> q.shape, q.codes.dtype.name, q.params["scale_code"].shape
        ((4, 256), 'int8', (4, 16))
    """
    if kind not in KINDS:
        raise FormatError(f"GGUF's {kind!r} has no codec; these have: {', '.join(KINDS)}")
    row = KINDS[kind]
    group = row.grid.group if isinstance(row.grid, GGUF) else 32
    return Codec(f"GGUF {kind}", row.grid, Groups("in", group), ByBlock(kind))


@dataclass(frozen=True)
class ByBlock:
    """A storage of blocks; see the module."""

    kind: str

    @property
    def row(self) -> Kind:
        return KINDS[self.kind]

    def shape(self, tensors: Mapping[str, Any]) -> Shape:
        shape = tuple(tensors[TENSOR].shape)
        if len(shape) != 2 or 0 in shape or shape[1] % self.row.nbytes:
            raise CheckpointError(
                f"tensor {TENSOR!r}: bytes {shape}; {self.kind} packs {self.row.weights} weights "
                f"into {self.row.nbytes}"
            )
        return shape[0], shape[1] // self.row.nbytes * self.row.weights

    def tensors(self, shape: Shape) -> dict[str, Spec]:
        out, width = shape
        nbytes = width // self.row.weights * self.row.nbytes
        return {TENSOR: Spec((out, nbytes), np.dtype(np.uint8))}

    def arrays(self, shape: Shape) -> dict[str, Spec]:
        out, width = shape

        def spec(array: Whole | Planes) -> Spec:
            dtype = np.dtype(array.dtype)
            size = array.stop - array.start if isinstance(array, Whole) else 0
            count = size // dtype.itemsize if isinstance(array, Whole) else array.count
            return Spec((out, width // self.row.weights * count), dtype)

        return {name: spec(array) for name, array in self.row.arrays.items()}

    def read(self, name: str, tensors: Mapping[str, Any], shape: Shape) -> np.ndarray:
        array, out = self.row.arrays[name], shape[0]
        blocks = np.ascontiguousarray(tensors[TENSOR]).reshape(out, -1, self.row.nbytes)
        if isinstance(array, Whole):
            raw = np.ascontiguousarray(blocks[..., array.start : array.stop])
            values = raw.view(array.dtype).reshape(out, -1)
            return -values if array.negated else values
        spec = self.arrays(shape)[name]
        whole = np.empty(spec.shape, spec.dtype)
        return by_rows(lambda rows: _elements(array, rows, spec), blocks, whole)

    def write(self, arrays: Mapping[str, np.ndarray], shape: Shape) -> dict[str, np.ndarray]:
        whole = np.empty((shape[0], shape[1] // self.row.weights * self.row.nbytes), np.uint8)
        for run in runs(*shape):
            some = {name: array[run] for name, array in arrays.items()}
            whole[run] = self._blocks(some, len(whole[run]))
        return {TENSOR: whole}

    def _blocks(self, arrays: Mapping[str, np.ndarray], out: int) -> np.ndarray:
        """The bytes of some rows."""
        width = arrays["codes"].shape[1]
        blocks = np.zeros((out, width // self.row.weights, self.row.nbytes), np.uint8)
        for name, array in self.row.arrays.items():
            values = plain(arrays[name])
            if isinstance(array, Whole):
                values = np.ascontiguousarray(-values if array.negated else values)
                raw = values.reshape(*blocks.shape[:2], -1).view(np.uint8)
                blocks[..., array.start : array.stop] = raw
                continue
            if array.patterns is not None:
                values = array.patterns.write(values)
            elif array.low:
                values = (values - np.int8(array.low)).view(np.uint8)
            elements = values.reshape(*blocks.shape[:2], array.count)
            for plane in array.planes:
                plane.write(elements, blocks)
        return blocks.reshape(out, -1)


def _elements(array: Planes, blocks: np.ndarray, spec: Spec) -> np.ndarray:
    """An array of some rows, from their blocks `[rows, blocks, bytes]`."""
    elements = np.zeros((*blocks.shape[:2], array.count), np.uint8)
    for plane in array.planes:
        plane.read(blocks, elements)
    elements = elements.reshape(len(blocks), -1)
    if array.patterns is not None:
        return array.patterns.read(elements, spec)
    return elements.view(np.int8) + np.int8(array.low) if array.low else elements
