"""Products of codes: integers or narrow floats are multiplied, scales come after.

For an input `[*batch, tokens, in]` and codes `[*batch, out, in]` that are scaled numbers less a
zero point (`weights/activations.py`), the product of the numbers is exact: int8 with int32 sums, or
narrow floats whose products float32 holds. Groups along the input axis are scaled one by one and
added up in float32, in a loop over the groups. Gradients are those of the rounded input and the
decoded weight, with the rounding left out.

Codes are multiplied as they are stored, `[out, in]`: XLA's CPU compiler takes either layout at the
same speed, but a transpose in the same program costs thirty times the product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jquant.grids import Grid, GridParams
from jquant.inference.late import held_codes, straight
from jquant.inference.operand import Operand
from jquant.numerics.formats import FORMATS
from jquant.weights.activations import encode, numbers
from jquant.weights.qtensor import QTensor, canonical_weight

# Sums of products of int8 are below 2^31 for inputs of this length, with zero points or without.
LONGEST, LONGEST_WITH_ZEROS = 2**17 - 1, 2**15
FEWEST = 8  # tokens: fewer take longer on XLA's CPU than eight
_EIGHT: dict[Any, Any] = {FORMATS["E4M3"]: jnp.float8_e4m3fn, FORMATS["E5M2"]: jnp.float8_e5m2}


def fits(q: QTensor, operand: Operand) -> bool:
    """Whether the sums of a group's products are below what 32 bits hold."""
    del operand
    return q.groups.group(q.codes.shape[-1]) <= LONGEST


def on_codes(
    rows: Float[Array, "*batch tokens in"], q: QTensor, dtype: Any
) -> Float[Array, "*batch tokens out"]:
    """The product of an input and a weight whose inputs are quantized, float32.

    Args:
        rows: the input, of any float dtype.
        q: a weight in groups along its input axis, with `activations`; both grids have numbers.
        dtype: what their numbers are multiplied as, int8 or bfloat16.
    """

    def of_numbers(x: Array, q: QTensor) -> Array:
        return _of_numbers(x, q, dtype)

    def of_values(x: Array, q: QTensor) -> Array:
        assert q.activations is not None
        return jnp.matmul(q.activations.rows(x), jnp.swapaxes(canonical_weight(q), -1, -2))

    return straight(of_numbers, of_values, rows, q)


def _of_numbers(x: Array, q: QTensor, dtype: Any) -> Array:
    assert q.activations is not None
    choice = q.activations.choice
    codes, params, sound = encode(x, choice, q.activations.params)
    tokens, width = codes.shape[-2:]
    c, less = numbers(choice.grid, codes, dtype)
    # Bytes are multiplied as they are stored; what has to be unpacked first waits for its turn.
    stored = q.codes if q.codes.dtype == dtype else held_codes(q.codes, x)
    d, lessened = numbers(q.grid, stored, dtype)
    c = filled(c, tokens, axis=-2)
    exact = dtype == jnp.int8 and _exact(q.groups.group(width), params, q.params)
    below = _zero_point(params, less, exact)
    if below is not None and below.shape[-1] > 1:
        below = filled(below, tokens, axis=-1)
    count = q.groups.count(width)
    shape = (*q.codes.shape[:-1], count)
    theirs = {name: jnp.broadcast_to(leaf, shape) for name, leaf in q.params.items()}
    group = _Group(_dot(choice.grid, q.grid, dtype), below, lessened, exact)
    y = _added(group, c, d, theirs, width, q.groups.group(width))
    scale = params.get("scale")
    unit = sound if scale is None else sound * scale.astype(jnp.float32)
    return y[..., :tokens, :] * unit[..., None]


def filled(a: Array, tokens: int, axis: int) -> Array:
    """An array of few tokens with zeros for more, so that they are at least `FEWEST`."""
    if tokens >= FEWEST:
        return a
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, FEWEST - tokens)
    return jnp.pad(a, pad)


def _exact(group: int, *params: GridParams) -> bool:
    """Whether zero points are whole numbers, which are taken off sums of integers as such."""
    zeros = [one["zero"].dtype for one in params if "zero" in one]
    return group <= LONGEST_WITH_ZEROS and all(jnp.issubdtype(z, jnp.integer) for z in zeros)


class _Group(NamedTuple):
    """How a group's share of a product is computed.

    Attributes:
        dot: the product of numbers `[*batch, tokens, g]` and `[*batch, out, g]`.
        below: the zero points of inputs, `[*batch, tokens]` or `[*batch, 1]`; None: they are zero.
        lessened: what was taken off the weight's codes.
        exact: whether sums are of integers until a scale multiplies them.
    """

    dot: Callable[[Array, Array], Array]
    below: Array | None
    lessened: int
    exact: bool

    def __call__(self, c: Array, d: Array, theirs: GridParams, length: Array | int) -> Array:
        """A group's share, `[*batch, tokens, out]`, but for the inputs' scale."""
        total = self.dot(c, d)
        zero = _zero_point(theirs, self.lessened, self.exact)
        wide = total if self.exact else total.astype(jnp.float32)
        kind = wide.dtype
        if zero is not None:
            wide = wide - zero[..., None, :] * jnp.sum(c, -1, dtype=kind)[..., None]
        if self.below is not None:
            rest = jnp.sum(d, -1, dtype=kind)
            rest = rest if zero is None else rest - jnp.asarray(length).astype(kind) * zero
            wide = wide - self.below[..., None] * rest[..., None, :]
        wide = wide.astype(jnp.float32)
        return wide * theirs["scale"].astype(jnp.float32)[..., None, :] if theirs else wide


def _added(group: _Group, c: Array, d: Array, theirs: GridParams, width: int, size: int) -> Array:
    """The sum of the shares of all groups of `size`, one by one in float32."""
    count = -(-width // size)
    if count == 1:
        return group(c, d, {name: leaf[..., 0] for name, leaf in theirs.items()}, width)
    parts = _grouped(c, count, size), _grouped(d, count, size)
    each = {name: jnp.moveaxis(leaf, -1, 0) for name, leaf in theirs.items()}
    lengths = jnp.minimum(width - size * jnp.arange(count, dtype=jnp.int32), size)
    start = jnp.zeros((*c.shape[:-1], d.shape[-2]), jnp.float32)
    y, _ = lax.scan(lambda y, xs: (y + group(*xs), None), start, (*parts, each, lengths))
    return y


def _zero_point(params: Any, less: int, exact: bool) -> Array | None:
    """The zero point of numbers that are codes less a constant; None where it is zero."""
    zero = params.get("zero")
    if zero is None:  # such codes are signed, and nothing was taken off them
        return None
    return zero.astype(jnp.int32 if exact else jnp.float32) - less


def _grouped(a: Array, count: int, group: int) -> Array:
    """`[*batch, rows, in]` as `[n, *batch, rows, g]`, zeros at the end of the last group."""
    width = a.shape[-1]
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, count * group - width)])
    return jnp.moveaxis(a.reshape(*a.shape[:-1], count, group), -2, 0)


def _dot(left: Grid, right: Grid, dtype: Any) -> Callable[[Array, Array], Array]:
    """The product of numbers `[*batch, tokens, g]` and `[*batch, out, g]`, sums in 32 bits."""
    wide = jnp.int32 if dtype == jnp.int8 else jnp.float32

    def plain(c: Array, d: Array, kinds: Any = (dtype, dtype), precision: Any = None) -> Array:
        batch = tuple(range(c.ndim - 2))
        dims = (((c.ndim - 1,), (d.ndim - 1,)), (batch, batch))
        c, d = c.astype(kinds[0]), d.astype(kinds[1])
        return lax.dot_general(c, d, dims, precision=precision, preferred_element_type=wide)

    kinds = [_EIGHT.get(getattr(grid, "format", None)) for grid in (left, right)]
    if None in kinds or jnp.float8_e4m3fn not in kinds:  # tensor cores have no E5M2 × E5M2
        return plain
    eight = partial(plain, kinds=kinds, precision=lax.Precision.HIGHEST)
    return lambda c, d: lax.platform_dependent(c, d, cuda=eight, default=plain)
