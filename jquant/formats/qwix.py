"""The arrays of qwix (`QArray`), for a kernel `[in, out]`: `qvalue`, `scale`, `zero_point`.

Values are `(qvalue - zero_point) * scale`, with scales of tiles along the inputs, `[in / tile,
out]`. A `QArray` of integers goes both ways; zero points are of the codes' own type. Checked
against qwix 0.1.8.
"""

from __future__ import annotations

from jquant.axes.groups import Groups
from jquant.errors import FormatError
from jquant.formats.base import Codec
from jquant.formats.by_tensor import ByTensor, Row
from jquant.formats.steps import Shifted, Transposed
from jquant.grids import Uniform, code_dtype

QTYPES = {"int2": 2, "int4": 4, "int8": 8}


def qarray(
    qtype: str = "int8",
    *,
    tile: int | None = None,
    symmetric: bool = True,
    scale_dtype: str = "float32",
) -> Codec:
    """The codec of a `QArray` of a kernel `[in, out]`; tensors are named as its fields.

    Args:
        qtype: "int2", "int4" or "int8", the dtype of `qvalue`.
        tile: inputs that share a scale; None: all of them.
        symmetric: whether there is no `zero_point`.
        scale_dtype: "float32", "float16" or "bfloat16".

    Raises:
        FormatError: an argument is out of its set.

    Example:
        >>> import numpy as np
        >>> values, scale = np.array([[1], [-2]], np.int8), np.ones((1, 1), np.float32)
        >>> qarray().decode({"qvalue": values, "scale": scale}).codes.tolist()
        [[1, -2]]
    """
    if qtype not in QTYPES:
        raise FormatError(f"qtype={qtype!r}; one of {tuple(QTYPES)} has a codec")
    bits = QTYPES[qtype]
    try:
        grid = Uniform(bits, symmetric=symmetric, scale_dtype=scale_dtype)
        groups = Groups("in", tile)
    except ValueError as error:
        raise FormatError(str(error)) from error
    low, high = grid.codes
    dtype = code_dtype(grid).name
    steps = (Transposed(), Shifted(0 if symmetric else (high + 1) // 2, qtype, low, high))
    rows = [
        Row("codes", "qvalue", ("out", "in"), dtype, steps),
        Row("scale", "scale", ("out", "groups"), scale_dtype, (Transposed(),)),
    ]
    if not symmetric:
        rows.append(Row("zero", "zero_point", ("out", "groups"), dtype, steps))
    return Codec("qwix", grid, groups, ByTensor(tuple(rows), groups))
