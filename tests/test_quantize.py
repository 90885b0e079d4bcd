"""The driver: what it returns, what it reports, and what it refuses before any work."""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.calibration import Evidence
from jquant.errors import EvidenceError, PlanError, WeightError
from jquant.grids import Uniform
from jquant.rounding import GPTQ
from tests.functions import CASES, Case, _normal

PARAMS = {"embed": _normal(0, 11, 6), "up": _normal(1, 6, 10), "norm": jnp.ones(6, jnp.float32)}


def fn(params, tokens):
    return jnp.tanh(params["embed"][tokens] * params["norm"]) @ params["up"]


TOKENS = jax.random.randint(jax.random.key(3), (4, 16), 0, 11)


def _plan(rules, params=PARAMS, weights=None):
    return jq.plan(weights or jq.find_weights(fn, params, TOKENS), rules)


GPTQ4 = jq.Scheme(Uniform(4), 4, GPTQ())
NEAREST4 = jq.Scheme(Uniform(4), 4)


@pytest.mark.filterwarnings("ignore:.*rank deficient")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gptq_runs_on_every_style_of_function(case: Case) -> None:
    weights = jq.find_weights(case.fn, case.params, case.batches[0])
    plan = jq.plan(weights, {".*": jq.Scheme(Uniform(3), 4, GPTQ(), fallback=True)})
    q, report = jq.quantize(case.fn, case.params, plan, case.batches)
    assert set(report) == set(weights)
    assert all(math.isfinite(row.error) and row.error < 0.5 for row in report.values())
    leaves = jax.tree.leaves(q, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor))
    assert sum(isinstance(leaf, jq.QTensor) for leaf in leaves) == len(weights)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype,
                        jq.dequantize(q), case.params)  # fmt: skip
    assert all(jax.tree.leaves(same))


def test_gptq_beats_nearest_where_inputs_are_correlated() -> None:
    mix, w = _normal(5, 48, 48), {"w": _normal(6, 48, 32)}
    forward = lambda p, x: (x @ mix) @ p["w"]  # noqa: E731
    x = _normal(7, 256, 48)
    plan = jq.plan(jq.find_weights(forward, w, x), {"w": jq.Scheme(Uniform(3), 16, GPTQ())})
    _, report = jq.quantize(forward, w, plan, [x])
    assert report["w"].ratio < 0.7


def test_reported_errors_are_those_of_the_result() -> None:
    plan = _plan({"up": GPTQ4, ".*": jq.keep})
    evidence = jq.capture(fn, PARAMS, [TOKENS])
    q, report = jq.quantize(fn, PARAMS, plan, [TOKENS])
    w, h = np.asarray(PARAMS["up"], float).T, np.asarray(evidence["up"].second_moment, float)
    e = w - np.asarray(jq.dequantize(q)["up"], float).T
    row = report["up"]
    np.testing.assert_allclose(row.error, np.sum(e @ h * e) / np.sum(w @ h * w), rtol=1e-3)
    nearest, _ = jq.quantize(fn, PARAMS, _plan({"up": NEAREST4}), evidence=evidence)
    e = w - np.asarray(jq.dequantize(nearest)["up"], float).T
    np.testing.assert_allclose(row.nearest_error, np.sum(e @ h * e) / np.sum(w @ h * w), rtol=1e-3)
    assert row.tokens == TOKENS.size
    assert row.damping == pytest.approx(0.01)
    assert (row.dead, row.fallback) == (0, False)
    assert report.kept == ("embed",)


def test_bits_per_weight_counts_scales_and_zeros() -> None:
    _, report = jq.quantize(fn, PARAMS, _plan({"up": NEAREST4}))
    # 10 rows of 6 inputs in groups of 4 and 2: a float32 scale and a 4-bit zero for each
    assert report["up"].bits_per_weight == pytest.approx(4 + (32 + 4) * 2 / 6)
    assert report.bits_per_weight == report["up"].bits_per_weight


def test_report_prints_and_serialises() -> None:
    import io
    import json

    from rich.console import Console

    _, report = jq.quantize(fn, PARAMS, _plan({"up": GPTQ4}), [TOKENS])
    out = Console(file=io.StringIO(), width=160)
    out.print(report.table())
    assert "up" in out.file.getvalue() and "Uniform 4b, in 4, GPTQ" in out.file.getvalue()
    again = json.loads(json.dumps(report.to_json()))
    assert again["weights"]["up"]["tokens"] == TOKENS.size
    assert math.isfinite(again["bits_per_weight"])


def test_a_second_run_of_equal_shapes_compiles_nothing(compiles) -> None:
    plan = _plan({"up": GPTQ4})
    jq.quantize(fn, PARAMS, plan, [TOKENS])
    with compiles() as log:
        jq.quantize(fn, jax.tree.map(lambda leaf: leaf * 2, PARAMS), plan, [TOKENS])
    assert [entry for entry in log if "multiply" not in entry] == []


def test_equal_shapes_compile_once(compiles) -> None:
    params = {f"w{k}": _normal(k, 9, 9) for k in range(4)}

    def deep(params, x):
        for k in range(4):
            x = jnp.tanh(x @ params[f"w{k}"])
        return x

    x = _normal(9, 16, 9)
    plan = jq.plan(jq.find_weights(deep, params, x), {".*": jq.Scheme(Uniform(3), 4, GPTQ())})
    jax.clear_caches()  # another test may have rounded such a weight
    with compiles() as log:
        jq.quantize(deep, params, plan, [x])
    assert sum("_round" in entry for entry in log) == 1


def test_given_evidence_needs_no_batches_and_no_call_of_the_function() -> None:
    evidence = jq.capture(fn, PARAMS, [TOKENS])
    wanted, _ = jq.quantize(fn, PARAMS, _plan({"up": GPTQ4}), [TOKENS])
    found, _ = jq.quantize(None, PARAMS, _plan({"up": GPTQ4}), evidence=evidence)  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        found["up"].codes.astype(jnp.int32), wanted["up"].codes.astype(jnp.int32)
    )


def test_scaling_evidence_changes_nothing() -> None:
    evidence = jq.capture(fn, PARAMS, [TOKENS])
    scaled = {path: Evidence(e.second_moment / 64, e.count, e.total, e.abs_max)
              for path, e in evidence.items()}  # fmt: skip
    one, two = (
        jq.quantize(fn, PARAMS, _plan({"up": GPTQ4}), evidence=e)[0] for e in (evidence, scaled)
    )
    np.testing.assert_array_equal(
        one["up"].codes.astype(jnp.int32), two["up"].codes.astype(jnp.int32)
    )


# Refusals: type, path, remedy; before any work.


def _never(params, tokens):
    raise AssertionError("work was started")


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite(bad) -> None:
    params = PARAMS | {"up": PARAMS["up"].at[2, 3].set(bad)}
    with pytest.raises(WeightError, match=r"'up' holds NaN or infinite.*keep"):
        jq.quantize(_never, params, _plan({"up": GPTQ4}), [TOKENS])


def test_a_plan_for_other_parameters() -> None:
    plan = _plan({"up": GPTQ4})
    with pytest.raises(PlanError, match=r"'up' of shape \(6, 10\), got \(6, 12\)"):
        jq.quantize(_never, PARAMS | {"up": jnp.ones((6, 12))}, plan, [TOKENS])
    with pytest.raises(PlanError, match=r"'up', which params do not have; near: 'upp'"):
        jq.quantize(_never, {"embed": PARAMS["embed"], "upp": PARAMS["up"]}, plan, [TOKENS])
    with pytest.raises(PlanError, match="jq.plan"):
        jq.quantize(_never, PARAMS, {".*": GPTQ4}, [TOKENS])  # type: ignore[arg-type]


def test_integer_weights() -> None:
    params = PARAMS | {"up": jnp.ones((6, 10), jnp.int8)}
    with pytest.raises(WeightError, match=r"'up' must be a float array, got int8"):
        jq.quantize(_never, params, _plan({"up": NEAREST4}), [TOKENS])


def test_gptq_without_evidence() -> None:
    with pytest.raises(EvidenceError, match=r"'up': GPTQ needs.*batches"):
        jq.quantize(_never, PARAMS, _plan({"up": GPTQ4}))


def test_gptq_on_a_weight_that_is_only_looked_up() -> None:
    with pytest.raises(EvidenceError, match=r"'embed' is only looked up.*Nearest"):
        jq.quantize(_never, PARAMS, _plan({"embed": GPTQ4}), [TOKENS])


def _evidence(moment, count=100.0) -> dict[str, Evidence]:
    return {"up": Evidence(moment, jnp.asarray(count))}


@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        (_evidence(jnp.eye(6).at[1, 2].set(jnp.nan)), "'up': its second moment holds NaN"),
        (_evidence(jnp.eye(6).at[1, 2].set(0.5)), "'up': its second moment is not symmetric"),
        (_evidence(jnp.eye(5)), r"'up': second moment must be \(6, 6\), got \(5, 5\)"),
        (_evidence(jnp.eye(6), 0.0), "'up' has seen no tokens"),
    ],
)
def test_evidence_that_is_wrong(evidence, message) -> None:
    with pytest.raises(EvidenceError, match=message):
        jq.quantize(_never, PARAMS, _plan({"up": GPTQ4}), evidence=evidence)


def test_few_tokens_warn() -> None:
    with pytest.warns(UserWarning, match=r"'up': 3 tokens for 6 input channels"):
        jq.quantize(fn, PARAMS, _plan({"up": GPTQ4}), [TOKENS[:1, :3]])


def test_no_factorisation_without_leave_is_an_error_and_with_leave_is_reported() -> None:
    indefinite = _evidence(-jnp.eye(6))
    with pytest.raises(EvidenceError, match=r"'up'.*could not be factorised.*fallback=True"):
        jq.quantize(fn, PARAMS, _plan({"up": GPTQ4}), evidence=indefinite)
    scheme = jq.Scheme(Uniform(4), 4, GPTQ(), fallback=True)
    q, report = jq.quantize(fn, PARAMS, _plan({"up": scheme}), evidence=indefinite)
    assert report.fallbacks == ("up",)
    nearest, _ = jq.quantize(fn, PARAMS, _plan({"up": NEAREST4}))
    np.testing.assert_array_equal(
        q["up"].codes.astype(jnp.int32), nearest["up"].codes.astype(jnp.int32)
    )


def test_nothing_warns_on_a_plain_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jq.quantize(fn, PARAMS, _plan({"up": GPTQ4}), [TOKENS])


@pytest.mark.parametrize("sequential", ["weight", None])
def test_a_network_with_quantized_weights_is_calibrated_as_it_is(sequential) -> None:
    """The weights that are there already are leaves of several arrays."""
    params = {"up": _normal(1, 6, 10), "down": _normal(2, 10, 6)}
    x = _normal(3, 32, 6)

    def two(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    weights = jq.find_weights(two, params, x)
    first, _ = jq.quantize(two, params, jq.plan(weights, {"up": NEAREST4, "down": jq.keep}), [x])
    run = jq.apply(two)
    plan = jq.plan(jq.find_weights(run, first, x, ignore="up/.*"), {"down": GPTQ4})
    q, report = jq.quantize(run, first, plan, [x], sequential=sequential)
    assert report.stages == (("down",),)
    plain = {"up": jq.dequantize(first)["up"], "down": params["down"]}
    wanted, _ = jq.quantize(two, plain, plan, [x], sequential=sequential)
    np.testing.assert_array_equal(q["down"].codes, wanted["down"].codes)
    assert isinstance(q["up"], jq.QTensor)


def test_all_weights_in_one_pass_are_what_capture_sees() -> None:
    """`sequential=None` is `capture`, then each weight from its evidence."""
    params = {"embed": _normal(0, 11, 6), "up": _normal(1, 6, 10), "down": _normal(2, 10, 6)}

    def three(p, tokens):
        return jnp.tanh(p["embed"][tokens] @ p["up"]) @ p["down"]

    weights = jq.find_weights(three, params, TOKENS)
    plan = jq.plan(weights, {"embed": NEAREST4, ".*": GPTQ4})
    batches = [TOKENS, TOKENS[:2]]
    one, report = jq.quantize(three, params, plan, batches, sequential=None)
    evidence = jq.capture(three, params, batches)
    assert set(evidence) == {"up", "down"} and report.stages == (tuple(plan),)
    other, _ = jq.quantize(three, params, plan, evidence=evidence)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_learned_weights_are_the_last_stage_of_the_same_job(tmp_path) -> None:
    """With one folder, one count of stages, and the same bits from records and on the host."""
    params = {"up": _normal(1, 6, 10), "down": _normal(2, 10, 6)}
    x = _normal(3, 32, 6)

    def two(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    descent = jq.rounding.Descent(4, 0.1, checks=2)
    learned = jq.Scheme(Uniform(3), None, jq.rounding.DiscQuant(descent=descent))
    plan = jq.plan(jq.find_weights(two, params, x), {"up": GPTQ4, "down": learned})
    ask = {"objective": jq.objectives.MSE(), "key": jax.random.key(0)}
    told: list[jq.Progress] = []
    one, report = jq.quantize(two, params, plan, [x], **ask, progress=told.append)
    assert report.stages == (("up",), ("down",))
    assert {p.stages for p in told} == {2} and [p.stage for p in told] == sorted(
        p.stage for p in told
    )
    assert (told[-1].stage, told[-1].doing, told[-1].fraction) == (1, "learning", 1.0)
    for _ in range(2):  # the second from its records
        kept, _ = jq.quantize(two, params, plan, [x], **ask, work_dir=tmp_path / "w", budget=0)
        jax.tree.map(np.testing.assert_array_equal, kept, one)
    names = sorted(path.name for path in (tmp_path / "w").iterdir())
    assert names == ["job.json", "learning.safetensors", "stage-00000.safetensors"]
