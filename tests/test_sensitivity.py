"""Scores of weights: each against its definition, written out; and what holds of all of them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.allocation import (
    Sensitivity,
    allocate,
    candidates,
    canonical_correlation,
    cmpq,
    exact_kl,
    fisher,
    kl_gradient,
    next_token_loss,
    pmpq,
    taylor,
    tdmpq,
)
from jquant.errors import EvidenceError, PlanError, WeightError
from jquant.grids import Uniform
from jquant.rounding import GPTQ
from tests import trained
from tests.functions import _normal

pytestmark = pytest.mark.slow

GRID = Uniform(4, scale_dtype="float16")
KEY = jax.random.key(0)
VOCAB, WIDTH = 12, 8


def fn(p, tokens):
    """Two residual blocks and a head, small enough to write every score out."""
    x = p["embed"][tokens]
    for block in p["blocks"]:
        x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    return x @ p["head"]


PARAMS = {
    "embed": _normal(0, VOCAB, WIDTH),
    "blocks": [
        {"up": 0.5 * _normal(10 + k, WIDTH, 16), "down": 0.3 * _normal(20 + k, 16, WIDTH)}
        for k in range(2)
    ],
    "head": _normal(3, WIDTH, VOCAB),
}
TOKENS = [np.asarray(jax.random.randint(jax.random.key(k), (5, 7), 0, VOCAB)) for k in (1, 2)]
WEIGHTS = jq.find_weights(fn, PARAMS, TOKENS[0])
PLAN = jq.plan(WEIGHTS, {"blocks/.*": jq.Scheme(GRID, 8), ".*": jq.keep})
CHOICE = candidates(PLAN, (2, 3, 4))
PATHS = [f"blocks/{k}/{name}" for k in range(2) for name in ("down", "up")]


def leaf(path: str):
    _, k, name = path.split("/")
    return PARAMS["blocks"][int(k)][name]


def with_(**arrays):
    """The parameters with other weights; names are `up0`, `down1`, …."""
    blocks = [dict(block) for block in PARAMS["blocks"]]
    for name, w in arrays.items():
        blocks[int(name[-1])][name[:-1]] = w
    return {**PARAMS, "blocks": blocks}


def named(path: str) -> str:
    _, k, name = path.split("/")
    return f"{name}{k}"


def rounded(path: str, at: int):
    """A weight on its candidate at a position, by `quantize` itself."""
    scheme = CHOICE[path][at]
    plan = jq.plan(WEIGHTS, {path: scheme, ".*": jq.keep})
    _, k, name = path.split("/")
    return jq.dequantize(jq.quantize(fn, PARAMS, plan)[0])["blocks"][int(k)][name]


MEASURES = {
    "cmpq": lambda b: cmpq(fn, PARAMS, CHOICE, b),
    "pmpq": lambda b: pmpq(fn, PARAMS, CHOICE, b),
    "tdmpq": lambda b: tdmpq(fn, PARAMS, CHOICE, b, key=KEY),
    "taylor": lambda b: taylor(fn, PARAMS, CHOICE, b),
    "fisher": lambda b: fisher(fn, PARAMS, CHOICE, b, key=KEY),
    "kl_gradient": lambda b: kl_gradient(fn, PARAMS, CHOICE, b, low=1),
    "exact_kl": lambda b: exact_kl(fn, PARAMS, CHOICE, b),
}
every_measure = pytest.mark.parametrize("name", MEASURES)


def shares_of(score: Sensitivity):
    """An allocation of the bytes of 3 bits."""
    return allocate(score, CHOICE, bytes=sum(CHOICE.bytes(path)[1] for path in CHOICE))[1]


# What holds of all scores


@every_measure
def test_scores_are_data_that_do_not_depend_on_the_order_of_batches(name: str) -> None:
    found, turned = MEASURES[name](TOKENS), MEASURES[name](iter(TOKENS[::-1]))
    assert list(found.values) == PATHS
    for path, numbers in found.values.items():
        assert len(numbers) == (1 if found.schemes is None else 3)
        np.testing.assert_allclose(numbers, turned.values[path], rtol=2e-5, atol=1e-6)
    again = Sensitivity.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found and again.table().row_count == 4
    assert all(f"{{{key}," in jq.cite(shares_of(found)) for key in found.papers)
    assert bool(found.papers) == (name != "exact_kl")
    assert found.by_block().keys() == {"blocks/0", "blocks/1"}
    assert shares_of(again).by == found.name


@every_measure
def test_what_is_not_finite_is_refused(name: str, monkeypatch) -> None:
    broken = with_(up0=PARAMS["blocks"][0]["up"].at[0, 0].set(jnp.nan))
    monkeypatch.setitem(globals(), "PARAMS", broken)
    with pytest.raises(WeightError, match="'blocks/0/up' holds NaN"):
        MEASURES[name](TOKENS)
    kept = {**with_(), "embed": PARAMS["embed"].at[TOKENS[0][0, 0]].set(jnp.inf)}
    kept["blocks"][0]["up"] = _normal(10, WIDTH, 16)
    monkeypatch.setitem(globals(), "PARAMS", kept)  # not planned, so only its effect is seen
    with pytest.raises(EvidenceError, match="nan|NaN"):
        MEASURES[name](TOKENS)


@every_measure
def test_no_batches_and_other_parameters_are_refused(name: str, monkeypatch) -> None:
    with pytest.raises(EvidenceError, match="no batches"):
        MEASURES[name]([])
    monkeypatch.setitem(globals(), "PARAMS", with_(up0=jnp.ones((WIDTH, 3))))
    with pytest.raises(PlanError, match=r"'blocks/0/up' of shape \(8, 16\), got \(8, 3\)"):
        MEASURES[name](TOKENS)


def test_programs_are_compiled_once(compiles) -> None:
    exact_kl(fn, PARAMS, CHOICE, TOKENS)
    pmpq(fn, PARAMS, CHOICE, TOKENS)
    kl_gradient(fn, PARAMS, CHOICE, TOKENS)
    fisher(fn, PARAMS, CHOICE, TOKENS, key=KEY)
    other = jax.tree.map(lambda w: 1.01 * w, PARAMS)
    more = [TOKENS[0] % 7, *TOKENS]
    with compiles() as log:
        exact_kl(fn, other, CHOICE, more)
        pmpq(fn, other, CHOICE, more)
        kl_gradient(fn, other, CHOICE, more)
        fisher(fn, other, CHOICE, more, key=KEY)
    assert not log


def test_trials_of_a_weight_compile_one_network(compiles) -> None:
    def other(p, tokens):
        return fn(p, tokens)

    with compiles() as log:
        exact_kl(other, PARAMS, CHOICE, TOKENS)
    assert sum("divergence" in line for line in log) == 1


def test_lazy_parameters_are_read() -> None:
    lazy = jax.tree.map(
        lambda w: jq.Lazy(w.shape, np.dtype("float32"), np.asarray(w).__getitem__, "w"), PARAMS
    )
    assert exact_kl(fn, lazy, CHOICE, TOKENS) == exact_kl(fn, PARAMS, CHOICE, TOKENS)
    assert cmpq(fn, lazy, CHOICE, TOKENS) == cmpq(fn, PARAMS, CHOICE, TOKENS)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    exact_kl(fn, PARAMS, CHOICE, TOKENS, progress=tell)
    assert told == [(k, 24) for k in range(1, 25)]
    told.clear()
    fisher(fn, PARAMS, CHOICE, TOKENS, key=KEY, progress=tell)
    assert told == [(1, 2), (2, 2)]


# Exact losses


def test_exact_losses_are_those_of_the_quantized_network() -> None:
    found = exact_kl(fn, PARAMS, CHOICE, TOKENS)
    for path in PATHS:
        for at in (0, 2):
            q = with_(**{named(path): rounded(path, at)})
            kl = jq.evaluate.kl(fn, PARAMS, q, TOKENS)
            assert found.values[path][at] == pytest.approx(kl, rel=1e-4)


def test_exact_losses_with_evidence_are_those_of_the_rounding() -> None:
    gptq = jq.plan(WEIGHTS, {"blocks/.*": jq.Scheme(GRID, 8, GPTQ()), ".*": jq.keep})
    choice = candidates(gptq, (2, 3))
    evidence = jq.capture(fn, PARAMS, TOKENS)
    found = exact_kl(fn, PARAMS, choice, TOKENS, evidence=evidence)
    path = "blocks/1/up"
    plan = jq.plan(WEIGHTS, {path: choice[path][0], ".*": jq.keep})
    q, _ = jq.quantize(fn, PARAMS, plan, evidence=evidence)
    assert found.values[path][0] == pytest.approx(jq.evaluate.kl(fn, PARAMS, q, TOKENS), rel=1e-4)
    nearest = exact_kl(fn, PARAMS, choice, TOKENS)
    assert nearest.values[path][0] != pytest.approx(found.values[path][0], rel=1e-2)
    with pytest.raises(EvidenceError, match="'blocks/0/down': GPTQ needs the second moment"):
        exact_kl(fn, PARAMS, choice, TOKENS, evidence={})


def test_losses_that_are_not_run_are_scaled_by_weight_errors() -> None:
    whole = exact_kl(fn, PARAMS, CHOICE, TOKENS)
    found = exact_kl(fn, PARAMS, CHOICE, TOKENS, only=(1,))
    for path in PATHS:
        power = [float(jnp.sum((rounded(path, at) - leaf(path)) ** 2)) for at in range(3)]
        one = whole.values[path][1]
        want = [one * p / power[1] for p in power]
        np.testing.assert_allclose(found.values[path], want, rtol=1e-4)
    with pytest.raises(PlanError, match=r"only=\(5,\) names none of the 3 candidates"):
        exact_kl(fn, PARAMS, CHOICE, TOKENS, only=(5,))


def test_outputs_that_are_not_logits_are_refused() -> None:
    def two(p, tokens):
        return fn(p, tokens), tokens

    for measure in (exact_kl, pmpq, kl_gradient):
        with pytest.raises(ValueError, match="needs one array of logits"):
            measure(two, PARAMS, CHOICE, TOKENS)
    with pytest.raises(ValueError, match="needs one array of logits"):
        fisher(two, PARAMS, CHOICE, TOKENS, key=KEY)


# Gradients


def test_taylor_is_the_gradient_times_the_error() -> None:
    found = taylor(fn, PARAMS, CHOICE, TOKENS)
    for path in ("blocks/0/up", "blocks/1/down"):
        e = rounded(path, 0) - leaf(path)
        slopes = []
        for tokens in TOKENS:

            def along(t, tokens=tokens, path=path, e=e):
                logits = fn(with_(**{named(path): leaf(path) + t * e}), tokens)
                log_p = jax.nn.log_softmax(logits[:, :-1])
                rows, steps = np.indices(tokens[:, 1:].shape)
                return -jnp.mean(log_p[rows, steps, tokens[:, 1:]])

            slopes.append(abs(float(jax.jvp(along, (0.0,), (1.0,))[1])))
        assert found.values[path][0] == pytest.approx(np.mean(slopes), rel=1e-4)


def test_of_a_linear_loss_the_first_order_is_the_change_itself() -> None:
    params, x = {"w": _normal(4, 8, 6)}, _normal(5, 16, 8)
    plan = jq.plan(jq.find_weights(lambda p, x: x @ p["w"], params, x), {".*": jq.Scheme(GRID)})
    choice = candidates(plan, (2, 4))

    def linear(outputs, x):
        return jnp.sum(outputs)

    found = taylor(lambda p, x: x @ p["w"], params, choice, [x], loss=linear)
    for at in range(2):
        q, _ = jq.quantize(lambda p, x: x @ p["w"], params, choice.plan({"w": at}))
        change = jnp.sum(x @ jq.dequantize(q)["w"]) - jnp.sum(x @ params["w"])
        assert found.values["w"][at] == pytest.approx(abs(float(change)), rel=1e-3)


def test_fisher_is_the_expected_square_of_the_score() -> None:
    """Of one softmax layer the diagonal is known: `E x² p (1 - p)`."""
    params, x = {"w": 0.5 * _normal(4, 6, 5)}, _normal(5, 8192, 6)

    def soft(p, x):
        return x @ p["w"]

    plan = jq.plan(jq.find_weights(soft, params, x), {".*": jq.Scheme(GRID)})
    choice = candidates(plan, (2, 3, 8))
    batches = [x[k : k + 64] for k in range(0, 8192, 64)]
    found = fisher(soft, params, choice, batches, key=KEY)
    p = jax.nn.softmax(x @ params["w"])
    diagonal = jnp.einsum("ti,to->io", x**2, p * (1 - p)) / len(x)
    for at in range(3):
        q, _ = jq.quantize(soft, params, choice.plan({"w": at}))
        e = jq.dequantize(q)["w"] - params["w"]
        want = float(0.5 * jnp.sum(diagonal * e**2))
        assert found.values["w"][at] == pytest.approx(want, rel=0.1)


def test_kl_gradient_is_the_slope_where_all_weights_are_coarse() -> None:
    found = kl_gradient(fn, PARAMS, CHOICE, TOKENS, low=0)
    coarse = {named(path): rounded(path, 0) for path in PATHS}
    slopes, powers = {}, {}
    for path in PATHS:
        gain = rounded(path, 0) - rounded(path, 2)

        def along(t, path=path, gain=gain):
            w = {**coarse, named(path): coarse[named(path)] + t * gain}
            kls = []
            for tokens in TOKENS:
                p, q = (
                    jax.nn.log_softmax(fn(PARAMS, tokens)),
                    jax.nn.log_softmax(fn(with_(**w), tokens)),
                )
                kls.append(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))
            return sum(kls) / len(kls)

        slopes[path] = float(jax.jvp(along, (0.0,), (1.0,))[1])
        powers[path] = [float(jnp.sum((rounded(path, at) - leaf(path)) ** 2)) for at in range(3)]
    assert min(slopes.values()) > 0
    for path, numbers in found.values.items():
        want = [slopes[path] * power / powers[path][0] for power in powers[path]]
        np.testing.assert_allclose(numbers, want, rtol=1e-3)


def test_a_weight_that_makes_up_for_others_gets_the_least_positive_score() -> None:
    # At 2 bits `a` loses 0.4 where `b`, which is added to it, gains 0.2: less of `b` is more loss.
    exact = jnp.array([[0.0, 3.0], [1.0, 0.0], [2.0, 1.0], [3.0, 2.0]])
    params = {"a": exact.at[1, 0].set(1.4), "b": exact.at[1, 0].set(1.8), "c": _normal(2, 4, 2)}

    def three(p, x):
        return x @ p["a"] + x @ p["b"] + 0.1 * (x @ p["c"])

    x = 0.3 * _normal(1, 64, 4)
    plan = jq.plan(jq.find_weights(three, params, x), {".*": jq.Scheme(Uniform(2))})
    found = kl_gradient(three, params, candidates(plan, (2, 8)), [x], low=0).values
    assert found["b"][0] == min(found["a"][0], found["c"][0]) > 0


def test_the_low_width_is_four_bits_or_what_is_below() -> None:
    whole = candidates(PLAN, (2, 3, 4, 8))
    assert kl_gradient(fn, PARAMS, whole, TOKENS) == kl_gradient(fn, PARAMS, whole, TOKENS, low=2)
    one = candidates(PLAN, (3, 8))
    assert kl_gradient(fn, PARAMS, one, TOKENS) == kl_gradient(fn, PARAMS, one, TOKENS, low=0)
    for low in (3, -1):
        with pytest.raises(PlanError, match=f"low={low}, but weight 'blocks/0/down' has"):
            kl_gradient(fn, PARAMS, whole, TOKENS, low=low)


# Disturbed blocks


def prune(w, fraction: float):
    """NumPy, straight from the definition."""
    flat = np.asarray(w).ravel().copy()
    order = np.argsort(np.abs(flat), kind="stable")
    flat[order[: int(fraction * flat.size)]] = 0.0
    return jnp.asarray(flat.reshape(w.shape))


def test_pruning_is_the_divergence_of_a_pruned_block() -> None:
    found = pmpq(fn, PARAMS, CHOICE, TOKENS)
    for k in range(2):
        block = {f"{n}{k}": prune(PARAMS["blocks"][k][n], 0.3) for n in ("up", "down")}
        kl = jq.evaluate.kl(fn, PARAMS, with_(**block), TOKENS)
        for name in ("up", "down"):
            want = kl / (2 * 8 * 16 / 1e6)
            assert found.values[f"blocks/{k}/{name}"][0] == pytest.approx(want, rel=1e-4)
    alone = pmpq(fn, PARAMS, CHOICE, TOKENS, unit="weight", fraction=0.5)
    kl = jq.evaluate.kl(fn, PARAMS, with_(up1=prune(leaf("blocks/1/up"), 0.5)), TOKENS)
    assert alone.values["blocks/1/up"][0] == pytest.approx(kl / (8 * 16 / 1e6), rel=1e-4)


def test_pruning_nothing_costs_nothing_and_more_costs_more() -> None:
    sizes = [0.0, 0.1, 0.3, 0.6, 1.0]
    found = [pmpq(fn, PARAMS, CHOICE, TOKENS, fraction=f).by_block() for f in sizes]
    for block in ("blocks/0", "blocks/1"):
        rises = [one[block] for one in found]
        assert rises[0] == 0 and rises == sorted(rises) and rises[1] > 0
    for bad in (-0.1, 1.5, "x"):
        with pytest.raises(PlanError, match="fraction must be between 0 and 1"):
            pmpq(fn, PARAMS, CHOICE, TOKENS, fraction=bad)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="unit must be 'block' or 'weight'"):
        pmpq(fn, PARAMS, CHOICE, TOKENS, unit="layer")  # type: ignore[arg-type]


def test_layers_of_a_stack_are_pruned_each_for_itself() -> None:
    params = {"w": _normal(0, 3, 6, 6) * jnp.array([0.01, 1.0, 1.0])[:, None, None]}

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])[0]

    x = _normal(1, 16, 6)
    plan = jq.plan(jq.find_weights(scanned, params, x), {".*": jq.Scheme(GRID)})
    found = pmpq(scanned, params, candidates(plan), [x], fraction=0.5).values["w"][0]
    pruned = {"w": jnp.stack([prune(w, 0.5) for w in params["w"]])}
    p, q = (jax.nn.log_softmax(scanned(tree, x)) for tree in (params, pruned))
    want = float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))) / (108 / 1e6)
    assert found == pytest.approx(want, rel=1e-4)


def test_noise_is_added_to_the_first_matrix_of_a_block() -> None:
    flat = tdmpq(fn, PARAMS, CHOICE, TOKENS, key=KEY, noise=0.0)
    loss = np.mean([float(next_token_loss(fn(PARAMS, t), t)) for t in TOKENS])
    assert [n for (n,) in flat.values.values()] == pytest.approx([loss] * 4, rel=1e-5)
    found = tdmpq(fn, PARAMS, CHOICE, TOKENS, key=KEY)
    # the noise is that of the block's name, whatever else is measured
    fewer = candidates(PLAN, (2, 3, 4), paths=["blocks/1/down", "blocks/1/up"])
    alone = tdmpq(fn, PARAMS, fewer, TOKENS, key=KEY)
    assert alone.values["blocks/1/up"] == found.values["blocks/1/up"]
    assert found.values["blocks/0/up"] == found.values["blocks/0/down"]
    assert found.values["blocks/0/up"][0] > loss
    changed = {**PARAMS, "blocks": [{**b, "up": 2 * b["up"]} for b in PARAMS["blocks"]]}
    assert tdmpq(fn, changed, CHOICE, TOKENS, key=KEY).values != found.values


# Canonical correlation


def oracle(x: np.ndarray, y: np.ndarray, ridge: float) -> float:
    """From the definition in float64: inverse roots of the covariances."""
    x, y = (np.asarray(a, np.float64) - np.asarray(a, np.float64).mean(0) for a in (x, y))

    def root(a: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(a.T @ a)
        return vectors / np.sqrt(values + ridge * values.mean()) @ vectors.T

    return float(np.linalg.svd(root(x) @ x.T @ y @ root(y), compute_uv=False)[0])


def by_qr(x: np.ndarray, y: np.ndarray) -> float:
    """Björck and Golub 1973: the cosine of the least angle between two spaces of columns."""
    q = [np.linalg.qr(a - a.mean(0))[0] for a in (x.astype(np.float64), y.astype(np.float64))]
    return float(np.linalg.svd(q[0].T @ q[1], compute_uv=False)[0])


def samples(seed: int, rows: int, width: int, other: int, shared: float):
    random = np.random.default_rng(seed)
    common = random.normal(size=(rows, 1))
    x = random.normal(size=(rows, width)) + shared * common
    y = random.normal(size=(rows, other)) * random.exponential(size=other) - shared * common
    return (x + 3).astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize(("rows", "width", "other", "shared"), [
    (40, 3, 5, 0.0), (64, 8, 8, 0.7), (200, 12, 1, 2.0), (33, 2, 2, 0.3),
])  # fmt: skip
def test_canonical_correlation_is_that_of_the_definition(rows, width, other, shared) -> None:
    x, y = samples(0, rows, width, other, shared)
    for ridge in (1e-3, 0.1):
        found = float(canonical_correlation(x, y, ridge))
        assert found == pytest.approx(oracle(x, y, ridge), abs=1e-4)
        assert found == pytest.approx(float(canonical_correlation(y, x, ridge)), abs=1e-5)
    assert float(canonical_correlation(x, y, 0.0)) == pytest.approx(by_qr(x, y), abs=1e-4)


def test_it_is_invariant_to_invertible_maps_and_units() -> None:
    x, y = samples(1, 80, 6, 6, 0.8)
    mixed = x @ np.random.default_rng(2).normal(size=(6, 6)).astype(np.float32) + 7
    one = float(canonical_correlation(x, y, 0.0))
    assert float(canonical_correlation(mixed, y, 0.0)) == pytest.approx(one, abs=1e-3)
    assert float(canonical_correlation(mixed, y)) == pytest.approx(one, abs=0.02)
    assert float(canonical_correlation(1e20 * x, 1e-20 * y, 0.0)) == pytest.approx(one, abs=1e-4)
    assert 0.99 < float(canonical_correlation(x, x)) <= 1
    assert 0 <= float(canonical_correlation(x, np.ones_like(x))) <= 1e-3  # it never moves


def test_with_few_samples_only_the_largest_components_count() -> None:
    """With as many features as rows, noise would correlate perfectly with any other noise."""
    x, y = samples(3, 48, 48, 48, 0.0)
    assert oracle(x, y, 1e-6) > 0.99
    found = float(canonical_correlation(x, y))

    def components(a: np.ndarray) -> np.ndarray:
        u, s, _ = np.linalg.svd(a.astype(np.float64) - a.mean(0), full_matrices=False)
        return (u * s)[:, :12]

    assert found == pytest.approx(oracle(components(x), components(y), 1e-3), abs=1e-3)
    assert found < 0.95
    for shapes in (((7, 2), (7, 2)), ((9, 2), (10, 2)), ((9,), (9, 2))):
        with pytest.raises(ValueError, match="needs .rows, features. of the same 8 rows"):
            canonical_correlation(*(jnp.ones(shape) for shape in shapes))


def states(p, x):
    """The residual stream before and after every block, averaged over the sequence."""
    found = [x]
    for block in p["blocks"]:
        found.append(found[-1] + jnp.tanh(found[-1] @ block["up"]) @ block["down"])
    return [np.asarray(jnp.mean(state, 1)) for state in found]


def test_states_are_the_residual_stream_between_blocks() -> None:
    tokens = np.asarray(jax.random.randint(jax.random.key(9), (40, 3), 0, VOCAB))
    blocks = [{n: 4 * w for n, w in block.items()} for block in PARAMS["blocks"]]
    params = {**PARAMS, "blocks": blocks}
    batches = [tokens[:15], tokens[15:]]
    found = cmpq(fn, params, CHOICE, batches, ridge=0.5).by_block()  # so that none is near 1
    # the states: after the embedding, after block 0, after block 1 (the head sees that one)
    s = states(params, params["embed"][tokens])
    rho = {(a, b): oracle(s[a], s[b], 0.5) for a in range(3) for b in range(3) if a != b}
    for k in range(2):
        want = 1 - np.mean([r for (a, _), r in rho.items() if a == k + 1])
        assert want > 0.01 and found[f"blocks/{k}"] == pytest.approx(want, rel=0.01)


def test_quantized_inputs_are_no_part_of_a_score_but_of_the_size() -> None:
    """A score is of the weight: static ranges of inputs, which need evidence, are not in it."""
    x, params = _normal(1, 64, 16), {"w": _normal(2, 16, 8)}
    function = lambda p, x: x @ p["w"]  # noqa: E731
    weights = jq.find_weights(function, params, x)
    static = jq.Activations(Uniform(8, symmetric=True), "static")
    with_inputs, plain = (
        candidates(jq.plan(weights, {".*": jq.Scheme(GRID, activations=a)}), (3, 4))
        for a in (static, None)
    )
    assert exact_kl(function, params, with_inputs, [x]).values == (
        exact_kl(function, params, plain, [x]).values
    )
    more = [a - b for a, b in zip(with_inputs.bytes("w"), plain.bytes("w"), strict=True)]
    assert more == [4, 4]  # one float32 scale, for all tokens


def test_tokens_on_one_axis_are_the_same_states() -> None:
    """A head may take the tokens of all sequences as one axis: nothing else ends the last block."""
    tokens = np.asarray(jax.random.randint(jax.random.key(9), (40, 3), 0, VOCAB))

    def flat(p, tokens):
        headless = {**p, "head": jnp.eye(WIDTH)}
        x = fn(headless, tokens)
        return (x.reshape(-1, WIDTH) @ p["head"]).reshape(*tokens.shape, VOCAB)

    assert cmpq(flat, PARAMS, CHOICE, [tokens]).by_block() == pytest.approx(
        cmpq(fn, PARAMS, CHOICE, [tokens]).by_block(), rel=1e-3
    )


def test_a_block_that_does_nothing_is_least_unlike_the_others() -> None:
    blocks = [{n: 4 * w for n, w in b.items()} for b in PARAMS["blocks"]]
    idle = {"up": jnp.zeros((WIDTH, 16)), "down": jnp.zeros((16, WIDTH))}
    params = {**PARAMS, "blocks": [blocks[0], idle, idle, blocks[1]]}
    plan = jq.plan(jq.find_weights(fn, params, TOKENS[0]), {
        "blocks/.*": jq.Scheme(GRID), ".*": jq.keep})  # fmt: skip
    tokens = np.asarray(jax.random.randint(jax.random.key(9), (64, 3), 0, VOCAB))
    found = cmpq(fn, params, candidates(plan), [tokens]).by_block()
    assert found["blocks/1"] == pytest.approx(found["blocks/2"], abs=1e-6)
    assert found["blocks/1"] < found["blocks/3"]
    assert all(0 <= score <= 1 for score in found.values())


def test_a_stack_has_the_mean_of_its_layers() -> None:
    ws = _normal(0, 3, 6, 6)
    x = _normal(1, 64, 4, 6)

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])[0]

    def unrolled(p, x):
        for k in "012":
            x = x + jnp.tanh(x @ p[k]["w"])
        return x

    found = []
    for function, params in (
        (scanned, {"w": ws}),
        (unrolled, {k: {"w": ws[int(k)]} for k in "012"}),
    ):
        plan = jq.plan(jq.find_weights(function, params, x), {".*": jq.Scheme(GRID)})
        found.append(cmpq(function, params, candidates(plan), [x]))
    assert found[0].values["w"][0] == pytest.approx(np.mean(list(found[1].by_block().values())))


def test_too_few_sequences_and_states_without_them_are_refused() -> None:
    with pytest.raises(EvidenceError, match="got 7 sequences; .* needs 8 at least"):
        cmpq(fn, PARAMS, CHOICE, [TOKENS[0], TOKENS[1][:2]])

    def pooled(p, x):
        x = jnp.sum(x, 0)
        for k in "01":
            x = x + jnp.tanh(x @ p[k])
        return x

    params = {k: _normal(int(k), 4, 4) for k in "01"}
    x = _normal(3, 16, 3, 4)
    plan = jq.plan(jq.find_weights(pooled, params, x), {".*": jq.Scheme(GRID)})
    with pytest.raises(EvidenceError, match="leading axis of 16 sequences"):
        cmpq(pooled, params, candidates(plan), [x])


# As data


def test_what_is_read_back_is_checked() -> None:
    good = exact_kl(fn, PARAMS, CHOICE, TOKENS[:1]).to_json()
    assert Sensitivity.from_json(good).name == "exact KL"
    for change in ({"format": 2}, {"values": 3}, {"schemes": {"x": 7}}, {"lists": []},
                   {"values": {PATHS[0]: [1.0]}}):  # fmt: skip
        with pytest.raises(ValueError, match="format|this is not what|do not match"):
            Sensitivity.from_json({**good, **change})
    with pytest.raises(ValueError, match="this is not what"):
        Sensitivity.from_json([])
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(EvidenceError, match="weight 'w': its score by mine is"):
            Sensitivity("mine", "", "", {"w": (bad,)})


def test_a_score_of_more_schemes_serves_fewer() -> None:
    found = exact_kl(fn, PARAMS, CHOICE, TOKENS)
    few = candidates(PLAN, (3, 4))
    assert found.losses(few) == {path: found.values[path][1:] for path in PATHS}


def test_a_score_that_knows_no_scheme_falls_to_a_quarter_with_each_bit() -> None:
    found = Sensitivity("mine", "", "", dict.fromkeys(PATHS, (3.0,))).losses(CHOICE)
    assert found["blocks/0/up"] == tuple(3.0 * 8 * 16 / 4**b for b in (2, 3, 4))


# A trained network


@pytest.fixture(scope="module")
def network():
    function, params, calibration, evaluation = trained.load()
    weights = jq.find_weights(function, params, calibration[:1])
    scheme = jq.Scheme(GRID, 64)
    plan = jq.plan(weights, {trained.LINEARS: scheme, ".*": jq.keep})
    return function, params, candidates(plan), calibration[:8, :128], evaluation[:8]


def test_at_three_bits_exact_losses_beat_the_uniform_width_on_text_not_seen(network) -> None:
    function, params, choice, text, held_out = network
    scores = {
        "exact": exact_kl(function, params, choice, [text], only=(0, 1, 2)),
        "fisher": fisher(function, params, choice, [text], key=KEY),
        "gradient": kl_gradient(function, params, choice, [text], low=1),
    }
    size = sum(choice.bytes(path)[1] for path in choice)
    plans = {"uniform": choice.plan(dict.fromkeys(choice, 1))}
    for name, score in scores.items():
        plans[name], shares = allocate(score, choice, bytes=size)
        assert shares.bytes <= size and len(shares.widths) > 1
    models = {name: jq.quantize(function, params, plan)[0] for name, plan in plans.items()}
    kl = {n: c.kl for n, c in jq.evaluate.compare_all(function, params, models, [held_out]).items()}
    assert all(kl[name] < 0.85 * kl["uniform"] for name in scores), kl
    # second order in the error: near the exact loss where that is small
    ratios = [scores["fisher"].values[p][2] / scores["exact"].values[p][2] for p in choice]
    assert 0.7 < np.exp(np.mean(np.log(ratios))) < 1.5
