"""The formats of GPTQ and of AWQ: unsigned codes, zero points, float16 scales.

Both keep a weight transposed, `[in, out]`. GPTQ (GPTQModel, AutoGPTQ) packs codes along the inputs
and zero points along the outputs; its version 1 stores zero points less one. A whole word is
lessened at once there, so that the least zero point takes one from its neighbour; read as GPTQModel
reads it, every pattern has its zero points and is written again as it was. AWQ packs both along the
outputs, eight in a word in an order of its own. Checked against GPTQModel 7.2.0.
"""

from __future__ import annotations

from typing import Literal

from jquant.axes.groups import Groups
from jquant.errors import FormatError
from jquant.formats.base import Codec
from jquant.formats.by_tensor import ByTensor, GroupIndex, Row
from jquant.formats.steps import OneLess, Ordered, Step, Stream, Transposed
from jquant.grids import Uniform, code_dtype

BITS = (2, 3, 4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(
    bits: int = 4,
    *,
    group: int | None = 128,
    version: Literal[1, 2] = 1,
    index: bool = True,
) -> Codec:
    """The codec of GPTQ: `qweight`, `qzeros`, `scales`, `g_idx`.

    Args:
        bits: 2, 3, 4 or 8.
        group: inputs that share a scale; None: all of them.
        version: 1 (`checkpoint_format: "gptq"`) or 2 ("gptq_v2").
        index: whether there is a tensor `g_idx`.

    Raises:
        FormatError: an argument is out of its set.

    A `g_idx` may put the inputs into groups in any order (`desc_act`), all of them of one size.

    Example:
        >>> {name: str(spec) for name, spec in gptq(group=32).storage.tensors((64, 32)).items()}
        {'qweight': 'int32 (4, 64)', 'qzeros': 'int32 (1, 8)', 'scales': 'float16 (1, 64)', \
'g_idx': 'int32 (32,)'}
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise FormatError(f"bits={bits!r}; GPTQ packs {BITS}")
    if version not in (1, 2):
        raise FormatError(f"version={version!r}; GPTQ has 1 and 2")
    grid, groups = Uniform(bits, scale_dtype="float16"), _groups(group)
    dtype = code_dtype(grid).name
    zeros: tuple[Step, ...] = (Stream(bits), Transposed())
    if version == 1:  # fields of three bits lie across words
        together = 32 % bits == 0
        less = OneLess(bits, together)
        zeros = (less, *zeros) if together else (zeros[0], less, zeros[1])
    rows = (
        Row("codes", "qweight", ("out", "in"), dtype, (Transposed(), Stream(bits))),
        Row("zero", "qzeros", ("out", "groups"), dtype, zeros),
        Row("scale", "scales", ("out", "groups"), "float16", (Transposed(),)),
    )
    told = (GroupIndex(group),) if index else ()
    return Codec(f"GPTQ v{version}", grid, groups, ByTensor(rows, groups, told, ragged=True))


def awq(*, group: int | None = 128) -> Codec:
    """The codec of AWQ's GEMM layout, 4 bits: `qweight`, `qzeros`, `scales`.

    Args:
        group: inputs that share a scale; None: all of them.

    Raises:
        FormatError: it is no size.

    Example:
        >>> import numpy as np
        >>> words, zeros = np.full((2, 1), 0x10, np.int32), np.zeros((1, 1), np.int32)
        >>> tensors = {"qweight": words, "qzeros": zeros, "scales": np.ones((1, 8), np.float16)}
        >>> awq(group=None).decode(tensors).codes.tolist()[:3]
        [[0, 0], [0, 0], [1, 1]]
    """
    grid, groups = Uniform(4, convention="A2", scale_dtype="float16"), _groups(group)
    steps = (Stream(4), Ordered(AWQ_ORDER), Transposed())
    rows = (
        Row("codes", "qweight", ("out", "in"), "uint4", steps),
        Row("zero", "qzeros", ("out", "groups"), "uint4", steps),
        Row("scale", "scales", ("out", "groups"), "float16", (Transposed(),)),
    )
    return Codec("AWQ", grid, groups, ByTensor(rows, groups))


def _groups(group: int | None) -> Groups:
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise FormatError(f"group={group!r}; a positive number of inputs, or None for all of them")
    return Groups("in", group)
