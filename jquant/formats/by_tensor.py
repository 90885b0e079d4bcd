"""Weights whose arrays are tensors of their own: one for codes, one for scales, one for zeros.

So are those of compressed-tensors, GPTQ, AWQ and qwix. A row of a table names an array, the tensor
it lies in, and the steps from one to the other. Some formats write a tensor that the shape decides
(`weight_shape`); it is checked, and written again. So is one that says which group every input is
in (`g_idx`): where groups are no runs of neighbours, the columns of the codes are sorted by group.
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
    """The group of every input, int32: in order, or in any (desc_act, actorder: group)."""

    size: int | None
    tensor: str = "g_idx"
    tells_shape: bool = False
    refusal: str = "does not hold the groups of the inputs in order"

    def value(self, shape: Shape) -> np.ndarray:
        width = shape[1]
        return (np.arange(width) // Groups("in", self.size).group(width)).astype(np.int32)

    def order(self, index: np.ndarray, shape: Shape) -> np.ndarray | None:
        """The inputs group after group, int32 `[in]`; None where they lie so.

        Raises:
            CheckpointError: a group has another number of inputs than its size.
        """
        whole = self.value(shape)
        if np.array_equal(index, whole):
            return None
        order = np.argsort(index, kind="stable").astype(np.int32)
        if not np.array_equal(index[order], whole):
            raise CheckpointError(f"tensor {self.tensor!r} puts {_unlike(index, whole)}")
        return order


def _unlike(index: np.ndarray, whole: np.ndarray) -> str:
    """The first group of another size than it has, in words."""
    got, own = (dict(zip(*_counted(part), strict=True)) for part in (index, whole))
    group = next(group for group, count in got.items() if own.get(group, 0) != count)
    return (
        f"{got[group]} inputs into group {group}, which has {own.get(group, 0)}; inputs may be in "
        "any order (desc_act, actorder: group), but groups have one size"
    )


def _counted(index: np.ndarray) -> tuple[list[int], list[int]]:
    """The groups, and how many inputs are in each."""
    groups, counts = np.unique(index, return_counts=True)
    return groups.tolist(), counts.tolist()


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

    @property
    def index(self) -> GroupIndex | None:
        """Where the group of every input is said, if it is."""
        return next((told for told in self.told if isinstance(told, GroupIndex)), None)

    def order(self, tensors: Mapping[str, Any], shape: Shape) -> np.ndarray | None:
        """Which input every column of the codes is of; None where they are in order."""
        index = self.index
        return index and index.order(np.asarray(read(tensors[index.tensor])), shape)

    def read(self, name: str, tensors: Mapping[str, Any], shape: Shape) -> np.ndarray:
        row = next(row for row in self.rows if row.array == name)
        if name == "codes":
            for told in self.told:
                own = told is self.index or np.array_equal(tensors[told.tensor], told.value(shape))
                if not own:
                    raise CheckpointError(f"tensor {told.tensor!r} {told.refusal}")
        array, specs = tensors[row.tensor], self._specs(row, shape)
        steps = list(zip(row.steps, specs[1:], strict=True))
        try:
            for rowwise, run in itertools.groupby(steps, lambda pair: pair[0].by_rows):
                array = _read(array, list(run), rowwise)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {row.tensor!r} holds {error}") from error
        array = array.astype(row.dtype, copy=False)
        order = self.order(tensors, shape) if name == "codes" else None
        return array if order is None else array[:, order]

    def write(
        self, arrays: Mapping[str, np.ndarray], shape: Shape, order: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The tensors; `order`: which input every column of the codes is of."""
        tensors: dict[str, np.ndarray] = {}
        places = None if order is None else _places(order, shape)
        for row in self.rows:
            array, specs = arrays[row.array], self._specs(row, shape)
            if places is not None and row.array == "codes":
                array = plain(array)[:, places]
            steps = list(zip(row.steps, specs, strict=False))[::-1]
            try:
                for rowwise, run in itertools.groupby(steps, lambda pair: pair[0].by_rows):
                    array = _written(array, list(run), rowwise)
            except FormatError as error:
                raise FormatError(f"{row.array!r}: {error}") from error
            tensors[row.tensor] = contiguous(plain(array)).astype(specs[0].dtype, copy=False)
        told = {told.tensor: told.value(shape) for told in self.told}
        if places is not None and self.index is not None:
            told[self.index.tensor] = told[self.index.tensor][places]
        return tensors | told


def _places(order: np.ndarray, shape: Shape) -> np.ndarray:
    """Which column every input is in, of which input every column is of.

    Raises:
        FormatError: not every input is in one column.
    """
    if not np.array_equal(np.sort(order), np.arange(shape[1])):
        raise FormatError("the order of columns is no order of the inputs")
    return np.argsort(order)


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
