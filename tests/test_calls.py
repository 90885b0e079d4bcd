"""Every call is what its body is: a function that calls is quantized, applied, emulated as one
that does not, and a weight that goes through calls and loops unchanged is the same weight still."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call
from jax.sharding import AxisType, PartitionSpec

import jquant as jq
from tests.functions import _normal

PARAMS = {"a": _normal(0, 8, 8), "s": _normal(2, 2, 8, 8) / 3}
X = _normal(3, 32, 8)
GPTQ = jq.Scheme(jq.grids.Uniform(4), None, jq.rounding.GPTQ())
Product = Callable[[jax.Array, jax.Array], jax.Array]


def _plain(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def _batched(x: jax.Array, w: jax.Array) -> jax.Array:
    call = custom_vmap(_plain)
    call.def_vmap(lambda size, batched, x, w: (_plain(x, w), True))
    return call(x, w)


def _linear(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(linear_call(lambda w, x: x @ w, lambda w, y: y @ w.T, w, x))


def _composed(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.composite(_plain, "test.product")(x, w)


def _mesh(size: int) -> jax.sharding.Mesh:
    return jax.make_mesh((size,), ("d",), axis_types=(AxisType.Auto,))


def _sharded(x: jax.Array, w: jax.Array) -> jax.Array:
    rows, whole = PartitionSpec("d"), PartitionSpec()
    product = lambda x, w: jnp.tanh(jax.lax.psum(x @ w, "d"))  # noqa: E731
    specs = (PartitionSpec(None, "d"), rows)
    return jax.shard_map(product, mesh=_mesh(1), in_specs=specs, out_specs=whole)(x, w)


PRODUCTS: dict[str, Product] = {
    "custom_vmap": _batched,
    "linear_call": _linear,
    "composite": _composed,
    "shard_map": _sharded,
    "nested": lambda x, w: jax.jit(jax.checkpoint(_batched))(x, w),
}


def _network(product: Product) -> Callable[..., Any]:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        h = jax.lax.scan(lambda h, w: (product(h, w), None), x, p["s"])[0]
        return product(h, p["a"])

    return fn


def _found(fn: Callable[..., Any], params: Any = PARAMS) -> Any:
    """What the walker's clients make of a function."""
    weights = jq.find_weights(fn, params, X)
    qparams, _ = jq.quantize(fn, params, jq.plan(weights, {".*": GPTQ}), [X])
    moments = {path: e.second_moment for path, e in jq.capture(fn, params, [X]).items()}
    runs = jax.jit(jq.apply(fn)), jax.jit(jq.emulate(fn, 7))
    results = runs[0](qparams, X), runs[1](params, X)
    axes = {path: (w.in_axes, w.batch_axes) for path, w in weights.items()}
    return axes, moments, jq.dequantize(qparams), results


@functools.cache
def _of_the_body() -> Any:
    return _found(_network(_plain))


def _close(found: Any, wanted: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, wanted)


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_call_is_what_its_body_is(product: Product) -> None:
    _close(_found(_network(product)), _of_the_body())


# A layer that gives its weight back, in a call or a branch of its own.
RETURNED: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "remat": jax.checkpoint(lambda h, w: (_plain(h, w), w)),
    "jit": jax.jit(lambda h, w: (_plain(h, w), w)),
    "deeper": jax.jit(jax.checkpoint(lambda h, w: jax.jit(lambda h, w: (_plain(h, w), w))(h, w))),
    "branch": lambda h, w: jax.lax.cond(
        h[0, 0] < 99, lambda h, w: (_plain(h, w), w), lambda h, w: (h, w), h, w
    ),
}


@functools.cache
def _of_layers() -> Any:
    """Of the same loops around layers that give no weight back."""

    def plain(p: Any, x: jax.Array) -> jax.Array:
        h = jax.lax.scan(lambda h, w: (_plain(h, w), None), x, p["s"])[0]
        h = jax.lax.fori_loop(0, 2, lambda _, h: _plain(h, p["a"]), h)
        return h @ p["s"][0]

    return _found(plain)


@pytest.mark.parametrize("layer", RETURNED.values(), ids=RETURNED)
def test_a_weight_that_comes_back_unchanged_is_the_weight(layer: Any) -> None:
    def returned(p: Any, x: jax.Array) -> jax.Array:
        h, stack = jax.lax.scan(layer, x, p["s"])

        def again(_: int, state: Any) -> Any:
            h, w = state
            return layer(h, w)

        h, _ = jax.lax.fori_loop(0, 2, again, (h, p["a"]))
        return h @ stack[0]  # what came out is the weight that went in

    _close(_found(returned), _of_layers())


def test_what_is_split_over_devices_is_refused_by_name() -> None:
    mesh = jax.sharding.AbstractMesh((2,), ("d",), (AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec(None, "d"))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        out = PartitionSpec(None, "d")
        return jax.shard_map(_plain, mesh=mesh, in_specs=specs, out_specs=out)(x, p["a"])

    with pytest.raises(jq.errors.UnsupportedPrimitiveError, match="'a' enters 'shard_map'.*'d': 2"):
        jq.find_weights(fn, PARAMS, X)
    with pytest.raises(jq.errors.UnsupportedPrimitiveError, match="'d': 2.*same random words"):
        jq.emulate(fn, 7, "stochastic")(jax.random.key(0), PARAMS, X)


def test_quantized_inputs_are_not_hidden_in_calls() -> None:
    grid = jq.grids.Uniform(8, symmetric=True)
    scheme = jq.Scheme(grid, None, activations=jq.Activations(grid))
    for product in PRODUCTS.values():
        fn = _network(product)
        plan = jq.plan(jq.find_weights(fn, PARAMS, X), {".*": scheme})
        q, _ = jq.quantize(fn, PARAMS, plan)
        with pytest.raises(jq.errors.UnsupportedPrimitiveError, match="out of sight"):
            jq.apply(fn)(q, X)
