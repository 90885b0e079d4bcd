"""Ranks by a budget of bytes: never above it, the best there is where all ranks cost the same."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import LoRC
from jquant.allocation import lorc_ranks
from jquant.allocation.ranks import Offer, _buy
from jquant.errors import EvidenceError, PlanError
from jquant.grids import NV, Uniform
from jquant.layerwise.weight import quantize_weight
from jquant.rounding import GPTQ
from jquant.weights.qtensor import factor_bits
from tests.functions import _normal

GRID = Uniform(2)
PARAMS = {
    "a": _normal(0, 12, 12),
    "b": 3.0 * _normal(1, 12, 12) @ jnp.diag(jnp.arange(1, 13, dtype=jnp.float32)),
    "c": _normal(2, 2, 12, 12) * jnp.exp(_normal(3, 2, 12, 1)),
    "d": _normal(4, 12, 7),
}
X = _normal(5, 64, 12) @ (jnp.eye(12, dtype=jnp.float32) + 0.5 * _normal(6, 12, 12))


def fn(p, x):
    x = jnp.tanh(x @ p["a"]) @ p["b"]
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["c"])[0]
    return x @ p["d"]


WEIGHTS = jq.find_weights(fn, PARAMS, X)


def plan_of(choice: LoRC, paths: str = "[a-d]", rounding=None) -> jq.Plan:
    scheme = jq.Scheme(GRID, None, rounding or jq.rounding.Nearest(), choice)
    return jq.plan(WEIGHTS, {paths: scheme, ".*": jq.Scheme(GRID)})


def ranks(plan: jq.Plan) -> dict[str, int]:
    return {p: s.compensation.rank if s.compensation else 0 for p, s in plan.items()}


def spent(plan: jq.Plan) -> float:
    """Bytes of all factors that quantizing by the plan stores."""
    total = 0.0
    for path, scheme in plan.items():
        layout = WEIGHTS[path].layout
        q, _ = jax.eval_shape(lambda w, s=scheme, v=layout: quantize_weight(w, s, v), PARAMS[path])
        total += 0 if q.compensation is None else factor_bits(q.compensation) / 8
    return total


@pytest.mark.parametrize(
    "choice",
    [LoRC(7), LoRC(7, Uniform(8, symmetric=True)), LoRC(5, Uniform(5)), LoRC(3, NV())],
    ids=["floats", "bytes", "5 bits", "nv"],
)
def test_the_budget_is_kept_to_the_byte_and_used_up(choice) -> None:
    for budget in (130, 700, 1111, 10_000):
        plan = lorc_ranks(PARAMS, plan_of(choice), budget)
        assert spent(plan) <= budget
        if budget == 10_000:
            assert set(ranks(plan).values()) == {choice.rank}
        else:  # the cheapest rank of a weight that may get more would not fit
            left = [p for p, r in ranks(plan).items() if r < choice.rank]
            for path in left:
                more = dataclasses.replace(choice, rank=ranks(plan)[path] + 1)
                other = {**plan, path: jq.Scheme(GRID, compensation=more)}
                assert spent(jq.Plan(other, WEIGHTS)) > budget


def test_what_is_spent_is_what_a_file_takes(tmp_path) -> None:
    plan = lorc_ranks(PARAMS, plan_of(LoRC(7, Uniform(8, symmetric=True))), 1111)
    sizes = []
    for schemes in (plan, dict.fromkeys(plan, jq.Scheme(GRID))):
        q, _ = jq.quantize(fn, PARAMS, jq.Plan(dict(schemes), WEIGHTS))
        jq.save(tmp_path / "q", q)
        sizes.append(sum(leaf.bytes for leaf in jq.io.read_header(tmp_path / "q").leaves.values()))
    assert sizes[0] - sizes[1] == spent(plan) <= 1111


def relative_errors(found: dict[str, int], choice: LoRC, evidence) -> float:
    plan = {}
    for path, scheme in plan_of(choice, rounding=GPTQ()).items():
        low = LoRC(found[path], metric=choice.metric, dtype="float32") if found[path] else None
        plan[path] = jq.Scheme(scheme.grid, None, scheme.rounding, low)
    _, report = jq.quantize(fn, PARAMS, jq.Plan(plan, WEIGHTS), evidence=evidence)
    return sum(row.error for row in report.values())


def test_no_division_of_equal_prices_is_better() -> None:
    """Brute force over `a` and `b`, of one shape, by the errors that reports show."""
    evidence = jq.capture(fn, PARAMS, [X])
    choice = LoRC(3, metric="hessian", dtype="float32")
    plan = plan_of(choice, "a|b", GPTQ())
    only = jq.Plan({p: plan[p] for p in "ab"}, WEIGHTS)
    for budget in (1, 2, 3, 4, 5):
        chosen = ranks(lorc_ranks(PARAMS, only, budget * 24 * 4, evidence=evidence))
        assert sum(chosen.values()) == budget
        divisions = [r for r in itertools.product(range(4), repeat=2) if sum(r) == budget]
        errors = {
            r: relative_errors({"a": r[0], "b": r[1], "c": 0, "d": 0}, choice, evidence)
            for r in divisions
        }
        least = min(errors.values())
        assert errors[chosen["a"], chosen["b"]] <= least * (1 + 1e-5)


def test_of_unequal_prices_it_misses_by_less_than_one_rank() -> None:
    random = np.random.default_rng(0)

    def price(offers, ranks) -> int:
        return sum(offer.price(r) for offer, r in zip(offers, ranks, strict=True))

    def worth(offers, ranks) -> float:
        return sum(sum(offer.gains[:r]) for offer, r in zip(offers, ranks, strict=True))

    for _ in range(200):
        offers = []
        for _ in range(3):
            gains = np.sort(random.exponential(size=random.integers(1, 4)))[::-1]
            offers.append(Offer(tuple(gains), ((0.0, 8.0 * random.integers(1, 13)),)))
        budget = int(random.integers(1, 30))
        found = list(_buy(dict(zip("xyz", offers, strict=True)), budget).values())
        every = itertools.product(*(range(len(offer.gains) + 1) for offer in offers))
        best = max(worth(offers, ranks) for ranks in every if price(offers, ranks) <= budget)
        assert price(offers, found) <= budget
        # The best ranks per byte, until one does not fit: its worth is what may be missed.
        items = [(gain / o.price(1), o.price(1), gain) for o in offers for gain in o.gains]
        missed, left = 0.0, budget
        for _, cost, gain in sorted(items, reverse=True):
            left -= cost
            if left < 0:
                missed = gain
                break
        assert worth(offers, found) >= best - missed - 1e-9


def test_cheap_ranks_come_before_a_dear_one_that_gains_more() -> None:
    offers = {"dear": Offer((3.0,), ((0.0, 80.0),)), "cheap": Offer((2.0,) * 5, ((0.0, 8.0),))}
    assert _buy(offers, 10) == {"dear": 0, "cheap": 5}
    assert _buy(offers, 15) == {"dear": 1, "cheap": 5}


def test_more_bytes_are_never_worth_less_and_give_ranks_where_errors_are() -> None:
    plan = plan_of(LoRC(7))
    sizes = [ranks(lorc_ranks(PARAMS, plan, budget)) for budget in range(200, 1600, 200)]
    totals = [sum(found.values()) for found in sizes]
    assert totals == sorted(totals) and totals[-1] > totals[0]
    assert len(set(sizes[2].values())) > 1  # not all alike


def test_a_stack_has_one_rank_and_pays_for_all_layers() -> None:
    plan = plan_of(LoRC(7), "c")
    assert ranks(lorc_ranks(PARAMS, plan, 2 * 2 * 24 * 2))["c"] == 2
    with pytest.raises(PlanError, match="95 bytes pay for no rank.*one of 'c', takes 96 bytes"):
        lorc_ranks(PARAMS, plan, 95)


def test_schemes_without_a_term_stay_and_those_without_a_rank_lose_theirs() -> None:
    plan = lorc_ranks(PARAMS, plan_of(LoRC(7), "a|d"), 38)
    assert ranks(plan) == {"a": 0, "b": 0, "c": 0, "d": 1}
    assert plan["b"] == jq.Scheme(GRID) and dict(plan.weights) == dict(WEIGHTS)


def test_lazy_parameters_are_read() -> None:
    lazy = {
        name: jq.Lazy(w.shape, np.dtype("float32"), np.asarray(w).__getitem__, name)
        for name, w in PARAMS.items()
    }
    seen: list[str] = []
    found = lorc_ranks(lazy, plan_of(LoRC(7)), 700, progress=seen.append)
    assert found == lorc_ranks(PARAMS, plan_of(LoRC(7)), 700)
    assert seen == ["a", "b", "c", "d"]


def test_bad_input() -> None:
    with pytest.raises(PlanError, match="no scheme of the plan has a compensation"):
        lorc_ranks(PARAMS, jq.plan(WEIGHTS, {".*": jq.Scheme(GRID)}), 1000)
    with pytest.raises(PlanError, match="bytes must be a whole number above 0, got 0.5"):
        lorc_ranks(PARAMS, plan_of(LoRC(7)), 0.5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="weight 'd' is a matrix of 7 outputs and 12 inputs"):
        lorc_ranks(PARAMS, plan_of(LoRC(8)), 1000)
    with pytest.raises(EvidenceError, match="'a': GPTQ needs the second moment"):
        lorc_ranks(PARAMS, plan_of(LoRC(7), rounding=GPTQ()), 1000)
    with pytest.raises(EvidenceError, match=r"'a': LoRC\(metric='hessian'\) needs the second"):
        lorc_ranks(PARAMS, plan_of(LoRC(7, metric="hessian")), 1000)
