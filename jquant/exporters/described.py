"""What decides whether a format can hold a weight: known before there is one.

A format asks for the grid, the groups, the quantized inputs and the parts of a weight, and for its
size. A plan knows all of these before anything is rounded, a `QTensor` after; both are described
alike, so what a format refuses after quantizing it refuses before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.calibration.find import Weight
from jquant.errors import FormatError
from jquant.formats.base import Codec
from jquant.grids.base import Grid
from jquant.schemes.scheme import Scheme
from jquant.weights.activations import Activations
from jquant.weights.inputs import Inputs
from jquant.weights.qtensor import QTensor


@dataclass(frozen=True)
class Described:
    """One matrix `[out, in]` of a weight, or of a stack of them.

    Attributes:
        shape: `(out, in)`.
        grid, groups, inputs: as `Scheme` has them.
        parts: what else belongs to it, by the names of their classes.
        whole: whether one set of parameters is shared by the whole matrix.
        of_tensor: whether one number for the whole weight multiplies the scales of groups.
        layout: how its array is read as that matrix; None: it is that.
    """

    shape: tuple[int, int]
    grid: Grid
    groups: Groups
    inputs: Activations | None = None
    parts: tuple[str, ...] = ()
    whole: bool = False
    of_tensor: bool = False
    layout: Layout | None = field(default=None, compare=False)

    @staticmethod
    def of(q: QTensor) -> Described:
        """Of a quantized weight."""
        out, inner = q.codes.shape[-2:]
        scale = q.params.get("scale")
        whole = scale is not None and tuple(scale.shape[-2:]) == (1, 1) and out > 1
        parts = tuple(type(p).__name__ for p in q.parts if not isinstance(p, Inputs))
        choice = None if q.activations is None else q.activations.choice
        tensor = bool({"tensor", "divisor"} & set(q.params))
        layout = q.layout.trimmed(q.codes.ndim - 2)
        return Described((out, inner), q.grid, q.groups, choice, parts, whole, tensor, layout)

    @staticmethod
    def planned(weight: Weight, scheme: Scheme) -> Described:
        """Of a weight and what a plan has for it."""
        sizes = weight.split_shape
        shape = (_product(sizes, weight.out_axes), _product(sizes, weight.in_axes))
        own = (scheme.compensation, *scheme.transforms)
        parts = tuple(type(part).__name__ for part in own if part is not None)
        e4m3 = getattr(scheme.grid, "scale", None) == "e4m3"
        tensor = e4m3 and getattr(scheme.grid, "tensor_scale", True)
        return Described(
            shape, scheme.grid, scheme.grouping, scheme.activations, parts, of_tensor=tensor,
            layout=weight.layout,
        )  # fmt: skip

    def __str__(self) -> str:
        """As a scheme, with what differs from the usual."""
        words = [repr(self.grid)]
        if self.groups != Groups():
            plain = self.groups.axis == "in"
            words.append(str(self.groups.size) if plain else repr(self.groups))
        if self.inputs is not None:
            words.append(f"activations={self.inputs!r}")
        return f"Scheme({', '.join((*words, *self.parts))})"


class Holding(NamedTuple):
    """How a format holds a weight.

    Attributes:
        codec: of its tensors; None: it is held as the array it stands for.
        settings: what the format's configuration says of it; weights of equal ones are one kind.
        stored: the weight as the codec has it, from the weight: the same numbers.
        kind: what it is held as where there is no codec.
    """

    codec: Codec | None
    settings: Any = None
    stored: Callable[[QTensor], QTensor] = lambda q: q
    kind: str = "array"

    @property
    def name(self) -> str:
        """What weights are held as."""
        return self.kind if self.codec is None else self.codec.name


def need_alone(weight: Described) -> None:
    """FormatError: there is something besides codes and scales that no format of files has."""
    if weight.parts:
        raise FormatError(f"parts besides the codes ({', '.join(weight.parts)})")
    macro = getattr(weight.grid, "macro", None)
    if macro is not None:
        raise FormatError(f"mantissas that {macro} groups share (macro={macro})")


def along_inputs(weight: Described, most: int | None = None) -> Groups:
    """The groups nearest to a weight's that run along its inputs and divide them.

    Example:
        >>> from jquant.grids import Uniform
        >>> along_inputs(Described((8, 96), Uniform(4), Groups("out", 64)))
        Groups(axis='in', size=48)
    """
    size, width = weight.groups.size, weight.shape[1]
    if size is None or size >= width:
        return Groups()
    top = min(size, most or size)
    return Groups("in", next(k for k in range(top, 0, -1) if width % k == 0))


def alone(weight: Described, **changes: Any) -> Described:
    """The weight without parts besides its codes, and with these changes."""
    return replace(weight, parts=(), **changes)


def _product(sizes: tuple[int, ...], axes: tuple[int, ...]) -> int:
    product = 1
    for axis in axes:
        product *= sizes[axis]
    return product
