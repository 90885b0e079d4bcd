"""Products of codes: integers or narrow floats are multiplied, scales come after.

For an input `[*batch, tokens, in]` and codes `[*batch, out, in]` that are scaled numbers less a
zero point (`activations.py`), the product of the numbers is exact: int8 with int32 sums, or narrow
floats whose products float32 holds. Groups along the input axis are scaled one by one and added up
in float32, in a loop over the groups. Gradients are those of the rounded input and the decoded
weight, with the rounding left out.

Codes are multiplied as they are stored, `[out, in]`: XLA's CPU compiler takes either layout at the
same speed, but a transpose in the same program costs thirty times the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array, Float

from jquant.axes.layout import Layout
from jquant.errors import UnsupportedPrimitiveError
from jquant.grids import Grid
from jquant.inference.axes import Axes, as_result, in_order
from jquant.inference.late import held_codes
from jquant.numerics.formats import FORMATS
from jquant.weights.activations import encode, numbers, rounded
from jquant.weights.qtensor import QTensor, canonical_weight

# Sums of products of int8 are below 2^31 for inputs of this length, with zero points or without.
LONGEST, LONGEST_WITH_ZEROS = 2**17 - 1, 2**15
FEWEST = 8  # tokens: fewer take longer on XLA's CPU than eight
_EIGHT: dict[Any, Any] = {FORMATS["E4M3"]: jnp.float8_e4m3fn, FORMATS["E5M2"]: jnp.float8_e5m2}


def on_codes(
    eqn: core.JaxprEqn, at: int, q: QTensor, x: jax.Array, layout: Layout, axes: Axes
) -> jax.Array | None:
    """A `dot_general` of an input and the codes of weight `at`, or None if it is not one of codes.

    Raises:
        UnsupportedPrimitiveError: a product of integers was asked for, and this is none.
    """
    inputs = q.activations
    assert inputs is not None
    way = inputs.choice.way(q.grid, q.blocks)
    if way == "simulated":
        return None
    group = q.blocks.group(q.codes.shape[-1])
    if axes.role != "in" or group > LONGEST:
        if inputs.choice.path == "integer":
            raise no_integers(
                q.shape, "it is contracted along its output axis, or over too many inputs"
            )
        return None
    rows = in_order(eqn, at, layout, axes).canonical(x)
    y = _product(rows, q, jnp.int8 if way == "integer" else jnp.bfloat16)
    y = as_result(y, eqn, at, layout, axes, x.shape)
    return y.astype(eqn.outvars[0].aval.dtype)  # type: ignore[attr-defined]


def no_integers(shape: Sequence[int], why: str) -> UnsupportedPrimitiveError:
    return UnsupportedPrimitiveError(
        f"a weight {tuple(shape)} with Activations(path='integer') has no product of integers "
        f"here: {why}; pass path='auto'"
    )


def _product(
    x: Float[Array, "*batch tokens in"], q: QTensor, dtype: Any
) -> Float[Array, "*batch tokens out"]:
    """The product of an input and a weight, both on their grids; float32."""

    @jax.custom_jvp
    def run(x: Array, q: QTensor) -> Array:
        return _of_numbers(x, q, dtype)

    def straight(x: Array, q: QTensor) -> Array:
        assert q.activations is not None
        seen = rounded(x, q.activations.choice, q.activations.params)
        return jnp.matmul(seen, jnp.swapaxes(canonical_weight(q), -1, -2))

    @run.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        return run(*primals), jax.jvp(straight, primals, tangents)[1]

    return run(x, q)


def _of_numbers(x: Array, q: QTensor, dtype: Any) -> Array:
    assert q.activations is not None
    choice = q.activations.choice
    codes, params, sound = encode(x, choice, q.activations.params)
    tokens, width = codes.shape[-2:]
    c, less = numbers(choice.grid, codes, dtype)
    # Bytes are multiplied as they are stored; what has to be unpacked first waits for its turn.
    stored = q.codes if q.codes.dtype == dtype else held_codes(q.codes, x)
    d, lessened = numbers(q.grid, stored, dtype)
    if tokens < FEWEST:
        c = jnp.pad(c, [(0, 0)] * (c.ndim - 2) + [(0, FEWEST - tokens), (0, 0)])
    group, count = q.blocks.group(width), q.blocks.count(width)
    # Zero points that are whole are taken off in integers.
    zeros = [x["zero"].dtype for x in (params, q.params) if "zero" in x]
    exact = dtype == jnp.int8 and group <= LONGEST_WITH_ZEROS
    exact = exact and all(jnp.issubdtype(kind, jnp.integer) for kind in zeros)
    below = _zero_point(params, less, exact)  # of the inputs
    if below is not None and below.shape[-1] > 1:
        below = jnp.pad(below, [(0, 0)] * (below.ndim - 1) + [(0, c.shape[-2] - tokens)])
    shape = (*q.codes.shape[:-1], count)
    theirs = {name: jnp.broadcast_to(leaf, shape) for name, leaf in q.params.items()}
    dot = _dot(choice.grid, q.grid, dtype)

    def one(c: Array, d: Array, theirs: Any, length: Array | int) -> Array:
        """A group's share, `[*batch, tokens, out]`, but for the inputs' scale."""
        total = dot(c, d)
        zero = _zero_point(theirs, lessened, exact)
        wide = total if exact else total.astype(jnp.float32)
        kind = wide.dtype
        if zero is not None:
            wide = wide - zero[..., None, :] * jnp.sum(c, -1, dtype=kind)[..., None]
        if below is not None:
            rest = jnp.sum(d, -1, dtype=kind)
            rest = rest if zero is None else rest - jnp.asarray(length).astype(kind) * zero
            wide = wide - below[..., None] * rest[..., None, :]
        wide = wide.astype(jnp.float32)
        return wide * theirs["scale"].astype(jnp.float32)[..., None, :] if theirs else wide

    if count == 1:
        y = one(c, d, {name: leaf[..., 0] for name, leaf in theirs.items()}, width)
    else:
        parts = _grouped(c, count, group), _grouped(d, count, group)
        each = {name: jnp.moveaxis(leaf, -1, 0) for name, leaf in theirs.items()}
        lengths = jnp.minimum(width - group * jnp.arange(count, dtype=jnp.int32), group)
        start = jnp.zeros((*c.shape[:-1], d.shape[-2]), jnp.float32)
        y, _ = lax.scan(lambda y, xs: (y + one(*xs), None), start, (*parts, each, lengths))
    scale = params.get("scale")
    unit = sound if scale is None else sound * scale.astype(jnp.float32)
    return y[..., :tokens, :] * unit[..., None]


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
