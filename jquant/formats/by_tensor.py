"""Weights whose arrays are tensors of their own: one for codes, one for scales, one for zeros.

So are those of compressed-tensors, GPTQ, AWQ and qwix. A row of a table names an array, the tensor
it lies in, and the steps from one to the other. Some formats write a tensor that the shape decides
(`weight_shape`, `g_idx`); it is checked, and written again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from jquant.axes.groups import Groups
from jquant.errors import CheckpointError, FormatError
from jquant.formats.base import Shape, Spec, plain
from jquant.formats.rows import by_rows, contiguous
from jquant.formats.steps import Step
from jquant.trees.lazy import read

Size = Literal["out", "in", "groups", "one"]


@dataclass(frozen=True)
class Row:
    """An array of a weight and the tensor it lies in.

    Attributes:
        array: "codes" or the name of a parameter.
        tensor: its name.
        sizes: the array's axes.
        dtype: the array's.
        steps: from the tensor to the array.
    """

    array: str
    tensor: str
    sizes: tuple[Size, Size]
    dtype: str
    steps: tuple[Step, ...] = ()


class Told(Protocol):
    """A tensor that the shape of the weight decides."""

    @property
    def tensor(self) -> str: ...

    @property
    def tells_shape(self) -> bool: ...

    def value(self, shape: Shape) -> np.ndarray: ...

    @property
    def refusal(self) -> str: ...


@dataclass(frozen=True)
class WeightShape:
    """The shape itself, int64."""

    tensor: str = "weight_shape"
    tells_shape: bool = True
    refusal: str = "does not hold two sizes"

    def value(self, shape: Shape) -> np.ndarray:
        return np.array(shape, np.int64)


@dataclass(frozen=True)
class GroupIndex:
    """The group of every input, in order."""

    size: int | None
    tensor: str = "g_idx"
    tells_shape: bool = False
    refusal: str = (
        "puts inputs into groups that are not runs of neighbours (desc_act, actorder: group); a "
        "QTensor has no such groups. Quantize without it, or save the model with sorted columns"
    )

    def value(self, shape: Shape) -> np.ndarray:
        width = shape[1]
        return (np.arange(width) // Groups("in", self.size).group(width)).astype(np.int32)


@dataclass(frozen=True)
class ByTensor:
    """A storage of rows; see the module. `ragged`: the last group of a row may be shorter."""

    rows: tuple[Row, ...]
    groups: Groups
    told: tuple[Told, ...] = ()
    ragged: bool = False

    def shape(self, tensors: Mapping[str, Any]) -> Shape:
        for told in self.told:
            if told.tells_shape:
                return self._said(told, np.asarray(read(tensors[told.tensor])))
        row = next(row for row in self.rows if row.array == "codes")
        shape = tuple(tensors[row.tensor].shape)
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"tensor {row.tensor!r} has the shape {shape}; expected a matrix")
        for step in row.steps:
            shape = step.given(shape)
        out, width = shape
        return out, width

    def _said(self, told: Told, value: np.ndarray) -> Shape:
        good = value.shape == (2,) and value.dtype == np.int64 and (value > 0).all()
        if not good or (value > 2**31).any():
            raise CheckpointError(f"tensor {told.tensor!r} {told.refusal}")
        return int(value[0]), int(value[1])

    def arrays(self, shape: Shape) -> dict[str, Spec]:
        return {row.array: self._spec(row, shape) for row in self.rows}

    def _spec(self, row: Row, shape: Shape) -> Spec:
        out, width = shape
        sizes = {"out": out, "in": width, "groups": self.groups.count(width), "one": 1}
        return Spec(tuple(sizes[size] for size in row.sizes), np.dtype(row.dtype))

    def _specs(self, row: Row, shape: Shape) -> list[Spec]:
        """What stands before each step, and behind the last one."""
        specs = [self._spec(row, shape)]
        for step in reversed(row.steps):
            specs.insert(0, step.stored(specs[0]))
        return specs

    def tensors(self, shape: Shape) -> dict[str, Spec]:
        specs = {row.tensor: self._specs(row, shape)[0] for row in self.rows}
        for told in self.told:
            value = told.value(shape)
            specs[told.tensor] = Spec(value.shape, value.dtype)
        return specs

    def read(self, name: str, tensors: Mapping[str, Any], shape: Shape) -> np.ndarray:
        row = next(row for row in self.rows if row.array == name)
        if name == "codes":
            for told in self.told:
                if not np.array_equal(tensors[told.tensor], told.value(shape)):
                    raise CheckpointError(f"tensor {told.tensor!r} {told.refusal}")
        array, specs = tensors[row.tensor], self._specs(row, shape)
        steps = list(zip(row.steps, specs[1:], strict=True))
        try:
            for rowwise, run in itertools.groupby(steps, lambda pair: pair[0].by_rows):
                array = _read(array, list(run), rowwise)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {row.tensor!r} holds {error}") from error
        return array.astype(row.dtype, copy=False)

    def write(self, arrays: Mapping[str, np.ndarray], shape: Shape) -> dict[str, np.ndarray]:
        tensors: dict[str, np.ndarray] = {}
        for row in self.rows:
            array, specs = arrays[row.array], self._specs(row, shape)
            steps = list(zip(row.steps, specs, strict=False))[::-1]
            try:
                for rowwise, run in itertools.groupby(steps, lambda pair: pair[0].by_rows):
                    array = _written(array, list(run), rowwise)
            except FormatError as error:
                raise FormatError(f"{row.array!r}: {error}") from error
            tensors[row.tensor] = contiguous(plain(array)).astype(specs[0].dtype, copy=False)
        return tensors | {told.tensor: told.value(shape) for told in self.told}


Run = list[tuple[Step, Spec]]  # steps in a row, each with the shape and dtype of its result


def _read(array: np.ndarray, run: Run, rowwise: bool) -> np.ndarray:
    """An array after steps, all of them rowwise or none."""

    def after(rows: np.ndarray) -> np.ndarray:
        for step, spec in run:
            whole = spec._replace(shape=(len(rows), *spec.shape[1:])) if rowwise else spec
            rows = step.read(rows, whole)
        return rows

    return by_rows(after, array, _room(run[-1][1])) if rowwise else after(array)


def _written(array: np.ndarray, run: Run, rowwise: bool) -> np.ndarray:
    """An array before steps, all of them rowwise or none."""

    def before(rows: np.ndarray) -> np.ndarray:
        rows = plain(rows)
        for step, _ in run:
            rows = step.write(rows)
        return rows

    return by_rows(before, array, _room(run[-1][1])) if rowwise else before(array)


def _room(spec: Spec) -> np.ndarray:
    return np.empty(spec.shape, spec.dtype)
