"""What a user passes to a job is theirs afterwards: no array of it has been given away.

jquant donates sums and states that it has made. The law is tried where such an array might be one
of the user's under another name: one array as two batches, as a batch and a parameter, as two
parameters; functions and callbacks that return what they were given; casts that change nothing; a
function that itself gives its inputs away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq
from jquant.rounding import Descent, DiscQuant
from tests.marks import covering, mostly_slow

WIDTH = 8
STEPS = Descent(2, 0.01)


@jax.custom_jvp
def _own(value: Any) -> Any:
    """The value as a callback gives it back."""
    return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(value.shape, value.dtype), value)


_own.defjvp(lambda at, along: (_own(*at), *along))


def _with_callbacks(p: Any, x: jax.Array) -> Any:
    h = jnp.tanh(_own(x) @ p["a"] + _own(p["bias"]))
    return _own(h @ p["b"]), x, p["a"], p["scale"]


def _with_casts(p: Any, x: jax.Array) -> Any:
    half = jnp.bfloat16
    product = lax.dot(x.astype(half), p["a"].astype(half), preferred_element_type=jnp.float32)
    return jnp.tanh(product.astype(jnp.float32)) @ p["b"].astype(jnp.float32), x, p["bias"]


def _giving(p: Any, x: jax.Array) -> Any:
    inner = jax.jit(lambda p, x: (jnp.tanh(x @ p["a"]) @ p["b"], x, p), donate_argnums=(0, 1))
    return inner(p, x)


FUNCTIONS = {"callbacks": _with_callbacks, "casts": _with_casts, "donations": _giving}


def _plan(fn: Any, params: Any, x: Any, **scheme: Any) -> jq.Plan:
    weights = jq.find_weights(fn, params, x)
    return jq.plan(weights, {".*": jq.Scheme(jq.grids.Uniform(4), **scheme)})


def _quantized(rounding: Any) -> Callable[..., Any]:
    def job(fn: Any, params: Any, batches: list[Any]) -> Any:
        plan = _plan(fn, params, batches[0], rounding=rounding)
        return jq.quantize(fn, params, plan, batches, key=jax.random.key(0))[0]

    return job


def _learned(fn: Any, params: Any, batches: list[Any]) -> Any:
    first = lambda p, *x: fn(p, *x)[0]  # noqa: E731
    plan = _plan(first, params, batches[0], rounding=DiscQuant(descent=STEPS))
    key, objective = jax.random.key(0), jq.objectives.MSE()
    return jq.quantize(first, params, plan, batches, key=key, objective=objective)[0]


JOBS: dict[str, Callable[..., Any]] = {
    "capture": jq.capture,
    "gptq": _quantized(jq.rounding.GPTQ()),
    "qep": _quantized(jq.rounding.GPTQ(correction="qep")),
    "disc": _quantized(DiscQuant(descent=STEPS)),
    "learned": _learned,
}
QUICK = ("capture", "learned")


@pytest.mark.filterwarnings("ignore:.*rank deficient")
@pytest.mark.filterwarnings("ignore:.*donated buffers")
@pytest.mark.parametrize(
    ("name", "job", "dtype"),
    mostly_slow(
        [(name, job, "float32") for name in FUNCTIONS for job in JOBS]
        + covering(FUNCTIONS, JOBS, ["bfloat16"]),
        lambda case: case[1] in QUICK and case[2] == "float32",
    ),
)
def test_what_was_passed_is_alive_afterwards(name: str, job: str, dtype: str) -> None:
    w = (jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)) * 0.3).astype(dtype)
    vector = jnp.ones(WIDTH, dtype)
    params = {"a": w, "b": w, "bias": vector, "scale": vector}  # each array twice
    x = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH)).astype(dtype)
    batches = [x, x, w]  # one as two batches, and one that is a parameter
    before = [np.array(v) for v in (w, vector, x)]
    result = JOBS[job](FUNCTIONS[name], params, batches)
    for value, old in zip((w, vector, x), before, strict=True):
        assert not value.is_deleted()
        np.testing.assert_array_equal(np.array(value), old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(result))
    again = JOBS[job](FUNCTIONS[name], params, batches)  # with programs that are there already
    assert not any(v.is_deleted() for v in (w, vector, x, *jax.tree.leaves(again)))
