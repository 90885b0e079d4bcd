"""Where arrays lie on the devices of a mesh, and who has a say in it.

On explicit axes (what `jax.make_mesh` makes by default) a sharding is part of an array's type, and
an operation whose result could lie in more than one way is an error. The function to be quantized
is written for that, and its operations are evaluated as they stand. What jquant computes besides,
sums over tokens or a sweep over columns, nobody could annotate: it runs on the same axes made
automatic, by `automatic` while a program is traced and by `at_ease` on arrays. Results are put
where they belong: evidence everywhere, codes where the weight was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

P = ParamSpec("P")
R = TypeVar("R")
Entry = str | tuple[str, ...] | None  # the mesh axes that an axis of an array is spread over


def typed(x: Any) -> NamedSharding | None:
    """The sharding that is part of the type of an array, a tracer or a shape; None: none is."""
    # A tracer's own attribute raises, with a message that looks for the operations that it came
    # through: of a deep network that took most of the time of tracing.
    traced = isinstance(x, Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    return sharding if named and AxisType.Explicit in sharding.mesh.axis_types else None


def like(x: Any) -> jax.ShapeDtypeStruct:
    """The type of an array, a number, or anything else that has a shape and a dtype."""
    plain = isinstance(x, np.ndarray) or not hasattr(x, "dtype")
    dtype = jnp.result_type(x) if plain else x.dtype
    return jax.ShapeDtypeStruct(np.shape(x), dtype, sharding=typed(x))


def sliced(x: Any, axes: Collection[int]) -> jax.ShapeDtypeStruct:
    """The type of one slice of an array along some axes, which stay with size 1."""
    shape = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    entries = entries_of(x)
    if entries is None:
        return jax.ShapeDtypeStruct(shape, x.dtype)
    left = (None if k in axes else entry for k, entry in enumerate(entries))
    return jax.ShapeDtypeStruct(
        shape, x.dtype, sharding=NamedSharding(x.sharding.mesh, Spec(*left))
    )


def automatic(
    function: Callable[..., Any], *operands: Any, out: NamedSharding | None = None
) -> Any:
    """`function(*operands)` on automatic axes; results lie as `out` says, or everywhere.

    What `function` closes over must be results of such a call, or on no mesh.
    """
    sharding = next(filter(None, map(typed, jax.tree.leaves(operands))), None)
    if sharding is None:
        return function(*operands)
    out = out or NamedSharding(sharding.mesh, Spec())
    if isinstance(sharding.mesh, Mesh):
        return jax.device_put(at_ease(function, *operands), out)
    return jax.sharding.auto_axes(function, out_sharding=out)(*operands)


def at_ease(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)` on arrays, on automatic axes; results stay on these."""
    sharding = next(filter(None, map(typed, jax.tree.leaves(operands))), None)
    if sharding is None:
        return function(*operands)
    with jax.set_mesh(_eased(sharding.mesh)):  # type: ignore[arg-type]
        return function(*jax.tree.map(_ease, operands))


def _eased(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _ease(x: Any) -> Any:
    sharding = typed(x)
    if sharding is None:
        return x
    return jax.device_put(x, NamedSharding(_eased(sharding.mesh), sharding.spec))  # type: ignore[arg-type]


def transferring(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose work is to carry numbers between host and devices.

    `jax.transfer_guard("disallow")` finds transfers that nobody meant; these are meant.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.transfer_guard("allow"):
            return function(*args, **kwargs)

    return call


def put(x: jax.Array, mesh: Any, entries: Sequence[Entry]) -> jax.Array:
    """The array spread over a mesh; an axis that the mesh does not divide lies everywhere."""
    return jax.device_put(x, NamedSharding(mesh, fitting(mesh, entries, x.shape)))


def fitting(mesh: Any, entries: Sequence[Entry], shape: Sequence[int]) -> Spec:
    """The entries that divide their axes."""

    def parts(entry: Entry) -> int:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return math.prod(mesh.shape[name] for name in names)

    pairs = zip(entries, shape, strict=False)
    return Spec(*(entry if size % parts(entry) == 0 else None for entry, size in pairs))


def entries_of(x: Any) -> list[Entry] | None:
    """For each axis, the mesh axes that it is spread over; None where there is no mesh."""
    sharding = typed(x) if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    entries = list(sharding.spec)
    return entries + [None] * (len(x.shape) - len(entries))


def window(leaf: jax.Array, index: Sequence[slice], kept: Sequence[Any]) -> jax.Array:
    """`leaf[index][kept]`; axes that are taken as a whole stay as they lie."""
    value = at_ease(lambda x: x[tuple(index)][tuple(kept)], leaf)
    entries = entries_of(leaf)
    if entries is None:
        return value
    left = [
        entry if cut.stop - cut.start == size else None
        for entry, cut, one, size in zip(entries, index, kept, leaf.shape, strict=False)
        if isinstance(one, slice)
    ]
    return put(value, leaf.sharding.mesh, left)  # type: ignore[attr-defined]
