"""Where the axes of a weight's array lie at a product, and what it sees of the other operand.

`dot_general`, convolutions and `ragged_dot` are one thing to a weight: each axis of its array is
contracted with an axis of the other operand (in), runs along with one (batch), or is left in the
result (out). A `Contraction` says so once, from an equation's dimension numbers. A convolution is
brought down to that by its patches, with an axis for every axis of the kernel that is contracted;
groups of channels are batch axes. With the weight's `Origin` follow how it is read (`Reading`) and
how its rows are arranged (`Arrangement`): what calibration asks. With the `Layout` of a quantized
weight follows the `Product` of rows and codes (`dimensions.py`): what `apply` asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.axes.layout import Role
from jquant.axes.origin import Origin
from jquant.axes.roles import Kind, Reading
from jquant.axes.rows import Arrangement, Share

Pairs = tuple[tuple[int, ...], tuple[int, ...]]


class UnreadableError(Exception):
    """A weight meets its input in a way that its rows cannot be told from; says why."""


def seen_from(slot: int, pairs: Pairs) -> Pairs:
    """Dimensions that meet, those of the operand in `slot` first."""
    return (pairs[1], pairs[0]) if slot else pairs


class Patches(NamedTuple):
    """What a convolution's kernel sees of its input at every position; static.

    `sizes` are those of a patch: channels of a group, then the window.
    """

    sizes: tuple[int, ...]
    groups: int
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilations: tuple[tuple[int, ...], tuple[int, ...]]  # of the input, of the kernel
    numbers: lax.ConvDimensionNumbers

    @property
    def feature(self) -> int:
        """The axis of the convolution's result that holds its channels; the others are tokens."""
        return self.numbers.out_spec[1]

    def of(self, x: jax.Array) -> jax.Array:
        """The patches of an input, `[positions, groups, channels, *window]`."""
        patches = lax.conv_general_dilated_patches(
            x, self.sizes[1:], self.strides, self.padding, *self.dilations,
            dimension_numbers=self.numbers, precision=lax.Precision.HIGHEST,
        )  # fmt: skip
        return jnp.moveaxis(patches, self.feature, -1).reshape(-1, self.groups, *self.sizes)


class Contraction(NamedTuple):
    """How a weight's array is contracted with another operand; static and hashable.

    Attributes:
        kind: of the operation.
        shape: of the weight's array. Where a convolution's channels are grouped, the array is read
            with one axis more: the groups apart from the output channels of each.
        roles: of its axes.
        meets: for each axis, the axis of the other operand that it meets; None: it meets none.
        operand: the shape of the other operand, as the weight sees it.
        patches: what the weight sees of a convolution's input; None: the operand itself.
        along: the batch axes of a `dot_general`, in the order in which its result has them.

    Example:
        >>> eqn = jax.make_jaxpr(jnp.matmul)(jnp.ones((5, 3)), jnp.ones((3, 2))).eqns[0]
        >>> contraction = Contraction.of(eqn, 1)
        >>> contraction.roles, contraction.meets, contraction.operand
        (('in', 'out'), (1, None), (5, 3))
    """

    kind: Kind
    shape: tuple[int, ...]
    roles: tuple[Role, ...]
    meets: tuple[int | None, ...]
    operand: tuple[int, ...]
    patches: Patches | None = None
    along: tuple[int, ...] = ()

    @staticmethod
    def of(eqn: core.JaxprEqn, slot: int) -> Contraction:
        """The contraction that an equation is to its operand number `slot`.

        Raises:
            UnreadableError: the operand meets the other one in another way than a weight does.
            KeyError: the equation is no product (`PRODUCTS`).
        """
        return _RULES[eqn.primitive.name](eqn, slot)

    @staticmethod
    def dot(
        shape: Sequence[int], operand: Sequence[int], contract: Pairs, batch: Pairs
    ) -> Contraction:
        """Of `dot_general`; the dimensions that meet are (the weight's, the other operand's)."""
        roles: dict[int, Role] = dict.fromkeys(contract[0], "in")
        roles |= dict.fromkeys(batch[0], "batch")
        meets = dict(zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True))
        dims = range(len(shape))
        return Contraction(
            "dot", tuple(shape), tuple(roles.get(k, "out") for k in dims),
            tuple(map(meets.get, dims)), tuple(operand), along=tuple(batch[0]),
        )  # fmt: skip

    def pairs(self, axes: Iterable[int]) -> tuple[tuple[int, int], ...]:
        """Some axes, each with the axis of the other operand that it meets."""
        met = ((axis, self.meets[axis]) for axis in axes)
        return tuple((axis, there) for axis, there in met if there is not None)

    @property
    def summed(self) -> list[int]:
        """The axes of the other operand that are contracted."""
        return [there for _, there in self.pairs(self.contracted)]

    @property
    def contracted(self) -> list[int]:
        """The axes that are contracted."""
        return [axis for axis, role in enumerate(self.roles) if role == "in"]

    def split(self, origin: Origin, shape: Sequence[int]) -> Origin:
        """The origin of an array of `shape`, with the axes that the array is read with.

        Raises:
            UnreadableError: groups do not lie in the array as they do in the weight.
        """
        if self.kind == "dot" or "batch" not in self.roles:
            return origin
        groups, rank = self.roles.index("batch"), len(shape)
        parts, joined = origin.own(rank)[groups], origin.own_offsets(rank)[groups] is not None
        if self.kind == "ragged_dot":
            if joined or any(part.axis < 0 or part.reversed for part in parts):
                raise UnreadableError("its groups were repeated, reversed or joined")
            return origin
        plain = not joined and len(parts) == 1 and parts[0].whole
        after = origin.reshape(shape, self.shape) if plain else None
        if after is None:
            raise UnreadableError("a grouped kernel was reshaped, sliced or joined")
        return after

    def reading(self, origin: Origin) -> Reading:
        """How the weight with this origin is read.

        Raises:
            UnreadableError: it lies in an order there that is not known.
        """
        reading = Reading.of(self.kind, origin, self.roles)
        if reading is None:
            raise UnreadableError(
                "it was indexed along an axis that is contracted, or that inputs or a loop go along"
            )
        return reading

    def arrangement(self, origin: Origin) -> Arrangement:
        """How the other operand, as it is seen, is rows of the weight with this origin."""
        rank = len(self.shape)
        axes = zip(self.roles, origin.own(rank), origin.own_offsets(rank), strict=True)
        shares = {
            there: Share(*axis)
            for there, axis in zip(self.meets, axes, strict=True)
            if there is not None
        }
        return Arrangement.of(self.operand, shares)

    def seen(self, x: jax.Array) -> jax.Array:
        """What the weight sees of the other operand, of shape `operand`."""
        return x if self.patches is None else self.patches.of(x)


def _shapes(eqn: core.JaxprEqn) -> list[tuple[int, ...]]:
    avals: list[Any] = [atom.aval for atom in eqn.invars]
    return [tuple(aval.shape) for aval in avals]


def _dot(eqn: core.JaxprEqn, slot: int) -> Contraction:
    contract, batch = eqn.params["dimension_numbers"]
    shapes = _shapes(eqn)
    return Contraction.dot(
        shapes[slot], shapes[1 - slot], seen_from(slot, contract), seen_from(slot, batch)
    )


def _conv(eqn: core.JaxprEqn, slot: int) -> Contraction:
    if slot != 1:
        raise UnreadableError("it is the convolution's input")
    params, shape = eqn.params, _shapes(eqn)[1]
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        raise UnreadableError("batch_group_count is not 1")
    out, *features = numbers.rhs_spec  # a patch's features: its channels, then the window
    patches = Patches(
        tuple(shape[dim] for dim in features), groups, tuple(params["window_strides"]),
        tuple(map(tuple, params["padding"])),
        (tuple(params["lhs_dilation"]), tuple(params["rhs_dilation"])), numbers,
    )  # fmt: skip
    result: Any = eqn.outvars[0].aval
    positions = math.prod(result.shape) // result.shape[patches.feature]
    roles: list[Role] = ["in"] * len(shape)
    meets: list[int | None] = [None] * len(shape)
    for k, dim in enumerate(features):
        meets[dim] = 2 + k
    roles[out], read = "out", list(shape)
    if groups > 1:
        roles[out : out + 1], meets[out : out + 1] = ["batch", "out"], [1, None]
        read[out : out + 1] = groups, shape[out] // groups
    operand = positions, groups, *patches.sizes
    return Contraction("conv", tuple(read), tuple(roles), tuple(meets), operand, patches)


def _ragged_dot(eqn: core.JaxprEqn, slot: int) -> Contraction:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    operand, shape, *_ = _shapes(eqn)
    groups = numbers.rhs_group_dimensions
    rows = len(contract[0]) == 1 and len(operand) == 2 and not any(batch)
    if slot != 1 or not rows or not groups:
        raise UnreadableError("only rows [tokens, in] in groups are supported")
    special: dict[int, Role] = dict.fromkeys(groups, "batch")
    special |= dict.fromkeys(contract[1], "in")
    roles: tuple[Role, ...] = tuple(special.get(k, "out") for k in range(len(shape)))
    meets = tuple(contract[0][0] if role == "in" else None for role in roles)
    return Contraction("ragged_dot", shape, roles, meets, operand)


_RULES: Mapping[str, Callable[[core.JaxprEqn, int], Contraction]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
}
PRODUCTS = frozenset(_RULES)
