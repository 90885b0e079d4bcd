"""Matrices that data picks, one for each row: what `ragged_dot` on sorted rows is, to the bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq
from jquant.errors import EvidenceError, UnsupportedPrimitiveError

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP = 64, 16, 24, 4, 2


def normal(seed: int, *shape: int) -> jax.Array:
    return 0.3 * jax.random.normal(jax.random.key(seed), shape)


PARAMS = {
    "first": normal(1, WIDTH, WIDTH),
    "router": 3 * normal(2, WIDTH, EXPERTS),
    "up": normal(3, EXPERTS, HIDDEN, WIDTH),
    "down": normal(4, EXPERTS, WIDTH, HIDDEN),
    "last": normal(5, WIDTH, WIDTH),
}
X = [3 * normal(6, TOKENS, WIDTH), 3 * normal(7, TOKENS, WIDTH)]


def routed(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The network up to its experts: tokens, and of each the experts with their shares."""
    x = jnp.tanh(x @ p["first"])
    share, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), TOP)
    return x, share, chosen


def mixed(p: Any, x: jax.Array, share: jax.Array, y: jax.Array) -> jax.Array:
    return (jnp.sum(share[..., None] * y.reshape(*share.shape, -1), 1) + x) @ p["last"]


def picking(p: Any, x: jax.Array) -> jax.Array:
    """A matrix for each row; those of `down` are picked long before they are used."""
    x, share, chosen = routed(p, x)
    index = chosen.reshape(-1)
    down = p["down"][index]
    hidden = jax.nn.gelu(jnp.einsum("sod,sd->so", p["up"][index], jnp.repeat(x, TOP, 0)))
    return mixed(p, x, share, jnp.einsum("sod,sd->so", down, hidden))


def by_token(p: Any, x: jax.Array) -> jax.Array:
    """Two axes of indices, and the row on the left."""
    x, share, chosen = routed(p, x)
    hidden = jax.nn.gelu(jnp.einsum("td,tkod->tko", x, p["up"][chosen]))
    return mixed(p, x, share, jnp.einsum("tko,tkdo->tkd", hidden, p["down"][chosen]))


def sorting(p: Any, x: jax.Array) -> jax.Array:
    """The same by `ragged_dot`."""
    x, share, chosen = routed(p, x)
    index = chosen.reshape(-1)
    order, sizes = jnp.argsort(index), jnp.zeros(EXPERTS, jnp.int32).at[index].add(1)
    rows = jnp.repeat(x, TOP, 0)[order]
    hidden = jax.nn.gelu(lax.ragged_dot(rows, p["up"].transpose(0, 2, 1), sizes))
    y = lax.ragged_dot(hidden, p["down"].transpose(0, 2, 1), sizes)
    return mixed(p, x, share, jnp.zeros_like(y).at[order].set(y))


@pytest.mark.parametrize("fn", [picking, by_token])
def test_each_matrix_has_the_evidence_of_its_rows(fn: Any) -> None:
    weights = jq.find_weights(fn, PARAMS, X[0])
    up = weights["up"]
    assert (up.in_axes, up.out_axes, up.batch_axes) == ((2,), (1,), (0,))
    assert not weights.others and [use.kind for use in up.uses] == ["ragged_dot"]
    evidence = jq.capture(fn, PARAMS, X)
    rows, _, chosen = map(np.concatenate, zip(*(routed(PARAMS, x) for x in X), strict=True))
    rows, index = np.repeat(rows, TOP, 0), chosen.reshape(-1)
    for expert in range(EXPERTS):
        own = rows[index == expert]
        hidden = np.asarray(jax.nn.gelu(own @ PARAMS["up"][expert].T))
        for name, inputs in {"up": own, "down": hidden}.items():
            assert evidence[name].count[expert] == len(own) > 0
            moment = evidence[name].second_moment[expert]
            np.testing.assert_allclose(moment, inputs.T @ inputs, atol=1e-4)


@pytest.mark.parametrize("preset", [jq.presets.int3_gptq, jq.presets.int3_qep])
@pytest.mark.parametrize("fn", [picking, by_token])
def test_codes_and_stages_are_those_of_sorted_rows(fn: Any, preset: Any) -> None:
    results = []
    for network in (fn, sorting):
        weights = jq.find_weights(network, PARAMS, X[0])
        plan = jq.plan(weights, {"(?!router).*": preset(8)})
        results.append(jq.quantize(network, PARAMS, plan, X))
    (q, report), (expected, other) = results
    assert report.stages == other.stages == (("first",), ("up",), ("down",), ("last",))
    for name in report:
        np.testing.assert_array_equal(q[name].codes, expected[name].codes)
    exact = jax.jit(fn)(jq.dequantize(q), X[0])
    np.testing.assert_allclose(jax.jit(jq.apply(fn))(q, X[0]), exact, atol=1e-5)


def test_codes_are_picked_as_codes() -> None:
    weights = jq.find_weights(picking, PARAMS, X[0])
    q, _ = jq.quantize(picking, PARAMS, jq.plan(weights, {".*": jq.presets.int4_nearest(8)}))
    program = str(jax.make_jaxpr(jq.apply(picking))(q, X[0][:5]))
    stack = f"f32[{EXPERTS},{HIDDEN},{WIDTH}]"
    assert stack not in program and f"f32[10,{HIDDEN},{WIDTH}]" in program

    def astray(p: Any, x: jax.Array) -> jax.Array:
        picked = p["up"].at[jnp.arange(8) - 2].get(mode="fill")
        return jnp.einsum("sod,sd->so", picked, x[:8])

    result = jq.apply(astray)(q, X[0])
    np.testing.assert_allclose(result, astray(jq.dequantize(q), X[0]), atol=1e-5)
    assert np.isnan(result[-2:]).all() and np.isfinite(result[:-2]).all()


def test_rows_out_of_range_are_no_evidence() -> None:
    index = jnp.array([0, 9, 2, 2])

    def fn(p: Any, x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.einsum("sod,sd->so", p["up"].at[index].get(mode="fill"), x)

    evidence = jq.capture(fn, PARAMS, [(X[0][:4], index)], paths=["up"])["up"]
    assert evidence.count.tolist() == [1, 0, 2, 0]


def test_sums_over_the_picked_are_sums_of_rows() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        x, share, chosen = routed(p, x)
        return jnp.einsum("tkd,tkod->to", share[..., None] * x[:, None], p["up"][chosen])

    evidence = jq.capture(fn, PARAMS, X[:1], paths=["up"])["up"]
    x, share, chosen = routed(PARAMS, X[0])
    rows = (share[..., None] * x[:, None])[chosen == 1]
    np.testing.assert_allclose(evidence.second_moment[1], rows.T @ rows, atol=1e-5)
    assert evidence.count.sum() == TOKENS * TOP


def test_picked_matrices_that_are_changed_are_no_weight() -> None:
    def scaled(p: Any, x: jax.Array) -> jax.Array:
        x, _, chosen = routed(p, x)
        return jnp.einsum("sod,sd->so", p["up"][chosen[:, 0]] * x[:, :1, None], x)

    def turned(p: Any, x: jax.Array) -> jax.Array:
        x, _, chosen = routed(p, x)
        return jnp.einsum("sdo,sd->so", p["up"][chosen[:, 0]].reshape(-1, WIDTH, HIDDEN), x)

    up = jq.find_weights(scaled, PARAMS, X[0])["up"]
    assert [use.kind for use in up.uses] == ["lookup"]
    with pytest.raises(UnsupportedPrimitiveError, match="'up'.*been through 'gather'"):
        jq.find_weights(turned, PARAMS, X[0])


def test_token_weights_do_not_reach_rows_that_are_sorted() -> None:
    weights = jq.find_weights(picking, PARAMS, X[0])
    plan = jq.plan(weights, {"up": jq.presets.int3_gptq(8)})
    with pytest.raises(EvidenceError, match="'up'"):
        jq.quantize(picking, PARAMS, plan, X, token_weights=lambda x: jnp.ones(TOKENS))
