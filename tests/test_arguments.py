"""What functions are given: any JAX value is taken, anything else is refused by name at once."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jquant as jq
from jquant.errors import TreeError
from jquant.weights.arguments import by_path, inputs_of

W = jax.random.normal(jax.random.key(0), (8, 8))
X = jax.random.normal(jax.random.key(1), (16, 8))


def first(params: Any, x: Any, *rest: Any) -> jax.Array:
    """A function whose weights come first among the leaves."""
    return x @ jax.tree.leaves(params)[0]


def planned(fn: Callable[..., Any], params: Any, *inputs: Any) -> jq.Plan:
    return jq.plan(jq.find_weights(fn, params, *inputs), {".*": jq.presets.int4_gptq(4)})


PLAN = planned(first, {"w": W}, X)


def evaluated(params: Any, batch: Any) -> Any:
    return jq.evaluate.compare(lambda p, t: p["e"][t], params, params, [batch])


# Everything public that is given parameters, batches, or both.
ENTRIES: dict[str, Callable[[Any, Any], Any]] = {
    "find_weights": lambda p, b: jq.find_weights(first, p, b),
    "capture": lambda p, b: jq.capture(first, p, [b]),
    "quantize": lambda p, b: jq.quantize(first, p, PLAN, [b]),
    "quantize in one pass": lambda p, b: jq.quantize(first, p, PLAN, [b], sequential=None),
    "estimate": lambda p, b: jq.estimate(first, p, PLAN, [b]),
    "exact_kl": lambda p, b: jq.allocation.exact_kl(first, p, jq.allocation.candidates(PLAN), [b]),
    "cmpq": lambda p, b: jq.allocation.cmpq(first, p, jq.allocation.candidates(PLAN), [b]),
    "adadim": lambda p, b: jq.allocation.adadim(first, p, PLAN, [b]),
}
WITHOUT_BATCHES: dict[str, Callable[[Any], Any]] = {
    "lorc_ranks": lambda p: jq.allocation.lorc_ranks(p, PLAN, 100),
    "tune_scales": lambda p: jq.tune_scales(first, {"w": W}, p, [X]),
    **{name: lambda p, run=run: run(p, X) for name, run in ENTRIES.items()},
}


@pytest.mark.parametrize("entry", WITHOUT_BATCHES)
@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"m/a": W, "m": {"a": W}}, ["params['m/a']", "params['m']['a']", "'m/a'"]),
        ([{"0/w": W, "0": {"w": W}}], ["[0]['0/w']", "[0]['0']['w']", "'0/0/w'"]),
        ({"a/": {"b": W}, "a": {"/b": W}}, ["['a/']['b']", "['a']['/b']", "'a//b'"]),
        ({"w": W, "act": jax.nn.relu}, ["params, at 'act'"]),
        ({"w": W, "act": {"name": "relu"}}, ["params, at 'act/name'", "str 'relu'"]),
        ({"w": W, "o": np.array([None])}, ["params, at 'o'", "object"]),
        ({"w": W, "n": 2**70}, ["params, at 'n'", "beyond JAX's integers"]),
    ],
    ids=lambda x: (
        "" if isinstance(x, list) else "-".join(map(str, x)) if isinstance(x, dict) else ""
    ),
)
def test_what_is_no_tree_of_arrays_is_refused_everywhere(
    entry: str, params: Any, names: list[str]
) -> None:
    with pytest.raises(TreeError) as caught:
        WITHOUT_BATCHES[entry](params)
    for name in names:
        assert name in str(caught.value), caught.value


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([[1, 2, 3]], "input 0 is a list of numbers.*3 arrays.*asarray"),
        ((X, {"ids": [1, 2]}), "input 1, at 'ids', is a list of numbers"),
        ("a text", "input 0 is no array but str 'a text'. .*tokenizer"),
        ((X, ["a", "text"]), "input 1, at '0', is no array but str"),
        (np.array(["a"]), "input 0 is an array of <U1.*tokenizer"),
        ((X, {"f": len}), "input 1, at 'f', is no array but builtin_function"),
    ],
)
def test_what_is_no_batch_of_arrays_is_refused_everywhere(
    entry: str, batch: Any, said: str
) -> None:
    with pytest.raises(TreeError, match=said) as caught:
        if entry == "find_weights":
            jq.find_weights(first, {"w": W}, *(batch if type(batch) is tuple else (batch,)))
        else:
            ENTRIES[entry]({"w": W}, batch)
    assert entry == "find_weights" or str(caught.value).startswith("batch 0: ")


class Pair(NamedTuple):
    nodes: Any
    scale: Any


Row = collections.namedtuple("Row", ["nodes"])


def test_only_plain_tuples_are_inputs() -> None:
    class Tuple(tuple):
        __slots__ = ()

    jax.tree_util.register_pytree_node(Tuple, lambda t: (list(t), None), lambda _, c: Tuple(c))
    for one in (Pair(X, 2.0), Row(X), Tuple((X, X)), [X, X], {"x": X}, X, 3, None):
        assert inputs_of(one) == (one,)
    for many in ((), (X,), (Pair(X, 1), X)):
        assert inputs_of(many) is many


def pair(params: Any, batch: Pair) -> jax.Array:
    return jnp.tanh(batch.nodes @ params["a"]) @ params["b"] * batch.scale


def test_a_namedtuple_is_one_input_everywhere() -> None:
    params, batch = {"a": W, "b": W.T}, Pair(X, 2.0)
    bare = {"a": W, "b": W.T}
    plain = planned(lambda p, x, s: pair(p, Pair(x, s)), bare, X, 2.0)
    plan = planned(pair, params, batch)
    assert plan == plain
    wanted, _ = jq.quantize(lambda p, x, s: pair(p, Pair(x, s)), bare, plain, [(X, 2.0)])
    for sequential in ("weight", None):
        found, _ = jq.quantize(pair, params, plan, [batch], sequential=sequential)
        if sequential == "weight":
            jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert float(jq.capture(pair, params, [batch])["a"].count) == 16
    for sequential in ("weight", None):
        assert jq.estimate(pair, params, plan, [batch], sequential=sequential).evidence_bytes
    choice = jq.allocation.candidates(plan)
    assert set(jq.allocation.cmpq(pair, params, choice, [batch]).values) == {"a", "b"}
    assert set(jq.allocation.exact_kl(pair, params, choice, [batch]).values) == {"a", "b"}
    learned = jq.plan(plan.weights, {".*": jq.presets.int4_nearest(4)})
    q, _ = jq.quantize(pair, params, learned, [batch])
    jq.tune_scales(pair, params, q, [batch], objective=jq.objectives.MSE())


@pytest.mark.parametrize(
    "number", [1e-3, 2, True, np.float32(0.5), np.int32(3), 1 + 2j, np.bool_(True)], ids=repr
)
def test_numbers_are_jax_values(number: Any) -> None:
    """They do as leaves and as inputs what the arrays do that JAX makes of them."""

    def fn(p: Any, x: jax.Array, s: Any) -> jax.Array:
        h = jnp.tanh(x @ p["a"]) + jnp.abs(p["n"]).astype(x.dtype)
        return (h @ p["b"]) * jnp.abs(s).astype(x.dtype)

    params, array = {"a": W, "b": W.T, "n": number}, jnp.asarray(number)
    plan = planned(fn, params, X, number)
    assert plan == planned(fn, {**params, "n": array}, X, array)
    for sequential in ("weight", None):
        found, _ = jq.quantize(fn, params, plan, [(X, number)], sequential=sequential)
        wanted, _ = jq.quantize(
            fn, {**params, "n": array}, plan, [(X, array)], sequential=sequential
        )
        assert found["n"] is number
        jax.tree.map(np.testing.assert_array_equal, found, {**wanted, "n": number})


@pytest.mark.parametrize("where", ["leaf", "input"])
def test_numbers_stay_weakly_typed(where: str) -> None:
    """Next to bfloat16 a number is bfloat16, and so is the product behind it."""
    seen = []

    def fn(p: Any, x: jax.Array, s: Any) -> jax.Array:
        h = x @ p["w"] + (p["eps"] if where == "leaf" else s)
        seen.append(h.dtype)
        return h @ p["v"]

    w, x = W.astype(jnp.bfloat16), X.astype(jnp.bfloat16)
    params = {"w": w, "v": w, "eps": 1e-5}
    plan = planned(fn, params, x, 0.5)
    for sequential in ("weight", "block", None):
        jq.quantize(fn, params, plan, [(x, 0.5)], sequential=sequential)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


def test_a_number_in_the_tree_survives_every_tool() -> None:
    params = {"eps": 1e-5, "n": 2, "w": W}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + p["eps"] * p["n"]

    plan = planned(fn, params, X)
    q, _ = jq.quantize(fn, params, plan, [X])
    assert (q["eps"], q["n"]) == (1e-5, 2)
    tuned, _ = jq.tune_scales(fn, params, q, [X], objective=jq.objectives.MSE())
    assert tuned["n"] == 2 and isinstance(tuned["n"], int)
    learned = jq.plan(
        plan.weights, {".*": jq.Scheme(jq.grids.Uniform(4), 4, jq.rounding.DiscQuant())}
    )
    found, _ = jq.quantize(
        fn, params, learned, [X], objective=jq.objectives.MSE(), key=jax.random.key(0)
    )
    assert found["n"] == 2 and isinstance(found["n"], int)


@pytest.mark.parametrize(
    ("model", "way_out"),
    [
        (eqx.nn.MLP(8, 8, 8, 1, key=jax.random.key(0)), "eqx.partition"),
        ({"net": [eqx.nn.Lambda(jax.nn.relu)]}, "eqx.partition"),
        ({"net": nnx.Dict(act=nnx.Variable(jax.nn.relu))}, "nnx.split"),
    ],
    ids=["mlp", "inside", "nnx"],
)
def test_functions_among_the_leaves_are_told_the_way_out(model: Any, way_out: str) -> None:
    with pytest.raises(TreeError, match=way_out):
        by_path(model)


def test_the_way_out_of_equinox_works() -> None:
    model = eqx.nn.MLP(8, 8, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    q, report = jq.quantize(fn, params, planned(fn, params, X), [X])
    assert set(report) == {"layers/0/weight", "layers/1/weight"}
    assert jq.apply(fn)(q, X).shape == (16, 8)


def test_evaluation_takes_a_tuple_of_one_and_lists() -> None:
    table = {"e": jax.random.normal(jax.random.key(0), (8, 8))}
    tokens = np.arange(8).reshape(2, 4)
    wanted = evaluated(table, tokens)
    assert evaluated(table, (tokens,)) == evaluated(table, tokens.tolist()) == wanted
    with pytest.raises(TreeError, match="batch 0: input 0 is no array but str"):
        evaluated(table, "text")
