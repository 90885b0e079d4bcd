"""What errors of outputs cost: squares of gradients by token, and moments weighed by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq
from jquant.axes.results import Outputs
from jquant.calibration.meeting import Meeting
from jquant.calibration.observe import Observer
from jquant.calibration.saliency import Saliency, edges_of
from jquant.calibration.tagged import Tagged, array_of, constant
from jquant.errors import EvidenceError, PlanError
from jquant.grids import Float, Uniform
from jquant.programs.walker import Walker, trace
from jquant.rounding import GPTQ, Guided, Nearest, Polish
from jquant.weights.arguments import path_of


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


X = _normal(0, 4, 6, 8)
P = {
    "w": _normal(1, 8, 8) / 3, "b": _normal(2, 8, 6) / 3, "s": _normal(3, 3, 8, 8) / 3,
    "h": _normal(4, 8, 2, 5), "o": _normal(5, 2, 4, 3), "c": _normal(6, 3, 8, 6) / 3,
    "g": _normal(7, 3, 4, 6) / 3, "x": _normal(8, 4, 8, 5),
    "m": _normal(9, 8, 5),
}  # fmt: skip


def _two(p: Any, x: Any) -> Any:
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["b"])


def _left(p: Any, x: Any) -> Any:
    return p["w"].T @ x.swapaxes(1, 2)


def _heads(p: Any, x: Any) -> Any:
    return jnp.einsum("btd,dhe->bhte", x, p["h"])


def _joined_heads(p: Any, x: Any) -> Any:
    return jnp.einsum("bthe,hed->tbd", x.reshape(4, 6, 2, 4), p["o"])


def _viewed(p: Any, x: Any) -> Any:
    return x @ p["h"].transpose(1, 2, 0).reshape(10, 8).T


def _experts(p: Any, x: Any) -> Any:
    return jnp.einsum("btd,bdf->tbf", x, p["x"])


def _conv(p: Any, x: Any) -> Any:
    return lax.conv_general_dilated(
        x, p["c"], (2,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC")
    )


def _grouped_conv(p: Any, x: Any) -> Any:
    numbers = ("NCW", "WIO", "NCW")
    return lax.conv_general_dilated(
        x.swapaxes(1, 2), p["g"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=2
    )


def _grouped(p: Any, x: Any) -> Any:
    tokens = x.shape[0] * x.shape[1]
    return lax.ragged_dot(
        x.reshape(-1, 8), p["s"], jnp.array([tokens // 4, tokens // 4, tokens // 2])
    )


def _shared(p: Any, x: Any) -> Any:
    """Two weights of one input, which earlier ones have made."""
    x = jnp.tanh(x @ p["w"])
    return x @ p["b"], x @ p["m"]


def _layers(p: Any, x: Any) -> Any:
    return lax.scan(lambda h, w: (h + jax.nn.relu(h @ w), None), x, p["s"])[0] @ p["b"]


def _sum(y: Any, *inputs: Any) -> Any:
    return jnp.sum(jnp.sin(y))


class _Spy(Observer):
    """Keeps the operands and the result of every product in which a weight meets an input."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[tuple[int, Meeting]] = []
        self.products: list[tuple[int, Meeting, Any, Any]] = []

    def guide(self, walker: Walker, where: Any, meeting: Meeting) -> None:
        self.met.append((where, meeting))

    def rule(self, eqn: Any, values: list[Any], walker: Walker) -> Any:
        before = len(self.met)
        results = super().rule(eqn, values, walker)
        for where, meeting in self.met[before:]:
            x = array_of(values[1 - where])
            self.products.append((where, meeting, x, results[0]))  # pyright: ignore
        return results


@pytest.mark.parametrize(
    "fn", [_two, _left, _heads, _joined_heads, _viewed, _experts, _conv, _grouped_conv]
)
def test_rows_of_outputs_are_rows_of_inputs_times_the_weight(fn: Callable[..., Any]) -> None:
    closed, _ = trace(fn, P, X)
    spy = _Spy()
    walker = Walker(spy, constant=constant)
    leaves = jax.tree_util.tree_flatten_with_path(P)[0]
    walker.run(closed, [*(Tagged.of(path_of(keys), leaf) for keys, leaf in leaves), X])
    weights = jq.find_weights(fn, P, X)
    assert spy.products
    for slot, meeting, x, y in spy.products:
        weight = weights[meeting.origin.path]
        canonical = weight.layout.canonical(P[weight.path])
        rows = meeting.way.rows(meeting.contraction.seen(x))
        outputs = Outputs.of(meeting.contraction, slot, meeting.origin)
        assert outputs.way.lead == meeting.way.lead
        assert outputs.count == canonical.shape[-2]
        np.testing.assert_allclose(
            outputs.rows(y), rows @ jnp.swapaxes(canonical, -1, -2), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_the_mean_square_of_gradients_by_outputs(groups: int) -> None:
    saliency = jq.saliency(_two, P, [X, X + 1], groups=groups, objective=_sum)
    assert (saliency.groups, set(saliency.names)) == (groups, {"w", "b"})

    def disturbed(zeros: Any, x: Any) -> Any:
        return _sum(jnp.tanh(jnp.tanh(x @ P["w"] + zeros[0]) @ P["b"] + zeros[1]))

    zeros = jnp.zeros((4, 6, 8)), jnp.zeros((4, 6, 6))
    gradients = [jax.grad(disturbed)(zeros, x) for x in (X, X + 1)]
    for k, name in enumerate("wb"):
        squares = np.stack([np.square(g[k]).reshape(24, groups, -1).mean(-1) for g in gradients])
        own = np.stack([batch[name][0] for batch in saliency.batches])
        np.testing.assert_allclose(own, squares / squares.mean((0, 1)), rtol=1e-3, atol=1e-6)
    assert saliency.nbytes == 2 * 2 * 24 * groups * 4


def test_layers_of_a_stack_have_their_own() -> None:
    apart = {**P, "s": {str(k): w for k, w in enumerate(P["s"])}}

    def written_out(p: Any, x: Any) -> Any:
        for k in range(3):
            x = x + jax.nn.relu(x @ p["s"][str(k)])
        return x @ p["b"]

    stacked = jq.saliency(_layers, P, [X], objective=_sum)
    plain = jq.saliency(written_out, apart, [X], objective=_sum)
    assert stacked.names == ("s[0]", "s[1]", "s[2]", "b")
    for one, other in (("s[0]", "s/0"), ("s[2]", "s/2"), ("b", "b")):
        (a,), (b,) = stacked.batches[0][one], plain.batches[0][other]
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    plan = _plan(_layers, Guided(), X)
    qparams, _ = jq.quantize(_layers, P, plan, [X], saliency=stacked)
    apart_plan = jq.plan(jq.find_weights(written_out, apart, X), {".*": plan["s"]})
    q, _ = jq.quantize(written_out, apart, apart_plan, [X], saliency=plain)
    for k in range(3):
        same = jq.dequantize(qparams)["s"][k] == jq.dequantize(q)["s"][str(k)]
        assert float(jnp.mean(same)) > 0.95  # sums in another order


def test_next_tokens_by_default() -> None:
    tokens = jax.random.randint(jax.random.key(0), (2, 5), 0, 8)
    params = {"e": _normal(0, 8, 8), "w": _normal(1, 8, 8)}
    fn = lambda p, tokens: p["e"][tokens] @ p["w"]  # noqa: E731
    (rows,) = jq.saliency(fn, params, [tokens]).batches[0]["w"]
    error = jax.nn.softmax(fn(params, tokens)[:, :-1]) - jax.nn.one_hot(tokens[:, 1:], 8)
    squares = np.pad(np.square(error).mean(-1), ((0, 0), (0, 1)))
    np.testing.assert_allclose(rows[:, 0], squares.ravel() / squares.mean(), rtol=1e-4)
    (drawn,) = jq.saliency(fn, params, [tokens], key=jax.random.key(3)).batches[0]["w"]
    assert (drawn.reshape(2, 5)[:, :4] > 0).all() and not np.allclose(drawn, rows)
    half = np.arange(5) < np.array([[5], [3]])
    (rows,) = jq.saliency(fn, params, [tokens], token_weights=[half]).batches[0]["w"]
    assert (rows.reshape(2, 5) > 0).tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3]


def _plan(fn: Any, rounding: Any, *inputs: Any, bits: int = 2) -> jq.Plan:
    weights = jq.find_weights(fn, P, *inputs)
    return jq.plan(weights, {".*": jq.Scheme(Uniform(bits), 4, rounding)})


def _codes(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jq.QTensor))
    return [leaf.codes.astype(jnp.int32) for leaf in leaves if isinstance(leaf, jq.QTensor)]


ROWS_OF: dict[Any, dict[str, tuple[int, ...]]] = {
    _shared: {"w": (120,), "b": (120,), "m": (120,)},
    _layers: {"s[0]": (120,), "s[1]": (120,), "s[2]": (120,), "b": (120,)},
    _experts: {"x": (4, 30)},
    _grouped: {"s": (120,)},
    _conv: {"c": (60,)},
}


@pytest.mark.parametrize(
    ("fn", "groups"), [(_shared, 3), (_layers, 1), (_experts, 1), (_grouped, 1), (_conv, 1)]
)
def test_where_all_cost_the_same_it_changes_nothing(fn: Any, groups: int) -> None:
    x = _normal(10, 4, 30, 8)
    weights = jq.find_weights(fn, P, x)
    plans = [
        jq.plan(weights, {".*": jq.Scheme(Uniform(2), 4, rounding)})
        for rounding in (GPTQ(correction="qep"), Guided(GPTQ(correction="qep")))
    ]
    ones = {name: np.full((*rows, groups), 2.0) for name, rows in ROWS_OF[fn].items()}
    plain, _ = jq.quantize(fn, P, plans[0], [x])
    q, _ = jq.quantize(fn, P, plans[1], [x], saliency=Saliency([ones]))
    for a, b in zip(_codes(plain), _codes(q), strict=True):
        assert float(jnp.mean(a == b)) > 0.97  # rows times √2 round otherwise


def test_each_group_of_rows_has_its_moment() -> None:
    w, groups = P["w"].T, 3
    parts = [jq.Evidence.of(X[k], full=X[k] + 0.1 * X[k + 1]) for k in range(groups)]
    evidence = parts[0].merge(parts[1]).guided_by(parts)
    assert evidence.groups == groups
    grid, inner = Uniform(2), GPTQ(correction="qep")
    rounded = Guided(inner)(w, grid, evidence=evidence)
    edges = edges_of(8, groups)
    assert edges == [0, 2, 5, 8]
    for part, a, b in zip(parts, edges, edges[1:], strict=False):
        own = inner(w[a:b], grid, evidence=part)
        assert (rounded.codes[a:b] == own.codes).all()
        for name, leaf in own.params.items():
            assert (rounded.params[name][a:b] == leaf).all()
        assert rounded.target is not None and own.target is not None
        np.testing.assert_allclose(rounded.target[a:b], own.target, rtol=1e-5)
    assert not {"error", "nearest_error"} & rounded.info.keys()
    assert Guided(Polish(inner)).label == "Guided(Polish(GPTQ))"
    assert Guided(inner).needs == {"moment", "drift", "guided"}


def test_its_moments_are_those_of_weighed_tokens() -> None:
    rows = np.abs(np.asarray(_normal(9, 24, 2)))
    given = Saliency([{"w": rows}])
    evidence = jq.capture(_two, P, [X], saliency=given)["w"]
    assert jq.capture(_two, P, [X], saliency=given)["b"].guided is None
    flat = X.reshape(24, 8)
    for g in range(2):
        weighed = jnp.einsum("ti,t,tj->ij", flat, rows[:, g], flat)
        np.testing.assert_allclose(evidence.of_group(g).second_moment, weighed, rtol=1e-4)
    both = evidence.merge(evidence)
    assert both.guided is not None and evidence.guided is not None
    np.testing.assert_allclose(both.guided.count, 2 * evidence.guided.count)
    # Beside weights of tokens both count, and what is padding may be anything.
    mask = np.arange(6) < np.array([6, 3, 2, 0])[:, None]
    padded = jnp.where(mask[..., None], X, jnp.nan)
    seen = jq.capture(_two, P, [padded], saliency=given, token_weights=[mask])["w"]
    own = jnp.einsum("ti,t,tj->ij", flat, rows[:, 0] * mask.ravel(), flat)
    np.testing.assert_allclose(seen.of_group(0).second_moment, own, rtol=1e-4, atol=1e-5)


def test_windows_of_a_weight_are_put_together() -> None:
    """One half of the inputs after the other, each with rows of its own."""
    fn = lambda p, x: (x[..., :4] @ p["w"][:4]) * (x[..., 4:] @ p["w"][4:])  # noqa: E731
    saliency = jq.saliency(fn, P, [X], paths=["w"], objective=_sum)
    one, two = saliency.batches[0]["w"]
    guided = jq.capture(fn, P, [X], saliency=saliency, paths=["w"])["w"].of_group(0)
    flat = X.reshape(24, 8)
    for k, rows in ((0, one), (4, two)):
        part = flat[:, k : k + 4]
        own = guided.second_moment[k : k + 4, k : k + 4]
        np.testing.assert_allclose(own, jnp.einsum("ti,t,tj->ij", part, rows[:, 0], part), 1e-4)
    assert float(jnp.abs(guided.second_moment[:4, 4:]).max()) == 0
    with pytest.raises(EvidenceError, match="'w'.*in all of them|'w'"):
        jq.saliency(lambda p, x: x @ p["w"][:, :4], P, [X], groups=2, objective=_sum)


def test_rotations_turn_it_too() -> None:
    evidence = jq.Evidence.of(X[0]).guided_by([jq.Evidence.of(X[1])])
    part, _, turned = jq.Hadamard().apart(P["w"], evidence)
    assert turned is not None
    np.testing.assert_allclose(
        turned.of_group(0).second_moment, jq.Evidence.of(part.rows(X[1])).second_moment, 1e-3, 1e-5
    )


def test_a_job_of_other_saliency_is_another(tmp_path: Any) -> None:
    plan, seen = _plan(_two, Guided(), X), jq.saliency(_two, P, [X], objective=_sum)
    jq.quantize(_two, P, plan, [X], saliency=seen, work_dir=tmp_path)
    other = jq.saliency(_two, P, [X], objective=lambda y, x: jnp.sum(y**2))
    with pytest.raises(jq.errors.WorkDirError, match="the data"):
        jq.quantize(_two, P, plan, [X], saliency=other, work_dir=tmp_path)


def test_a_whole_stack_takes_no_saliency_of_layers() -> None:
    saliency = jq.saliency(_layers, P, [X], objective=_sum)
    with pytest.raises(EvidenceError, match=r"'s' is of its layers.*sequential='weight'"):
        jq.capture(_layers, P, [X], saliency=saliency)
    with pytest.raises(EvidenceError, match=r"'s' is of its layers.*sequential='weight'"):
        jq.quantize(
            _layers, P, _plan(_layers, Guided(), X), [X], saliency=saliency, sequential=None
        )


ROWS = np.ones((24, 1))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS * np.nan, r"'w' in batch 0: weights hold nan at \(0, 0\)"),
        (-ROWS, r"'w' in batch 0: weights hold -1.0 at \(0, 0\); pass finite weights, 0 or more"),
        (ROWS * 0, "'w' is 0 for all tokens of all 1 batches"),
        (ROWS[:, 0], r"'w' in batch 0 must be numbers \[\*batch, tokens, groups\], got float64"),
        (ROWS.astype(complex), "'w' in batch 0 must be numbers"),
        ((), "'w' in batch 0 has no arrays"),
    ],
)
def test_what_is_no_saliency(rows: Any, words: str) -> None:
    with pytest.raises(EvidenceError, match=words):
        Saliency([{"w": rows}])


def test_groups_and_names_agree() -> None:
    with pytest.raises(EvidenceError, match=r"'b': the last axis.*got \[1, 2\] groups"):
        Saliency([{"w": ROWS, "b": np.ones((24, 2))}])
    with pytest.raises(EvidenceError, match="'b' is in some batches"):
        Saliency([{"w": ROWS, "b": ROWS}, {"w": ROWS}])
    with pytest.raises(EvidenceError, match="no batches"):
        Saliency([])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"w": ROWS[1:], "b": ROWS}], r"'w', batch 0: got \[23, 1\] for rows \[24, groups\]"),
        ([{"w": ROWS}], "does not know weight 'b'; near: 'w'"),
        ([{"w": ROWS, "b": ROWS}] * 2, "is of 2 batches, got 1"),
    ],
)
def test_saliency_of_another_job_is_refused_before_work(given: Any, words: str) -> None:
    told: list[Any] = []
    with pytest.raises(EvidenceError, match=words):
        jq.quantize(
            _two, P, _plan(_two, Guided(), X), [X], saliency=Saliency(given), progress=told.append
        )
    assert not told


def test_what_has_no_use_for_it_or_lacks_it() -> None:
    saliency = jq.saliency(_two, P, [X], objective=_sum)
    with pytest.raises(EvidenceError, match="'b': Guided.GPTQ. needs to know.*saliency="):
        jq.quantize(_two, P, _plan(_two, Guided(), X), [X])
    with pytest.raises(PlanError, match="no rounding of the plan uses it"):
        jq.quantize(_two, P, _plan(_two, GPTQ(), X), [X], saliency=saliency)
    with pytest.raises(EvidenceError, match=r"batch 0 \(float32\[4, 5, 8\]\) is none that"):
        jq.quantize(_two, P, _plan(_two, Guided(), X), [X[:, 1:]], saliency=saliency)
    with pytest.raises(EvidenceError, match="needs moments weighed"):
        Guided()(P["w"], Uniform(2), evidence=X[0].T @ X[0])
    with pytest.raises(ValueError, match="Guided.rounding must be a rounding"):
        Guided(3)  # type: ignore[arg-type]
    guided = jq.Evidence.of(X[0]).guided_by([jq.Evidence.of(X[1]), jq.Evidence.of(X[2])])
    with pytest.raises(ValueError, match="share parameters"):
        Guided()(P["w"], Uniform(2), jq.Groups("out", 4), evidence=guided)
    with pytest.raises(ValueError, match="share parameters"):
        Guided(Nearest())(P["w"], Float(2, 1, scale="e4m3", group=8), evidence=guided)
    with pytest.raises(EvidenceError, match="guided for 2 groups of rows, and the weight has 1"):
        Guided()(P["w"][:1], Uniform(2), evidence=guided)


@pytest.mark.parametrize(
    ("fn", "options", "words"),
    [
        (_two, {"groups": 9, "paths": ["w"]}, "'w' has no saliency: it has 8 outputs, fewer than"),
        (_two, {"paths": ["v"]}, "'v' is no weight"),
        (_two, {"objective": None}, r"default objective takes logits.*\(4, 6, 6\)"),
        (_two, {"objective": lambda y, x: y}, r"must be a number, got float32\[4, 6, 6\]"),
        (_two, {"objective": lambda y, x: jnp.sum(y) * jnp.nan}, "is NaN or infinite in batch 0"),
        (_two, {"objective": lambda y, x: jnp.sum(x)}, "is 0 for all tokens"),
        (_two, {"token_weights": [np.ones((4, 6))]}, "told to the default objective only"),
        (_two, {"key": jax.random.key(0)}, "token_weights and key are told to the default"),
        (lambda p, x: x @ (p["w"] @ p["b"]), {}, "'w' has no saliency: the outputs of its product"),
        (
            lambda p, x: lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["w"]), x),
            {}, "'w' is used inside a",
        ),
    ],
)  # fmt: skip
def test_what_has_no_saliency(fn: Any, options: Any, words: str) -> None:
    with pytest.raises(EvidenceError, match=words):
        jq.saliency(fn, P, [X], **{"objective": _sum, **options})
