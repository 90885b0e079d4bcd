"""What a function does beside its results changes nothing: prints, callbacks, empty branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import io_callback

import jquant as jq
from tests.functions import _normal

PARAMS = {"a": _normal(0, 8, 8), "b": _normal(1, 8, 8), "s": _normal(2, 3, 8, 8) / 3}
X = _normal(3, 32, 8)


def _printed(h: jax.Array) -> None:
    jax.debug.print("{}", h.mean())


def _nothing(*values: Any) -> None:
    del values


# What to do with the activation between two layers, and with the second layer's weight.
DEEDS: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "print": lambda h, w: _printed(h),
    "ordered": lambda h, w: jax.debug.print("{}", h.mean(), ordered=True),
    "weight": lambda h, w: jax.debug.print("{} {}", h.mean(), w),
    "callback": lambda h, w: jax.debug.callback(_nothing, h, w),
    "io_callback": lambda h, w: io_callback(_nothing, None, h),
    "jit": lambda h, w: jax.jit(_printed)(h),
    "remat": lambda h, w: jax.checkpoint(_printed)(h),
    "branch": lambda h, w: jax.lax.cond(h[0, 0] > 9, _printed, _nothing, h),
    "branch-jit": lambda h, w: jax.jit(
        lambda h: jax.lax.cond(h[0, 0] > 9, lambda h: _printed(jnp.tanh(h)), _nothing, h)
    )(h),
    "loop": lambda h, w: jax.lax.scan(lambda c, row: (c, _printed(row)), None, h),
}


def _all(h: jax.Array, w: jax.Array) -> None:
    for deed in DEEDS.values():
        deed(h, w)


def _straight(deed: Callable[[jax.Array, jax.Array], Any]) -> Callable[..., Any]:
    """Two layers with something done between them."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ p["a"])
        deed(h, p["b"])
        return h @ p["b"]

    return fn


def _scanned(deed: Callable[[jax.Array, jax.Array], Any]) -> Callable[..., Any]:
    """The same in every layer of a stack."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            deed(h, w)
            return jnp.tanh(h @ w), None

        return jax.lax.scan(layer, x, p["s"])[0] @ p["a"]

    return fn


def _found(fn: Callable[..., Any], scheme: jq.Scheme) -> Any:
    """Everything that the walker's clients make of a function."""
    weights = jq.find_weights(fn, PARAMS, X)
    qparams, report = jq.quantize(fn, PARAMS, jq.plan(weights, {".*": scheme}), [X, X + 1])
    moments = jq.capture(fn, PARAMS, [X])
    results = jq.apply(fn)(qparams, X), jq.emulate(fn, 7)(PARAMS, X)
    return report.stages, moments, jax.tree.leaves(qparams), results


def _same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: None if isinstance(a, str) else _equal(a, b), found, wanted)


def _equal(a: jax.Array, b: jax.Array) -> None:
    assert a.dtype == b.dtype and bool(jnp.all(a == b))


GPTQ = jq.Scheme(jq.grids.Uniform(4), None, jq.rounding.GPTQ())


@pytest.mark.parametrize("network", [_straight, _scanned])
def test_what_is_done_beside_changes_no_result(network: Any) -> None:
    _same(_found(network(_all), GPTQ), _found(network(_nothing), GPTQ))


def test_a_weight_used_only_in_what_gives_nothing_is_calibrated() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        jax.lax.cond(x[0, 0] > -99, lambda x: _printed(x @ p["b"]), _nothing, x)
        return x @ p["a"]

    weights = jq.find_weights(fn, PARAMS, X)
    assert list(weights) == ["a", "b"]
    _, report = jq.quantize(fn, PARAMS, jq.plan(weights, {".*": GPTQ}), [X])
    assert {report[path].tokens for path in ("a", "b")} == {32}
