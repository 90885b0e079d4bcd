"""A product is the rows that its weight sees times the weight, whatever the dimension numbers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from jquant.axes.contraction import Contraction, UnreadableError
from jquant.axes.layout import Layout
from jquant.axes.origin import Origin


def whole(*shape: int) -> jax.Array:
    """Small whole numbers: sums of their products are exact in any order."""
    values = np.random.default_rng(math.prod(shape)).integers(-3, 4, shape)
    return jnp.asarray(values, jnp.float32)


def conv(strides: tuple[int, int] = (1, 1), **options: Any) -> Callable[..., jax.Array]:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda x, w: lax.conv_general_dilated(
        x, w, strides, "SAME", dimension_numbers=numbers, **options
    )


def einsum(equation: str) -> Callable[..., jax.Array]:
    return lambda x, w: jnp.einsum(equation, x, w)


SIZES = jnp.array([2, 0, 4], jnp.int32)
CASES = {
    "matmul": (einsum("td,do->to"), (6, 4), (4, 3)),
    "weight first": (einsum("td,od->ot"), (6, 4), (3, 4)),
    "heads": (einsum("btd,dnh->btnh"), (2, 3, 4), (4, 2, 5)),
    "from heads": (einsum("btnh,nhd->btd"), (2, 3, 2, 5), (2, 5, 4)),
    "experts": (einsum("etd,edf->etf"), (3, 5, 4), (3, 4, 2)),
    "convolution": (conv(), (2, 5, 5, 4), (3, 3, 4, 6)),
    "strided": (conv(strides=(2, 2)), (2, 5, 5, 4), (3, 3, 4, 6)),
    "dilated": (conv(rhs_dilation=(2, 2)), (2, 5, 5, 4), (3, 3, 4, 6)),
    "grouped": (conv(feature_group_count=2), (2, 5, 5, 4), (3, 3, 2, 6)),
    "ragged": (lambda x, w: lax.ragged_dot(x, w, SIZES), (6, 4), (3, 4, 5)),
}  # fmt: skip
HEAVY = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")


def equation(fn: Callable[..., jax.Array], *operands: jax.Array) -> core.JaxprEqn:
    def find(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
        inner = [b for e in jaxpr.eqns for b in core.jaxprs_in_params(e.params)]
        own = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in HEAVY]
        return [*own, *(eqn for body in inner for eqn in find(body))]

    (eqn,) = find(jax.make_jaxpr(fn)(*operands).jaxpr)
    return eqn


@pytest.mark.parametrize("name", CASES)
def test_a_product_is_its_rows_times_the_weight(name: str) -> None:
    fn, *shapes = CASES[name]
    x, w = (whole(*shape) for shape in shapes)
    eqn = equation(fn, x, w)
    slot = next(k for k, var in enumerate(eqn.invars) if var.aval.shape == w.shape)
    contraction = Contraction.of(eqn, slot)
    origin = contraction.split(Origin.of("w", w.shape), w.shape)
    rows = contraction.arrangement(origin).rows(contraction.seen(x))
    digits = [d for axis in contraction.reading(origin).axes(w.shape) for d in axis]
    layout = Layout.of(
        w.shape,
        in_axes=[k for k, (_, role) in enumerate(digits) if role == "in"],
        batch_axes=[k for k, (_, role) in enumerate(digits) if role == "batch"],
        split_shape=[size for size, _ in digits],
    )
    weight = layout.canonical(w)
    if contraction.kind == "ragged_dot":  # each row sees the weight of its group
        group = np.repeat(np.arange(len(SIZES)), SIZES)
        product = jnp.einsum("td,tod->to", rows, weight[group])
    else:
        product = rows @ jnp.swapaxes(weight, -1, -2)
    np.testing.assert_array_equal(jnp.sort(product.ravel()), jnp.sort(fn(x, w).ravel()))


def test_what_is_no_rows_of_a_weight_is_refused() -> None:
    x, w = whole(2, 5, 5, 4), whole(3, 3, 4, 6)
    with pytest.raises(UnreadableError, match="the convolution's input"):
        Contraction.of(equation(conv(), x, w), 0)
    eqn = equation(conv(batch_group_count=2), x, w)
    with pytest.raises(UnreadableError, match="batch_group_count"):
        Contraction.of(eqn, 1)
    fn, *shapes = CASES["ragged"]
    with pytest.raises(UnreadableError, match="in groups"):
        Contraction.of(equation(fn, *(whole(*shape) for shape in shapes)), 0)
    fn, *shapes = CASES["grouped"]
    contraction = Contraction.of(equation(fn, *(whole(*shape) for shape in shapes)), 1)
    flat = Origin.of("w", (18, 6)).reshape((18, 6), shapes[1])
    assert flat is not None and contraction.split(flat, shapes[1])
    halved = Origin.of("w", (3, 3, 2, 12)).window((3, 3, 2, 12), 3, 0, 6)
    assert halved is not None
    with pytest.raises(UnreadableError, match="sliced"):
        contraction.split(halved, shapes[1])
