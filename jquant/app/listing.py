"""What a checkpoint holds, as a table: from its header, without reading its arrays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jquant.app.console import megabytes
from jquant.io import Header, Stored


def listing(path: Path, header: Header, every: bool) -> Table:
    """A line for every array, or for every kind of array; bytes, and bits of each number."""
    rows: dict[tuple[str, ...], list[Any]] = {}
    for name, leaf in header.leaves.items():
        rows.setdefault((name if every else "", *_kind(leaf)), []).append(leaf)
    table = Table(
        title=f"{path}: format {header.version}, {len(header.leaves)} arrays, "
        f"{megabytes(header.file_bytes)}"
    )
    table.add_column("path" if every else "arrays", overflow="fold")
    for column in ("shape", "dtype", "grid", "groups", "bytes", "bits each"):
        table.add_column(column, justify="right" if column in ("bytes", "bits each") else "left")
    for (name, *kind), leaves in rows.items():
        size = sum(leaf.bytes for leaf in leaves)
        weights = sum(int(np.prod(leaf.shape)) for leaf in leaves)
        bits = f"{8 * size / weights:.2f}" if weights else "–"
        table.add_row(name or str(len(leaves)), *kind, megabytes(size), bits)
    return table


def _kind(leaf: Stored) -> tuple[str, ...]:
    """The columns of a leaf that those of its kind share: shape, dtype, grid and groups."""
    grid = "–" if leaf.grid is None else _short(leaf.grid)
    grid += f" + rank {leaf.rank}" if leaf.rank else ""
    groups = "–" if leaf.groups is None else f"{leaf.groups.axis} {leaf.groups.size or 'all'}"
    return "×".join(map(str, leaf.shape)) or "scalar", leaf.dtype, grid, groups


def _short(choice: Any) -> str:
    """A frozen dataclass without the fields that have their default."""
    fields = [f for f in dataclasses.fields(choice) if getattr(choice, f.name) != f.default]
    changed = ", ".join(f"{f.name}={getattr(choice, f.name)!r}" for f in fields)
    return f"{type(choice).__name__}({changed})"
