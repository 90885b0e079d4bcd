"""The canonical view of a weight, `[*batch, out, in]`, cut into groups `[*, rows, n, g]`.

`Groups` says which weights share one set of grid parameters; `to_groups` and `from_groups` cut and
join, ragged last group included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


@jax.tree_util.register_static
@dataclass(frozen=True)
class Groups:
    """Runs of weights along one axis that share grid parameters; the last may be shorter.

    Args:
        axis: "in" (default), the usual groups within an output channel, or "out", groups within an
            input channel (the per-IC grouping of AdaDim, Heo et al. 2023).
        size: how many weights a group has; None (default): the whole axis.

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> Groups("in", 128).count(300)
        3
    """

    axis: Literal["in", "out"] = "in"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.axis not in ("in", "out"):
            raise ValueError(f"Groups.axis must be 'in' or 'out', got {self.axis!r}")
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"Groups.size must be a positive int or None, got {self.size!r}")

    @property
    def papers(self) -> tuple[str, ...]:
        return ("heo2024adadim",) if self.axis == "out" else ()

    def group(self, length: int) -> int:
        """The group size on an axis of `length` weights."""
        return length if self.size is None else min(self.size, length)

    def count(self, length: int) -> int:
        """How many groups an axis of `length` weights has."""
        return -(-length // self.group(length))


def to_groups(
    canonical: Shaped[Array, "*batch out in"], groups: Groups
) -> Shaped[Array, "*batch rows n g"]:
    """Cut `[*batch, out, in]` into groups; a ragged last group is padded with its last weight.

    Rows are the other axis: `out` for groups along `in`, and `in` for groups along `out`. Repeating
    the last weight leaves a group's minimum and maximum as they are.
    """
    rows = canonical if groups.axis == "in" else jnp.swapaxes(canonical, -1, -2)
    length = rows.shape[-1]
    size, count = groups.group(length), groups.count(length)
    if size * count != length:
        pad = [(0, 0)] * (rows.ndim - 1) + [(0, size * count - length)]
        rows = jnp.pad(rows, pad, mode="edge")
    return rows.reshape(*rows.shape[:-1], count, size)


def from_groups(
    grouped: Shaped[Array, "*batch rows n g"], groups: Groups, length: int
) -> Shaped[Array, "*batch out in"]:
    """The inverse of `to_groups`; `length` is the size of the grouped axis without padding."""
    rows = grouped.reshape(*grouped.shape[:-2], -1)[..., :length]
    return rows if groups.axis == "in" else jnp.swapaxes(rows, -1, -2)
