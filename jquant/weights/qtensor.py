"""A quantized weight as one pytree leaf group: codes, group parameters, how to read them.

`QTensor` holds integer codes `[*batch, out, in]` in the narrowest JAX type (XLA packs int2 and int4
on every backend; `nbytes` does not know), and the grid's parameters per group. Static: the grid,
the groups, the layout that leads back to the original array, and the dtype it had. None of them
stores a batch size, so a `QTensor` may be sliced by `scan`, `vmap` or `jax.tree.map(lambda a: a[0],
q)`. Codes of 2 bits are joined by `packed.joined` and never as they are. A weight with a low-rank
`compensation` stands for the sum of both; its factors have the same batch axes, so they are sliced
along. How the inputs of its products are quantized is not part of what it stands for, but stays
with it (`Inputs`). Both are parts of the weight (`parts.py`), and there may be more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.tree_util import GetAttrKey
from jaxtyping import Array, Float, Integer

from jquant import deprecated
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.grids.base import Grid, GridParams
from jquant.grids.grouped import Grouped
from jquant.numerics.distortion import bits_per_weight
from jquant.numerics.narrow import as_dtype
from jquant.trees.placement import automatic, entries_of, fitting, typed
from jquant.weights.inputs import Inputs
from jquant.weights.parts import Part
from jquant.weights.refusal import no_array

_CHILDREN = ("codes", "params", "compensation", "activations")


@deprecated.keywords("QTensor")
@no_array
@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class QTensor:
    """A weight on a grid. `shape`, `ndim` and `dtype` are those of the array it stands for.

    A `QTensor` used as an array raises `QuantizedWeightError`, a `TypeError`: `apply` runs a
    function on it, `dequantize` gives the array.

    Attributes:
        codes: `[*batch, out, in]`, in the narrowest integer dtype that holds the grid's codes.
        params: the grid's parameters, leaves `[*batch, rows, n]` or `[*batch, rows, n, k]`: n
            groups in each of the rows, which are `out` for groups along "in", else `in`.
        grid, groups, layout: how values, groups and the array's own axes are made of these.
        dtype: of the array.
        compensation: a low-rank term that is added to the values, or None.
        activations: how the inputs of its products are quantized, or None.
        transforms: other parts of the weight, in the order in which they were taken off.
    """

    codes: Integer[Array, "*batch out in"]
    params: GridParams
    grid: Grid = field(metadata={"static": True})
    groups: Groups = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    compensation: LowRank | None = None
    activations: Inputs | None = None
    transforms: tuple[Part, ...] = ()  # in the order in which they were taken off the weight

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that belongs to the weight besides its codes, innermost first."""
        own = (self.activations, self.compensation)
        return (*(part for part in own if part is not None), *reversed(self.transforms))

    def only(self, kept: Callable[[Part], bool]) -> QTensor:
        """The weight with those of its parts that are to be kept."""

        def of(part: Any) -> Any:
            return part if part is not None and kept(part) else None

        return replace(
            self,
            compensation=of(self.compensation),
            activations=of(self.activations),
            transforms=tuple(filter(kept, self.transforms)),
        )

    # A pytree of its arrays and parts. A transform more is a child more.

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children = [(GetAttrKey(name), getattr(self, name)) for name in _CHILDREN]
        children += [(GetAttrKey(f"transforms_{k}"), t) for k, t in enumerate(self.transforms)]
        return children, (self.grid, self.groups, self.layout, self.dtype)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: Sequence[Any]) -> QTensor:
        codes, params, compensation, activations, *transforms = children
        grid, groups, layout, dtype = static
        parts = compensation, activations, tuple(transforms)
        return cls(codes, params, grid, groups, layout, dtype, *parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape(self.codes.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return self.codes.size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A term `left @ right` of a weight in the canonical view, `[*batch, out, in]`.

    Attributes:
        left: `[*batch, out, rank]`, a float array or a `QTensor` that stands for one.
        right: `[*batch, rank, in]`, likewise.
    """

    left: Float[Array, "*batch out rank"] | QTensor
    right: Float[Array, "*batch rank in"] | QTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.float32)

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def alters(self) -> bool:
        return False

    def factors(self) -> tuple[Float[Array, "*batch out rank"], Float[Array, "*batch rank in"]]:
        """Both factors as float32 arrays."""
        left, right = (
            dequantize_weight(factor) if isinstance(factor, QTensor) else factor
            for factor in (self.left, self.right)
        )
        return left.astype(jnp.float32), right.astype(jnp.float32)

    def product(self) -> Float[Array, "*batch out in"]:
        """The whole term, float32."""
        return jnp.matmul(*self.factors(), precision=lax.Precision.HIGHEST)

    def weight(self, values: Float[Array, "*batch out in"]) -> Float[Array, "*batch out in"]:
        return values + self.product()

    def rows(self, x: Float[Array, "*batch tokens in"]) -> Float[Array, "*batch tokens in"]:
        return x

    def picked(self, pick: Callable[[Array], Array]) -> Part:
        left, right = self.factors()
        return LowRank(pick(left), right)

    def array_bits(self) -> list[float]:
        return [bits for factor in (self.left, self.right) for bits in array_bits(factor)]

    def check(self, whole: QTensor | None) -> None:
        """Raise if the factors have no product, or one that is not the weight's size."""
        for factor in (self.left, self.right):
            if not isinstance(factor, jax.ShapeDtypeStruct | QTensor):
                raise TypeError("a factor must be an array or a weight")
            if isinstance(factor, QTensor) and (factor.parts or factor.shape != factor.codes.shape):
                raise ValueError("a quantized factor must lie as it is used")
            if not jnp.issubdtype(factor.dtype, jnp.floating):
                raise TypeError("factors must be floats")
        left, right = self.left.shape, self.right.shape
        if len(left) < 2 or left[:-2] != right[:-2] or left[-1] != right[-2]:
            raise ValueError(f"factors {left} and {right} have no product")
        if whole is not None and tuple(self.shape) != tuple(whole.codes.shape):
            raise ValueError(f"its compensation does not fit codes {whole.codes.shape}")


def is_qtensor(leaf: object) -> bool:
    return isinstance(leaf, QTensor)


def tree_map_weights(function: Callable[[Any], Any], tree: Any) -> Any:
    """`jax.tree.map` in which a `QTensor` is one leaf."""
    return jax.tree.map(function, tree, is_leaf=is_qtensor)


def canonical_weight(q: QTensor) -> Float[Array, "*batch out in"]:
    """The array a `QTensor` stands for in its canonical view, float32."""
    values = Grouped(q.grid, q.groups).decode(q.codes, q.params)
    for part in q.parts:
        values = part.weight(values)
    return values


def dequantize_weight(q: QTensor) -> Float[Array, ...]:
    """The array a `QTensor` stands for, in its original shape and dtype, and finite in that.

    It lies as the codes do.
    """

    def decoded(q: QTensor) -> Array:
        return as_dtype(q.layout.original(canonical_weight(q)), q.dtype)

    return automatic(decoded, q, out=type_of(q).sharding)


def type_of(q: QTensor) -> jax.ShapeDtypeStruct:
    """The type of the array a `QTensor` stands for."""
    sharding = typed(q.codes)
    if sharding is not None:
        layout, entries = q.layout.trimmed(q.codes.ndim - 2), entries_of(q.codes)
        marks = layout.original_marks(entries or ())
        sharding = NamedSharding(sharding.mesh, fitting(sharding.mesh, marks, q.shape))
    return jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=sharding)


def placed(q: QTensor, like: Any) -> QTensor:
    """The quantized weight on the devices of the array it stands for, spread as that is.

    Axes of codes and group parameters are, where the mesh divides them; the rest lies everywhere.
    Nothing moves where the array is on no mesh.
    """
    entries = entries_of(like)
    return q if entries is None else jax.tree.map(jax.device_put, q, shardings_of(q, like.sharding))


def shardings_of(q: QTensor, sharding: NamedSharding) -> Any:
    """For every array of a quantized weight, where it lies if the weight is to lie so.

    Axes of codes and group parameters are spread as those of the weight, where the mesh divides
    them; the rest lies everywhere. Arrays may be lazy, or described only.
    """
    mesh, rank = sharding.mesh, len(q.shape)
    entries = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    *batch, rows, inner = q.layout.canonical_marks(entries)
    groups = (rows, inner) if q.groups.axis == "in" else (inner, rows)

    def as_marked(marks: Sequence[Any]) -> Callable[[Any], NamedSharding]:
        return lambda leaf: NamedSharding(mesh, fitting(mesh, marks, leaf.shape))

    everywhere = jax.tree.map(as_marked(()), replace(q, codes=None, params=None))
    return replace(
        everywhere,
        codes=as_marked((*batch, rows, inner))(q.codes),
        params=jax.tree.map(as_marked((*batch, *groups)), q.params),
    )


def dequantize(qparams: Any) -> Any:
    """The pytree with an array in place of every `QTensor`; other leaves are left as they are.

    The arrays say nothing of quantized inputs: `fn(dequantize(qparams), x)` takes x in full
    precision, where `apply(fn)(qparams, x)` rounds what enters the weights that ask for it.

    Example:
        >>> import jquant as jq
        >>> params = {"w": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4), "b": jnp.zeros(4)}
        >>> fn = lambda p, x: x @ p["w"] + p["b"]
        >>> weights = jq.find_weights(fn, params, jnp.ones((2, 8)))
        >>> plan = jq.plan(weights, {".*": jq.Scheme(jq.grids.Uniform(8))})
        >>> qparams, _ = jq.quantize(fn, params, plan)
        >>> float(jnp.abs(dequantize(qparams)["w"] - params["w"]).max()) < 0.01
        True
    """
    return tree_map_weights(
        lambda leaf: dequantize_weight(leaf) if is_qtensor(leaf) else leaf, qparams
    )


def weight_bits(q: QTensor) -> float:
    """Stored bits per weight: codes, group parameters, and all parts (factors of a compensation,
    static ranges of inputs).

    Works on all that has shapes and dtypes.

    Example:
        >>> from jquant.grids import Uniform
        >>> layout = Layout.of((4, 8), in_axes=(1,))
        >>> params = {"scale": jnp.ones((4, 1), jnp.float16)}
        >>> low = LowRank(jnp.ones((4, 1), jnp.float16), jnp.ones((1, 8), jnp.float16))
        >>> q = QTensor(jnp.zeros((4, 8), jnp.int4), params, Uniform(4, True), Groups(), layout,
        ...             jnp.dtype("float32"), low)
        >>> weight_bits(q)  # 4, a float16 for 8 of them, 12 float16 for 32 of them
        12.0
    """
    parts = sum(bits for part in q.parts for bits in part.array_bits())
    return bits_per_weight(q.codes, q.params, q.grid.bits) + parts / q.size


def factor_bits(low: LowRank) -> float:
    """Stored bits of both factors."""
    return sum(
        weight_bits(f) * f.size if isinstance(f, QTensor) else f.size * jnp.finfo(f.dtype).bits
        for f in (low.left, low.right)
    )


def array_bits(stored: QTensor | Array) -> list[float]:
    """Stored bits of every array of a quantized weight, or of a factor; codes first."""
    if not isinstance(stored, QTensor):
        return [float(stored.size * jnp.finfo(stored.dtype).bits)]
    own = [float(stored.codes.size * stored.grid.bits)]
    for name in stored.params:
        alone = replace(stored.only(lambda part: False), params={name: stored.params[name]})
        own.append(weight_bits(alone) * stored.size - own[0])
    return own + [bits for part in stored.parts for bits in part.array_bits()]


def weight_bytes(q: QTensor) -> int:
    """Bytes that a checkpoint takes for a quantized weight: each array is a stream of its own.

    Works on all that has shapes and dtypes.

    Example:
        >>> from jquant.grids import Uniform
        >>> params = {"scale": jnp.ones((1, 1), jnp.float16)}
        >>> q = QTensor(jnp.zeros((1, 3), jnp.int4), params, Uniform(3, True), Groups(),
        ...             Layout.of((1, 3), in_axes=(1,)), jnp.dtype("float32"))
        >>> weight_bytes(q)  # 9 bits of codes, 16 of the scale
        4
    """
    return sum(math.ceil(round(bits, 3) / 8) for bits in array_bits(q))
