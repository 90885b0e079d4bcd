"""What a codec is: the tensors of one weight as a `QTensor` and back, bit for bit.

A checkpoint that is quantized already holds, for every weight, tensors of packed codes, scales and
zero points. `Codec.decode` makes a `QTensor` of them that stands for the very numbers that the file
means: codes and parameters are carried over, nothing is rounded. `Codec.encode` is its inverse, so
the two in a row are the identity on bytes. What differs between formats is a grid, the groups, and
a `Storage`: where the bits of each array of a weight lie. Everything here is NumPy and has no
state. Weights are `[out, in]`, as checkpoints have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.errors import CheckpointError, FormatError
from jquant.grids import GGUF, Affine, Float, Grid, Uniform
from jquant.io.leaves import within
from jquant.numerics.packed import whole_bytes
from jquant.trees.lazy import Lazy, Window, read
from jquant.weights.columns import Columns
from jquant.weights.inputs import Inputs
from jquant.weights.qtensor import QTensor

Shape = tuple[int, int]  # (out, in)


class Spec(NamedTuple):
    """The shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype.name} {self.shape}"


class Storage(Protocol):
    """Where the arrays of a weight lie in its tensors. Arrays are `codes` and the parameters."""

    def shape(self, tensors: Mapping[str, Any]) -> Shape:
        """The weight's, told by the tensors' shapes or what they say. KeyError: one is missing."""
        ...

    def tensors(self, shape: Shape) -> dict[str, Spec]:
        """The tensors that a weight of this shape has."""
        ...

    def arrays(self, shape: Shape) -> dict[str, Spec]:
        """The arrays that a weight of this shape has."""
        ...

    def read(self, name: str, tensors: Mapping[str, Any], shape: Shape) -> np.ndarray:
        """One array, from tensors that are as `tensors(shape)` has them.

        Raises:
            CheckpointError: their bits are none of an array.
        """
        ...

    def write(self, arrays: Mapping[str, np.ndarray], shape: Shape) -> dict[str, np.ndarray]:
        """The tensors of arrays that are as `arrays(shape)` has them.

        Raises:
            FormatError: the format has no bits for their values.
        """
        ...


@dataclass(frozen=True)
class Codec:
    """A format of quantized weights, both ways.

    Attributes:
        name: of the format.
        grid: the weights it holds are on.
        groups: which weights share parameters.
        storage: see `Storage`.

    Example:
        >>> from jquant import formats
        >>> codec = formats.gguf("Q4_1")
        >>> blocks = np.arange(40, dtype=np.uint8).reshape(1, 40)  # 20 bytes for 32 weights
        >>> q = codec.decode({"weight": blocks})
        >>> q.shape, q.grid, q.params["scale"].dtype.name
        ((1, 64), GGUF(kind='Q4_1'), 'float16')
        >>> bool((codec.encode(q)["weight"] == blocks).all())
        True
    """

    name: str
    grid: Grid
    groups: Groups
    storage: Storage

    def decode(self, tensors: Mapping[str, Any], dtype: Any = jnp.float32) -> QTensor:
        """The weight of its tensors.

        Args:
            tensors: by the names that the format gives them (`weight_packed`, `qweight`, …); of
                GGUF, `weight`, uint8 `[out, bytes]`. Arrays or `Lazy`.
            dtype: of the array that the weight stands for.

        Returns:
            a weight `[out, in]` with arrays in memory. Where the groups of inputs are no runs of
            neighbours, its codes are sorted by group, and `Columns` says so.

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape or dtype than it
                must be; groups do not divide the weight; scales are NaN or infinite, or codes none
                of the grid.
        """
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[...]), self.lazy(tensors, dtype))

    def lazy(self, tensors: Mapping[str, Any], dtype: Any = jnp.float32) -> QTensor:
        """The same with a `Lazy` for every array, which reads the tensors it lies in.

        Names, shapes and dtypes are checked now, values when they are read.
        """
        shape = self._checked(tensors)
        identity = "; ".join(getattr(t, "identity", name) for name, t in tensors.items())

        def array(name: str, spec: Spec) -> Lazy:
            def values(window: Window) -> np.ndarray:
                whole = self.storage.read(name, _WhenNeeded(tensors), shape)
                if jnp.issubdtype(spec.dtype, jnp.floating) and not np.isfinite(whole).all():
                    raise CheckpointError(f"{name!r} holds NaN or infinity")
                return whole[window]

            return Lazy(spec.shape, spec.dtype, values, f"{identity}: {self.name}, {name}")

        arrays = {name: array(name, spec) for name, spec in self.storage.arrays(shape).items()}
        layout = Layout.of(shape, in_axes=(1,))
        codes: Any = arrays.pop("codes")
        params: Any = arrays
        q = QTensor(codes, params, self.grid, self.groups, layout, jnp.dtype(dtype))
        order = getattr(self.storage, "order", lambda *_: None)(tensors, shape)
        if order is None:
            return q
        where = f"{identity}: {self.name}, order"
        columns: Any = Lazy(order.shape, order.dtype, lambda window: order[window], where)
        return replace(q, transforms=(Columns(columns),))

    def encode(self, q: QTensor) -> dict[str, np.ndarray]:
        """The tensors of a weight: the inverse of `decode`.

        Raises:
            FormatError: the format cannot hold the weight: another grid, other groups, an array of
                another dtype, codes it has no bits for, batch axes, or parts besides its codes.
        """
        self._check_held(q)
        shape: Any = tuple(q.codes.shape)
        arrays = {"codes": q.codes, **q.params}
        specs = self.storage.arrays(shape)
        if set(arrays) != set(specs):
            raise self._refusal(f"the arrays {sorted(arrays)}", f"{sorted(specs)}")
        for name, spec in specs.items():
            got = Spec(tuple(arrays[name].shape), np.dtype(arrays[name].dtype))
            if got != spec:
                raise self._refusal(f"{name!r} as {got}", f"{spec}")
        held = {name: np.asarray(read(array)) for name, array in arrays.items()}
        if not within(held["codes"], self.grid.codes):
            raise self._refusal("codes outside their grid", f"{self.grid.codes}")
        order = self._order(q)
        more: Any = {} if order is None else {"order": np.asarray(read(order))}
        return self.storage.write(held, shape, **more)

    def _checked(self, tensors: Mapping[str, Any]) -> Shape:
        """The shape of the weight of these tensors, if they are what it has."""
        try:
            shape = self.storage.shape(tensors)
        except KeyError as error:
            raise CheckpointError(f"tensor {error} is missing, of {self.name}") from None
        size = self.groups.size
        if size is not None and shape[1] % size and self._is_whole:
            raise CheckpointError(f"{shape[1]} inputs; {self.name} has groups of {size}")
        expected = self.storage.tensors(shape)
        for name, spec in expected.items():
            if name not in tensors:
                raise CheckpointError(f"tensor {name!r} is missing, of {self.name}")
            got = Spec(tuple(tensors[name].shape), np.dtype(tensors[name].dtype))
            if got != spec:
                raise CheckpointError(
                    f"tensor {name!r} is {got}; of a weight {shape} in {self.name} it is {spec}"
                )
        if left := sorted(set(tensors) - set(expected)):
            raise CheckpointError(f"tensor {left[0]!r} is none of {self.name}: {list(expected)}")
        return shape

    @property
    def _is_whole(self) -> bool:
        """Whether the last group of a row has to be a whole one."""
        return not getattr(self.storage, "ragged", False)

    def _check_held(self, q: QTensor) -> None:
        # How inputs are quantized is said elsewhere in a checkpoint, if it is.
        parts = [p for p in q.parts if not isinstance(p, Inputs)]
        if parts and self._order(q) is None:
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise self._refusal(f"parts besides the codes ({kinds})", "codes and parameters alone")
        if q.codes.ndim != 2 or len(q.shape) != 2:
            raise self._refusal(
                f"an array {q.shape} with codes {q.codes.shape}",
                "one matrix; encode the layers of a stack one by one",
            )
        if formula(q.grid) != formula(self.grid):
            raise self._refusal(f"{q.grid}", f"{self.grid}")
        width = q.codes.shape[1]
        own, theirs = (g.group(width) for g in (self.groups, q.groups))
        if q.groups.axis != "in" or own != theirs or (width % own and self._is_whole):
            raise self._refusal(f"{q.groups} of {width} inputs", f"groups of {own}")

    def _order(self, q: QTensor) -> Any:
        """The order of the weight's columns, if it has no other part and the format has a place."""
        parts = [part for part in q.parts if not isinstance(part, Inputs)]
        if len(parts) != 1 or getattr(self.storage, "index", None) is None:
            return None
        return parts[0].order if isinstance(parts[0], Columns) else None

    def _refusal(self, got: str, holds: str) -> FormatError:
        return FormatError(f"{self.name} cannot hold {got}; it holds {holds}")


class _WhenNeeded(Mapping[str, np.ndarray]):
    """Tensors that are read when they are asked for: an array needs few of its weight's."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(read(self.tensors[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def formula(grid: Grid) -> tuple[Any, ...]:
    """What decides how a grid's codes are decoded; two that differ elsewhere hold the same weights.

    Example:
        >>> formula(Uniform(4)) == formula(Uniform(4, convention="A2"))
        True
        >>> formula(Uniform(4)) == formula(Uniform(4, convention="A4"))
        False
        >>> formula(Uniform(4, True)) == formula(Uniform(4, True, "S5"))
        False
    """
    if isinstance(grid, GGUF):
        plain = grid.row.scale_codes is None and not grid.row.has_offset
        if not plain:
            return GGUF, grid.kind
        grid = Uniform(grid.bits, symmetric=True, scale_dtype="float16")
    if isinstance(grid, Uniform):
        whole = grid.convention not in ("A3", "A4", "S5")
        return Uniform, grid.bits, grid.symmetric, grid.scale_dtype, whole
    if isinstance(grid, Affine):
        return Affine, grid.bits, grid.scale_dtype
    if isinstance(grid, Float):
        return Float, grid.format, grid.scale, grid.macro
    return (grid,)


def plain(array: np.ndarray) -> np.ndarray:
    """Integers of less than a byte in whole bytes; other arrays as they are."""
    return array.astype(whole_bytes(array.dtype)) if array.dtype.name.startswith(_SMALL) else array


_SMALL = ("int2", "int4", "uint2", "uint4")
