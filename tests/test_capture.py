"""Capture sees what flows into every weight of any function; what it cannot see raises."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.errors import EvidenceError, UnsupportedPrimitiveError
from tests.functions import CASES, Case, _gram, _normal


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_moments_equal_a_hand_written_forward(case: Case) -> None:
    evidence = jq.capture(case.fn, case.params, case.batches)
    hand = [case.moments(case.params, batch) for batch in case.batches]
    assert set(evidence) == set(hand[0])
    for path, found in evidence.items():
        wanted = sum(np.asarray(h[path]) for h in hand)
        assert found.second_moment.shape == wanted.shape, path
        np.testing.assert_allclose(found.second_moment, wanted, rtol=2e-4, atol=2e-4, err_msg=path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_axes_lead_to_the_canonical_view_that_evidence_is_for(case: Case) -> None:
    weights = jq.find_weights(case.fn, case.params, case.batches[0])
    moments = case.moments(case.params, case.batches[0])
    leaves = {
        jax.tree_util.keystr(k, simple=True, separator="/"): leaf
        for k, leaf in jax.tree_util.tree_flatten_with_path(case.params)[0]
    }
    assert set(weights) == set(moments)
    for path, weight in weights.items():
        canonical = weight.layout.canonical(leaves[path])
        assert moments[path].shape == (
            *canonical.shape[:-2],
            canonical.shape[-1],
            canonical.shape[-1],
        )
        np.testing.assert_array_equal(weight.layout.original(canonical), leaves[path])


def test_mean_maximum_and_count() -> None:
    x = _normal(0, 7, 3)
    found = jq.capture(lambda p, x: x @ p, _normal(1, 3, 2), [x[:4], x[4:]])[""]
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.abs_max, jnp.abs(x).max(0))
    assert float(found.count) == 7


def test_capturing_apart_and_merging_is_capturing_together() -> None:
    case = CASES[0]
    together = jq.capture(case.fn, case.params, case.batches)
    one, two = (jq.capture(case.fn, case.params, [batch]) for batch in case.batches)
    for path, found in together.items():
        merged = one[path].merge(two[path])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, merged
        )


def test_a_shared_input_is_held_once_also_when_every_user_casts_it() -> None:
    params = {"q": _normal(0, 4, 4), "k": _normal(1, 4, 2, 3), "other": _normal(2, 4, 4)}

    def fn(params, x):
        def project(x, w):
            return jnp.tensordot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), 1)

        cast = [jax.jit(project)(x, params[name]) for name in ("q", "k")]
        return cast, (x * 2) @ params["other"]

    found = jq.capture(fn, params, [_normal(3, 5, 4)])
    assert found["q"].second_moment is found["k"].second_moment
    assert found["q"].second_moment is not found["other"].second_moment


def test_bfloat16_inputs_are_multiplied_exactly() -> None:
    x = _normal(0, 64, 8).astype(jnp.bfloat16)
    found = jq.capture(lambda p, x: x @ p, jnp.ones((8, 2), jnp.bfloat16), [x])[""]
    assert found.second_moment.dtype == jnp.float32
    np.testing.assert_allclose(found.second_moment, _gram(x.astype(jnp.float32)), rtol=1e-6)


def test_experts_without_tokens_count_none() -> None:
    case = next(case for case in CASES if case.name == "ragged-dot")
    found = jq.capture(case.fn, case.params, case.batches)["experts"]
    assert found.count.tolist() == [4, 0, 8]


def test_a_second_capture_of_equal_shapes_compiles_nothing(compiles) -> None:
    case = CASES[0]
    jq.capture(case.fn, case.params, case.batches)
    with compiles() as log:
        jq.capture(case.fn, case.params, case.batches)
        jq.find_weights(case.fn, case.params, case.batches[0])
    assert log == []


def test_find_weights_computes_nothing_and_takes_shapes() -> None:
    shape = jax.ShapeDtypeStruct
    huge = {"w": shape((1 << 20, 1 << 20), jnp.float32)}
    weights = jq.find_weights(lambda p, x: x @ p["w"], huge, shape((8, 1 << 20), jnp.float32))
    assert weights["w"].in_axes == (0,)


def test_two_uses_of_a_tied_weight() -> None:
    case = CASES[0]
    uses = jq.find_weights(case.fn, case.params, case.batches[0])["params/embed/embedding"].uses
    assert [(use.kind, use.counted) for use in uses] == [("lookup", False), ("dot", True)]


def _hidden(wrap):
    """A function whose weight `deep/w` is used inside something."""
    return lambda params, x: wrap(params["deep"]["w"], x)


def _shard(w, x):
    mesh = jax.sharding.AbstractMesh((2,), ("a",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(w, x)


def _changed_by_a_loop(w, x):
    return jax.lax.fori_loop(0, 2, lambda _, s: (s[0] * 0.5, s[1] @ s[0]), (w, x))[1]


def _solved(w, x):
    return jax.lax.custom_linear_solve(lambda v: w @ v, x[0], lambda _, b: b)


def _called_back(w, x):
    return jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), x, w, x)


def _picked(w, x):
    return jnp.einsum("btd,bde->bte", x[None], w[None][jnp.array([0])])


def _stacked(w, x):
    return jnp.einsum("btd,bde->bte", x[None], jnp.stack([w, w])[jnp.array([1])])


@pytest.mark.parametrize(
    ("wrap", "primitive"),
    [
        pytest.param(_shard, "shard_map", id="shard_map"),
        pytest.param(_solved, "custom_linear_solve", id="solve"),
        pytest.param(_called_back, "pure_callback", id="callback"),
        pytest.param(lambda w, x: x @ jnp.fft.fft(w).real, "fft", id="fft"),
        pytest.param(_changed_by_a_loop, "scan", id="loop"),
        pytest.param(jax.lax.linalg.triangular_solve, "triangular_solve", id="triangular"),
        pytest.param(_stacked, "gather", id="stacked"),
        pytest.param(_picked, "gather", id="picked"),
    ],
)
def test_a_weight_that_cannot_be_followed_raises_with_path_and_primitive(wrap, primitive) -> None:
    params, x = {"deep": {"w": _normal(0, 4, 4)}}, _normal(1, 3, 4)
    for verb in (
        lambda: jq.find_weights(_hidden(wrap), params, x),
        lambda: jq.capture(_hidden(wrap), params, [x]),
    ):
        with pytest.raises(UnsupportedPrimitiveError, match="'deep/w'") as caught:
            verb()
        assert primitive in str(caught.value)
        assert "ignore" in str(caught.value)


def test_an_ignored_weight_does_not_raise() -> None:
    params, x = {"deep": {"w": _normal(0, 4, 4)}, "w": _normal(2, 4, 2)}, _normal(1, 3, 4)

    def fn(params, x):
        return (x @ jnp.exp(params["deep"]["w"])) @ params["w"]

    assert list(jq.find_weights(fn, params, x, ignore="deep/.*")) == ["w"]
    assert list(jq.capture(fn, params, [x], paths=["w"])) == ["w"]


def test_biases_norms_positions_and_learned_queries_are_no_trouble() -> None:
    params = {"position": _normal(0, 5, 4), "queries": _normal(1, 3, 4), "w": _normal(2, 4, 6),
              "scale": _normal(3, 1, 4)}  # fmt: skip

    def fn(params, x):
        x = (x + params["position"]) * (1 + params["scale"])
        keys, queries = x @ params["w"], params["queries"] @ params["w"]
        return jax.nn.softmax(queries @ keys.T) @ x

    x = _normal(4, 5, 4)
    weights = jq.find_weights(fn, params, x)
    assert weights.others["position"] == "it is used by 'add' only"
    found = jq.capture(fn, params, [x])["w"]
    keys = (x + params["position"]) * (1 + params["scale"])
    np.testing.assert_allclose(
        found.second_moment, _gram(keys) + _gram(params["queries"]), rtol=1e-4, atol=1e-4
    )


def test_inputs_that_are_not_finite_name_the_weight_and_the_batch() -> None:
    x = _normal(0, 3, 4)
    with pytest.raises(EvidenceError, match=r"'w'.*batch 1"):
        jq.capture(
            lambda p, x: x @ p["w"],
            {"w": jnp.ones((4, 2), jnp.float32)},
            [x, x.at[1, 1].set(jnp.nan), x],
        )


def test_no_batches_is_an_error() -> None:
    with pytest.raises(EvidenceError, match="no batches"):
        jq.capture(lambda p, x: x @ p, jnp.ones((2, 2)), [])


def test_batches_of_other_shapes_are_added_up() -> None:
    x = _normal(0, 7, 4)
    fn = lambda p, x: x @ p  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jq.capture(fn, jnp.ones((4, 2), jnp.float32), [x[:3], x[3:]])[""]
    np.testing.assert_allclose(found.second_moment, _gram(x), rtol=1e-5)


def test_each_branch_has_its_own_uses() -> None:
    """Two branches alike: neither use takes the other's place."""
    params = {"yes": jnp.ones((4, 3)), "no": jnp.ones((4, 3))}

    def fn(p, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["yes"], lambda x: x @ p["no"], x)

    assert set(jq.find_weights(fn, params, jnp.ones((2, 4)))) == {"yes", "no"}


def test_a_later_batch_that_does_not_fit_is_named() -> None:
    params = {"w": jnp.ones((4, 3), jnp.float32)}
    with pytest.raises(EvidenceError, match=r"batch 1 has float32\[2, 5\], where batch 0 has"):
        jq.capture(
            lambda p, x: x @ p["w"],
            params,
            [jnp.ones((2, 4), jnp.float32), jnp.ones((2, 5), jnp.float32)],
        )


@pytest.mark.parametrize(
    ("size", "says"),
    [(1e20, "finite, but so large"), (jnp.inf, "NaN or infinite"), (jnp.nan, "NaN or infinite")],
)
@pytest.mark.parametrize("tokens", [3, 1200])
def test_inputs_that_are_too_large_are_told_from_those_that_are_not_finite(
    size, says, tokens
) -> None:
    x = _normal(0, tokens, 4)
    with pytest.raises(EvidenceError, match=f"'w' is {says}.*first in batch 1"):
        jq.capture(
            lambda p, x: x @ p["w"],
            {"w": jnp.ones((4, 2), jnp.float32)},
            [x, x.at[1, 1].set(size), x],
        )


def test_large_inputs_are_no_trouble_until_their_sums_are() -> None:
    fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}, jnp.full((3, 4), 1e18)
    found = jq.capture(fn, params, [x, x])["w"]
    np.testing.assert_allclose(found.second_moment, 6e36, rtol=1e-5)
    with pytest.raises(EvidenceError, match="'w' is finite, but so large.*first in batch 2"):
        jq.capture(fn, params, [x * 7, x * 7, x * 7, x])
