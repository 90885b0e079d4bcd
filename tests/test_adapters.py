"""Training beside codes: the function at the start, gradients, memory, files, folding, refusals."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from functions import CASES, Case, _normal
from marks import mostly_slow

import jquant as jq
from jquant.adapters import LoRA, Scales, Whole
from jquant.errors import EvidenceError, ObjectiveError, PlanError, TreeError, WeightError
from jquant.grids import Uniform
from jquant.rounding import GPTQ
from jquant.weights.qtensor import QTensor, is_qtensor

KEY = jax.random.key(0)
FEW = ("linen-scan-remat-tied", "vmapped-experts")
EVERY = pytest.mark.parametrize(
    "case", mostly_slow(CASES, lambda case: case.name in FEW, ids=lambda case: case.name)
)


def quantized(case: Case, **more: Any) -> Any:
    weights = jq.find_weights(case.fn, case.params, case.batches[0])
    plan = jq.plan(weights, {".*": jq.Scheme(Uniform(4), **more)})
    return jq.quantize(case.fn, case.params, plan)[0]


def moved(trainable: Any, size: float = 0.1) -> Any:
    """As after some steps."""
    leaves, structure = jax.tree.flatten(trainable)
    news = [leaf + size * _normal(k, *leaf.shape) for k, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, news)


def matrix(scheme: Any = None, width: int = 16) -> tuple[Any, Any, Any, Any]:
    """`(fn, params, qparams, x)` of a product and a bias."""
    params = {"w": _normal(1, width, 8), "b": _normal(2, 8)}

    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["w"] + p["b"])

    x = _normal(3, 5, width)
    scheme = scheme or jq.Scheme(Uniform(4), 8)
    plan = jq.plan(jq.find_weights(fn, params, x), {".*": scheme})
    return fn, params, jq.quantize(fn, params, plan)[0], x


def same(one: Any, two: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def close(one: Any, two: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two)


# The function, and its gradients


@EVERY
def test_before_the_first_step_it_is_the_function(case: Case) -> None:
    q, x = quantized(case), case.batches[0]
    merged = jq.merge(*jq.adapt(q, rank=1, key=KEY))
    assert jax.tree.structure(merged, is_leaf=is_qtensor) == jax.tree.structure(q, is_qtensor)
    same(jq.dequantize(merged), jq.dequantize(q))
    # Another program, so another order of sums.
    close(jq.apply(case.fn)(merged, x), jq.apply(case.fn)(q, x))


def losses(case: Case, frozen: Any) -> tuple[Any, Any]:
    """The loss of what is trained, on codes and on arrays."""

    def loss(fn: Any, params: Any) -> Any:
        out = jax.tree.leaves(fn(params, case.batches[0]))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in out)

    on_codes = lambda t: loss(jq.apply(case.fn), jq.merge(frozen, t))  # noqa: E731
    return on_codes, lambda t: loss(case.fn, jq.dequantize(jq.merge(frozen, t)))


def derivatives(case: Case, frozen: Any, trainable: Any) -> tuple[Any, Any]:
    """Those of what is trained, on codes and on arrays; none is zero."""
    both = losses(case, frozen)
    if case.name == "plain-cond-while":  # a while loop has forward derivatives only
        ones = jax.tree.map(jnp.ones_like, trainable)
        on_codes, on_arrays = (jax.jvp(loss, (trainable,), (ones,)) for loss in both)
    else:
        on_codes, on_arrays = (jax.jit(jax.grad(loss))(trainable) for loss in both)
        assert jax.tree.structure(on_codes) == jax.tree.structure(trainable)
        assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(on_codes))
    return on_codes, on_arrays


@EVERY
@pytest.mark.parametrize("rank", [1, None])
def test_gradients_are_those_of_dequantized_weights(case: Case, rank: Any) -> None:
    more = {} if rank else {"compensation": jq.LoRC(1)}
    adapters = [LoRA(rank), Scales()]
    frozen, trainable = jq.adapt(quantized(case, **more), {".*": adapters}, key=KEY)
    close(*derivatives(case, frozen, moved(trainable)))


def test_training_moves_the_adapters_and_nothing_else() -> None:
    fn, _, q, x = matrix()
    frozen, trainable = jq.adapt(q, rank=2, key=KEY)
    optimizer, y = optax.adam(1e-2), _normal(9, 5, 8) / 4

    def loss(t: Any, frozen: Any) -> Any:
        return jnp.mean((jq.apply(fn)(jq.merge(frozen, t), x) - y) ** 2)

    @jax.jit
    def step(t: Any, state: Any, frozen: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(t, frozen)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, state = optimizer.update(grads, state, t)
        return optax.apply_updates(t, updates), state, value

    state, seen = optimizer.init(trainable), []
    for _ in range(40):
        trainable, state, value = step(trainable, state, frozen)
        seen.append(float(value))
    assert seen[-1] < 0.75 * seen[0]
    merged = jq.merge(frozen, trainable)
    same(dataclasses.replace(merged["w"], compensation=None), q["w"])


def test_second_and_forward_derivatives_are_those_of_arrays() -> None:
    fn, _, q, x = matrix()
    case = Case("matrix", fn, None, [x], lambda: {})
    frozen, trainable = jq.adapt(q, {"w": [LoRA(2), Scales()]}, key=KEY)
    trainable, (on_codes, on_arrays) = moved(trainable), losses(case, frozen)
    along = moved(jax.tree.map(jnp.zeros_like, trainable), 1.0)

    def both(f: Any) -> Any:
        forward = jax.jvp(f, (trainable,), (along,))[1]
        curved = jax.jvp(jax.grad(f), (trainable,), (along,))[1]
        return forward, curved, jax.vmap(jax.grad(f))(jax.tree.map(lambda a: a[None], trainable))

    close(jax.jit(lambda: both(on_codes))(), jax.jit(lambda: both(on_arrays))())


# Memory


# In the others activations have the shape of a weight, or weights are used as arrays.
PLAIN = [c for c in CASES if c.name not in ("plain-cond-while", "vmapped-experts", "views")]


@pytest.mark.parametrize("case", mostly_slow(PLAIN, lambda case: case.name == FEW[0], ids=str))
def test_nothing_of_a_weights_size_waits_for_the_backward_pass(case: Case) -> None:
    """No array of floats is kept that has the shape of a weight, or of one as it is decoded."""
    frozen, trainable = jq.adapt(quantized(case), rank=1, key=KEY)
    leaves = jax.tree.leaves(frozen.params, is_leaf=is_qtensor)
    weights = {q.shape for q in leaves if is_qtensor(q)}
    canonical = {q.codes.shape for q in leaves if is_qtensor(q)}
    on_codes, _ = losses(case, frozen)
    _, back = jax.vjp(on_codes, trainable)
    kept = [r.shape for r in jax.tree.leaves(back) if jnp.issubdtype(r.dtype, jnp.floating)]
    assert kept and not (weights | canonical) & set(kept)


@pytest.mark.optimized
@pytest.mark.parametrize("scanned", [False, True])
def test_a_step_takes_codes_adapters_and_activations(scanned: bool) -> None:
    """The compiled program holds a few decoded weights at a time, of 24."""
    width, layers = 256, 12

    def layer(x: Any, w: Any) -> tuple[Any, None]:
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    def fn(p: Any, x: Any) -> Any:
        if scanned:
            return jax.lax.scan(layer, x, p)[0]
        for k in range(layers):
            x, _ = layer(x, p[f"{k:02d}"])
        return x

    params: Any = {
        f"{k:02d}": {
            name: _normal(2 * k + j, width, width) / 16 for j, name in enumerate(("up", "down"))
        }
        for k in range(layers)
    }
    if scanned:
        params = jax.tree.map(lambda *a: jnp.stack(a), *params.values())
    x = _normal(99, 8, width)
    plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_nearest(64)})
    frozen, trainable = jq.adapt(jq.quantize(fn, params, plan)[0], rank=2, key=KEY)

    def loss(t: Any, frozen: Any) -> Any:
        return jnp.sum(jq.apply(fn)(jq.merge(frozen, t), x) ** 2)

    program = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile()
    one = 4 * width * width
    assert program.memory_analysis().temp_size_in_bytes < (12 if scanned else 6) * one


# What is trained


def test_factors_that_are_there_are_trained_on() -> None:
    """LoftQ: the term that makes up for rounding is where training begins."""
    fn, _, q, x = matrix(jq.Scheme(Uniform(2), 8, compensation=jq.LoRC(3)))
    frozen, trainable = jq.adapt(q, rank=None)
    assert jax.tree.map(jnp.shape, trainable) == {"w": {"left": (8, 3), "right": (3, 16)}}
    assert frozen.params["w"].compensation is None
    same(jq.apply(fn)(jq.merge(frozen, trainable), x), jq.apply(fn)(q, x))
    coded = jq.LoRC(3, Uniform(8, symmetric=True))
    _, _, q, x = matrix(jq.Scheme(Uniform(2), 8, compensation=coded))
    same(jq.dequantize(jq.merge(*jq.adapt(q, rank=None))), jq.dequantize(q))


def test_a_new_term_stands_beside_one_that_stays() -> None:
    fn, _, q, x = matrix(jq.Scheme(Uniform(2), 8, compensation=jq.LoRC(3)))
    frozen, trainable = jq.adapt(q, rank=2, key=KEY)
    merged = jq.merge(frozen, moved(trainable))
    assert merged["w"].compensation.rank == 5
    left, right = (moved(trainable)["w"][name] for name in ("left", "right"))
    close(jq.dequantize(merged)["w"], jq.dequantize(q)["w"] + (left @ right).T)


def test_alpha_scales_the_term() -> None:
    _, _, q, _ = matrix()
    frozen, trainable = jq.adapt(q, {"w": LoRA(2, alpha=6)}, key=KEY)
    trainable = moved(trainable)
    change = jq.dequantize(jq.merge(frozen, trainable))["w"] - jq.dequantize(q)["w"]
    close(change, 3 * (trainable["w"]["left"] @ trainable["w"]["right"]).T)


def test_scales_keep_codes_and_types_and_whole_leaves_their_dtype() -> None:
    fn, params, q, x = matrix(jq.Scheme(Uniform(4, scale_dtype="float16"), 8))
    q = q | {"b": q["b"].astype(jnp.bfloat16)}
    frozen, trainable = jq.adapt(q, {"w": Scales(), "b": Whole()})
    assert set(trainable["w"]) <= set(q["w"].params) and "scale" in trainable["w"]
    same(jq.merge(frozen, trainable), q)
    merged = jq.merge(frozen, moved(trainable))
    same(merged["w"].codes, q["w"].codes)
    assert merged["w"].params["scale"].dtype == jnp.float16 and merged["b"].dtype == jnp.bfloat16
    new, old = (tree["w"].params["scale"].astype(jnp.float32) for tree in (merged, q))
    ratio = new / old
    np.testing.assert_allclose(ratio, 1 + moved(trainable)["w"]["scale"], rtol=2e-3)


def test_a_term_beside_a_weight_that_is_not_quantized() -> None:
    """For comparison: where its layout is told, a plain array gets one too."""
    case = next(c for c in CASES if c.name == "vmapped-experts")
    weights = jq.find_weights(case.fn, case.params, case.batches[0])
    rules = {path: LoRA(1) for path in weights}
    frozen, trainable = jq.adapt(case.params, rules, key=KEY, weights=weights)
    same(jq.merge(frozen, trainable), case.params)
    q = quantized(case)
    low = jq.adapt(q, rules, key=KEY)
    assert jax.tree.map(jnp.shape, low[1]) == jax.tree.map(jnp.shape, trainable)
    change = lambda f, t, p: jax.tree.map(jnp.subtract, jq.dequantize(jq.merge(f, t)), p)  # noqa: E731
    close(
        change(frozen, moved(trainable), case.params),
        change(low[0], moved(low[1]), jq.dequantize(q)),
    )


def test_keys_are_of_paths() -> None:
    _, _, q, _ = matrix()
    _, one = jq.adapt({"a": q["w"], "b": q["w"]}, rank=2, key=KEY)
    _, two = jq.adapt({"b": q["w"]}, rank=2, key=KEY)
    same(one["b"], two["b"])
    assert np.any(np.asarray(one["a"]["right"] != one["b"]["right"]))


# Files


def test_saved_and_resumed(tmp_path: Path) -> None:
    fn, _, q, x = matrix()
    frozen, trainable = jq.adapt(q, {"w": LoRA(2, alpha=4), "b": Whole()}, key=KEY)
    optimizer = optax.adam(1e-2)
    trainable = moved(trainable)
    state = {"trainable": trainable, "optimizer": optimizer.init(trainable)}
    merged = jq.merge(frozen, trainable)
    jq.save(tmp_path / "merged", merged)
    same(jq.apply(fn)(jq.load(tmp_path / "merged"), x), jq.apply(fn)(merged, x))
    jq.save(tmp_path / "frozen", frozen.params)
    jq.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", state)
    again = dataclasses.replace(frozen, params=jq.load(tmp_path / "frozen"))
    for back in (jq.load(tmp_path / "state"), restored):
        same(back["trainable"], trainable)
        same(jq.merge(again, back["trainable"]), merged)
    same(restored, state)


# Folding


def test_folded_into_floats_and_into_codes() -> None:
    fn, _, q, x = matrix(jq.presets.int8_nearest(8))
    frozen, trainable = jq.adapt(q, {"w": LoRA(2), "b": Whole()}, key=KEY)
    trainable = moved(trainable)
    merged = jq.merge(frozen, trainable)
    loss = lambda p: jnp.mean(jq.apply(fn)(p, x) ** 2)  # noqa: E731
    floats, report = jq.fold(frozen, trainable, loss=loss)
    same(floats, jq.dequantize(merged))
    assert report["w"].error == 0 and report["w"].bits == 32
    assert report.loss == pytest.approx(report.loss_before, rel=1e-5)
    codes, report = jq.fold(frozen, trainable, jq.presets.int8_nearest(8), loss=loss)
    assert isinstance(codes["w"], QTensor) and codes["w"].compensation is None
    array = jq.dequantize(merged)["w"]
    error = jnp.sum((jq.dequantize(codes)["w"] - array) ** 2) / jnp.sum(array**2)
    assert report["w"].error == pytest.approx(float(error), rel=1e-3)
    assert report["w"].bits < report["w"].bits_before and report.loss != report.loss_before
    same(codes["b"], merged["b"])


@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_folding_by_gptq_takes_evidence_and_is_better_for_it() -> None:
    fn, _, q, _ = matrix()
    frozen, trainable = jq.adapt(q, rank=2, key=KEY)
    trainable, x = moved(trainable), _normal(5, 64, 16) * jnp.linspace(0.1, 3.0, 16)
    array = jq.dequantize(jq.merge(frozen, trainable))
    evidence = jq.capture(fn, array, [x])
    scheme = jq.Scheme(Uniform(3), 8, GPTQ())
    with pytest.raises(EvidenceError, match=r"'w': GPTQ.*pass evidence=jq\.capture"):
        jq.fold(frozen, trainable, scheme)
    with pytest.raises(EvidenceError, match=r"second moment must be \(16, 16\), got \(8, 8\)"):
        wrong = {"w": jq.Evidence.of(jnp.ones((4, 8)))}
        jq.fold(frozen, trainable, scheme, evidence=wrong)
    tree, _ = jq.fold(frozen, trainable, scheme, evidence=evidence)
    plain, _ = jq.fold(frozen, trainable, jq.Scheme(Uniform(3), 8))
    cost = lambda p: float(jnp.sum((x @ (jq.dequantize(p)["w"] - array["w"])) ** 2))  # noqa: E731
    assert cost(tree) < cost(plain)


def test_what_has_only_trained_scales_stays_as_it_is() -> None:
    _, _, q, _ = matrix()
    frozen, trainable = jq.adapt(q, {"w": Scales()})
    tree, report = jq.fold(frozen, moved(trainable), jq.Scheme(Uniform(2)))
    same(tree, jq.merge(frozen, moved(trainable)))
    assert len(report) == 0


# Refusals


REFUSED = {
    "none quantized": (lambda q, p: jq.adapt(p, key=KEY), "no weight of qparams is quantized"),
    "too high": (
        lambda q, p: jq.adapt(q, rank=9, key=KEY),
        "rank 9 on weight 'w' of 8 × 16: pass a rank of at most 8",
    ),
    "no key": (lambda q, p: jq.adapt(q), r"weight 'w': LoRA\(8\) begins at random; pass key"),
    "no such path": (lambda q, p: jq.adapt(q, {"v": LoRA(1)}, key=KEY), "'v' matches no leaf.*'w'"),
    "no expression": (lambda q, p: jq.adapt(q, {"(": LoRA(1)}), "is not a regular expression"),
    "no adapter": (lambda q, p: jq.adapt(q, {"w": 8}), r"expected a jq\.LoRA.*got 8"),
    "a class": (lambda q, p: jq.adapt(q, {"w": LoRA}), r"expected a jq\.LoRA"),
    "two": (lambda q, p: jq.adapt(q, {"w": [LoRA(1), LoRA(2)]}, key=KEY), "two adapters of a kind"),
    "not quantized": (
        lambda q, p: jq.adapt(q, {"b": LoRA(1)}, key=KEY),
        "'b', which is not quantized; pass weights=",
    ),
    "no scales": (lambda q, p: jq.adapt(p, {"w": Scales()}), "'w', which is not quantized"),
    "whole codes": (lambda q, p: jq.adapt(q, {"w": Whole()}), "'w', which is quantized: its codes"),
    "shadowed": (
        lambda q, p: jq.adapt(q, {".*": LoRA(1), "w": Scales()}, key=KEY),
        "decides nothing: earlier rules already match",
    ),
    "no term": (lambda q, p: jq.adapt(q, rank=None), r"'w' has no low-rank term that LoRA\(None\)"),
    "nothing": (lambda q, p: jq.adapt(q, {}, key=KEY), "train nothing; give some leaves"),
    "all kept": (lambda q, p: jq.adapt(q, {".*": jq.keep}), "train nothing; give some leaves"),
    "no rules": (lambda q, p: jq.adapt(q, LoRA(1), key=KEY), "rules must be path expression"),
    "no path": (lambda q, p: jq.adapt(q, {0: LoRA(1)}, key=KEY), "0 is not a regular expression"),
    "no weights": (
        lambda q, p: jq.adapt(q, {"w": LoRA(1)}, key=KEY, weights=["w"]),
        "weights must be what jq.find_weights",
    ),
    "a plan for weights": (
        lambda q, p: jq.adapt(q, {"w": LoRA(1)}, key=KEY, weights={"w": jq.Scheme(Uniform(4))}),
        "weights must be what jq.find_weights.*got Scheme.*for 'w'",
    ),
    "other weights": (
        lambda q, p: jq.adapt(
            {"w": p["w"].T},
            {"w": LoRA(1)},
            key=KEY,
            weights=jq.find_weights(lambda p, x: x @ p["w"], p, jnp.ones((1, 16))),
        ),
        r"'w' of shape \(16, 8\), qparams of \(8, 16\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_path_and_remedy(name: str) -> None:
    _, params, q, _ = matrix()
    call, message = REFUSED[name]
    with pytest.raises(PlanError, match=message):
        call(q, params)


def test_scales_of_eight_bits_and_integers_are_refused() -> None:
    _, _, q, _ = matrix(jq.Scheme(jq.grids.MX()), 32)
    with pytest.raises(PlanError, match="has no group parameters that can be trained"):
        jq.adapt(q, {"w": Scales()})
    with pytest.raises(PlanError, match="'n', which holds int32, which has no gradients"):
        jq.adapt({"n": jnp.zeros(3, jnp.int32)}, {"n": Whole()})


@pytest.mark.parametrize("kind", [0, -1, 2.0, True])
def test_choices_are_checked(kind: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {kind!r}")):
        LoRA(kind)
    with pytest.raises(ValueError, match="alpha"):
        LoRA(1, alpha=-1.0)
    with pytest.raises(ValueError, match="leave alpha out"):
        LoRA(None, alpha=2.0)


def test_arrays_that_do_not_fit_are_refused() -> None:
    _, _, q, _ = matrix()
    frozen, t = jq.adapt(q, rank=2, key=KEY)
    w = t["w"]
    wrong = {
        "'w', 'right' is missing": {"w": {"left": w["left"]}},
        "'w', 'left' is missing": {},
        "'w', 'more' is no trainable array": {"w": w | {"more": w["left"]}},
        "'v', 'left' is no trainable array": t | {"v": w},
        r"'w', 'left' must be floats \(8, 2\), got \(2, 16\)": {"w": w | {"left": w["right"]}},
        r"got \(8, 2\) of int32": {"w": w | {"left": w["left"].astype(jnp.int32)}},
        "must be path → name → array": [w],
        "must be path → name → array, as": {"w": w["left"]},
    }
    for message, trainable in wrong.items():
        with pytest.raises(TreeError, match=message):
            jq.merge(frozen, trainable)
    with pytest.raises(TypeError, match="frozen first, got dict"):
        jq.merge(t, frozen)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [0, jnp.ones(3), jax.random.split(KEY)])
def test_what_is_no_key_is_refused(key: Any) -> None:
    _, _, q, _ = matrix()
    frozen, trainable = jq.adapt(q, rank=2, key=KEY)
    for call in (
        lambda: jq.adapt(q, rank=2, key=key),
        lambda: jq.fold(frozen, trainable, key=key),
        lambda: jq.compress(trainable, Uniform(4, True, "S3"), key),
    ):
        with pytest.raises(ValueError, match="key must be one random key, such as"):
            call()
    jq.adapt(q, rank=2, key=jax.random.PRNGKey(0))  # keys of the old kind are keys


def test_folding_what_is_no_adapted_weight_is_refused() -> None:
    _, _, q, _ = matrix()
    frozen, trainable = jq.adapt(q, rank=2, key=KEY)
    with pytest.raises(TreeError, match=r"adapted already; pass jq\.merge"):
        jq.adapt(frozen, rank=1, key=KEY)
    with pytest.raises(PlanError, match=r"fold: plan must be a jq\.Scheme.*got 'int4'"):
        jq.fold(frozen, trainable, "int4")  # type: ignore[arg-type]
    for wrong in ([1], {"w": jnp.ones((16, 16))}):
        with pytest.raises(EvidenceError, match=r"evidence must be path → jq\.Evidence"):
            jq.fold(frozen, trainable, jq.Scheme(Uniform(4)), evidence=wrong)  # type: ignore[arg-type]
    diverged = jax.tree.map(lambda a: a * jnp.nan, trainable)
    for plan in (None, jq.Scheme(Uniform(4))):
        with pytest.raises(WeightError, match="'w': with what was trained it is NaN"):
            jq.fold(frozen, diverged, plan)
    with pytest.raises(ObjectiveError, match=r"one number, got shape \(8,\)"):
        jq.fold(frozen, trainable, loss=lambda p: p["b"])
    qep, evidence = jq.Scheme(Uniform(3), 8, GPTQ(correction="qep")), jq.Evidence.of(jnp.eye(16))
    with pytest.raises(EvidenceError, match="'w': .*corrects for inputs that have drifted"):
        jq.fold(frozen, trainable, qep, evidence={"w": evidence})
    with pytest.raises(ValueError, match="loss must be a function of the tree, got 3"):
        jq.fold(frozen, trainable, loss=3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="plan names 'b', which has no trained low-rank term"):
        jq.fold(frozen, trainable, {"b": jq.Scheme(Uniform(4))})
    with pytest.raises(PlanError, match=r"expected a jq\.Scheme, got 4"):
        jq.fold(frozen, trainable, {"w": 4})  # type: ignore[dict-item]
    with pytest.raises(PlanError, match="is random; pass key"):
        jq.fold(frozen, trainable, jq.Scheme(Uniform(4), rounding=jq.rounding.Stochastic()))


# Other people's functions


@pytest.mark.slow
def test_beside_the_weights_of_a_torch_module() -> None:
    pytest.importorskip("torchax")
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    fn, params = jq.models.from_torch(net)
    x = _normal(1, 3, 16)
    plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.Scheme(Uniform(4))})
    q, _ = jq.quantize(fn, params, plan)
    frozen, trainable = jq.adapt(q, rank=2, key=KEY)
    case = Case("torch", fn, params, [x], lambda: {})
    trainable, (on_codes, on_arrays) = moved(trainable), losses(case, frozen)
    close(jax.grad(on_codes)(trainable), jax.grad(on_arrays)(trainable))
