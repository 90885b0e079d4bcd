"""How a weight lies on a mesh while it is rounded: its rows over all devices, each row as a whole.

Given the factor of the inputs' second moment, rows of a weight (its outputs) are rounded without
each other, and in a row every column waits for those before it. So a weight that is spread along
its inputs (FSDP) or lies everywhere would be rounded by every device as a whole; spread by rows,
each device has an n-th of the work, and nothing is sent. What comes out goes back to where the
weight was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Array

from jquant.axes.layout import Layout
from jquant.learning.descend import is_learned
from jquant.schemes.scheme import Scheme
from jquant.trees.placement import Entry, entries_of, put


def over_rows(w: Array, scheme: Scheme, layout: Layout) -> Array:
    """The weight, its rows over as many devices of its mesh as divide them.

    Batch axes (experts, layers) stay as they lie. A weight on no mesh comes back as it is; so does
    one whose groups run along rows, and one that is learned, whose rows are descended together.
    """
    entries = entries_of(w)
    if entries is None or w.sharding.mesh.size == 1:  # type: ignore[attr-defined]
        return w
    if scheme.grouping.axis != "in" or is_learned(scheme):
        return w
    sizes = w.sharding.mesh.shape  # type: ignore[attr-defined]
    *batch, rows, _ = layout.canonical_marks(entries)
    taken = {name for entry in batch for name in names_of(entry)}
    free = [name for name in dict.fromkeys((*names_of(rows), *sizes)) if name not in taken]
    chosen = _dividing(free, sizes, _first_rows(w, layout))
    marks = layout.original_marks([*batch, tuple(chosen) or None, None])
    return put(w, w.sharding.mesh, marks)  # type: ignore[attr-defined]


def _dividing(names: Sequence[str], sizes: Mapping[str, int], length: int) -> list[str]:
    """The mesh axes, from the first on, whose devices together divide a length."""
    chosen: list[str] = []
    for name in names:
        if length % math.prod(sizes[n] for n in (*chosen, name)) == 0:
            chosen.append(name)
    return chosen


def names_of(entry: Entry) -> tuple[str, ...]:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _first_rows(w: Array, layout: Layout) -> int:
    """The size of the axis that rows begin with, which is the one that can be spread."""
    marks = layout.original_marks([*[None] * layout.batch_rank, True, None])
    return next((size for size, mark in zip(w.shape, marks, strict=True) if mark), 1)
