"""Values that depend on no input, and what is known of them.

A `Tagged` array is computed from parameters and constants alone, so it is one and the same for all
inputs. What it owes to weights is told by its origins: one for a weight or a view of it, several
where weights were added or joined, none for a constant. A function then contracts the *effective*
weight with an input, and every origin that is not broken says which axes of which parameter that
input meets. Elementwise operations on the way leave axes as they are: they are noted
(`Origin.through`), but for multiplication by one common factor, which a grid's scales follow.

Two kinds of values that do depend on inputs are tagged too: `dependent` ones, rows or matrices that
data has picked from a weight, and `uniform` dependent ones, a single number in the shape of others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from jquant.axes.origin import GONE, Origin


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Tagged:
    """An array and what is known of it. As a pytree it has one leaf, so control flow slices it.

    Attributes:
        array: the array.
        origins: the weights, or products of parameters, that it stands for; none of a constant.
        reach: the numbers of other uses of weights that went into it (see `pending.py`): they count
            if it meets an input.
        dependent: whether it depends on inputs after all.
        uniform: whether all its elements are one number.
        pick: of matrices that data has picked from a stack, the number by which the observer knows
            them (see `picks.py`); None of anything else, also of what is made of them.
    """

    array: Array
    origins: tuple[Origin, ...] = field(default=(), metadata={"static": True})
    reach: tuple[int, ...] = field(default=(), metadata={"static": True})
    dependent: bool = field(default=False, metadata={"static": True})
    uniform: bool = field(default=False, metadata={"static": True})
    pick: int | None = field(default=None, metadata={"static": True})

    @staticmethod
    def of(path: str, array: Array) -> Tagged:
        """A leaf of the parameters; a vector or an empty one is a constant like others."""
        weight = array.ndim > 1 and array.size > 0
        return Tagged(array, (Origin.of(path, array.shape),) if weight else ())

    @property
    def good(self) -> tuple[Origin, ...]:
        """The origins that are still views."""
        return tuple(origin for origin in self.origins if origin.broken is None)

    @property
    def lost(self) -> tuple[Origin, ...]:
        """Those of weights that it has no view of any more."""
        seen = [origin for origin in self.good if origin.product is None]
        broken = (origin for origin in self.origins if origin.broken is not None)
        return tuple(o for o in broken if not any(map(o.overlaps, seen)))

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(origin.path for origin in self.origins if origin.product is None)


def constant(value: Any, kind: Any, walker: Any) -> Any:
    """What a walker puts in place of an array that stands in the program."""
    del kind, walker
    return Tagged(jnp.asarray(value)) if isinstance(value, jax.Array) or jnp.ndim(value) else value


def is_key(leaf: Any) -> bool:
    """Whether an input is a key of random numbers: what is made of it is noise, not data."""
    raw = leaf.dtype == jnp.uint32 and leaf.shape == (2,)
    return raw or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def array_of(value: Any) -> Any:
    return value.array if isinstance(value, Tagged) else value


def is_independent(atom: Any, value: Any) -> bool:
    """Whether an operand is the same for all inputs."""
    if isinstance(value, Tagged):
        return not value.dependent
    return isinstance(atom, core.Literal) or not isinstance(value, jax.Array)


def is_uniform(value: Any) -> bool:
    if isinstance(value, Tagged):
        return value.uniform or value.array.size == 1
    return jnp.size(value) == 1


def settled(origins: Iterable[Origin], reach: Iterable[int]) -> tuple[Any, tuple[int, ...]]:
    """Origins without broken products, which are among the uses that went into the value."""
    origins, reach = tuple(origins), set(reach)
    lost = {o.product for o in origins if o.product is not None and o.broken is not None}
    kept = tuple(o for o in origins if o.product not in lost or o.broken is None)
    return kept, tuple(sorted(reach | {number for number in lost if number is not None}))


def changed(value: Tagged, array: Array, origins: Iterable[Origin | None], name: str) -> Tagged:
    """A value that `name` has made an array of; an origin that is None was broken by it."""
    after = [
        old.break_at(name) if new is None else new
        for old, new in zip(value.origins, origins, strict=True)
        if new is not GONE
    ]
    kept, reach = settled(after, value.reach)
    return replace(value, array=array, origins=kept, reach=reach, pick=None)


def fitted(value: Tagged, shape: tuple[int, ...]) -> Tagged:
    """An operand whose axes of size 1 an elementwise operation stretches to `shape`."""
    if value.array.shape == shape or value.array.ndim != len(shape):
        return value
    rank = len(shape)
    origins = [o.broadcast(rank, shape, range(rank)) if not o.broken else o for o in value.origins]
    return replace(
        changed(value, value.array, origins, "broadcast_in_dim"), uniform=is_uniform(value)
    )
