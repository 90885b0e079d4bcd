"""qwix: a weight as the arrays of a `QArray`, in the shape of the array it stands for.

    Uniform, up to 4 bits     int4              zero points are codes, or there are none
    Uniform, 5 to 8 bits      int8
    Float E2M1, E4M3, E5M2    float4, float8    scales of any kind

Values are `(qvalue - zero_point) * scale`, and the scale has the weight's axes, each divided by the
size of its tiles. Along several input axes groups are runs of the flattened ones; where these are
no tiles, they are refused. Scales that are no floats of NumPy's or bfloat16 (E8M0, and E4M3 with
the tensor's) are written as the float32 that they stand for. Checked against qwix 0.1.8.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.axes.groups import Groups
from jquant.axes.layout import Factor, Layout
from jquant.errors import FormatError
from jquant.exporters.described import Described, Holding, alone, along_inputs, need_alone
from jquant.formats.base import formula
from jquant.formats.compressed_tensors import SCALE_DTYPES
from jquant.grids import Float, MinMax, Uniform
from jquant.trees.lazy import read
from jquant.weights.qtensor import QTensor

HOLDS = (
    "integers of 2 to 8 bits whose zero points are codes, and E2M1, E4M3 and E5M2 numbers, in "
    "groups that divide their axis"
)
_FLOATS = {
    Float(2, 1).format: "float4_e2m1fn",
    Float(4, 3).format: "float8_e4m3fn",
    Float(5, 2).format: "float8_e5m2",
}
Part = tuple[str, int]  # a factor of an axis: its role and its place
Counts = Mapping[Part, int]


def hold(weight: Described) -> Holding:
    """How a `QArray` holds a weight; see `Target`.

    Raises:
        FormatError: it cannot; says what stands in the way.
    """
    need_alone(weight)
    if weight.inputs is not None:
        raise FormatError("quantized inputs, of which a QArray says nothing")
    grid = weight.grid
    if isinstance(grid, Uniform):
        plain = Uniform(grid.bits, grid.symmetric, scale_dtype=grid.scale_dtype)
        if formula(grid) != formula(plain):
            raise FormatError(f"zero points that are no codes (convention {grid.convention})")
    elif not isinstance(grid, Float) or grid.format not in _FLOATS or grid.scale is None:
        raise FormatError(f"the grid {grid!r}")
    out, width = weight.shape
    whole = width if weight.groups.axis == "in" else out
    if whole % weight.groups.group(whole):
        raise FormatError(f"groups of {weight.groups.group(whole)}, which do not divide {whole}")
    layout = weight.layout or Layout.of(weight.shape, in_axes=(1,))
    _tiles(layout, weight.groups, weight.whole)
    return Holding(None, kind=f"QArray of {_dtype(grid)}")


def nearest(weight: Described) -> Described:
    """The weight as the nearest scheme that a `QArray` holds would have it."""
    grid = weight.grid
    if isinstance(grid, Uniform):
        grid = Uniform(grid.bits, grid.symmetric, scale_dtype=grid.scale_dtype)
    elif isinstance(grid, Float) and grid.format in _FLOATS and grid.scale is not None:
        grid = replace(grid, macro=None)
    elif isinstance(grid, Float) and grid.bits in (4, 8):
        scale = grid.scale or "float32"
        limits = {"range": grid.range if grid.scale else MinMax(), "group": grid.group}
        size = {4: (2, 1), 8: (5, 2) if grid.exponent_bits == 5 else (4, 3)}[grid.bits]
        grid = Float(*size, scale=scale, **limits)
    else:
        grid = Uniform(min(max(int(grid.bits), 2), 8))
    near = alone(weight, grid=grid, groups=along_inputs(weight), inputs=None)
    try:
        _tiles(weight.layout or Layout.of(weight.shape, in_axes=(1,)), near.groups, False)
    except FormatError:
        near = replace(near, groups=Groups())
    return near


def qarray_of(q: QTensor) -> dict[str, np.ndarray]:
    """The arrays `qvalue`, `scale` and, of zero points, `zero_point`.

    Example:
        >>> layout = Layout.of((4, 1), in_axes=(0,))
        >>> codes, scale = jnp.array([[0, 1, 2, 3]], jnp.uint2), jnp.ones((1, 2))
        >>> params = {"scale": scale, "zero": jnp.array([[1, 0]], jnp.uint2)}
        >>> q = QTensor(codes, params, Uniform(2), Groups("in", 2), layout, "float32")
        >>> {name: array.tolist() for name, array in qarray_of(q).items()}
        {'qvalue': [[-2], [-1], [0], [1]], 'scale': [[1.0], [1.0]], 'zero_point': [[-1], [-2]]}
    """
    layout = q.layout.trimmed(q.codes.ndim - 2)
    grid, dtype = q.grid, np.dtype(_dtype(q.grid))
    codes = np.asarray(read(q.codes)).astype(np.int16)
    scale = np.asarray(read(q.params["scale"]))
    arranged = functools.partial(_arranged, q, layout)
    if isinstance(grid, Uniform):
        shift = 0 if grid.symmetric else 1 << (grid.bits - 1)
        values = (codes - np.int16(shift)).astype(dtype)
        arrays = {"qvalue": values, "scale": arranged(scale)}
        if "zero" in q.params:
            zero = np.asarray(read(q.params["zero"])).astype(np.int16) - np.int16(shift)
            arrays["zero_point"] = arranged(zero).astype(dtype)
    else:
        assert isinstance(grid, Float)
        values = np.asarray(grid.numbers(jnp.asarray(codes))).astype(dtype)
        arrays = {"qvalue": values, "scale": arranged(_whole_scale(q, scale))}
    wide = arrays["qvalue"]
    arrays["qvalue"] = np.asarray(layout.original(jnp.asarray(wide)))
    return arrays


def _dtype(grid: Any) -> str:
    if isinstance(grid, Uniform):
        return "int4" if grid.bits <= 4 else "int8"
    return _FLOATS[grid.format]


def _whole_scale(q: QTensor, scale: np.ndarray) -> np.ndarray:
    """The scale of each group as a float, with that of the tensor in it."""
    assert isinstance(q.grid, Float)
    if q.grid.scale in SCALE_DTYPES:
        return scale
    scale = scale.astype(np.float32)
    if "divisor" in q.params:
        scale = scale / np.asarray(read(q.params["divisor"]))
    return scale * np.asarray(read(q.params["tensor"])) if "tensor" in q.params else scale


def _arranged(q: QTensor, layout: Layout, leaf: np.ndarray) -> np.ndarray:
    """A parameter `[*batch, rows, n]` along the weight's own axes."""
    whole = leaf.shape[-2:] == (1, 1) and q.codes.shape[-2] > 1
    counts = _tiles(layout, q.groups, whole)
    if q.groups.axis == "out":
        leaf = np.swapaxes(leaf, -1, -2)
    sizes = tuple(
        tuple(f if f.role == "batch" else f._replace(size=counts[f.role, f.place]) for f in axis)
        for axis in layout.axes
    )
    small = Layout(sizes)
    rows = (*q.codes.shape[:-2], small.size("out"), small.size("in"))
    return np.asarray(small.original(jnp.asarray(np.broadcast_to(leaf, rows))))


def _tiles(layout: Layout, groups: Groups, whole: bool) -> Counts:
    """How many scales there are along each factor of the axes; FormatError: they are no tiles."""
    parts = {role: _of_role(layout, role) for role in ("out", "in")}
    counts: dict[Part, int] = {}
    for role, factors in parts.items():
        size = 1
        if whole or role == groups.axis:
            total = layout.size(role)  # type: ignore[arg-type]
            size = total if whole else groups.group(total)
        for factor in reversed(factors):
            if size % factor.size == 0:
                count, size = 1, size // factor.size
            elif factor.size % size == 0:
                count, size = factor.size // size, 1
            else:
                raise FormatError(f"{groups!r}, which are no tiles of axes of {_sizes(factors)}")
            counts[role, factor.place] = count
    for axis in layout.axes:
        _need_tiles(axis, counts, groups)
    return counts


def _need_tiles(axis: tuple[Factor, ...], counts: Counts, groups: Groups) -> None:
    """FormatError: equal scales along an axis of several factors are not those of neighbours."""
    full = True
    for factor in axis:
        size = factor.size
        count = size if factor.role == "batch" else counts[factor.role, factor.place]
        if not full and count > 1:
            raise FormatError(f"{groups!r}, which are no tiles of an axis of {_sizes(axis)}")
        full = full and count == size


def _of_role(layout: Layout, role: str) -> list[Factor]:
    factors = [factor for axis in layout.axes for factor in axis if factor.role == role]
    return sorted(factors, key=lambda factor: factor.place)


def _sizes(factors: Any) -> str:
    return " × ".join(str(factor.size) for factor in factors)
