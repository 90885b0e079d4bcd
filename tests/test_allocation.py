"""Who gets the bits: never above the budget, the best there is where that can be known."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.allocation import Sensitivity, allocate, candidates, clusters
from jquant.allocation.budget import cells, dynamic, greedy, lagrange
from jquant.errors import EvidenceError, PlanError
from jquant.grids import MX, NF4, KMeans, Power, Uniform
from jquant.rounding import GPTQ

METHODS = ("dynamic", "greedy", "lagrange", "clusters")
GRID = Uniform(4, scale_dtype="float16")


def blocks_of(count: int, width: int = 16, out: int = 16):
    """A function of `count` equal layers, its parameters and the plan for all of them."""
    params = {"layers": {str(k): {"w": jnp.ones((width, out))} for k in range(count)}}

    def fn(p, x):
        return [x @ p["layers"][str(k)]["w"] for k in range(count)]

    weights = jq.find_weights(fn, params, jnp.ones((2, width)))
    return fn, params, jq.plan(weights, {".*": jq.Scheme(GRID)})


def problem(random: np.random.Generator, items: int, options: int):
    """Losses in any order, rising sizes; some of them equal."""
    losses = random.choice([0.0, 0.5, 1.0, 2.0, 3.0, 7.0], (items, options)).tolist()
    steps = random.integers(0, 5, (items, options))
    return losses, (1 + np.cumsum(steps, 1)).tolist()


def total(numbers, choice):
    return sum(some[at] for some, at in zip(numbers, choice, strict=True))


def best(losses, sizes, budget) -> float:
    every = itertools.product(*(range(len(some)) for some in sizes))
    return min(total(losses, c) for c in every if total(sizes, c) <= budget)


def budgets(sizes) -> range:
    least = sum(some[0] for some in sizes)
    return range(least, sum(some[-1] for some in sizes) + 3)


# The three ways, as functions of numbers


def test_dynamic_programming_is_brute_force() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        losses, sizes = problem(random, 4, 3)
        for budget in budgets(sizes):
            found = dynamic(losses, sizes, budget)
            assert total(sizes, found) <= budget
            assert total(losses, found) == best(losses, sizes, budget)


def test_ten_layers_of_three_choices_are_brute_force() -> None:
    random = np.random.default_rng(1)
    losses = (random.exponential(size=(10, 1)) * np.array([1.0, 0.25, 0.0625])).tolist()
    sizes = [[2, 3, 4]] * 4 + [[6, 9, 12]] * 6
    numbers = np.array(list(itertools.product(range(3), repeat=10)))
    loss = np.take_along_axis(np.array(losses), numbers.T, 1).sum(0)
    size = np.take_along_axis(np.array(sizes), numbers.T, 1).sum(0)
    for budget in (44, 53, 61, 70, 87, 88):
        found = dynamic(losses, sizes, budget)
        assert total(losses, found) == pytest.approx(loss[size <= budget].min(), rel=1e-12)
        assert total(sizes, found) <= budget


def test_of_equal_choices_the_earlier_item_gets_more() -> None:
    """Among all choices of least loss, the first in the order of items by bytes."""
    random = np.random.default_rng(2)
    for _ in range(40):
        losses, sizes = problem(random, 4, 3)
        for budget in budgets(sizes):
            every = itertools.product(*(range(3) for _ in sizes))
            least = best(losses, sizes, budget)
            equal = [c for c in every if total(sizes, c) <= budget and total(losses, c) == least]
            bytes_of = [[some[at] for some, at in zip(sizes, c, strict=True)] for c in equal]
            found = dynamic(losses, sizes, budget)
            assert [s[at] for s, at in zip(sizes, found, strict=True)] == max(bytes_of)


def test_equal_sums_are_ties_in_any_order_of_adding() -> None:
    # 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floating point
    losses = [[0.3, 0.1], [0.3, 0.1], [0.3, 0.1], [0.2, 0.2]]
    for budget in range(4, 8):
        found = dynamic(losses, [[1, 2]] * 4, budget)
        assert found == sorted(found, reverse=True)


def test_the_lagrangian_is_optimal_for_what_it_spends() -> None:
    random = np.random.default_rng(3)
    spent = set()
    for _ in range(60):
        losses, sizes = problem(random, 4, 3)
        for budget in budgets(sizes):
            found = lagrange(losses, sizes, budget)
            used = total(sizes, found)
            assert used <= budget
            assert total(losses, found) == best(losses, sizes, used)
            spent.add(budget - used)
    assert 0 in spent and len(spent) > 1


def test_greedy_misses_by_less_than_one_upgrade() -> None:
    random = np.random.default_rng(4)
    worse = 0
    for _ in range(8):
        losses = np.sort(random.exponential(size=(4, 3)))[:, ::-1].tolist()
        sizes = (1 + np.cumsum(random.integers(1, 6, (4, 3)), 1)).tolist()
        gain = max(some[0] - some[-1] for some in losses)
        for budget in budgets(sizes):
            found = greedy(losses, sizes, budget)
            least = best(losses, sizes, budget)
            assert total(sizes, found) <= budget
            assert least <= total(losses, found) + 1e-12 < least + gain + 1e-9
            assert total(losses, found) <= total(losses, lagrange(losses, sizes, budget)) + 1e-12
            worse += total(losses, found) > least + 1e-9
    assert worse > 0  # it is greedy


def test_more_budget_is_never_worse() -> None:
    random = np.random.default_rng(5)
    for _ in range(12):
        losses, sizes = problem(random, 5, 4)
        for way in (dynamic, greedy, lagrange):
            found = [total(losses, way(losses, sizes, budget)) for budget in budgets(sizes)]
            assert all(a >= b - 1e-12 for a, b in itertools.pairwise(found)), way


@pytest.mark.parametrize("scale", [1e-305, 1e-30, 1.0, 1e30, 1e300])
def test_the_unit_of_losses_does_not_matter(scale) -> None:
    losses = [[4.0, 1.0, 0.5], [9.0, 3.0, 1.0], [5.0, 1.0, 0.7]]
    for way in (dynamic, greedy, lagrange):
        large = [[loss * scale for loss in some] for some in losses]
        for budget in (3, 5, 7, 9):
            assert way(large, [[1, 2, 3]] * 3, budget) == way(losses, [[1, 2, 3]] * 3, budget)
    assert dynamic([[0.0, 0.0]] * 3, [[1, 2]] * 3, 5) == [1, 1, 0]


def test_clusters_are_the_best_runs_there_are() -> None:
    random = np.random.default_rng(6)
    for size in range(1, 8):
        for count in range(1, 5):
            values = random.choice([0.0, 0.1, 1.0, 1.5, 3.0, 8.0, -2.0], size) * 10.0**size
            found = clusters(values.tolist(), count)

            def spread(label, values=values) -> float:
                groups = [values[np.array(label) == k] for k in set(label)]
                return sum(((g - g.mean()) ** 2).sum() for g in groups)

            every = itertools.product(range(count), repeat=size)
            assert spread(found) <= min(map(spread, every)) + 1e-9 * 100.0**size
            means = [values[np.array(found) == k].mean() for k in range(max(found) + 1)]
            assert means == sorted(means)
            assert max(found) + 1 == min(count, len(set(values)))


# Schemes for weights


@pytest.mark.parametrize("method", METHODS)
def test_uniform_scores_give_uniform_bits(method) -> None:
    _, _, plan = blocks_of(6)
    found = candidates(plan)
    scores = Sensitivity("flat", "", "", {path: (3.0,) for path in plan})
    for at, width in enumerate(range(2, 9)):
        size = sum(found.bytes(path)[at] for path in found)
        chosen, shares = allocate(scores, found, bytes=size, method=method)
        assert shares.widths == {width: 6} and shares.bytes == size
        assert {scheme.grid.bits for scheme in chosen.values()} == {width}


def test_uniform_scores_give_uniform_bits_to_weights_of_any_size() -> None:
    params = {"a": jnp.ones((16, 64)), "b": jnp.ones((16, 16)), "c": jnp.ones((3, 16, 16))}

    def fn(p, x):
        return x @ p["a"], x @ p["b"], jax.lax.scan(lambda x, w: (x @ w, None), x, p["c"])

    plan = jq.plan(jq.find_weights(fn, params, jnp.ones((2, 16))), {".*": jq.Scheme(GRID)})
    found = candidates(plan)
    scores = Sensitivity("flat", "", "", {path: (3.0,) for path in plan})
    for bits in (3, 5):
        size = sum(found.bytes(path)[bits - 2] for path in found)
        assert allocate(scores, found, bytes=size)[1].widths == {bits: 3}


@pytest.mark.parametrize("method", ["dynamic", "greedy"])
def test_ties_give_more_bits_to_the_earlier_layer(method) -> None:
    _, _, plan = blocks_of(12)
    found = candidates(plan, (3, 4))
    assert list(found)[:4] == [f"layers/{k}/w" for k in range(4)]  # 2 before 10
    low, high = found.bytes("layers/0/w")
    scores = Sensitivity("flat", "", "", {path: (3.0,) for path in plan})
    for more in range(13):
        budget = 12 * low + more * (high - low)
        _, shares = allocate(scores, found, bytes=budget, method=method)
        assert list(shares.positions.values()) == [1] * more + [0] * (12 - more)
        assert list(shares) == [f"layers/{k}/w" for k in range(12)]


@pytest.mark.parametrize("method", METHODS)
def test_bits_rise_with_the_score_and_loss_falls_with_the_budget(method) -> None:
    _, _, plan = blocks_of(7)
    found = candidates(plan)
    values = dict(zip(plan, (1.0, 8.0, 0.1, 3.0, 100.0, 3.0, 0.5), strict=True))
    scores = Sensitivity("mine", "", "", {path: (x,) for path, x in values.items()})
    last = math.inf
    for bits in np.arange(32, 97, 3) / 10:
        plan, shares = allocate(scores, found, bits=float(bits), method=method)
        ranked = [shares[path].scheme.grid.bits for path in sorted(values, key=lambda p: values[p])]
        if method in ("lagrange", "clusters"):  # elsewhere a tie, or what fits, may turn two
            assert ranked == sorted(ranked)
        else:
            assert all(a <= b + 1 for a, b in itertools.pairwise(ranked))
        assert shares.bytes <= shares.budget <= bits * 7 * 256 / 8
        assert shares.loss <= last + 1e-12
        last = shares.loss


def test_clusters_share_a_width_and_the_widths_are_the_best_that_fit() -> None:
    _, _, plan = blocks_of(6)
    found = candidates(plan, (2, 3, 4, 6))
    values = (1.0, 1.1, 10.0, 11.0, 0.1, 0.12)
    scores = Sensitivity("s", "", "", {p: (x,) for p, x in zip(plan, values, strict=True)})
    losses, label = scores.losses(found), [1, 1, 2, 2, 0, 0]
    for bits in (3.2, 4.0, 4.7, 5.5):
        _, shares = allocate(scores, found, bits=bits, method="clusters", clusters=3)
        got = [shares[path].position for path in found]
        assert len({*zip(label, got, strict=True)}) == 3
        worth = []
        for positions in itertools.combinations_with_replacement(range(4), 3):
            at = dict(zip(found, (positions[k] for k in label), strict=True))
            if sum(found.bytes(path)[k] for path, k in at.items()) <= shares.budget:
                worth.append(sum(losses[path][k] for path, k in at.items()))
        assert shares.loss == pytest.approx(min(worth), rel=1e-9)


def test_weights_of_a_block_are_clustered_together() -> None:
    fn, params, plan = blocks_of(4)
    found = candidates(plan, (2, 4))
    blocks = dict(zip(found, "aabb", strict=True))
    each = {path: (x, x / 16) for path, x in zip(found, (1.0, 9.0, 2.0, 1.0), strict=True)}
    keys = {p: tuple(f"{s.grid!r}, {s.groups!r}" for s in found[p]) for p in found}
    scores = Sensitivity("s", "", "", each, keys, blocks)
    _, shares = allocate(scores, found, bits=4.3, method="clusters", clusters=2)
    assert list(shares.positions.values()) == [1, 1, 0, 0]
    alone, _ = allocate(each, found, bits=4.3, method="clusters", clusters=2)
    assert [s.grid.bits for s in alone.values()] == [2, 4, 2, 2]


def test_the_budget_is_kept_to_the_byte_of_a_file(tmp_path) -> None:
    """Schemes of many kinds on weights of awkward shapes: what is counted is what is stored."""
    params = {
        "a": jax.random.normal(jax.random.key(0), (37, 11)),
        "b": jax.random.normal(jax.random.key(1), (37, 5)),
        "c": jax.random.normal(jax.random.key(2), (3, 37, 37)),
    }

    def fn(p, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["c"])[0]
        return x @ p["a"], x @ p["b"]

    weights = jq.find_weights(fn, params, jnp.ones((2, 37)))
    plan = jq.plan(weights, {".*": jq.Scheme(GRID)})
    offers = [
        jq.Scheme(Uniform(2, scale_dtype="float16"), 7),
        jq.Scheme(Uniform(3), None),
        jq.Scheme(Uniform(3, symmetric=True), jq.Groups("out", 4)),
        jq.Scheme(NF4, 16),
        jq.Scheme(MX(), None),
        jq.Scheme(Power(5, per="group"), 10),
        jq.Scheme(KMeans(2, table_dtype="float16"), None),
        jq.Scheme(GRID, 9, compensation=jq.LoRC(3, Uniform(8, symmetric=True))),
        jq.Scheme(GRID, 9, compensation=jq.LoRC(2)),
    ]
    found = candidates(plan, offers)
    random = np.random.default_rng(7)
    losses = {path: random.exponential(size=len(offers)).tolist() for path in found}
    used = set()
    for bits in (3.8, 4.4, 5.0, 7.0):
        plan, shares = allocate(losses, found, bits=bits)
        qparams, report = jq.quantize(fn, params, plan)
        jq.save(tmp_path / "q", qparams)
        leaves = jq.io.read_header(tmp_path / "q").leaves
        assert {path: leaves[path].bytes for path in plan} == {
            p: s.bytes for p, s in shares.items()
        }
        assert shares.bytes == sum(leaf.bytes for leaf in leaves.values()) <= shares.budget
        assert shares.budget == math.floor(bits * (37 * 16 + 3 * 37 * 37) / 8)
        assert shares.bits == pytest.approx(report.bits_per_weight, rel=0.01)
        used.update(shares.positions.values())
    assert len(used) > 2


def test_bits_and_bytes_are_one_budget() -> None:
    _, _, plan = blocks_of(4)
    found = candidates(plan)
    losses = {path: [2.0**-k for k in range(7)] for path in found}
    size = 4 * found.bytes("layers/0/w")[2]
    exact = 8 * size / (4 * 256)
    one, two = (allocate(losses, found, **b)[1] for b in ({"bits": exact}, {"bytes": size}))
    assert one == two and one.bytes == size and one.bits == exact
    assert allocate(losses, found, bytes=size - 1)[1].bytes < size
    assert allocate(losses, found, bits=100)[1].widths == {8: 4}


def test_fixed_weights_take_their_bytes_and_keep_their_scheme() -> None:
    _, _, plan = blocks_of(3)
    found = candidates(plan, (2, 3, 4), paths=["layers/1/w", "layers/2/w"])
    assert found.free == ("layers/1/w", "layers/2/w")
    scores = Sensitivity("s", "", "", {path: (1.0,) for path in found.free})
    least = sum(found.bytes(path)[0] for path in found)
    plan2, shares = allocate(scores, found, bytes=least + 40)
    assert plan2["layers/0/w"] == plan["layers/0/w"]
    assert shares["layers/0/w"].bytes == found.bytes("layers/0/w")[0]
    for method in METHODS:
        shares = allocate(scores, found, bytes=least + 64, method=method)[1]
        assert shares.bytes <= least + 64 and shares["layers/0/w"].position == 0


def test_the_same_choice_can_be_made_of_other_candidates() -> None:
    _, _, plan = blocks_of(3)
    rough = candidates(plan, (2, 4))
    fine = candidates(plan, lambda own: [
        jq.Scheme(Uniform(b, scale_dtype="float16"), None, GPTQ()) for b in (2, 4)
    ])  # fmt: skip
    losses = {path: (x, x / 16) for path, x in zip(rough, (1.0, 3.0, 2.0), strict=True)}
    _, shares = allocate(losses, rough, bits=4.4)
    other = fine.plan(shares.positions)
    assert [s.grid.bits for s in other.values()] == [2, 4, 2]
    assert all(isinstance(s.rounding, GPTQ) for s in other.values())


def test_large_problems_are_greedy_unless_asked_otherwise(monkeypatch) -> None:
    _, _, plan = blocks_of(3)
    found = candidates(plan)
    losses = {path: [2.0**-k for k in range(7)] for path in found}
    sizes = [found.bytes(path) for path in found]
    need = cells(sizes, 300)
    monkeypatch.setattr("jquant.allocation.budget.MOST", need)
    assert allocate(losses, found, bytes=300)[1].method == "dynamic"
    monkeypatch.setattr("jquant.allocation.budget.MOST", need - 1)
    assert allocate(losses, found, bytes=300)[1].method == "greedy"
    with pytest.raises(PlanError, match=f"a table of {need} entries.*method='greedy'"):
        allocate(losses, found, bytes=300, method="dynamic")


def test_what_was_chosen_is_told() -> None:
    _, _, plan = blocks_of(3)
    found = candidates(plan, (2, 4))
    _, shares = allocate({path: (1.0, 0.5) for path in found}, found, bits=4.4)
    assert str(shares).startswith("2 of 2 bits, 1 of 4 bits; 3.833 bits per weight stored, by loss")
    assert shares.table().row_count == 3
    said = json.loads(json.dumps(shares.to_json()))
    assert said["bytes"] == shares.bytes and said["weights"]["layers/0/w"]["position"] == 1
    assert [row["bytes"] for row in said["weights"].values()] == [168, 100, 100]


# What a user can get wrong


def test_bad_budgets() -> None:
    _, _, plan = blocks_of(3)
    found = candidates(plan)
    losses = {path: (1.0,) * 7 for path in found}
    least = 3 * found.bytes("layers/0/w")[0]
    for given, words in (
        ({}, "exactly one; got bits=None, bytes=None"),
        ({"bits": 3.0, "bytes": 10}, "exactly one"),
        ({"bits": math.nan}, "bits must be a number above 0, got nan"),
        ({"bits": -1.0}, "bits must be"),
        ({"bits": True}, "bits must be"),
        ({"bits": "3"}, "bits must be"),
        ({"bytes": 10.5}, "bytes must be a whole number above 0, got 10.5"),
        ({"bytes": 0}, "bytes must be"),
        ({"bytes": least - 1}, rf"is below the smallest possible: {least} bytes, 3.125 bits"),
        ({"bits": 2.0}, rf"a budget of 192 bytes, 2 bits per weight.*{least} bytes"),
    ):
        with pytest.raises(PlanError, match=words):
            allocate(losses, found, **given)
    named = 8 * least / 768  # what the message names is enough
    assert allocate(losses, found, bits=math.ceil(1e4 * named) / 1e4)[1].bytes == least


def test_bad_losses_and_methods() -> None:
    _, _, plan = blocks_of(2)
    found = candidates(plan, (2, 4))
    fine = {path: (1.0, 0.5) for path in found}
    for losses, error, words in (
        ({}, PlanError, "do not name weight 'layers/0/w', which has 2"),
        (fine | {"layers/1/w": (1.0,)}, PlanError, "'layers/1/w' has 2 candidates, got 1 losses"),
        (fine | {"layers/1/w": (1.0, math.nan)}, EvidenceError, "'layers/1/w': a loss must be 0"),
        (fine | {"layers/1/w": (1.0, -0.1)}, EvidenceError, "got -0.1"),
    ):
        with pytest.raises(error, match=words):
            allocate(losses, found, bits=8)
    with pytest.raises(PlanError, match="method must be one of auto, dynamic.*got 'ilp'"):
        allocate(fine, found, bits=8, method="ilp")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="clusters must be a whole number above 0, got 0"):
        allocate(fine, found, bits=8, method="clusters", clusters=0)
    with pytest.raises(PlanError, match="what allocation.candidates returns, got Plan"):
        allocate(fine, plan, bits=8)  # type: ignore[arg-type]
    uneven = jq.allocation.Candidates(
        {path: schemes[: 2 + at] for at, (path, schemes) in enumerate(candidates(plan).items())},
        plan.weights,
    )
    losses = {path: (1.0,) * len(schemes) for path, schemes in uneven.items()}
    with pytest.raises(PlanError, match=r"they have \[2, 3\] candidates"):
        allocate(losses, uneven, bits=8, method="clusters")


def test_bad_candidates() -> None:
    _, _, plan = blocks_of(2)
    for given, words in (
        (((4,),), "no weight of this plan of 2 has two schemes"),
        ((()), None),
        (((),), "'layers/0/w' has no candidates"),
        (((2, "4"),), "a width in bits or a jq.Scheme, got '4'"),
        (((2, True),), "got True"),
        (((2, 77),), "'layers/0/w' cannot have 77 bits: "),
    ):
        if words is None:
            assert len(candidates(plan, *given)["layers/0/w"]) == 7
            continue
        with pytest.raises(PlanError, match=words):
            candidates(plan, *given)
    with pytest.raises(PlanError, match="paths names 'layers/7/w'.*near: 'layers/1/w'"):
        candidates(plan, paths=["layers/7/w"])
    with pytest.raises(PlanError, match="what jq.plan returns, got dict"):
        candidates({})  # type: ignore[arg-type]
    table = jq.Plan(dict.fromkeys(plan, jq.Scheme(NF4)), plan.weights)
    with pytest.raises(PlanError, match="'layers/0/w': a Codebook grid has no width to choose"):
        candidates(table)
    with pytest.raises(ValueError, match="needs values and a count above 0"):
        clusters([], 2)


def test_scores_of_other_weights_or_candidates_are_refused() -> None:
    _, _, plan = blocks_of(2)
    found = candidates(plan, (2, 4))
    keys = {path: tuple(f"{s.grid!r}, {s.groups!r}" for s in found[path]) for path in found}
    by_scheme = Sensitivity("mine", "", "", {path: (2.0, 1.0) for path in found}, keys)
    assert allocate(by_scheme, found, bits=8)[1].by == "mine"
    with pytest.raises(PlanError, match=r"mine was not measured for weight 'layers/0/w' under Uni"):
        allocate(by_scheme, candidates(plan, (2, 3)), bits=8)
    with pytest.raises(PlanError, match="not measured for weight 'layers/1/w'"):
        allocate(Sensitivity("mine", "", "", {"layers/0/w": (1.0,)}), found, bits=8)
