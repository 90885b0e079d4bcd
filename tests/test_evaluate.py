"""The measures against float64 oracles on a model that is one table: `logits = table[token]`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import evaluate
from jquant.evaluate import logits
from jquant.trees.lazy import Lazy

VOCAB = 40
FULL = 2.0 * jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))
MOVED = FULL + 0.3 * jax.random.normal(jax.random.key(1), (VOCAB, VOCAB))
TOKENS = np.random.default_rng(2).integers(0, VOCAB, (7, 33)).astype(np.int32)


def table(params: jax.Array, tokens: jax.Array) -> jax.Array:
    return params[tokens]


def log_softmax(table: Any) -> np.ndarray:
    z = np.asarray(table, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def oracle(tokens: np.ndarray) -> tuple[float, float, float, float]:
    p, q = log_softmax(FULL), log_softmax(MOVED)
    kl = (np.exp(p) * (p - q)).sum(-1)[tokens].mean()
    same = (p.argmax(-1) == q.argmax(-1))[tokens].mean()
    now, then = tokens[:, :-1], tokens[:, 1:]
    return kl, math.exp(-p[now, then].mean()), math.exp(-q[now, then].mean()), same


def test_compare_equals_the_oracle() -> None:
    got = evaluate.compare(table, FULL, MOVED, [TOKENS])
    kl, full, quantized, same = oracle(TOKENS)
    assert got.kl == pytest.approx(kl, rel=1e-5)
    assert got.perplexity_full == pytest.approx(full, rel=1e-6)
    assert got.perplexity_quantized == pytest.approx(quantized, rel=1e-6)
    assert got.agreement == same and 0 < same < 1
    assert got.tokens == TOKENS.size
    assert "nats/token" in str(got)


def test_the_single_measures_are_those_of_compare() -> None:
    both = evaluate.compare(table, FULL, MOVED, [TOKENS])
    assert evaluate.kl(table, FULL, MOVED, [TOKENS]) == both.kl
    assert evaluate.agreement(table, FULL, MOVED, [TOKENS]) == both.agreement
    alone = evaluate.perplexity(table, FULL, [TOKENS])
    assert alone == pytest.approx(both.perplexity_full, rel=1e-6)


def test_how_text_is_batched_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate.compare(table, FULL, MOVED, [TOKENS])
    monkeypatch.setattr(logits, "TOKENS_PER_FORWARD", 3 * 33)
    for cuts in ([3], [1, 2, 6], [5]):
        parts = iter(np.split(TOKENS, cuts))
        got = evaluate.compare(table, FULL, MOVED, parts)
        # nothing but how the compiler sums within one token
        assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(whole), rel=1e-5)


def test_equal_rows_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def counted(params: jax.Array, tokens: jax.Array) -> jax.Array:
        traced.append(tokens.shape)
        return params[tokens]

    monkeypatch.setattr(logits, "TOKENS_PER_FORWARD", 2 * 33)
    evaluate.compare(counted, FULL, MOVED, [TOKENS])  # 2 + 2 + 2 + 1 rows
    first = len(traced)
    evaluate.compare(counted, FULL, MOVED, [TOKENS[:4], TOKENS[4:5]])
    assert set(traced) == {(2, 33)} and len(traced) == first


def test_lengths_may_vary_and_progress_counts_positions() -> None:
    done: list[int] = []
    parts = [TOKENS[:, :20], TOKENS[:2, 20:]]
    got = evaluate.compare(table, FULL, MOVED, parts, progress=done.append)
    assert done == [140, 166] and got.tokens == 166
    assert got.kl == pytest.approx((140 * oracle(parts[0])[0] + 26 * oracle(parts[1])[0]) / 166)


def test_an_unchanged_model_is_at_distance_zero() -> None:
    got = evaluate.compare(table, FULL, FULL, [TOKENS])
    assert got.kl == 0.0 and got.agreement == 1.0
    assert got.perplexity_full == got.perplexity_quantized
    assert evaluate.perplexity(table, jnp.zeros((VOCAB, VOCAB)), [TOKENS]) == pytest.approx(VOCAB)


def test_forbidden_tokens_and_hopeless_models_are_numbers() -> None:
    masked = FULL.at[:, 0].set(-jnp.inf)  # never predicted by both: contributes nothing
    rows = np.full((1, 8), 5)
    assert evaluate.kl(table, masked, masked, [rows]) == 0.0
    sure = jnp.zeros((VOCAB, VOCAB)).at[:, 1].set(1e5)
    assert evaluate.perplexity(table, sure, [rows]) == math.inf


def test_low_precision_logits_are_measured_in_float32() -> None:
    def low(params: jax.Array, tokens: jax.Array) -> jax.Array:
        return params.astype(jnp.bfloat16)[tokens]

    rounded = FULL.astype(jnp.bfloat16).astype(jnp.float32)
    assert evaluate.perplexity(low, FULL, [TOKENS]) == pytest.approx(
        evaluate.perplexity(table, rounded, [TOKENS]), rel=1e-6
    )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"batches is empty"),
        (np.zeros((0, 4), np.int32), r"batches is empty"),
        ([np.zeros((0, 4), np.int32)], r"batches is empty"),
        (TOKENS, r"batch 0 is int32 \(33,\).*wrap one array as \[tokens\]"),
        ([TOKENS, TOKENS[0]], r"batch 1 .*one row as tokens\[None\]"),
        ([TOKENS[:, :1]], r"T >= 2"),
        ([TOKENS.astype(np.float32)], r"batch 0 is float32"),
    ],
)
def test_batches_that_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.compare(table, FULL, MOVED, batches)
    with pytest.raises(ValueError, match=message):
        evaluate.perplexity(table, FULL, batches)


def test_several_models_are_compared_with_one_run_of_the_full_one() -> None:
    ran: list[str] = []

    def counted(params: jax.Array, tokens: jax.Array) -> jax.Array:
        jax.debug.callback(lambda first: ran.append(first), params[0, 0])
        return params[tokens]

    models = {"moved": MOVED, "half": FULL / 2}
    found = evaluate.compare_all(counted, FULL, models, [TOKENS])
    jax.effects_barrier()
    assert sum(float(first) == float(FULL[0, 0]) for first in ran) == len(ran) / 3 > 0
    assert list(found) == list(models)
    for name, model in models.items():
        assert found[name] == evaluate.compare(table, FULL, model, [TOKENS])
    with pytest.raises(ValueError, match="models is empty"):
        evaluate.compare_all(table, FULL, {}, [TOKENS])
    broken = FULL.at[int(TOKENS[0, 4]), 3].set(jnp.nan)
    with pytest.raises(ValueError, match="bad: the logits give nan at row 0, token 4"):
        evaluate.compare_all(table, FULL, {"moved": MOVED, "bad": broken}, [TOKENS])


def test_bad_models_are_refused() -> None:
    broken = FULL.at[int(TOKENS[0, 4]), 3].set(jnp.nan)
    with pytest.raises(ValueError, match=r"qparams: the logits give nan at row 0, token 4"):
        evaluate.compare(table, FULL, broken, [TOKENS])
    with pytest.raises(ValueError, match=r"params: the logits give nan"):
        evaluate.perplexity(table, broken, [TOKENS])
    forbidden = FULL.at[:, 3].set(-jnp.inf)  # only the quantized model rules token 3 out
    with pytest.raises(ValueError, match=r"give inf"):
        evaluate.compare(table, FULL, forbidden, [np.zeros((1, 4), np.int32)])
    with pytest.raises(ValueError, match=r"gave \(7, 40\); expected logits \[7, 33, vocabulary\]"):
        evaluate.perplexity(lambda p, t: p[t[:, 0]], FULL, [TOKENS])


# Outputs of any kind


def test_output_error_is_relative_and_over_all_floats() -> None:
    def fn(params, x):
        return {"a": x @ params, "b": (2 * x @ params).astype(jnp.bfloat16), "n": jnp.arange(3)}

    x, w = jnp.ones((4, 3)), jnp.ones((3, 2))
    batches = [x, (3 * x,)]
    assert evaluate.output_error(fn, w, w, batches) == 0.0
    assert abs(evaluate.output_error(fn, w, 0.5 * w, batches) - 0.25) < 1e-3
    done: list[int] = []
    evaluate.output_error(fn, w, w, batches, progress=done.append)
    assert done == [1, 2]


@pytest.mark.parametrize("case", ["no batches", "no floats", "zeros", "not finite"])
def test_outputs_without_a_size_are_refused(case: str) -> None:
    x = {"zeros": 0.0, "not finite": jnp.inf}.get(case, 1.0) * jnp.ones((2, 2))
    fn = (lambda p, x: jnp.arange(2)) if case == "no floats" else (lambda p, x: x * p)
    with pytest.raises(ValueError, match="finite floats that are not all 0"):
        evaluate.output_error(fn, 1.0, 1.0, [] if case == "no batches" else [x])


def test_lazy_parameters_are_read() -> None:
    values = np.ones((3, 2), np.float32)
    x = np.ones((2, 3), np.float32)
    lazy = Lazy(values.shape, values.dtype, values.__getitem__, "w")
    params = {"w": lazy}
    assert evaluate.output_error(lambda p, x: x @ p["w"], params, params, [x]) == 0
