"""Leaves that are read when they are needed: a shape, a dtype, and how to read a window of it.

A `Lazy` stands in a parameter tree where an array would stand. It is no pytree node, so it is a
leaf like any array, and nothing of it is in memory until it is indexed: `leaf[...]` reads all of
it, `leaf[2:3]` that window, and no other byte where the source can do so. What lies between a file
and a parameter (a transpose, a cast, dequantization, a check for NaN) happens on every read and is
kept nowhere. So a network larger than memory can be walked through leaf by leaf.

`read` treats all kinds of leaves alike; `realize` ends laziness for a whole tree.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from jquant.trees import placement

# What a reader is asked for: one slice per axis, with start, stop and no step.
Window = tuple[slice, ...]
Index = EllipsisType | int | slice | tuple[EllipsisType | int | slice, ...]


@dataclass(frozen=True, eq=False)
class Lazy:
    """An array that is read when it is indexed, and never kept.

    Attributes:
        shape, dtype: of the array.
        read: gives a window, as one `slice(start, stop)` per axis, in the array's dtype.
        identity: which bytes these are and what is done to them: two leaves of equal identity hold
            equal values, so a computation that is resumed can tell whether its inputs have changed.
        sharding: where `realize` and `quantize` put what they read, each process the windows that
            its devices hold; `jq.io.place(tree, shardings, lazy=True)` says it. None: as JAX does.

    Indexing takes integers and slices of step 1 along leading axes, and raises `IndexError` for
    anything else or out of range; a source that gives another shape or dtype than it promised
    raises `ValueError`. What a file's reader raises is its own matter (`CheckpointError`).

    Example:
        >>> table = np.arange(6.0).reshape(3, 2)
        >>> leaf = Lazy(table.shape, table.dtype, lambda window: table[window], "an example")
        >>> leaf
        Lazy(shape=(3, 2), dtype=dtype('float64'), identity='an example')
        >>> leaf[1:2].tolist(), leaf.T[0].tolist()
        ([[2.0, 3.0]], [0.0, 2.0, 4.0])
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Window], np.ndarray] = field(repr=False)
    identity: str
    sharding: Sharding | None = field(default=None, repr=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, once read."""
        return self.size * np.dtype(self.dtype).itemsize

    def __getitem__(self, index: Index) -> np.ndarray:
        window, kept = _window(self.shape, index)
        value = self.read(window)
        shape = tuple(w.stop - w.start for w in window)
        if value.shape != shape or value.dtype != self.dtype:
            raise ValueError(
                f"{self.identity}: promised {np.dtype(self.dtype).name} {shape}, "
                f"read {value.dtype.name} {value.shape}"
            )
        return value[kept]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a Lazy leaf holds no array, so reading it always makes one")
        return np.asarray(self[...], dtype)

    @property
    def T(self) -> Lazy:  # noqa: N802
        """The array with its axes reversed."""
        return Lazy(
            self.shape[::-1],
            self.dtype,
            lambda window: self[window[::-1]].T,
            f"{self.identity}, transposed",
        )

    @property
    def mT(self) -> Lazy:  # noqa: N802
        """The array with its last two axes exchanged, as in a stack of matrices."""
        *stacks, rows, columns = self.shape

        def read(window: Window) -> np.ndarray:
            *first, r, c = window
            return self[(*first, c, r)].swapaxes(-1, -2)

        return Lazy((*stacks, columns, rows), self.dtype, read, f"{self.identity}, transposed")

    def map(self, function: Callable[[np.ndarray], np.ndarray], dtype: Any, what: str) -> Lazy:
        """The array after an elementwise function of result type `dtype`, run on what is read.

        `what` names the function in the identity.

        Example:
            >>> leaf = Lazy((2,), np.dtype("int32"), np.arange(2, dtype="int32").__getitem__, "ab")
            >>> leaf.map(lambda a: a + 0.5, "float64", "and a half")[...].tolist()
            [0.5, 1.5]
        """
        return Lazy(
            self.shape,
            np.dtype(dtype),
            lambda window: function(self[window]),
            f"{self.identity}, {what}",
        )

    def astype(self, dtype: Any) -> Lazy:
        """The array cast to another dtype."""
        kind = np.dtype(dtype)
        if kind == self.dtype:
            return self
        return self.map(lambda value: value.astype(kind), kind, kind.name)


def stack(leaves: Sequence[Lazy]) -> Lazy:
    """Arrays of equal shape and dtype as one, along a new first axis.

    A window reads only the arrays it names, one after the other.

    Raises:
        ValueError: there are none, or they differ in shape or dtype.
    """
    kinds = {(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves}
    if len(kinds) != 1:
        raise ValueError(f"only arrays of one shape and dtype can be stacked, got {len(kinds)}")
    ((shape, dtype),) = kinds

    def read(window: Window) -> np.ndarray:
        first, *rest = window
        chosen = leaves[first]
        if len(chosen) == 1:  # nothing to gather: no second copy
            return chosen[0][tuple(rest)][None]
        out = np.empty((len(chosen), *(w.stop - w.start for w in rest)), dtype)
        for row, leaf in zip(out, chosen, strict=True):
            row[...] = leaf[tuple(rest)]
        return out

    return Lazy(
        (len(leaves), *shape), dtype, read, f"stack({'; '.join(leaf.identity for leaf in leaves)})"
    )


def is_lazy(leaf: object) -> bool:
    return isinstance(leaf, Lazy)


def read(leaf: Any, index: Index = ...) -> Any:
    """A window of any leaf, in memory: of a `Lazy`, a JAX or NumPy array, or a memory map.

    Args:
        leaf: what stands in the tree.
        index: integers and slices of step 1 along leading axes; `...` is all of it.

    Returns:
        a JAX array of a JAX array (one compiled program for all windows of a size) and of a `Lazy`
        with a sharding, lying on the devices of a mesh as the whole does, otherwise a NumPy array
        that is not backed by a file.

    Raises:
        IndexError: the index is out of range or of another kind.

    Example:
        >>> read(np.arange(6).reshape(3, 2), 1).tolist()
        [2, 3]
    """
    if isinstance(leaf, Lazy):
        return leaf[index] if leaf.sharding is None else _read_apart(leaf, index)
    if index is Ellipsis and isinstance(leaf, jax.Array):
        return leaf
    window, kept = _window(tuple(leaf.shape), index)
    if isinstance(leaf, jax.Array):
        return placement.window(leaf, window, kept)
    value = np.asarray(leaf)[window][kept]
    return np.array(value) if isinstance(leaf, np.memmap) else value


def _read_apart(leaf: Lazy, index: Index) -> Any:
    """A window of a leaf that is to lie on several devices; integers' axes are dropped there."""
    window, kept = _window(leaf.shape, index)
    shape = tuple(at.stop - at.start for at in window)
    sharding: Any = leaf.sharding
    entries = placement.entries_of(leaf)
    if entries is not None:  # axes that are cut lie everywhere
        pairs = zip(entries, shape, leaf.shape, strict=True)
        left = [entry if part == size else None for entry, part, size in pairs]
        sharding = NamedSharding(sharding.mesh, placement.fitting(sharding.mesh, left, shape))
    value = into_place(replace(leaf, sharding=None), sharding, window)
    integers = isinstance(value, jax.Array) and not all(isinstance(k, slice) for k in kept[:-1])
    return placement.window(value, [slice(0, n) for n in shape], kept) if integers else value


def into_place(leaf: Any, sharding: Sharding, window: Window | None = None) -> Any:
    """A leaf, or a window of it, on the devices of a sharding: of each only what lies there.

    An array of 64 bits that JAX would cut comes as a NumPy array.
    """
    window = window or tuple(slice(0, size) for size in leaf.shape)
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return read(leaf, window)
    shape = tuple(at.stop - at.start for at in window)
    parts: dict[Any, np.ndarray] = {}  # copies on several devices are read once

    def part(index: Any) -> np.ndarray:
        cuts = tuple(at.indices(size)[:2] for at, size in zip(index, shape, strict=True))
        if cuts not in parts:
            pairs = zip(cuts, window, strict=True)
            parts[cuts] = np.asarray(
                read(leaf, tuple(slice(a + at.start, b + at.start) for (a, b), at in pairs))
            )
        return parts[cuts]

    return jax.make_array_from_callback(shape, sharding, part)


def realize(tree: Any) -> Any:
    """Every `Lazy` leaf of a tree, also inside a `QTensor`, as an array; other leaves as they are.

    Arrays come as JAX arrays; 64-bit ones as NumPy arrays where JAX is not in its 64-bit mode,
    because it would cut them.

    Example:
        >>> leaf = Lazy((2,), np.dtype("int32"), np.arange(2, dtype="int32").__getitem__, "ab")
        >>> realize({"a": leaf})
        {'a': Array([0, 1], dtype=int32)}
    """

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, Lazy):
            return leaf
        if leaf.sharding is not None:
            return read(leaf)
        kept = jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype
        return jnp.asarray(leaf[...]) if kept else leaf[...]

    return jax.tree.map(whole, tree)


def span(shape: Sequence[int], window: Window) -> tuple[int, tuple[int, ...], Window]:
    """Where a window lies in a row-major array: the shortest run of elements that holds it.

    Returns:
        the run's first element, the run's shape, and the window within that shape.

    Example:
        >>> span((5, 4, 3), (slice(2, 3), slice(1, 3), slice(0, 2)))
        (27, (1, 2, 3), (slice(None, None, None), slice(None, None, None), slice(0, 2, None)))
    """
    sizes = [w.stop - w.start for w in window]
    axis = next((a for a, size in enumerate(sizes) if size != 1), len(sizes) - 1)
    first = sum(w.start * math.prod(shape[a + 1 :]) for a, w in enumerate(window[: axis + 1]))
    whole = (*sizes[: axis + 1], *shape[axis + 1 :])
    return first, whole, (*[slice(None)] * (axis + 1), *window[axis + 1 :])


def _window(shape: tuple[int, ...], index: Index) -> tuple[Window, tuple[Any, ...]]:
    """An index as one slice per axis, and what to index its result by to drop integers' axes."""
    entries = index if isinstance(index, tuple) else (index,)
    if entries and entries[-1] is Ellipsis:
        entries = entries[:-1]
    if len(entries) > len(shape):
        raise IndexError(f"{len(entries)} indices for the shape {shape}")
    window: list[slice] = []
    kept: list[Any] = []
    rest = [slice(None)] * (len(shape) - len(entries))
    for entry, size in zip((*entries, *rest), shape, strict=True):
        if isinstance(entry, slice):
            start, stop, step = entry.indices(size)
            if step != 1:
                raise IndexError(f"slices must have step 1, got {step}")
            window.append(slice(start, max(start, stop)))
            kept.append(slice(None))
            continue
        if not hasattr(entry, "__index__"):
            raise IndexError(f"expected integers and slices along leading axes, got {entry!r:.40}")
        at = operator.index(entry)  # type: ignore[arg-type]
        if not -size <= at < size:
            raise IndexError(f"index {at} is out of range for the shape {shape}")
        window.append(slice(at % size, at % size + 1))
        kept.append(0)
    return tuple(window), (*kept, ...)  # the dots keep an element an array
