"""A weight is followed to its product through whatever does not depend on the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq
from jquant.errors import UnsupportedPrimitiveError
from tests.functions import _gram, _normal

X = _normal(9, 12, 4)
MASK = jnp.asarray(np.tri(4, 6), jnp.float32)


def _same(*paths: str) -> Callable[[Mapping[str, Any], Any], dict[str, Any]]:
    """All these weights see the input as it is."""
    return lambda params, x: {path: _gram(x) for path in paths}


MAPS = {
    "mask": lambda w: w * MASK,
    "where": lambda w: jnp.where(MASK > 0, w, 0),
    "clipped": lambda w: jnp.clip(w, -0.5, 0.5),
    "noise": lambda w: w + 0.1 * jax.random.normal(jax.random.key(0), w.shape, w.dtype),
    "dropconnect": lambda w: (
        w * jax.random.bernoulli(jax.random.key(0), 0.5, w.shape).astype(w.dtype)
    ),
    "standardised": lambda w: (w - w.mean(0)) / w.std(0),
    "squashed": jnp.tanh,
    "fake quantized": lambda w: jnp.round(w * 7).astype(jnp.int8).astype(jnp.float32) / 7,
}
FACTORS = {
    "a literal": lambda w, x: w / 4.0,
    "a constant": lambda w, x: w / jnp.sqrt(16.0),
    "its norm": lambda w, x: w / jnp.linalg.norm(w),
    "its largest singular value": lambda w, x: w / jnp.linalg.svd(w)[1][0],
    "computed from inputs": lambda w, x: x.mean() * w,
    "negative": lambda w, x: -w,
}


@pytest.mark.parametrize("name", MAPS)
def test_an_elementwise_map_is_followed_and_told(name: str) -> None:
    fn = lambda p, x: x @ MAPS[name](p["w"])  # noqa: E731
    params = {"w": _normal(0, 4, 6)}
    (use,) = jq.find_weights(fn, params, X)["w"].uses
    assert use.counted and use.through
    np.testing.assert_allclose(jq.capture(fn, params, [X])["w"].second_moment, _gram(X), rtol=1e-5)


@pytest.mark.parametrize("name", FACTORS)
def test_a_common_factor_is_a_view(name: str) -> None:
    fn = lambda p, x: x @ FACTORS[name](p["w"], x)  # noqa: E731
    params = {"w": _normal(0, 4, 6)}
    (use,) = jq.find_weights(fn, params, X)["w"].uses
    assert use.counted and not use.through
    np.testing.assert_allclose(jq.capture(fn, params, [X])["w"].second_moment, _gram(X), rtol=1e-5)


def _low_rank(params, x):
    moment = _gram(x)
    return {"w": moment, "a": moment, "b": params["a"].T @ moment @ params["a"]}


def _absorbed(params, x):  # q · k with both projections of one side multiplied beforehand
    heads = jnp.einsum("td,dhr->htr", x, params["q"])
    return {
        "q": _gram(x),
        "k": jnp.einsum("htr,hts->hrs", heads, heads),
    }


def _two_axes(params, x):
    return {"w": _gram(x), "b": _gram(jnp.einsum("td,df->tf", x, params["w"].reshape(4, 6)))}


def _chain(params, x):
    moments = []
    for w in params["s"].reshape(-1, 4, 4):
        moments.append(_gram(x))
        x = jnp.tanh(x @ w)
    return {"s": np.stack(moments).reshape(params["s"].shape)}


def _layers(stack, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]


def _halves(stack, x):
    """The second two of four layers out of a stack read backwards."""
    return _layers(stack[::-1][:2][::-1], _layers(stack[:2], x))


def _pieces(stack, x):
    x = _layers(stack[:3], x)
    return _layers(stack[4:], jnp.tanh(x @ stack[3]))


def _two_stacks(params, x):
    moments = {"s": [], "t": []}
    for w, v in zip(params["t"], params["s"][::-1], strict=True):
        moments["t"].append(_gram(x))
        moments["s"].append(_gram(x @ w))
        x = jnp.tanh(x @ w @ v)
    return {"t": jnp.stack(moments["t"]), "s": jnp.stack(moments["s"][::-1])}


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "a sum": (
        lambda p, x: x @ (p["w"] + p["v"]), {"w": (4, 6), "v": (4, 6)}, _same("w", "v"),
    ),
    "two uses, one masked": (
        lambda p, x: x[:1] @ p["w"] + x @ (p["w"] * MASK), {"w": (4, 6)},
        lambda p, x: {"w": _gram(x) + _gram(x[:1])},
    ),
    "a product": (
        lambda p, x: x @ (p["a"] @ p["b"]), {"a": (4, 3), "b": (3, 6)},
        lambda p, x: {"a": _gram(x), "b": p["a"].T @ _gram(x) @ p["a"]},
    ),
    "a product from the left": (
        lambda p, x: (p["b"] @ p["a"]) @ x.T, {"a": (3, 4), "b": (6, 3)},
        lambda p, x: {"a": _gram(x), "b": p["a"] @ _gram(x) @ p["a"].T},
    ),
    "a product turned and scaled": (
        lambda p, x: x @ (0.5 * (p["a"] @ p["b"]).T), {"a": (6, 3), "b": (3, 4)},
        lambda p, x: {"b": _gram(x), "a": p["b"] @ _gram(x) @ p["b"].T},
    ),
    "a low-rank adapter": (
        lambda p, x: x @ (p["w"] + 0.1 * (p["a"] @ p["b"])),
        {"w": (4, 6), "a": (4, 3), "b": (3, 6)}, _low_rank,
    ),
    "absorbed projections": (
        lambda p, x: jnp.einsum("td,hdc->htc", x, jnp.einsum("dhr,chr->hdc", p["q"], p["k"])),
        {"q": (4, 2, 3), "k": (5, 2, 3)}, _absorbed,
    ),
    "a product by heads": (
        lambda p, x: jnp.einsum("td,dhk->thk", x, (p["w"] @ p["b"]).reshape(4, 2, 3)),
        {"w": (4, 6), "b": (6, 6)}, _two_axes,
    ),
    "its own square": (
        lambda p, x: x @ (p["w"] @ p["w"]), {"w": (4, 4)},
        lambda p, x: {"w": _gram(x) + _gram(x @ p["w"])},
    ),
    "joined outputs": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"], jnp.zeros((4, 2), x.dtype)], 1),
        {"w": (4, 6), "v": (4, 3)}, _same("w", "v"),
    ),
    "joined inputs": (
        lambda p, x: jnp.concatenate([x, 2 * x], 1) @ jnp.concatenate([p["w"], p["v"]]),
        {"w": (4, 6), "v": (4, 6)}, lambda p, x: {"w": _gram(x), "v": 4 * _gram(x)},
    ),
    "padded inputs": (
        lambda p, x: jnp.pad(x, ((0, 0), (1, 2)), constant_values=1.0)
        @ jnp.pad(p["w"], ((1, 2), (0, 0))),
        {"w": (4, 6)}, _same("w"),
    ),
    "stacked and batched": (
        lambda p, x: jnp.einsum("etd,edf->etf", jnp.stack([x, 3 * x]), jnp.stack([p["w"], p["v"]])),
        {"w": (4, 6), "v": (4, 6)}, lambda p, x: {"w": _gram(x), "v": 9 * _gram(x)},
    ),
    "backwards": (
        lambda p, x: x @ p["w"][::-1], {"w": (4, 6)}, lambda p, x: {"w": _gram(x[:, ::-1])},
    ),
    "half of it backwards": (
        lambda p, x: x[:, :2] @ p["w"][::-1][:2], {"w": (4, 6)},
        lambda p, x: {"w": jnp.zeros((4, 4)).at[2:, 2:].set(_gram(x[:, 1::-1]))},
    ),
    "columns in another order": (
        lambda p, x: x @ p["w"][:, jnp.array([3, 1, 0])], {"w": (4, 6)}, _same("w"),
    ),
    "every other column": (
        lambda p, x: (x @ p["w"][:, ::2], 2 * x @ p["w"][:, 1::2]), {"w": (4, 6)},
        lambda p, x: {"w": jnp.stack([_gram(x), 4 * _gram(x)])},
    ),
    "every third column of seven": (
        lambda p, x: x @ p["w"][:, 1::3], {"w": (4, 7)}, _same("w"),
    ),
    "every other row": (
        lambda p, x: (x[:, :2] @ p["w"][::2], x[:, 2:] @ p["w"][1::2]), {"w": (4, 6)},
        lambda p, x: {"w": jnp.stack([_gram(x[:, :2]), _gram(x[:, 2:])])},
    ),
    "layers by turns": (
        lambda p, x: lax.scan(
            lambda h, w: (jnp.tanh(h @ w[0] @ w[1]), None), x, (p["s"][::2], p["s"][1::2])
        )[0],
        {"s": (2, 4, 4)},
        lambda p, x: {"s": jnp.stack([_gram(x), _gram(x @ p["s"][0])])},
    ),
    "read column by column": (
        lambda p, x: x @ lax.reshape(p["w"], (4, 4), dimensions=(1, 0)), {"w": (4, 4)}, _same("w"),
    ),
    "rows repeated": (
        lambda p, x: jnp.repeat(x, 2, 1) @ jnp.repeat(p["w"], 2, 0), {"w": (4, 6)},
        lambda p, x: {"w": 4 * _gram(x)},
    ),
    "a stack backwards": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["s"][::-1])[0],
        {"s": (2, 4, 4)},
        lambda p, x: {"s": jnp.stack([_gram(jnp.tanh(x @ p["s"][1])), _gram(x)])},
    ),
    "a stack beside another backwards": (
        lambda p, x: lax.scan(
            lambda h, w: (jnp.tanh(h @ w[0] @ w[1]), None), x, (p["t"], p["s"][::-1])
        )[0],
        {"s": (2, 4, 4), "t": (2, 4, 4)}, _two_stacks,
    ),
    "a stack scanned twice over": (
        lambda p, x: lax.scan(
            lambda h, pair: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, pair),
            x, p["s"].reshape(1, 2, 4, 4),
        )[0],
        {"s": (2, 4, 4)},
        lambda p, x: {"s": jnp.stack([_gram(x), _gram(jnp.tanh(x @ p["s"][0]))])},
    ),
    "stack axes merged": (
        lambda p, x: lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), x, p["s"].reshape(4, 4, 4)
        )[0],
        {"s": (2, 2, 4, 4)}, _chain,
    ),
    "halves of merged stack axes": (
        lambda p, x: _halves(p["s"].reshape(4, 4, 4), x), {"s": (2, 2, 4, 4)}, _chain,
    ),
    "a layer of merged stack axes, and the others": (
        lambda p, x: _pieces(p["s"].reshape(6, 4, 4), x), {"s": (2, 3, 4, 4)}, _chain,
    ),
    "stack axes swapped, then merged": (
        lambda p, x: _layers(p["s"].swapaxes(0, 1).reshape(4, 4, 4), x), {"s": (2, 2, 4, 4)},
        lambda p, x: {"s": _chain({"s": p["s"].swapaxes(0, 1)}, x)["s"].swapaxes(0, 1)},
    ),
    "three levels out of one axis": (
        lambda p, x: lax.scan(
            lambda h, a: (lax.scan(lambda h, b: (_layers(b, h), None), h, a)[0], None),
            x, p["s"].reshape(2, 2, 1, 4, 4),
        )[0],
        {"s": (4, 4, 4)}, _chain,
    ),
    "a window of merged in axes": (
        lambda p, x: x[:, :2] @ p["w"].reshape(6, 6)[3:5], {"w": (2, 3, 6)},
        lambda p, x: {"w": np.pad(_gram(x[:, :2]), ((3, 1), (3, 1)))},
    ),
    "stacks joined before a loop": (
        lambda p, x: lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), x, jnp.concatenate([p["s"], p["t"]])
        )[0],
        {"s": (1, 4, 4), "t": (1, 4, 4)},
        lambda p, x: {"s": _gram(x)[None], "t": _gram(jnp.tanh(x @ p["s"][0]))[None]},
    ),
    "a kernel stretched to three dimensions": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(1, 2, 2, 3, 4),
            jnp.repeat(p["w"].reshape(1, 1, 1, 4, 6), 2, 0),
            (1, 1, 1), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        ),
        {"w": (4, 6)},
        lambda p, x: {"w": _gram(x.reshape(2, 6, 4).sum(0))},
    ),
    "experts of twice the inputs": (
        lambda p, x: lax.ragged_dot(
            jnp.repeat(x, 2, 1), jnp.repeat(p["w"], 2, 1), jnp.array([5, 7])
        ),
        {"w": (2, 4, 6)},
        lambda p, x: {"w": 4 * jnp.stack([_gram(x[:5]), _gram(x[5:])])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_weight_sees_what_meets_it(name: str) -> None:
    fn, shapes, moments = CASES[name]
    params = {path: _normal(k, *shape) for k, (path, shape) in enumerate(shapes.items())}
    hand = moments(jax.tree.map(np.asarray, params), X)
    found = jq.capture(fn, params, [X])
    assert set(found) == set(hand)
    for path, evidence in found.items():
        np.testing.assert_allclose(
            evidence.second_moment, hand[path], rtol=2e-4, atol=2e-4, err_msg=path
        )
    # Stage by stage sees the same, and what it makes of it is what `apply` runs.
    plan = jq.plan(jq.find_weights(fn, params, X), {".*": jq.Scheme(jq.grids.Uniform(8))})
    gptq = jq.plan(plan.weights, {".*": jq.presets.int8_gptq()})
    qparams, report = jq.quantize(fn, params, gptq, [X], sequential=None)
    assert set(report) == set(hand)
    got, full = jax.jit(jq.apply(fn))(qparams, X), jax.jit(fn)(params, X)
    np.testing.assert_allclose(got, full, atol=0.3)
    staged, told = jq.quantize(fn, params, gptq, [X])
    for path in hand:
        assert staged[path].shape == params[path].shape
        assert report[path].tokens == told[path].tokens == int(found[path].count.min())


SORTED = jnp.array([2, 0, 1, 3])
# Values that depend on no input, made by more than arithmetic, on either side of a stage.
NETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "latents through a projection": (
        lambda p, x: jax.nn.relu(p["l"] @ p["q"]) @ jnp.tanh(x @ p["k"]).T,
        {"l": (3, 4), "q": (4, 5), "k": (4, 5)},
    ),
    "positions from a network": (
        lambda p, x: jnp.tanh(x @ p["w"])
        + (jax.nn.relu(jnp.ones((6, 2), x.dtype) @ p["a"]) @ p["b"])[0],
        {"w": (4, 6), "a": (2, 5), "b": (5, 6)},
    ),
    "a class token through a projection": (
        lambda p, x: jnp.concatenate([p["c"] @ p["t"], x]) @ p["w"],
        {"c": (1, 3), "t": (3, 4), "w": (4, 6)},
    ),
    "queries and keys without inputs": (
        lambda p, x: jax.nn.softmax(p["q"] @ p["k"].T) @ (x[:5] @ p["v"]),
        {"q": (3, 4), "k": (5, 4), "v": (4, 6)},
    ),
    "also of constant rows": (
        lambda p, x: jnp.tanh(x @ p["q"]) + jax.nn.relu(jnp.ones((9, 4), x.dtype) @ p["q"]).sum(0),
        {"q": (4, 6)},
    ),
    "a mask that was scattered": (
        lambda p, x: jnp.tanh(
            x[:1] @ p["w"] + x @ (p["w"] * jnp.ones((4, 6), x.dtype).at[2].set(0))
        )
        @ p["v"],
        {"w": (4, 6), "v": (6, 3)},
    ),
    "a mask by rank": (
        lambda p, x: jnp.tanh(x @ jnp.where(p["w"] >= jnp.sort(p["w"].ravel())[10], p["w"], 0))
        @ p["v"],
        {"w": (4, 6), "v": (6, 3)},
    ),
    "rows of an identity": (
        lambda p, x: jnp.tanh(x @ (p["w"] + jnp.eye(4, dtype=x.dtype)[SORTED])) @ p["v"],
        {"w": (4, 4), "v": (4, 3)},
    ),
    "a norm by iteration": (
        lambda p, x: jnp.tanh(x @ (p["w"] / jnp.linalg.norm(
            lax.fori_loop(0, 3, lambda _, u: u @ p["w"].T @ p["w"], jnp.ones((1, 4), x.dtype))
        ))) @ p["v"],
        {"w": (5, 4), "v": (4, 3)},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*second moment is rank deficient")
@pytest.mark.parametrize("sequential", ["weight", None])
@pytest.mark.parametrize("name", NETS)
def test_stages_see_the_rows_that_one_pass_sees(name: str, sequential: Any) -> None:
    fn, shapes = NETS[name]
    params = {path: _normal(k, *shape) for k, (path, shape) in enumerate(shapes.items())}
    x = X if name != "a norm by iteration" else _normal(3, 12, 5)
    found = jq.capture(fn, params, [x])
    assert set(found) == set(shapes)
    plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int8_gptq()})
    qparams, report = jq.quantize(fn, params, plan, [x], sequential=sequential)
    for path, evidence in found.items():
        assert report[path].tokens == int(evidence.count.min()), path
    got, full = jax.jit(jq.apply(fn))(qparams, x), jax.jit(fn)(params, x)
    np.testing.assert_allclose(got, full, atol=0.3)


def test_products_are_calibrated_as_the_function_written_without_them() -> None:
    params = {"a": _normal(0, 16, 8), "b": _normal(1, 8, 12)}
    x = _normal(2, 256, 16) * jnp.linspace(0.1, 3, 16, dtype=jnp.float32)
    together, apart = lambda p, x: x @ (p["a"] @ p["b"]), lambda p, x: (x @ p["a"]) @ p["b"]
    one, two = (jq.capture(fn, params, [x]) for fn in (together, apart))
    for path in params:
        np.testing.assert_allclose(
            one[path].second_moment, two[path].second_moment, rtol=1e-4, atol=1e-2
        )


def test_what_only_scales_or_shifts_is_no_weight() -> None:
    params = {"w": _normal(0, 4, 6), "scale": _normal(1, 12, 4), "shift": _normal(2, 12, 6),
              "gain": _normal(3, 1, 6), "norm": _normal(4, 3, 4)}  # fmt: skip

    def fn(p, x):
        x = jnp.einsum("td,td->td", x, p["scale"])
        x = lax.scan(lambda h, s: (h * (1 + s), None), x, p["norm"])[0]
        return x @ (p["w"] * p["gain"]) + p["shift"]

    weights = jq.find_weights(fn, params, X)
    assert list(weights) == ["w"]
    assert weights["w"].uses[0].through == ("mul",)
    assert set(weights.others) == {"scale", "shift", "gain", "norm"}


def _group_norm(p, x):
    y = x.reshape(3, 4, 2, 2)
    y = (y - y.mean((1, 3), keepdims=True)) / (1 + y.std((1, 3), keepdims=True))
    return (y * p["scale"] + p["shift"]).reshape(12, 4)


def _rotated(p, x):
    a, b = x.reshape(12, 2, 2)[..., 0], x.reshape(12, 2, 2)[..., 1]
    cos, sin = p["cos"][:12], p["sin"][:12]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _decaying(p, x):
    """A state that decays by each channel's own rates, from a learned start."""

    def step(h, row):
        return h * jnp.exp(p["rate"]) + row[:, None], h.sum(1)

    return lax.scan(step, p["start"], x)[1]


def _two_states(p, x):
    return lax.while_loop(
        lambda c: c[0] < 2,
        lambda c: (c[0] + 1, jnp.tanh(c[1] + x), c[1] * c[2]),
        (0, jnp.tanh(p["first"]), p["second"]),
    )[2]


# What of the parameters is beside the product with `w`, and what that meets of them and x.
BESIDE: dict[str, tuple[Any, dict[str, Any]]] = {
    "a group norm over two axes": (_group_norm, {"scale": (2, 2), "shift": (2, 1)}),
    "a scale of each position": (
        lambda p, x: (x.reshape(3, 4, 4) * p["scale"]).reshape(12, 4), {"scale": (4, 4)},
    ),
    "gains of two axes multiplied": (
        lambda p, x: x * (p["rows"] * p["columns"]), {"rows": (12, 1), "columns": (1, 4)},
    ),
    "tables of a rotation": (_rotated, {"cos": (16, 2), "sin": (16, 2)}),
    "decays and a start": (_decaying, {"rate": (4, 3), "start": (4, 3)}),
    "starts of a loop, one through a map": (_two_states, {"first": (12, 4), "second": (12, 4)}),
    "a temperature and a bias of scores": (
        lambda p, x: jax.nn.softmax(x @ x.T * p["heat"] + p["near"]) @ x,
        {"heat": (1, 1), "near": (12, 12)},
    ),
    "decays by an associative scan": (
        lambda p, x: lax.associative_scan(
            lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (p["rate"], x)
        )[1],
        {"rate": (12, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_a_product_is_no_weight(name: str) -> None:
    before, shapes = BESIDE[name]
    params = {path: _normal(k, *shape) for k, (path, shape) in enumerate(shapes.items())}
    params["w"] = _normal(9, 4, 6)
    fn = lambda p, x: before(p, x) @ p["w"]  # noqa: E731
    weights = jq.find_weights(fn, params, X)
    assert list(weights) == ["w"] and set(weights.others) == set(shapes)
    (found,) = jq.capture(fn, params, [X]).values()
    np.testing.assert_allclose(found.second_moment, _gram(before(params, X)), rtol=1e-4, atol=1e-4)


def test_the_first_state_of_a_recurrence_is_no_weight() -> None:
    params = {"h": _normal(0, 3, 4), "w": _normal(1, 4, 4), "u": _normal(2, 4, 4)}

    def fn(p, x):
        def cell(h, x):
            return jnp.tanh(h @ p["w"] + x @ p["u"]), h

        return lax.scan(cell, p["h"], x.reshape(4, 3, 4))

    weights = jq.find_weights(fn, params, X)
    assert list(weights) == ["u", "w"]
    assert weights.others == {"h": "it is used by 'scan' only"}


def test_spectral_normalisation_is_a_factor() -> None:
    module = nn.SpectralNorm(nn.Dense(6))
    variables = module.init(jax.random.key(0), X, update_stats=False)
    fn = lambda v, x: module.apply(v, x, update_stats=False)  # noqa: E731
    weights = jq.find_weights(fn, variables, X)
    found = jq.capture(fn, variables, [X])["params/layer_instance/kernel"]
    assert weights["params/layer_instance/kernel"].in_axes == (0,)
    assert float(found.count) == 12
    np.testing.assert_allclose(found.second_moment, _gram(X), rtol=1e-5)


def _modules() -> dict[str, tuple[Any, Any]]:
    return {
        "weight norm": (nn.WeightNorm(nn.Dense(6)), X),
        "lstm": (nn.RNN(nn.OptimizedLSTMCell(5)), X.reshape(3, 4, 4)),
        "transposed convolution": (
            nn.ConvTranspose(4, (3,), transpose_kernel=True), X.reshape(3, 4, 4),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["weight norm", "lstm", "transposed convolution"])
def test_layers_of_flax_that_make_their_kernels(name: str) -> None:
    module, x = _modules()[name]
    variables = module.init(jax.random.key(0), x)
    kernels = {
        jax.tree_util.keystr(k, simple=True, separator="/")
        for k, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]
        if jax.tree_util.keystr(k, simple=True, separator="/").endswith("kernel")
    }
    weights = jq.find_weights(module.apply, variables, x)
    assert set(weights) == kernels
    plan = jq.plan(weights, {".*": jq.presets.int8_gptq()})
    qparams, report = jq.quantize(module.apply, variables, plan, [x])
    assert all(row.error <= 1.05 * row.nearest_error for row in report.values())
    assert jnp.abs(jq.apply(module.apply)(qparams, x) - module.apply(variables, x)).max() < 0.1


@pytest.mark.parametrize(
    "pick",
    [
        pytest.param(lambda e, t: jax.vmap(lambda i: e[i])(t), id="vmap"),
        pytest.param(lambda e, t: lax.map(lambda i: e[i], t), id="map"),
        pytest.param(lambda e, t: jnp.stack([e[t[0]], e[t[1]]]), id="scalars"),
        pytest.param(lambda e, t: lax.dynamic_slice(e, (t[0], 0), (1, 4)), id="slice"),
        pytest.param(lambda e, t: jax.vmap(eqx.nn.Embedding(weight=e))(t), id="equinox"),
    ],
)
def test_a_lookup_of_one_token_at_a_time(pick) -> None:
    params, tokens = {"e": _normal(0, 7, 4), "w": _normal(1, 4, 6)}, jnp.array([3, 1])

    def fn(p, t):
        h = pick(p["e"], t) @ p["w"]
        return (h[:, :4]) @ p["e"].T

    kinds = [use.kind for use in jq.find_weights(fn, params, tokens)["e"].uses]
    assert kinds in (["lookup", "dot"], ["lookup", "lookup", "dot"])
    np.testing.assert_allclose(
        jq.capture(fn, params, [tokens])["w"].second_moment, _gram(pick(params["e"], tokens)),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_a_table_of_several_features_is_looked_up() -> None:
    params, tokens = {"e": _normal(0, 7, 3, 4), "w": _normal(1, 4, 6)}, jnp.array([3, 1, 0])

    def fn(p, t):
        rows = p["e"][t]
        return (rows * jnp.tanh(rows[:, :1])).sum(1) @ p["w"]

    weight = jq.find_weights(fn, params, tokens)["e"]
    assert (weight.in_axes, weight.out_axes) == ((1, 2), (0,))
    assert [use.kind for use in weight.uses] == ["lookup"]


HIDDEN = {
    "fft": (lambda w, x: x @ jnp.fft.fft(w).real, "fft"),
    "solve": (
        lambda w, x: x @ jnp.linalg.solve(w, jnp.eye(4, dtype=w.dtype)),
        "custom_linear_solve",
    ),
    "reduced": (lambda w, x: x @ w.reshape(4, 2, 2).sum(2), "reduce_sum"),
    "picked by data": (
        lambda w, x: jax.vmap(
            lambda r: r @ lax.switch((r[0] > 0).astype(int), [lambda: w, lambda: -w])
        )(x),
        "select_n",
    ),
    "masked by data": (lambda w, x: x @ jnp.where(x[:4, :4] > 0, w, 0), "select_n"),
    "rows in another order": (lambda w, x: x @ w[jnp.array([3, 1, 0, 2])], "dot_general"),
    "columns in order of size, beside another": (
        lambda w, x: x @ jnp.concatenate([jnp.sort(w), jnp.ones((4, 2), w.dtype)], 1),
        "sort",
    ),
    "every other row": (lambda w, x: x[:, :2] @ w[jnp.array([0, 2])], "dot_general"),
    "layers in another order": (
        lambda w, x: lax.scan(
            lambda h, w: (h @ w, None), x[:, :2], w.reshape(4, 2, 2)[jnp.array([2, 0])]
        )[0],
        "inputs or a loop go along",
    ),
    "sums by an associative scan": (
        lambda w, x: x @ lax.associative_scan(jnp.add, w.reshape(4, 4, 1))[..., 0],
        "lax.associative_scan does (instead of adding weights up, add up their products with",
    ),
    "products by an associative scan": (
        lambda w, x: x[:, :2] @ lax.associative_scan(jnp.matmul, w.reshape(4, 2, 2))[2],
        "multiply the input by one after the other, as in lax.scan",
    ),
    "a choice by an associative scan": (
        lambda w, x: x[:, :2] @ lax.associative_scan(lambda a, b: b, w.reshape(4, 2, 2))[2],
        "lax.associative_scan",
    ),
    "added after a transform": (
        lambda w, x: x @ (jnp.eye(4, dtype=w.dtype) + jnp.linalg.qr(w)[0]),
        "qr",
    ),
    "an iteration": (
        lambda w, x: x @ lax.fori_loop(0, 3, lambda _, w: 1.5 * w - 0.5 * w @ w.T @ w, w),
        "scan",
    ),
}


@pytest.mark.parametrize("join", [lambda a, b: a + b, lambda a, b: jnp.concatenate([a, b], 1)])
def test_a_weight_lost_beside_another_is_refused(join: Callable[[Any, Any], Any]) -> None:
    params = {"a": _normal(0, 4, 4), "b": _normal(1, 4, 4)}
    fn = lambda p, x: x @ join(p["b"], jnp.cumsum(p["a"], 0))  # noqa: E731
    with pytest.raises(UnsupportedPrimitiveError, match="'a'.*cumsum"):
        jq.find_weights(fn, params, X)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_cannot_be_followed_is_refused_and_never_lost(name: str) -> None:
    wrap, primitive = HIDDEN[name]
    params = {"deep": {"w": _normal(0, 4, 4)}}
    with pytest.raises(UnsupportedPrimitiveError, match="'deep/w'") as caught:
        jq.find_weights(lambda p, x: wrap(p["deep"]["w"], x), params, X)
    assert primitive in str(caught.value)


def test_codes_of_the_weight_before_a_map_are_told() -> None:
    fn = lambda p, x: x @ (p["w"] * MASK)  # noqa: E731
    params = {"w": _normal(0, 4, 6)}
    plan = jq.plan(jq.find_weights(fn, params, X), {".*": jq.presets.int4_gptq()})
    _, report = jq.quantize(fn, params, plan, [X])
    assert report["w"].note == "codes are of the weight before mul"


def _indexed(w, low, high):
    return jnp.take(w, jnp.arange(low, high), axis=1)


# Whose outputs meet how many inputs, and the moment of all of them.
SLICES: dict[str, tuple[Any, tuple[int, ...], int, Any]] = {
    "alike": (lambda w, x: (x @ w[:, :3], x @ w[:, 3:]), (4, 6), 1, _gram),
    "in two": (
        lambda w, x: (x @ w[:, :3], jnp.tanh(x) @ w[:, 3:]), (4, 6), 2,
        lambda x: _gram(x) + _gram(np.tanh(x)),
    ),
    "split in three": (
        lambda w, x: [y @ w for y, w in zip((x, 2 * x, 3 * x), jnp.split(w, 3, 1), strict=True)],
        (4, 6), 3, lambda x: 14 * _gram(x),
    ),
    "overlapping": (lambda w, x: (x @ w[:, :4], 2 * x @ w[:, 2:]), (4, 6), 2,
                    lambda x: 5 * _gram(x)),
    "at fixed positions": (
        lambda w, x: (x @ _indexed(w, 0, 3), 2 * x @ _indexed(w, 3, 6)), (4, 6), 2,
        lambda x: 5 * _gram(x),
    ),
    "at fixed positions, alike": (
        lambda w, x: (x @ _indexed(w, 0, 3), x @ _indexed(w, 3, 6)), (4, 6), 1, _gram,
    ),
    "crosswise in two layers": (
        lambda w, x: (x @ w[0][:, :3], 2 * x @ w[0][:, 3:], 2 * x @ w[1][:, :3], x @ w[1][:, 3:]),
        (2, 4, 6), 2, lambda x: np.stack([5 * _gram(x)] * 2),
    ),
    "of layers with inputs of their own": (
        lambda w, x: (x @ w[0][:, :3], x @ w[0][:, 3:], 2 * x @ w[1][:, :3]), (2, 4, 6), 1,
        lambda x: np.stack([_gram(x), 4 * _gram(x)]),
    ),
    "of experts": (
        lambda w, x: jax.vmap(lambda w, x: (x @ w[:, :2], 2 * x @ w[:, 2:]))(
            w, x.reshape(3, 4, 4)
        ),
        (3, 4, 6), 2, lambda x: np.stack([5 * _gram(y) for y in x.reshape(3, 4, 4)]),
    ),
    "of a convolution": (
        lambda w, x: [
            lax.conv_general_dilated(
                k * x[None], w[..., :2] if k == 1 else w[..., 2:], (1,), "VALID",
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
            for k in (1, 2)
        ],
        (1, 4, 6), 2, lambda x: 5 * _gram(x),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLICES)
def test_slices_of_a_fused_kernel_that_meet_different_inputs_are_told(name: str) -> None:
    product, shape, count, moment = SLICES[name]
    params = {"w": _normal(0, *shape)}
    fn = lambda p, x: product(p["w"], x)  # noqa: E731
    weights = jq.find_weights(fn, params, X)
    assert weights["w"].slices == count
    assert (f"meet {count} inputs" in weights["w"].note) == (count > 1)
    found = jq.capture(fn, params, [X])["w"]
    np.testing.assert_allclose(found.second_moment, moment(np.asarray(X)), rtol=1e-4)


def test_the_report_tells_of_slices() -> None:
    params = {"w": _normal(0, 4, 6)}
    fn = lambda p, x: SLICES["in two"][0](p["w"], x)  # noqa: E731
    plan = jq.plan(jq.find_weights(fn, params, X), {".*": jq.presets.int4_gptq()})
    _, report = jq.quantize(fn, params, plan, [X])
    assert "meet 2 inputs" in report["w"].note
