"""Arrays of less than a byte: joined, they hold what bytes would; no program of ours joins bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import jquant as jq
from jquant.jobs.layers import join_layers
from jquant.layerwise.weight import quantize_weight
from jquant.numerics.packed import joined, unpacked
from tests.functions import _normal

KINDS = ["int2", "uint2", "int4", "uint4", "int8", "uint8", "float32", "bfloat16"]


def _equations(jaxpr: Any) -> Iterator[core.JaxprEqn]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _equations(inner)


def _bits(dtype: Any) -> int:
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8


def _joins_bits(fn: Any, *args: Any) -> list[str]:
    """Operations of a function that end the process where they are given 2 bits."""
    return [
        f"{eqn.primitive.name} {var.aval}"
        for eqn in _equations(jax.make_jaxpr(fn)(*args))
        if eqn.primitive.name in ("concatenate", "sort", "all_gather")
        for var in eqn.invars
        if _bits(getattr(var.aval, "dtype", jnp.int8)) < 8
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("join", [joined, lambda xs, axis: join_layers(*xs, axis=axis)])
def test_joined_as_bytes_are(kind: str, join: Any) -> None:
    dtype = jnp.dtype(kind)
    low = -2 if jnp.issubdtype(dtype, jnp.signedinteger) else 0
    rows = np.random.default_rng(0).integers(low, low + 4, (3, 2, 3, 5)).astype(np.int8)
    arrays = [jnp.asarray(row).astype(dtype) for row in rows]
    for axis in range(3):
        assert not _joins_bits(lambda *xs, axis=axis: join(xs, axis), *arrays)
        found = join(arrays, axis)
        assert found.dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(found.astype(jnp.int8)), np.concatenate(list(rows), axis)
        )
    np.testing.assert_array_equal(unpacked(arrays[0]).astype(jnp.int8), rows[0])


SCHEMES = {
    "nearest": jq.presets.int2_nearest(4),
    "gptq": jq.presets.int2_gptq(4),
    "dynamic": jq.Scheme(
        jq.grids.Uniform(2), 4, jq.rounding.GPTQ(groups="dynamic", order="natural")
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_no_program_joins_bits(scheme: jq.Scheme) -> None:
    params = {"e": _normal(0, 7, 8), "s": _normal(1, 3, 8, 8)}

    def fn(p: Any, t: jax.Array) -> jax.Array:
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), p["e"][t], p["s"])[0]
        return h @ p["s"][1].T @ p["e"].T

    t = jnp.arange(6)
    weights = jq.find_weights(fn, params, t)
    for path, weight in weights.items():
        evidence = jq.Evidence(
            jnp.eye(8) + jnp.zeros((*params[path].shape[:-2], 1, 1)), jnp.ones(())
        )
        assert not _joins_bits(
            lambda w, e, layout=weight.layout: quantize_weight(w, scheme, layout, evidence=e)[0],
            params[path], evidence,
        )  # fmt: skip
    nearest = jq.plan(weights, {".*": jq.Scheme(scheme.grid, scheme.groups)})
    q, _ = jq.quantize(fn, params, nearest)
    assert not _joins_bits(jq.apply(fn), q, t)
    np.testing.assert_allclose(jq.apply(fn)(q, t), fn(jq.dequantize(q), t), rtol=2e-5, atol=2e-5)


def test_a_stack_has_the_codes_of_its_layers() -> None:
    stack, x = _normal(1, 2, 8, 8) / 2, _normal(2, 32, 8)

    def scanned(s: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, s)[0]

    def listed(s: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in s:
            x = jnp.tanh(x @ w)
        return x

    def codes(fn: Any, params: Any) -> Any:
        plan = jq.plan(jq.find_weights(fn, params, x), {".*": SCHEMES["gptq"]})
        return jq.quantize(fn, params, plan, [x])[0]

    wanted = np.stack([np.asarray(q.codes) for q in codes(listed, list(stack))])
    found = codes(scanned, stack)
    assert found.codes.dtype == jnp.uint2
    np.testing.assert_array_equal(np.asarray(found.codes), wanted)
