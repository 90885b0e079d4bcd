"""The formats of compressed-tensors (llm-compressor, vLLM), one function each.

    pack-quantized         integers of 2 to 8 bits, a dense stream of bits in int32 words
    int-quantized          integers of up to 8 bits, one int8 each
    float-quantized        E4M3 numbers
    nvfp4-pack-quantized   E2M1, an E4M3 scale per 16, a float32 number that divides all scales
    mxfp4-pack-quantized   E2M1, a power of two per 32

Scales belong to a `strategy`: a "group" of inputs, a "channel" (an output's inputs), a "tensor", or
a "block" of outputs and inputs. 3, 5, 6 and 7 bits are packed densely, as versions from 0.18 on do;
older ones left the rest of a word empty, and their files have other shapes. What a file says of the
inputs of products (`input_activations`) is not part of a weight. Checked against compressed-tensors
0.20.1.
"""

from __future__ import annotations

from typing import Literal

from jquant.axes.groups import Groups
from jquant.errors import FormatError
from jquant.formats.base import Codec
from jquant.formats.by_tensor import ByTensor, GroupIndex, Row, Size, WeightShape
from jquant.formats.steps import (
    Patterns,
    Repeated,
    Shifted,
    Single,
    Step,
    Stream,
    Transposed,
    Viewed,
)
from jquant.grids import Float, Grid, Uniform, code_dtype

Strategy = Literal["group", "channel", "tensor"]
SCALE_DTYPES = ("float32", "float16", "bfloat16")


def pack_quantized(
    bits: int = 4,
    *,
    strategy: Strategy = "group",
    group: int | None = 128,
    symmetric: bool = True,
    scale_dtype: str = "bfloat16",
    index: bool = False,
) -> Codec:
    """The codec of `pack-quantized`: `weight_packed`, `weight_scale`, `weight_shape`, and of
    asymmetric weights `weight_zero_point`.

    Args:
        bits: 2 to 8.
        strategy: whose scales there are.
        group: inputs that share a scale, for "group" alone.
        symmetric: whether there are no zero points.
        scale_dtype: "float32", "float16" or "bfloat16".
        index: whether there is a tensor `weight_g_idx`, of groups of one size in any order.

    Raises:
        FormatError: an argument is out of its set, or they contradict each other.

    Example:
        >>> specs = pack_quantized(3, group=32).storage.tensors((2, 64))
        >>> str(specs["weight_packed"])  # 64 codes of 3 bits in 6 words
        'int32 (2, 6)'
    """
    grid = _uniform(bits, symmetric, scale_dtype)
    groups, sizes = _groups(strategy, group)
    dtype = code_dtype(grid).name
    low, high = grid.codes
    steps: tuple[Step, ...] = (Stream(bits),)
    if symmetric:
        steps += (Shifted(low, "uint8", low, high),)
    rows = [Row("codes", "weight_packed", ("out", "in"), dtype, steps), _scale(sizes, scale_dtype)]
    if not symmetric:
        if strategy == "tensor":  # alone stored as it is
            zero: tuple[Step, ...] = (Single(), Shifted((high + 1) // 2, "int8", low, high))
        else:
            zero = (Transposed(), Stream(bits), Transposed())
        rows.append(Row("zero", "weight_zero_point", sizes, dtype, zero))
    told = (WeightShape(), *((GroupIndex(group, "weight_g_idx"),) if index else ()))
    return _codec("pack-quantized", grid, groups, rows, told=told)


def int_quantized(
    bits: int = 8,
    *,
    strategy: Strategy = "channel",
    group: int | None = None,
    symmetric: bool = True,
    scale_dtype: str = "bfloat16",
) -> Codec:
    """The codec of `int-quantized`: `weight` (int8), `weight_scale`, and of asymmetric weights
    `weight_zero_point` (int8). Arguments as for `pack_quantized`.

    Example:
        >>> import numpy as np
        >>> q = int_quantized().decode({
        ...     "weight": np.array([[1, -2]], np.int8),
        ...     "weight_scale": np.ones((1, 1), "bfloat16")})
        >>> q.codes.tolist(), q.grid.symmetric
        ([[1, -2]], True)
    """
    grid = _uniform(bits, symmetric, scale_dtype)
    groups, sizes = _groups(strategy, group)
    low, high = grid.codes
    step = Shifted(0 if symmetric else (high + 1) // 2, "int8", low, high)
    dtype = code_dtype(grid).name
    rows = [Row("codes", "weight", ("out", "in"), dtype, (step,)), _scale(sizes, scale_dtype)]
    if not symmetric:
        zero = (Single(), step) if strategy == "tensor" else (step,)
        rows.append(Row("zero", "weight_zero_point", sizes, dtype, zero))
    return _codec("int-quantized", grid, groups, rows)


def float_quantized(
    *,
    strategy: Strategy | Literal["block"] = "channel",
    group: int | None = None,
    block: tuple[int, int] | None = None,
    scale_dtype: str = "bfloat16",
) -> Codec:
    """The codec of `float-quantized`: `weight` (E4M3) and `weight_scale`.

    Args:
        strategy: whose scales there are.
        group: inputs that share a scale, for "group" alone.
        block: outputs and inputs that share a scale, for "block" alone; the last ones may be fewer.
        scale_dtype: "float32", "float16" or "bfloat16".

    Raises:
        FormatError: an argument is out of its set, or they contradict each other.

    Example:
        >>> import jquant as jq, numpy as np
        >>> q = float_quantized(strategy="tensor", scale_dtype="float32").decode({
        ...     "weight": np.array([[448.0, -1.0]], "float8_e4m3fn"),
        ...     "weight_scale": np.array([0.5], np.float32)})
        >>> jq.dequantize(q).tolist()
        [[224.0, -0.5]]
    """
    _one_of("scale_dtype", scale_dtype, SCALE_DTYPES)
    if (strategy == "block") != (block is not None):
        raise FormatError(f"strategy={strategy!r} with block={block}; block= is for 'block' alone")
    grid = Float(4, 3, scale=scale_dtype, negative_zero=True)
    codes = Row("codes", "weight", ("out", "in"), "int8", (Viewed("float8_e4m3fn"), Patterns(grid)))
    if block is not None:
        rows, columns = (_positive("block", size) for size in block)
        scale = Row("scale", "weight_scale", ("out", "groups"), scale_dtype, (Repeated(rows),))
        groups = Groups("in", columns)
        return _codec("float-quantized", grid, groups, [codes, scale], ragged=True)
    groups, sizes = _groups(strategy, group)
    return _codec("float-quantized", grid, groups, [codes, _scale(sizes, scale_dtype)])


def nvfp4_pack_quantized() -> Codec:
    """The codec of `nvfp4-pack-quantized`: `weight_packed` (uint8, the first of two numbers in the
    low half), `weight_scale` (E4M3), `weight_global_scale` (float32, a divisor).

    Example:
        >>> nvfp4_pack_quantized().grid.bits, nvfp4_pack_quantized().groups.size
        (4, 16)
    """
    grid = Float(2, 1, scale="e4m3", group=16, negative_zero=True)
    scale = Row("scale", "weight_scale", ("out", "groups"), "float8_e4m3fn")
    whole = Row("divisor", "weight_global_scale", ("one", "one"), "float32", (Single(),))
    return _codec("nvfp4-pack-quantized", grid, Groups("in", 16), [_fp4(grid), scale, whole])


def mxfp4_pack_quantized() -> Codec:
    """The codec of `mxfp4-pack-quantized`: `weight_packed` (as NVFP4's) and `weight_scale` (uint8,
    the exponent of a power of two, 127 for one).

    Example:
        >>> mxfp4_pack_quantized().grid.scale, mxfp4_pack_quantized().groups.size
        ('e8m0', 32)
    """
    grid = Float(2, 1, scale="e8m0", group=32, negative_zero=True)
    powers = Row("scale", "weight_scale", ("out", "groups"), "float8_e8m0fnu", (Viewed("uint8"),))
    return _codec("mxfp4-pack-quantized", grid, Groups("in", 32), [_fp4(grid), powers])


def _fp4(grid: Float) -> Row:
    steps = (Stream(4, "uint8"), Patterns(grid))
    return Row("codes", "weight_packed", ("out", "in"), "int4", steps)


def _scale(sizes: tuple[Size, Size], dtype: str) -> Row:
    steps = (Single(),) if sizes == ("one", "one") else ()
    return Row("scale", "weight_scale", sizes, dtype, steps)


def _codec(
    name: str, grid: Grid, groups: Groups, rows: list[Row], **options: bool | tuple
) -> Codec:
    return Codec(name, grid, groups, ByTensor(tuple(rows), groups, **options))  # type: ignore[arg-type]


def _uniform(bits: int, symmetric: bool, scale_dtype: str) -> Uniform:
    _one_of("scale_dtype", scale_dtype, SCALE_DTYPES)
    _one_of("bits", bits, tuple(range(2, 9)))
    return Uniform(bits, symmetric=symmetric, scale_dtype=scale_dtype)


def _groups(strategy: str, group: int | None) -> tuple[Groups, tuple[Size, Size]]:
    """The groups of a strategy, and the sizes of its scales."""
    _one_of("strategy", strategy, ("group", "channel", "tensor"))
    if (strategy == "group") != (group is not None):
        raise FormatError(f"strategy={strategy!r} with group={group}; group= is for 'group' alone")
    if group is not None:
        return Groups("in", _positive("group", group)), ("out", "groups")
    return Groups(), ("out", "one") if strategy == "channel" else ("one", "one")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise FormatError(f"{name}={value!r}; one of {allowed} can be stored")


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(f"{name} must be made of positive ints, got {value!r}")
    return value
