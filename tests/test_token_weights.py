"""Tokens weighed in calibration: evidence with weights is evidence of the weighed tokens."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq
from jquant.errors import EvidenceError, PlanError, WorkDirError

LENGTHS = (12, 5, 3, 0)
MASK = np.arange(12) < np.array(LENGTHS)[:, None]


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


X = _normal(0, 4, 12, 8)
P = {
    "w": _normal(1, 8, 8) / 3, "b": _normal(2, 8, 8) / 3, "s": _normal(3, 3, 8, 8) / 3,
    "h": _normal(4, 4, 4), "c": _normal(5, 3, 8, 8) / 3, "x": _normal(6, 3, 8, 8) / 3,
}  # fmt: skip


def of_mask(x: Any, mask: Any) -> Any:
    return mask


def _attention(p: Any, x: Any, mask: Any) -> Any:
    """Causal, with heads, and the residual stream flattened in between."""
    batch, time, _ = x.shape
    q, k, v = (y.reshape(batch, time, 2, 4) for y in (x @ p["w"], x @ p["b"], x @ p["s"][0]))
    score = jnp.einsum("bthd,bshd->bhts", q, k) + jnp.where(mask, 0.0, -1e9)[:, None, None]
    score = jnp.where(jnp.tril(jnp.ones((time, time), bool)), score, -1e9)
    y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(score), v).reshape(batch * time, 8)
    return x + (jnp.tanh(y) @ p["s"][1]).reshape(x.shape)


def _time_major(p: Any, x: Any, mask: Any) -> Any:
    return jnp.tanh(x.swapaxes(0, 1).reshape(-1, 8) @ p["w"]) @ p["b"]


def _experts(p: Any, x: Any, mask: Any) -> Any:
    return jax.vmap(lambda w: jnp.tanh(x @ w))(p["x"]).sum(0) @ p["b"]


def _layers(p: Any, x: Any, mask: Any) -> Any:
    def layer(h: Any, w: Any) -> Any:
        return h + jax.nn.relu(h @ w), None

    return lax.scan(jax.checkpoint(layer), x, p["s"])[0] @ p["b"]


def _heads(p: Any, x: Any, mask: Any) -> Any:
    """One weight for all heads; rotated halves, joined again."""
    y = x.reshape(4, -1, 2, 4) @ p["h"] if x.shape[0] == 4 else x.reshape(1, -1, 2, 4) @ p["h"]
    y = jnp.concatenate([-y[..., 2:], y[..., :2]], -1)
    return y.reshape(*x.shape) @ p["b"]


def _loop(p: Any, x: Any, mask: Any) -> Any:
    return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x) @ p["b"]


def _pooled(p: Any, x: Any, mask: Any) -> Any:
    """A mean over real tokens: one row for each sequence, in which none is real for the last."""
    mask = jnp.asarray(mask, jnp.float32)
    share = mask / jnp.maximum(mask.sum(1, keepdims=True), 1)
    return jnp.einsum("bt,btd->bd", share, jnp.tanh(x @ p["w"])) @ p["b"]


def _first(p: Any, x: Any, mask: Any) -> Any:
    return jnp.tanh(x @ p["w"])[:, 0] @ p["b"]


def _grouped(p: Any, x: Any, mask: Any) -> Any:
    sizes = jnp.full(3, x.shape[0] * x.shape[1]).at[1:].set(0)
    return lax.ragged_dot(x.reshape(-1, 8), p["x"], sizes) @ p["b"]


def _causal_conv(p: Any, x: Any, mask: Any) -> Any:
    return lax.conv_general_dilated(
        x, p["c"], (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC")
    )


def _joined(p: Any, x: Any, mask: Any) -> Any:
    """Each of two weights meets a share of the features."""
    return jnp.concatenate([x, jnp.tanh(x)], -1) @ jnp.concatenate([p["w"], p["b"]])


def _class_token(p: Any, x: Any, mask: Any) -> Any:
    """A learned token before the others, read alone in the end; a pooled one behind them."""
    batch, time, _ = x.shape
    first = jnp.broadcast_to(p["h"].reshape(2, 8)[:1], (batch, 1, 8))
    last = jnp.where(mask[..., None], x, 0).sum(1, keepdims=True)
    x = jnp.concatenate([first, x, last], 1)
    mask = jnp.pad(mask, ((0, 0), (1, 1)), constant_values=True)
    q, k, v = x @ p["w"], x @ p["b"], x @ p["s"][0]
    score = jnp.where(mask[:, None], jnp.einsum("btd,bsd->bts", q, k), -1e9)
    y = (jnp.tanh(x + jax.nn.softmax(score) @ v)) @ p["s"][1]
    return y[:, 0] @ p["s"][2], y[:, 1:-1] @ p["x"][0]


def _registers(p: Any, x: Any, mask: Any) -> Any:
    """As many learned tokens as a batch has others, which are dropped."""
    rows = jnp.broadcast_to(_normal(7, 12, 8), (x.shape[0], 12, 8))
    y = jnp.tanh(jnp.concatenate([rows, x], 1) @ p["w"])
    return y[:, :12] @ p["b"]


FUNCTIONS = [_attention, _time_major, _experts, _layers, _heads, _loop, _pooled, _first, _grouped,
             _causal_conv, _joined, _class_token, _registers]  # fmt: skip


def _alone(fn: Any, **kwargs: Any) -> dict[str, jq.Evidence]:
    """Evidence of every sequence by itself, without its padding."""
    batches = [(X[k : k + 1, :n], jnp.ones((1, n), bool)) for k, n in enumerate(LENGTHS) if n]
    total: dict[str, jq.Evidence] = {}
    for batch in batches:
        found = jq.capture(fn, P, [batch], **kwargs)
        total = {path: total[path].merge(e) if total else e for path, e in found.items()}
    return total


def _close(found: jq.Evidence, wanted: jq.Evidence, factor: float = 1.0) -> None:
    np.testing.assert_allclose(found.count, factor * np.asarray(wanted.count), rtol=1e-6)
    for name in ("second_moment", "total"):
        one, other = (np.asarray(getattr(e, name)) for e in (found, wanted))
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, factor * other, atol=3e-6 * factor * scale)
    assert found.abs_max is not None and wanted.abs_max is not None
    np.testing.assert_allclose(found.abs_max, wanted.abs_max, rtol=1e-5)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_masked_evidence_is_that_of_the_sequences_without_padding(fn: Any) -> None:
    garbage = jnp.where(MASK[..., None], X, 1e3)
    wanted = _alone(fn, spread=True)
    found = jq.capture(fn, P, [(garbage, MASK)], token_weights=of_mask, spread=True)
    threes = jq.capture(fn, P, [(garbage, MASK)], token_weights=[3.0 * MASK])
    assert found.keys() == wanted.keys() and found
    for path, evidence in found.items():
        _close(evidence, wanted[path])
        _close(threes[path], wanted[path], 3.0)
        one, other = evidence.spread, wanted[path].spread
        assert one is not None and other is not None
        np.testing.assert_allclose(one.high, other.high, rtol=1e-5)
        assert int(one.counts.sum()) == int(other.counts.sum())


def test_whole_weights_count_tokens_as_often() -> None:
    weights = np.array(jax.random.randint(jax.random.key(1), MASK.shape, 0, 4))
    rows = np.repeat(np.asarray(X).reshape(-1, 8), weights.reshape(-1), axis=0)

    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["w"].astype(x.dtype)) @ p["b"].astype(x.dtype)

    for dtype in (jnp.float32, jnp.bfloat16):
        found = jq.capture(fn, P, [X.astype(dtype)], token_weights=[weights])
        wanted = jq.capture(fn, P, [jnp.asarray(rows, dtype)])
        for path in ["w"] if dtype == jnp.bfloat16 else found:
            _close(found[path], wanted[path])


def _blocks(p: Any, x: Any, mask: Any) -> Any:
    """Token by token."""
    h = x + jnp.tanh(x @ p["w"])
    return lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, p["s"])[0] @ p["b"]


def _plan(preset: Any, fn: Any = _blocks) -> jq.Plan:
    return jq.plan(jq.find_weights(fn, P, X, MASK), {".*": preset})


@pytest.mark.parametrize("sequential", ["weight", None])
@pytest.mark.parametrize("preset", [jq.presets.int4_gptq(), jq.presets.int4_qep()])
def test_codes_are_those_of_the_real_tokens_alone(preset: Any, sequential: Any) -> None:
    if "drift" in preset.needs and sequential is None:
        return
    plan = _plan(preset)
    real = (X[MASK][None], np.ones((1, sum(LENGTHS)), bool))
    wanted, told = jq.quantize(_blocks, P, plan, [real], sequential=sequential)
    padded = jnp.where(MASK[..., None], X, jnp.nan)  # what a softmax over nothing leaves
    found, report = jq.quantize(
        _blocks, P, plan, [(padded, MASK)], sequential=sequential, token_weights=of_mask
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()
    assert [row.tokens for row in report.values()] == [row.tokens for row in told.values()]
    plain, _ = jq.quantize(_blocks, P, plan, [(X, MASK)], sequential=sequential)
    assert any((plain[k].codes != found[k].codes).any() for k in plan)


def _routed(p: Any, x: Any, mask: Any) -> Any:
    rows = jnp.tanh(x @ p["w"]).reshape(-1, 8)
    best = jnp.argsort(rows[:, 0])[:20]
    return rows.at[best].add(rows[best] @ p["b"])


def _slots(p: Any, x: Any, mask: Any) -> Any:
    """Capacity slots filled by a product with ones and zeros."""
    rows = x.reshape(-1, 8)
    slot = jax.nn.one_hot(jnp.cumsum(rows[:, 0] > 0) - 1, 24, dtype=x.dtype)
    return jnp.einsum("td,tc->cd", rows, slot) @ p["b"]


def _recurrent(p: Any, x: Any, mask: Any) -> Any:
    def step(h: Any, row: Any) -> Any:
        h = jnp.tanh(row + h @ p["b"])
        return h, h

    return lax.scan(step, jnp.zeros((4, 8), x.dtype), x.swapaxes(0, 1))[1]


def _strided(p: Any, x: Any, mask: Any) -> Any:
    y = lax.conv_general_dilated(
        x, jnp.ones((2, 8, 8), x.dtype), (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y @ p["b"]


def _mixed(p: Any, x: Any, mask: Any) -> Any:
    return jnp.einsum("bdt,tf->bdf", x.swapaxes(1, 2)[..., :8], p["b"])


def _shifted(p: Any, x: Any, mask: Any) -> Any:
    return (x[:, 1:] - x[:, :-1]) @ p["b"]


def _channels_first(p: Any, x: Any, mask: Any) -> Any:
    return x.swapaxes(1, 2) @ p["b"]


LOST = [_routed, _slots, _recurrent, _strided, _mixed, _shifted]


@pytest.mark.parametrize("fn", LOST, ids=lambda fn: fn.__name__)
def test_rows_of_unknown_tokens_are_refused_before_work_or_counted_and_told(fn: Any) -> None:
    plan = _plan(jq.presets.int4_nearest(), fn)
    calls: list[Any] = []
    for sequential in ("weight", None):
        with pytest.raises(EvidenceError, match=r"weight 'b'.*unmatched='count'"):
            jq.quantize(
                fn, P, plan, [(X, MASK)], sequential=sequential, token_weights=of_mask,
                progress=calls.append,
            )  # fmt: skip
        counted = jq.TokenWeights(of_mask, unmatched="count")
        _, report = jq.quantize(
            fn, P, plan, [(X, MASK)], sequential=sequential, token_weights=counted
        )
        assert "counted" in report["b"].note
        assert all("counted" not in row.note for path, row in report.items() if path != "b")
    assert not calls
    evidence = jq.capture(fn, P, [(X, MASK)])
    known = {"b": evidence["b"]}
    jq.quantize(fn, P, plan, [(X, MASK)], evidence=known, token_weights=of_mask)


def test_an_input_of_other_axes_than_the_weights_is_not_taken_for_tokens() -> None:
    with pytest.raises(EvidenceError, match=r"input 0 of shape \(4, 8, 12\)"):
        jq.capture(_channels_first, P, [(X.swapaxes(1, 2), MASK)], token_weights=of_mask)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([-1.0 * MASK], r"batch 0: .* hold -1\.0 at \(0, 0\)"),
        ([np.where(MASK, np.nan, 1.0)], r"hold nan at"),
        ([MASK[:, :5]], r"must have the leading axes of one of the inputs"),
        (["real"], r"must be a bool, integer or float array"),
        ([1j * MASK], r"must be a bool, integer or float array"),
        ([0 * MASK], r"0 for all tokens"),
        ([], r"has 0 arrays, and there are more batches"),
        ([MASK, MASK], r"more arrays than there are batches"),
        (3, r"must be a function"),
    ],
)
def test_weights_that_are_no_weights_are_refused(weights: Any, message: str) -> None:
    plan = _plan(jq.presets.int4_gptq())
    with pytest.raises(EvidenceError, match=message):
        jq.capture(_blocks, P, [(X, MASK)], token_weights=weights)
    with pytest.raises(EvidenceError, match=message):
        jq.quantize(_blocks, P, plan, [(X, MASK)], token_weights=weights)
    with pytest.raises(EvidenceError, match="unmatched must be"):
        jq.TokenWeights(of_mask, "drop")  # type: ignore[arg-type]


def test_few_real_tokens_are_warned_of() -> None:
    plan = _plan(jq.presets.int4_gptq())
    mask = np.arange(12) < np.array([3, 0, 0, 0])[:, None]
    with pytest.warns(UserWarning, match="3 tokens for 8 input channels"):
        jq.quantize(_blocks, P, plan, [(X, mask)], token_weights=of_mask)


def test_other_weights_are_another_job(tmp_path: Any) -> None:
    plan = _plan(jq.presets.int4_gptq())
    call = (_blocks, P, plan, [(X, MASK)])
    first, _ = jq.quantize(*call, work_dir=tmp_path, token_weights=iter([MASK]))
    again, _ = jq.quantize(*call, work_dir=tmp_path, token_weights=of_mask)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()
    for weights in (None, [2 * MASK], [~MASK]):
        with pytest.raises(WorkDirError, match="the data"):
            jq.quantize(*call, work_dir=tmp_path, token_weights=weights)


def test_an_estimate_weighs_tokens_too() -> None:
    plan = _plan(jq.presets.int4_gptq())
    for sequential in ("weight", None):
        found = jq.estimate(
            _blocks, P, plan, [(X, MASK)], sequential=sequential, token_weights=of_mask
        )
        assert found.evidence_bytes > 0
    with pytest.raises(EvidenceError, match="weight 'b'"):
        routed = _plan(jq.presets.int4_gptq(), _routed)
        jq.estimate(_routed, P, routed, [(X, MASK)], token_weights=of_mask)


@pytest.mark.parametrize("objective", [jq.objectives.KL(), jq.objectives.Fisher()])
def test_objectives_weigh_tokens(objective: Any) -> None:
    found, wanted = _normal(7, 4, 12, 11), _normal(8, 4, 12, 11)
    real = objective(found[MASK], wanted[MASK])
    spoiled = jnp.where(MASK[..., None], found, jnp.nan)
    np.testing.assert_allclose(
        objective(spoiled, wanted, token_weights=jnp.asarray(MASK)), real, rtol=1e-5
    )
    half = 0.5 * MASK.astype(np.float32)
    np.testing.assert_allclose(objective(found, wanted, token_weights=half), real, rtol=1e-5)
    whole = np.ones(MASK.shape, bool)
    np.testing.assert_allclose(
        objective(found, wanted, token_weights=whole), objective(found, wanted), rtol=1e-6
    )
    with pytest.raises(ValueError, match="leading axes of the logits"):
        objective(found, wanted, token_weights=MASK[:, :3])


def test_learned_roundings_see_real_tokens_only() -> None:
    scheme = jq.Scheme(
        jq.grids.Uniform(3), None,
        jq.rounding.DiscQuant(descent=jq.rounding.Descent(4, 1e-2)),
    )  # fmt: skip
    plan, key = _plan(scheme), jax.random.key(0)
    kl = jq.objectives.KL()

    def learned(batch: Any, weights: Any) -> Any:
        return jq.quantize(
            _blocks, P, plan, [batch], objective=kl, key=key, token_weights=weights
        )[1].traces[0]  # fmt: skip

    wanted = learned((X[MASK][None], np.ones((1, sum(LENGTHS)), bool)), None)
    padded = (jnp.where(MASK[..., None], X, 50.0), MASK)
    found = learned(padded, of_mask)
    np.testing.assert_allclose(found.looks[0], wanted.looks[0], rtol=1e-4)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-2)
    for other in (jq.objectives.MSE(), jq.objectives.Reconstruction()):
        with pytest.raises(PlanError, match="cannot be told what tokens count"):
            jq.quantize(_blocks, P, plan, [padded], objective=other, key=key, token_weights=of_mask)


EMBED = {"e": _normal(9, 11, 8), "0": {"w": _normal(10, 8, 8) / 3}, "1": {"w": _normal(11, 8, 8)}}
TOKENS = np.asarray(jax.random.randint(jax.random.key(3), (4, 12), 0, 11))


def _logits(p: Any, tokens: Any, mask: Any) -> Any:
    h = p["e"][tokens]
    h = h + jnp.tanh(h @ p["0"]["w"])
    h = jnp.where(mask[..., None], h, 20.0)
    return (h + jnp.tanh(h @ p["1"]["w"])) @ p["e"].T


def _scores(of: Any, batches: Any, weights: Any) -> dict[str, tuple[float, ...]]:
    plan = jq.plan(
        jq.find_weights(_logits, EMBED, TOKENS, MASK),
        {"./w": jq.presets.int4_nearest(8), "e": jq.keep},
    )
    choice = jq.allocation.candidates(plan, (3, 4))
    return dict(of(_logits, EMBED, choice, batches, token_weights=weights).values)


ALONE = [(TOKENS[k : k + 1, :n], np.ones((1, n), bool)) for k, n in enumerate(LENGTHS) if n]


@pytest.mark.parametrize("name", ["exact_kl", "pmpq", "kl_gradient", "taylor", "tdmpq"])
def test_scores_are_those_of_the_sequences_without_padding(name: str) -> None:
    key = {"key": jax.random.key(0)} if name == "tdmpq" else {}

    def of(*args: Any, **kwargs: Any) -> Any:
        return getattr(jq.allocation, name)(*args, **key, **kwargs)

    found = _scores(of, [(TOKENS, MASK)], of_mask)
    if name in ("taylor", "tdmpq"):  # means over batches of another size: one batch is one sequence
        wanted = _scores(of, [(TOKENS[:1], MASK[:1])], None)
        found = _scores(of, [(TOKENS[:1], MASK[:1])], 0.5 * MASK[None, :1])
        with pytest.raises(PlanError, match="default loss only"):
            _scores(
                lambda *a, **k: of(*a, loss=lambda y, *_: y.sum(), **k), [(TOKENS, MASK)], of_mask
            )
    else:
        wanted = _scores(of, ALONE, None)
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], rtol=2e-3)


def test_fisher_counts_a_token_as_often_as_its_weight_says() -> None:
    def of(*args: Any, **kwargs: Any) -> Any:
        return jq.allocation.fisher(*args, key=jax.random.key(0), **kwargs)

    plain = _scores(of, [(TOKENS, np.ones_like(MASK))], None)
    for weights in (np.ones(MASK.shape), 3.0 * np.ones(MASK.shape)):
        found = _scores(of, [(TOKENS, np.ones_like(MASK))], [weights])
        for path in plain:
            np.testing.assert_allclose(found[path], plain[path], rtol=1e-3)
    masked = _scores(of, [(TOKENS, MASK)], of_mask)
    spoiled = np.where(MASK, TOKENS, 10)
    again = _scores(of, [(spoiled, MASK)], of_mask)
    assert masked.keys() == again.keys()


def test_adadim_compares_real_tokens_only() -> None:
    plan = _plan(jq.Scheme(jq.grids.Uniform(3), 4))
    real = (X[MASK][None], np.ones((1, sum(LENGTHS)), bool))
    wanted_plan, wanted = jq.allocation.adadim(_blocks, P, plan, [real])
    padded = jnp.where(MASK[..., None], X, 50.0)
    found_plan, found = jq.allocation.adadim(
        _blocks, P, plan, [(padded, MASK)], token_weights=of_mask
    )
    assert dict(found_plan) == dict(wanted_plan)
    for path, choice in wanted.items():
        losses = found[path].losses
        assert losses is not None and choice.losses is not None
        np.testing.assert_allclose(losses, choice.losses, rtol=1e-4)
    routed = _plan(jq.Scheme(jq.grids.Uniform(3), 4), _routed)
    with pytest.raises(EvidenceError, match="lost in 'scatter-add'"):
        jq.allocation.adadim(_routed, P, routed, [(X, MASK)], token_weights=of_mask)


def test_cmpq_pools_real_tokens_only() -> None:
    tokens = np.asarray(jax.random.randint(jax.random.key(5), (40, 6), 0, 11))
    mask = np.arange(6) < np.array(jax.random.randint(jax.random.key(6), (40, 1), 0, 7))
    some = mask.any(1)
    spoiled = np.where(mask, tokens, 0)
    found = _scores(jq.allocation.cmpq, [(tokens, mask)], of_mask)
    again = _scores(jq.allocation.cmpq, [(spoiled[some], mask[some])], of_mask)
    for path in found:
        np.testing.assert_allclose(found[path], again[path], rtol=1e-3, atol=1e-5)
    plain = _scores(jq.allocation.cmpq, [(tokens, mask)], None)
    assert any(abs(plain[p][0] - found[p][0]) > 1e-3 for p in plain)


def test_distances_are_those_of_the_sequences_without_padding() -> None:
    other = jax.tree.map(lambda w: w * 1.05, EMBED)
    wanted = jq.evaluate.compare(_logits, EMBED, other, ALONE)
    for weights in (of_mask, [0.25 * MASK]):
        found = jq.evaluate.compare(_logits, EMBED, other, [(TOKENS, MASK)], token_weights=weights)
        for name in ("kl", "perplexity_full", "perplexity_quantized", "agreement", "tokens"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=2e-4)
    alone = jq.evaluate.perplexity(_logits, EMBED, [(TOKENS, MASK)], token_weights=of_mask)
    np.testing.assert_allclose(alone, wanted.perplexity_full, rtol=1e-4)
    with pytest.raises(ValueError, match="of their shape"):
        jq.evaluate.kl(_logits, EMBED, other, [(TOKENS, MASK)], token_weights=[MASK[:, 0]])


@pytest.fixture(autouse=True)
def few_tokens() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*second moment is rank deficient")
        yield
