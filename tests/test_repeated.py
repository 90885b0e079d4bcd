"""Kernels that are repeated on their way to an operation: moments are right, or it is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from tests.functions import _normal


def _conv(x: jax.Array, w: jax.Array) -> jax.Array:
    plain = "NDHWC"[-x.ndim :] if x.ndim == 5 else "NHWC"
    kernel = "DHWIO" if x.ndim == 5 else "HWIO"
    window = (1,) * (x.ndim - 2)
    return jax.lax.conv_general_dilated(
        x, w, window, "SAME", dimension_numbers=(plain, kernel, plain)
    )


GROUPS = jnp.array([20, 0, 30, 14])
# What the operation is given of the weight, the weight's shape, the input's, the operation.
CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], Any]] = {
    "conv-in": (lambda w: jnp.repeat(w, 2, 2), (3, 3, 2, 5), (4, 6, 6, 4), _conv),
    "conv-window": (lambda w: jnp.repeat(w, 2, 0), (2, 3, 4, 5), (4, 6, 6, 4), _conv),
    "inflated": (
        lambda w: jnp.broadcast_to(w, (3, *w.shape)), (3, 3, 2, 5), (2, 4, 4, 4, 2), _conv,
    ),
    "experts": (
        lambda w: jnp.repeat(w, 2, 0), (2, 4, 5), (64, 4),
        lambda x, w: jax.lax.ragged_dot(x, w, GROUPS),
    ),
    "ragged-in": (
        lambda w: jnp.repeat(w, 2, 1), (4, 2, 5), (64, 4),
        lambda x, w: jax.lax.ragged_dot(x, w, GROUPS),
    ),
    "kron": (
        lambda w: jnp.kron(jnp.ones((2, 1)), jnp.kron(w, jnp.ones((2, 1)))), (3, 5), (64, 12),
        jnp.matmul,
    ),
    "blocks": (
        lambda w: jnp.tile(w, (2, 1, 1)), (1, 2, 5), (64, 2, 2),
        lambda x, w: jnp.einsum("tgd,gdf->tgf", x, w),
    ),
    "experts-dense": (
        lambda w: jnp.repeat(w, 2, 0), (2, 4, 5), (4, 6, 4),
        lambda x, w: jnp.einsum("etd,edf->etf", x, w),
    ),
    "conv-groups": (
        lambda w: jnp.repeat(w, 2, 1), (3, 1, 6), (2, 6, 4),
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        ),
    ),
    "sliced": (lambda w: jnp.repeat(w, 2, 0)[:3], (2, 5), (64, 3), jnp.matmul),
    "by index": (
        lambda w: w[jnp.array([0, 0, 1, 1])], (2, 4, 5), (4, 6, 4),
        lambda x, w: jnp.einsum("etd,edf->etf", x, w),
    ),
    "dot-in": (lambda w: jnp.repeat(w, 2, 0), (2, 5), (64, 4), jnp.matmul),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_repeated_kernel_is_refused_at_once_or_has_its_moment(name: str) -> None:
    repeat, shape, size, product = CASES[name]
    params, x = {"w": _normal(0, *shape)}, _normal(1, *size)
    fn = lambda p, x: product(x, repeat(p["w"]))  # noqa: E731
    try:
        weight = jq.find_weights(fn, params, x)["w"]
    except jq.errors.UnsupportedPrimitiveError as error:
        assert "'w'" in str(error)
        return
    # A product is linear in its weight: the squared sum of what a change d of it does is d H dT.
    moment = jq.capture(fn, params, [x])["w"].second_moment
    d = _normal(2, *shape)
    rows = weight.layout.canonical(d)
    wanted = jnp.sum(product(x, repeat(d)) ** 2)
    np.testing.assert_allclose(
        jnp.einsum("...oi,...ij,...oj->", rows, moment, rows), wanted, rtol=1e-4
    )
