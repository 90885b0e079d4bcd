"""Weights that no token reaches, and corrections that have no drift: one behaviour, and told."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq
from jquant.calibration.evidence import Evidence
from jquant.errors import EvidenceError
from jquant.grids import Uniform
from jquant.jobs.report import WORSE
from jquant.rounding import GPTQ, AdaRound, Stochastic
from jquant.schemes.scheme import Scheme
from jquant.weights.activations import Activations
from tests.marks import covering

WIDTH = 8
X = jax.random.normal(jax.random.key(0), (64, WIDTH))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"w": normal(1, 3, WIDTH, WIDTH), "v": normal(2, WIDTH, WIDTH)}
FLAGS = jnp.array([True, False, True])

# Functions in which no token reaches the second matrix of `w`.


def branch(params: Any, x: jax.Array) -> jax.Array:
    h = x @ params["w"][0] + x @ params["w"][2]
    return lax.cond(x.max() > 1e6, lambda h: h @ params["w"][1], lambda h: h, h @ params["v"])


def einsum_experts(params: Any, x: jax.Array) -> jax.Array:
    slots = jnp.stack([x, jnp.zeros_like(x), 2.0 * x])
    return jnp.einsum("etd,edf->etf", slots, params["w"]).sum(0) @ params["v"]


def ragged_experts(params: Any, x: jax.Array) -> jax.Array:
    sizes = jnp.array([30, 0, x.shape[0] - 30], jnp.int32)
    return lax.ragged_dot(x, params["w"], sizes) @ params["v"]


def scanned_layers(params: Any, x: jax.Array) -> jax.Array:
    def turn(h: jax.Array, layer: Any) -> Any:
        w, flag = layer
        return lax.cond(flag, lambda h: jnp.tanh(h @ w), lambda h: h, h), None

    return lax.scan(turn, x, (params["w"], FLAGS))[0] @ params["v"]


def switched(params: Any, x: jax.Array) -> jax.Array:
    turns = [lambda h, k=k: h @ params["w"][k] for k in range(3)]
    at = (x[:, 0] > 0).astype(jnp.int32) * 2

    def choose(h: jax.Array, which: jax.Array) -> Any:
        return lax.switch(which, turns, h)

    h = lax.map(lambda pair: choose(*pair), (x, at))
    return h @ params["v"]


FUNCTIONS = [branch, einsum_experts, ragged_experts, scanned_layers, switched]
each = pytest.mark.parametrize("fn", FUNCTIONS)


def quantized(
    fn: Any, rounding: Any, *, params: Any = PARAMS, fallback: bool = True, **how: Any
) -> Any:
    weights = jq.find_weights(fn, params, X)
    scheme = Scheme(Uniform(3), None, rounding, fallback=fallback)
    return jq.quantize(fn, params, jq.plan(weights, {".*": scheme}), [X], **how)


def codes(tree: Any, path: str) -> np.ndarray:
    return np.asarray(tree[path].codes.astype(jnp.int32))


@pytest.mark.parametrize(("sequential", "fn"), covering(["weight", None], FUNCTIONS))
def test_what_no_token_reaches_is_refused_or_rounded_to_nearest(fn: Any, sequential: Any) -> None:
    with pytest.raises(EvidenceError, match=r"weight 'w.* has seen no tokens.*fallback=True"):
        quantized(fn, GPTQ(), fallback=False, sequential=sequential)
    found, report = quantized(fn, GPTQ(), sequential=sequential)
    row = report["w"]
    assert (row.fallback, row.tokens, report["v"].fallback) == (True, 0, False)
    assert "no token reached w" in row.note and np.isfinite(row.error)
    assert report.fallbacks == ("w",)
    assert any(
        line.startswith("weight 'w': nearest rounding stands in") for line in report.warnings
    )
    nearest, _ = quantized(fn, jq.rounding.Nearest())
    unseen, plain = codes(found, "w"), codes(nearest, "w")
    np.testing.assert_array_equal(unseen[1], plain[1])
    assert (unseen[0] != plain[0]).any() and (unseen[2] != plain[2]).any()


def whole_branch(params: Any, x: jax.Array) -> jax.Array:
    """The report's own input."""
    return lax.cond(x.max() > 1e6, lambda h: h @ params["b"], lambda h: h, x @ params["a"])


def test_a_branch_that_no_batch_takes() -> None:
    params = {"a": normal(3, WIDTH, WIDTH), "b": normal(4, WIDTH, WIDTH)}
    with pytest.raises(EvidenceError, match="weight 'b' has seen no tokens; pass batches that"):
        quantized(whole_branch, GPTQ(), params=params, fallback=False)
    for rounding in (GPTQ(), GPTQ(correction="qep"), AdaRound()):
        found, report = quantized(whole_branch, rounding, params=params)
        nearest, plain = quantized(whole_branch, jq.rounding.Nearest(), params=params)
        np.testing.assert_array_equal(codes(found, "b"), codes(nearest, "b"))
        assert report["b"].fallback and not report["a"].fallback
        # As without evidence: of the weights.
        w, q = params["b"], jq.dequantize(nearest)["b"]
        wanted = float(jnp.sum((w - q) ** 2) / jnp.sum(w**2))
        np.testing.assert_allclose(report["b"].error, wanted, rtol=1e-5)
        del plain


def test_every_unseen_weight_of_a_stage_is_refused_before_any_is_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jquant.jobs import stages

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a weight was rounded")

    monkeypatch.setattr(stages, "quantize_weight", never)
    with pytest.raises(
        EvidenceError, match="'w' has seen no tokens in 1 of 3 experts .* layers.*1"
    ):
        quantized(ragged_experts, GPTQ(), fallback=False, sequential=None)


def test_given_evidence_of_no_tokens_is_the_same() -> None:
    fn = einsum_experts
    evidence = jq.capture(fn, PARAMS, [X])
    weights = jq.find_weights(fn, PARAMS, X)
    plans = [jq.plan(weights, {".*": Scheme(Uniform(3), None, GPTQ(), fallback=f)}) for f in (0, 1)]
    with pytest.raises(EvidenceError, match="'w' has seen no tokens in 1 of 3"):
        jq.quantize(fn, PARAMS, plans[0], evidence=evidence)
    found, report = jq.quantize(fn, PARAMS, plans[1], evidence=evidence)
    assert report["w"].fallback and "in 1 of 3 experts or layers (1)" in report["w"].note
    same, _ = quantized(fn, GPTQ(), sequential=None)
    np.testing.assert_array_equal(codes(found, "w"), codes(same, "w"))


@pytest.mark.parametrize("fn", [einsum_experts, ragged_experts, branch, switched])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_of_all_others_stand_in(fn: Any, symmetric: bool) -> None:
    choice = Activations(Uniform(8, symmetric=symmetric), granularity="static")
    weights = jq.find_weights(fn, PARAMS, X)
    schemes = [Scheme(Uniform(4), None, activations=choice, fallback=f) for f in (False, True)]
    plans = [jq.plan(weights, {".*": scheme}) for scheme in schemes]
    with pytest.raises(EvidenceError, match="'w' has seen no tokens in 1 of 3.*fallback=True"):
        jq.quantize(fn, PARAMS, plans[0], [X])
    found, report = jq.quantize(fn, PARAMS, plans[1], [X])
    scales = np.asarray(found["w"].activations.params["scale"]).reshape(3)
    assert max(scales[0], scales[2]) <= scales[1] * 1.0001 and scales[1] < 2 * scales.max()
    assert "static ranges of all others stand in: no token reached w" in report["w"].note


def test_nothing_stands_in_for_the_ranges_of_what_nobody_saw() -> None:
    choice = Activations(Uniform(8, symmetric=True), granularity="static")
    scheme = Scheme(Uniform(4), None, activations=choice, fallback=True)
    plan = jq.plan(jq.find_weights(scanned_layers, PARAMS, X), {".*": scheme})
    with pytest.raises(EvidenceError, match=r"'w\[1\]' has seen no tokens; .*nothing stands in"):
        jq.quantize(scanned_layers, PARAMS, plan, [X])


# Corrections without drift.


def recurrent(params: Any, x: jax.Array) -> jax.Array:
    def turn(h: jax.Array, row: jax.Array) -> Any:
        h = jnp.tanh(row + h @ params["u"])
        return h, h

    return lax.scan(turn, jnp.zeros((8, WIDTH)), (x @ params["a"]).reshape(8, 8, WIDTH))[1]


def repeated(params: Any, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params["u"]), x @ params["a"])


def chosen(params: Any, x: jax.Array) -> jax.Array:
    h = x @ params["a"]
    return lax.cond(x.sum() > 1e6, jnp.tanh, lambda h: h @ params["u"], h)


def until(params: Any, x: jax.Array) -> jax.Array:
    h = x @ params["a"]
    return lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ params["u"])), (0, h)
    )[1]


def rearranged(params: Any, x: jax.Array) -> jax.Array:
    """The use stands outside, behind a loop whose rows may be other tokens in each network."""
    h = x @ params["a"]
    return lax.map(lambda some: some[jnp.argsort(some[:, 0])], h.reshape(8, 8, -1)) @ params["u"]


@pytest.mark.parametrize(
    "fn, where",
    [
        (recurrent, "inside a scan"), (repeated, "inside a scan"), (chosen, "inside a cond"),
        (until, "inside a while"), (rearranged, "behind a scan that moves tokens"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("correction", ["qep", "gptaq"])
def test_without_drift_a_correction_is_plain_gptq_and_says_so(
    fn: Any, where: str, correction: Any
) -> None:
    params = {"a": normal(5, WIDTH, WIDTH), "u": normal(6, WIDTH, WIDTH)}
    found, report = quantized(fn, GPTQ(correction=correction), params=params, fallback=False)
    plain, silent = quantized(fn, GPTQ(), params=params, fallback=False)
    np.testing.assert_array_equal(codes(found, "u"), codes(plain, "u"))
    said = f"not corrected: the drift of its inputs is not known {where}"
    assert said in report["u"].note and f"weight 'u': {said}" in report.warnings
    assert not report["a"].warnings and not silent.warnings


def test_groups_of_a_ragged_product_are_corrected() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["v"])
        sizes = jnp.bincount(jnp.argmax(h[:, :3], -1), length=3).astype(jnp.int32)
        return lax.ragged_dot(h[jnp.argsort(jnp.argmax(h[:, :3], -1))], params["w"], sizes)

    found, report = quantized(fn, GPTQ(correction="qep"), fallback=False)
    plain, _ = quantized(fn, GPTQ(), fallback=False)
    assert report["w"].warnings == () and (codes(found, "w") != codes(plain, "w")).any()


# What is told.


def test_an_error_above_that_of_nearest_rounding_is_a_warning() -> None:
    params = {"a": normal(7, WIDTH, WIDTH)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["a"]

    plan = jq.plan(jq.find_weights(fn, params, X), {".*": Scheme(Uniform(3), None, Stochastic())})
    _, report = jq.quantize(fn, params, plan, evidence={"a": Evidence.of(X)}, key=jax.random.key(0))
    row = report["a"]
    assert row.ratio > WORSE
    said = f"its error is {row.ratio:.2f} times that of nearest rounding"
    assert row.warnings == (said,) and said in row.note
    assert report.warnings == (f"weight 'a': {said}",)
    notes = " ".join(report.table().columns[-1].cells)  # type: ignore[arg-type]
    assert said in notes and re.search(r"\d", notes)
    assert report.to_json()["weights"]["a"]["warnings"] == (said,)  # type: ignore[index]
    _, fine = quantized(fn, GPTQ(), params=params)
    assert fine.warnings == ()


def test_what_is_told_outlives_the_process(tmp_path: Any) -> None:
    """A job that goes on after its last stage reports what the first one did."""
    reports = [
        quantized(scanned_layers, GPTQ(correction="qep"), work_dir=tmp_path)[1] for _ in range(2)
    ]
    assert reports[0].warnings == reports[1].warnings and len(reports[0].warnings) > 1
    assert reports[1]["w"].fallback


@pytest.mark.parametrize("rounding", [AdaRound(), GPTQ(groups="dynamic", order="natural")])
def test_only_the_expert_that_saw_nothing_is_rounded_to_nearest(rounding: Any) -> None:
    found, _ = quantized(ragged_experts, rounding)
    nearest, _ = quantized(ragged_experts, jq.rounding.Nearest())
    one, two = codes(found, "w"), codes(nearest, "w")
    np.testing.assert_array_equal(one[1], two[1])
    assert (one[0] != two[0]).any()


def test_a_compensation_of_what_no_token_reaches() -> None:
    params = {"a": normal(3, WIDTH, WIDTH), "b": normal(4, WIDTH, WIDTH)}
    weights = jq.find_weights(whole_branch, params, X)
    choice = jq.LoRC(2, metric="hessian")
    scheme = Scheme(Uniform(3), None, GPTQ(), choice, fallback=True)
    found, report = jq.quantize(whole_branch, params, jq.plan(weights, {".*": scheme}), [X])
    plain = Scheme(Uniform(3), None, jq.rounding.Nearest(), jq.LoRC(2), fallback=True)
    wanted, _ = jq.quantize(whole_branch, params, jq.plan(weights, {".*": plain}), [X])
    one, two = (jq.dequantize(tree)["b"] for tree in (found, wanted))
    np.testing.assert_allclose(one, two, atol=1e-2)
    assert report["b"].fallback and report["b"].error < report["b"].nearest_error
