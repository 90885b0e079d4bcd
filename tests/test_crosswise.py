"""Parts of one leaf are calibrated as leaves of their own would be, or refused before any work.

The oracle of every case is the same function of the parts, each given as a leaf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq
from jquant.errors import EvidenceError, PlanError, UnsupportedPrimitiveError, WeightError
from tests.functions import _normal
from tests.marks import mostly_slow

pytestmark = pytest.mark.filterwarnings("ignore:.*second moment is rank deficient")

X = _normal(100, 48, 8) * jnp.exp(0.5 * _normal(101, 8))
LATENTS = _normal(5, 3, 8)
IMAGE = X.reshape(2, 24, 8)
SCHEMES = {"nearest": jq.presets.int4_nearest(4), "gptq": jq.presets.int4_gptq(4)}


class Parts(NamedTuple):
    """A leaf of `shape`, cut into parts; `whole` uses it, `apart` the list of its parts."""

    shape: tuple[int, ...]
    whole: Callable[[Any, Any], Any]
    apart: Callable[[Any, Any], Any]
    cut: Callable[[Any], list[Any]] = list
    x: Any = X


def _other(x: Any) -> Any:
    """Another input."""
    return jnp.tanh(x[..., ::-1] * 0.7 + x)


def _scan(stack: Any, x: Any, reverse: bool = False) -> Any:
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack, reverse=reverse)[0]


def _one_by_one(layers: Any, x: Any) -> Any:
    return functools.reduce(lambda h, w: jnp.tanh(h @ w), layers, x)


def _nested(stack: Any, x: Any) -> Any:
    return lax.scan(lambda h, s: (_scan(s, h), None), x, stack)[0]


def _conv(x: Any, kernel: Any, spec: str) -> Any:
    numbers = ("NWC", spec, "NWC")
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=numbers)


def _thirds(w: Any) -> list[Any]:
    return [w[:, :8], w[:, 8:16], w[:, 16:]]


def _whole(w: Any) -> list[Any]:
    return [w]


def _chosen(layers: Any, x: Any) -> Any:
    """A branch for each row."""
    pick = lambda r: lax.cond(r[0] > 0, lambda r: r @ layers[0], lambda r: r @ layers[1], r)  # noqa: E731
    return lax.map(pick, x)


ALIKE: dict[str, Parts] = {
    "a layer by itself, and all at once": Parts(
        (2, 8, 8),
        lambda s, x: (_other(x) @ s[0], jnp.einsum("td,ldf->tlf", x, s)),
        lambda s, x: (_other(x) @ s[0], x @ s[0], x @ s[1]),
    ),
    "all at once to more rows, and a layer": Parts(
        (2, 8, 8),
        lambda s, x: (jnp.einsum("td,ldf->tlf", jnp.concatenate([x, x]), s), _other(x) @ s[1]),
        lambda s, x: ([jnp.concatenate([x, x]) @ w for w in s], _other(x) @ s[1]),
    ),
    "a scan, and all at once": Parts(
        (3, 8, 8),
        lambda s, x: (_scan(s, x), jnp.einsum("td,ldf->tlf", _other(x), s)),
        lambda s, x: (_one_by_one(s, x), [_other(x) @ w for w in s]),
    ),
    "a scan of one layer, and that layer": Parts(
        (1, 8, 8),
        lambda s, x: (_scan(s, x), _other(x) @ s[0]),
        lambda s, x: (_one_by_one(s, x), _other(x) @ s[0]),
    ),
    "a scan, and scans in a scan": Parts(
        (4, 8, 8),
        lambda s, x: (_scan(s, x), _nested(s.reshape(2, 2, 8, 8), _other(x))),
        lambda s, x: (_one_by_one(s, x), _one_by_one(s, _other(x))),
    ),
    "scans in a scan, and a layer": Parts(
        (4, 8, 8),
        lambda s, x: (_nested(s.reshape(2, 2, 8, 8), x), _other(x) @ s[2]),
        lambda s, x: (_one_by_one(s, x), _other(x) @ s[2]),
    ),
    "scans in a scan, and a window across": Parts(
        (4, 8, 8),
        lambda s, x: (_nested(s.reshape(2, 2, 8, 8), x), _scan(s[1:3], _other(x))),
        lambda s, x: (_one_by_one(s, x), _one_by_one(s[1:3], _other(x))),
    ),
    "scans in two orders": Parts(
        (3, 8, 8),
        lambda s, x: _scan(s, _scan(s, x), reverse=True),
        lambda s, x: _one_by_one(s[::-1], _one_by_one(s, x)),
    ),
    "a layer used twice": Parts(
        (3, 8, 8),
        lambda s, x: _scan(s, x) @ s[1],
        lambda s, x: _one_by_one(s, x) @ s[1],
    ),
    "single layers under vmap": Parts(
        (2, 8, 8),
        lambda s, x: [
            jax.vmap(jnp.matmul)(a[None], s[k : k + 1]) for k, a in enumerate((x, _other(x)))
        ],
        lambda s, x: (x @ s[0], _other(x) @ s[1]),
    ),
    "a slice, and the other by an index": Parts(
        (8, 16),
        lambda w, x: (jnp.concatenate([x, x]) @ w[:, :8], _other(x) @ w.reshape(8, 2, 8)[:, 1]),
        lambda w, x: (jnp.concatenate([x, x]) @ w[0], _other(x) @ w[1]),
        lambda w: [w[:, :8], w[:, 8:]],
    ),
    "the whole, and a third by an index": Parts(
        (8, 24),
        lambda w, x: (x @ w, _other(x) @ w.reshape(8, 3, 8)[:, 1]),
        lambda w, x: ([x @ v for v in w], _other(x) @ w[1]),
        _thirds,
    ),
    "a row of a table, then all of it": Parts(
        (20, 8),
        lambda w, x: (x @ w[0], _other(x) @ w.T),
        lambda w, x: (x @ w[0][0], _other(x) @ w[0].T),
        _whole,
    ),
    "a tied table": Parts(
        (20, 8),
        lambda w, x: jnp.tanh(w[jnp.argmax(x, 1)]) @ w.T,
        lambda w, x: jnp.tanh(w[0][jnp.argmax(x, 1)]) @ w[0].T,
        _whole,
    ),
    "a pointwise convolution, and a product": Parts(
        (1, 8, 8),
        lambda w, x: (_conv(x, w, "WIO"), _other(x) @ w[0]),
        lambda w, x: (_conv(x, w[0][None], "WIO"), _other(x) @ w[0]),
        x=IMAGE,
    ),
    "branches of their own": Parts((2, 8, 8), _chosen, _chosen),
    "two factors of a product": Parts(
        (2, 8, 8), lambda s, x: x @ (s[0] @ s[1]), lambda s, x: x @ (s[0] @ s[1])
    ),
    "one in two orientations": Parts(
        (2, 8, 8),
        lambda s, x: [(x @ w, _other(x)[:9] @ w.T) for w in (s[0], s[1])],
        lambda s, x: [(x @ w, _other(x)[:9] @ w.T) for w in s],
    ),
    "a scan, and each turned to more rows": Parts(
        (3, 8, 8),
        lambda s, x: (_scan(s, x), [jnp.concatenate([x, _other(x)]) @ w.T for w in s]),
        lambda s, x: (_one_by_one(s, x), [jnp.concatenate([x, _other(x)]) @ w.T for w in s]),
    ),
}


def _leaf(case: Parts) -> dict[str, Any]:
    return {"s": _normal(3, *case.shape)}


def _of_leaf(case: Parts) -> Callable[[Any, Any], Any]:
    return lambda p, x: case.whole(p["s"], x)


@pytest.mark.parametrize("name", ALIKE)
def test_parts_see_what_leaves_of_their_own_would(name: str) -> None:
    case = ALIKE[name]
    params, parts = _leaf(case), case.cut(_normal(3, *case.shape))
    moments = jq.capture(_of_leaf(case), params, [case.x])["s"].second_moment
    alone = jq.capture(case.apart, parts, [case.x])
    moments = moments.reshape(-1, *moments.shape[-2:])
    assert len(moments) == len(parts)
    for k, moment in enumerate(moments):
        np.testing.assert_allclose(
            moment, alone[str(k)].second_moment.squeeze(), rtol=2e-4, atol=2e-4
        )


def _quantized(fn: Any, params: Any, x: Any, scheme: jq.Scheme, sequential: Any) -> Any:
    plan = jq.plan(jq.find_weights(fn, params, x), {".*": scheme})
    return jq.quantize(fn, params, plan, [x], sequential=sequential)[0]


def _sorted(results: list[Any]) -> np.ndarray:
    """All numbers of some results, whatever they are arranged in."""
    return np.sort(np.concatenate([np.ravel(y) for y in results]))


# Stage by stage only where the stages of the two are the same.
CODES = [(name, "gptq", None) for name in ALIKE] + [
    (name, scheme, "weight")
    for name in ALIKE
    if "scan" not in name or "one layer" in name
    for scheme in SCHEMES
]
QUICK = [
    ("the whole, and a third by an index", "gptq", None),
]


@pytest.mark.parametrize(("name", "scheme", "sequential"), mostly_slow(CODES, QUICK))
def test_parts_have_the_codes_of_leaves_of_their_own(
    name: str, scheme: str, sequential: Any
) -> None:
    case = ALIKE[name]
    got = _quantized(_of_leaf(case), _leaf(case), case.x, SCHEMES[scheme], sequential)
    parts = case.cut(_normal(3, *case.shape))
    alone = jq.dequantize(_quantized(case.apart, parts, case.x, SCHEMES[scheme], sequential))
    for one, two in zip(case.cut(jq.dequantize(got)["s"]), alone, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    applied = jax.tree.leaves(jq.apply(_of_leaf(case))(got, case.x))
    plain = jax.tree.leaves(case.apart(alone, case.x))
    np.testing.assert_allclose(_sorted(applied), _sorted(plain), atol=1e-4)


def _chain(layers: Any, x: Any) -> Any:
    """Up along one axis, and down along the other."""
    return jnp.tanh(x @ layers[0]) @ layers[1].T


def _pair(h: Any, pair: Any) -> Any:
    return _chain(pair, h), None


@jax.custom_vjp
def _custom(layers: Any, x: Any) -> Any:
    return _chain(layers, x)


_custom.defvjp(lambda s, x: (_custom(s, x), (s, x)), lambda kept, g: kept)


def _experts(layers: Any, x: Any) -> Any:
    hidden = jnp.tanh(jnp.einsum("ecd,edf->ecf", x, layers[0]))
    return jnp.einsum("ecf,edf->ecd", hidden, layers[1])


def _ragged(layers: Any, x: Any) -> Any:
    sizes = jnp.array([24, 24])
    hidden = jnp.tanh(lax.ragged_dot(x, layers[0], sizes))
    return lax.ragged_dot(hidden, jnp.swapaxes(layers[1], 1, 2), sizes)


def _absorbed(w: Any, x: Any) -> Any:
    """Keys taken back to the latent from the left, values from the right."""
    heads = _other(x).reshape(-1, 2, 4)
    return jnp.einsum("thn,rhn->thr", heads, w[..., :4]), jnp.einsum("tr,rhv->thv", x, w[..., 4:])


# The shape, the function, which part the error names, and an input.
CROSSWISE: dict[str, tuple[tuple[int, ...], Callable[[Any, Any], Any], str, Any]] = {
    "by index": ((2, 8, 12), _chain, "s[1] is contracted over axis 2", X),
    "square": ((2, 8, 8), _chain, "s[1] is contracted over axis 2", X),
    "unstacked": ((2, 8, 12), lambda s, x: _chain(jnp.unstack(s), x), "s[1]", X),
    "split": ((2, 8, 12), lambda s, x: _chain([w[0] for w in jnp.split(s, 2)], x), "s[1]", X),
    "sliced and reshaped": (
        (2, 8, 12), lambda s, x: _chain([s[:1].reshape(8, 12), s[1:].reshape(8, 12)], x), "s[1]", X,
    ),
    "einsum": (
        (2, 8, 12),
        lambda s, x: jnp.einsum("tf,df->td", jnp.einsum("td,df->tf", x, s[0]), s[1]), "s[1]", X,
    ),
    "three layers": (
        (3, 8, 12), lambda s, x: jnp.tanh(_chain(s, x)) @ s[2],
        "s[0], s[2] are contracted over axis 1, but s[1] is contracted over axis 2", X,
    ),
    "pairs in a scan": ((2, 2, 8, 12), lambda s, x: lax.scan(_pair, x, s)[0], "s[:, 1]", X),
    "pairs out of one axis": (
        (4, 8, 8), lambda s, x: lax.scan(_pair, x, s.reshape(2, 2, 8, 8))[0], "s[1:4:2]", X,
    ),
    "two halves in a scan": (
        (4, 8, 8), lambda s, x: lax.scan(_pair, x, (s[:2], s[2:]))[0], "s[2:4]", X,
    ),
    "every other in a scan": (
        (4, 8, 8), lambda s, x: lax.scan(_pair, x, (s[::2], s[1::2]))[0], "s[1:4:2]", X,
    ),
    "two scans": (
        (4, 8, 8),
        lambda s, x: lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), _scan(s[:2], x), s[2:])[0],
        "s[2:4]", X,
    ),
    "turned before a scan": (
        (2, 8, 8), lambda s, x: _scan(jnp.stack([s[0], s[1].T]), x), "s[1]", X,
    ),
    "turned before vmap": (
        (2, 8, 8),
        lambda s, x: jax.vmap(jnp.matmul)(
            jnp.stack([x, _other(x)]), jnp.stack([s[0], s[1].T])
        ),
        "s[1]", X,
    ),
    "lax.map": (
        (2, 8, 8),
        lambda s, x: (lax.map(lambda w: x @ w, s[:1]), lax.map(lambda w: x @ w.T, s[1:])),
        "s[1]", X,
    ),
    "a loop": (
        (2, 8, 8), lambda s, x: lax.fori_loop(0, 2, lambda _, h: _chain(s, h), x), "s[1]", X,
    ),
    "branches": (
        (2, 8, 8),
        lambda s, x: lax.cond(x[0, 0] > 0, lambda: x @ s[0], lambda: x @ s[1].T), "s[", X,
    ),
    "checkpoint": ((2, 8, 12), lambda s, x: jax.checkpoint(_chain)(s, x), "s[1]", X),
    "custom_vjp": ((2, 8, 12), _custom, "s[1]", X),
    "joined": ((2, 8, 8), lambda s, x: x @ jnp.concatenate([s[0], s[1].T], 1), "s[1]", X),
    "added": ((2, 8, 8), lambda s, x: x @ (s[0] + s[1].T), "s[1]", X),
    "multiplied": ((2, 8, 8), lambda s, x: x @ (s[0] @ s[1].T), "s[1]", X),
    "keys of inputs, queries of latents": (
        (2, 8, 8), lambda s, x: (x @ s[0]) @ (LATENTS @ s[1]).T, "s[1]", X,
    ),
    "rows of one axis": ((16, 12), lambda s, x: _chain([s[:8], s[8:]], x), "s[8:16]", X),
    "a fused kernel": (
        (8, 24), lambda s, x: (x @ s[:, :8], x @ s[:, 8:16], x @ s[:, 16:].T), "s[:, 16:24]", X,
    ),
    "absorbed": ((8, 2, 8), _absorbed, "axis 2", X),
    "convolutions": (
        (2, 3, 8, 8),
        lambda s, x: _conv(jnp.tanh(_conv(x, s[0], "WIO")), s[1], "WOI"), "s[1]", IMAGE,
    ),
    "experts": ((2, 2, 8, 12), _experts, "s[1]", IMAGE),
    "groups": ((2, 2, 8, 12), _ragged, "s[1]", X),
    "heads": (
        (2, 8, 8),
        lambda s, x: (
            x @ s[0],
            jnp.einsum("thk,hkf->thf", x.reshape(-1, 2, 4), s[1].reshape(2, 4, 8)),
        ),
        "s[1]", X,
    ),
    "a table and a head": (
        (2, 8, 8), lambda s, x: (s[0][jnp.argmax(x, 1)], x @ s[1]),
        "s[0] is looked up along axis 2", X,
    ),
    "more rows the other way": (
        (2, 8, 8), lambda s, x: (_scan(s, x), jnp.concatenate([x, x]) @ s[1].T), "s[0]", X,
    ),
    "each both ways": (
        (2, 8, 8),
        lambda s, x: (x @ s[0], x[:9] @ s[0].T, x[:9] @ s[1], x @ s[1].T), "s[1]", X,
    ),
}  # fmt: skip


LOST: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "beside another layer": (lambda s, x: x @ (s[0] + jnp.cumsum(s[1], 0)), "cumsum"),
    "beside a row": (lambda s, x: x @ (s[0][:1] + jnp.cumsum(s[1], 0)), "cumsum"),
    "beside a layer that it was made of": (
        lambda s, x: x @ (s[0] + jnp.cumsum(s[0] + s[1], 0)), "cumsum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_a_layer_that_is_lost_beside_another_is_refused(name: str) -> None:
    product, primitive = LOST[name]
    for cut in (lambda p: p, lambda p: list(p)):  # a stack, and leaves of their own
        params = cut(_normal(0, 2, 8, 8))
        with pytest.raises(UnsupportedPrimitiveError, match=primitive):
            jq.find_weights(product, params, X)


@pytest.mark.parametrize("name", CROSSWISE)
def test_parts_used_crosswise_are_refused_by_name(name: str) -> None:
    shape, product, part, x = CROSSWISE[name]
    params, fn = {"s": _normal(0, *shape)}, lambda p, x: product(p["s"], x)
    with pytest.raises(WeightError, match="'s' is used crosswise") as error:
        jq.find_weights(fn, params, x)
    assert part in str(error.value) and "leaves of their own" in str(error.value)
    assert not jq.find_weights(fn, params, x, ignore="s")


def test_capture_refuses_them_too() -> None:
    with pytest.raises(WeightError, match="'s' is used crosswise"):
        jq.capture(lambda p, x: _chain(p["s"], x), {"s": _normal(0, 2, 8, 8)}, [X])


def _never(_: Any) -> None:
    pytest.fail("work has begun")


@pytest.mark.parametrize("sequential", ["weight", "block", None])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_of_another_function_is_refused_before_work(scheme: str, sequential: Any) -> None:
    params = {"s": _normal(0, 2, 8, 8)}
    straight = jq.find_weights(lambda p, x: _one_by_one([p["s"][0], p["s"][1]], x), params, X)
    plan = jq.plan(straight, {".*": SCHEMES[scheme]})
    for crossed in (_chain, lambda s, x: _chain([s[0].T, s[1]], x)):
        with pytest.raises(
            PlanError, match=r"'s' used along other axes.*s.* contracted over axis 2"
        ):
            jq.quantize(
                lambda p, x, fn=crossed: fn(p["s"], x), params, plan, [X],
                sequential=sequential, progress=_never,
            )  # fmt: skip


@pytest.mark.parametrize("sequential", ["weight", None])
def test_a_plan_decides_where_batches_have_other_majorities(sequential: Any) -> None:
    """The axes are those that find_weights has told, whatever the lengths of the batches."""
    fn = lambda p, a, b: (a @ p["w"], b @ p["w"].T)  # noqa: E731
    params, narrow = {"w": _normal(0, 8, 6)}, _other(X)[:, :6]
    plan = jq.plan(jq.find_weights(fn, params, X, narrow[:9]), {".*": SCHEMES["gptq"]})
    batches = [(X[:7], narrow), (X, narrow[:9])]  # most rows of the first meet the other axis
    q, report = jq.quantize(fn, params, plan, batches, sequential=sequential)
    assert report["w"].tokens == 7 + 48
    alone, _ = jq.quantize(lambda p, a: a @ p["w"], params, plan, [X[:7], X])
    np.testing.assert_array_equal(q["w"].codes, alone["w"].codes)
    seen = jq.capture(fn, params, batches)["w"]  # without a plan, the first batch does
    expected = narrow.T @ narrow + narrow[:9].T @ narrow[:9]
    np.testing.assert_allclose(seen.second_moment, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sequential", ["weight", None])
def test_layers_that_are_only_looked_up_have_no_moment(sequential: Any) -> None:
    params = {"s": _normal(0, 2, 20, 8)}
    fn = lambda p, x: jnp.tanh(p["s"][0][jnp.argmax(x, 1)]) @ p["s"][1].T  # noqa: E731
    weights = jq.find_weights(fn, params, X)
    plan = jq.plan(weights, {".*": SCHEMES["gptq"]})
    with pytest.raises(EvidenceError, match=r"'s.*' is only looked up in s\[0\]"):
        jq.quantize(fn, params, plan, [X], sequential=sequential, progress=_never)
    plan = jq.plan(
        weights, {".*": jq.Scheme(jq.grids.Uniform(4), 4, jq.rounding.GPTQ(), fallback=True)}
    )
    _, report = jq.quantize(fn, params, plan, [X], sequential=sequential)
    assert "nearest rounding stands in" in report["s"].note


def test_one_input_to_several_matrices_has_no_range_of_each() -> None:
    params = {"s": _normal(0, 2, 8, 8)}
    fn = lambda p, x: (_scan(p["s"], x), jnp.einsum("td,ldf->tlf", x, p["s"]))  # noqa: E731
    weights = jq.find_weights(fn, params, X)
    assert [use.together for use in weights["s"].uses] == [False, True]
    inputs = jq.Activations(jq.grids.Uniform(8), granularity="static")
    static = jq.Scheme(jq.grids.Uniform(8), activations=inputs)
    with pytest.raises(PlanError, match="one input meets several of its matrices"):
        jq.quantize(fn, params, jq.plan(weights, {".*": static}), [X], progress=_never)
