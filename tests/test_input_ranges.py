"""Static ranges of inputs: histograms that add up, what is read from them, where they are kept."""

import copy
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hostile_files import forge, refuse
from test_io import assert_same

import jquant as jq
from jquant import Activations, Percentile
from jquant.calibration.spread import BINS, Spread, _edges
from jquant.grids import MSE, Float, Uniform
from jquant.io.schemes import from_json, to_json
from tests.functions import CASES, _normal

BYTES = Uniform(8, symmetric=True, convention="S3")
AFFINE, E4M3 = Uniform(8), Float(4, 3, scale="float32")
HEAVY = _normal(0, 400, 32) * jnp.exp(_normal(1, 400, 32))  # long tails


spread_of = jax.jit(Spread.of)
HEAVY_SPREAD = spread_of(HEAVY)


def step(choice: Activations) -> np.ndarray:
    return np.asarray(HEAVY_SPREAD.params(choice)["scale"])


def test_bins_hold_what_numpy_counts() -> None:
    x = np.asarray(HEAVY)
    found = spread_of(HEAVY)
    up = _edges()[BINS // 2 :]
    wanted = [np.histogram(part, up)[0] for part in (-x[x < 0], x[x >= 0])]
    np.testing.assert_array_equal(found.counts, np.concatenate([wanted[0][::-1], wanted[1]]))
    assert (found.low, found.high) == (x.min(), x.max())
    assert found.counts.shape == (BINS,) and np.diff(_edges()).min() > 0
    wild = spread_of(jnp.array([[1e-30, -1e30, 0.0, 3e38]]))
    assert wild.counts.sum() == 4 and wild.high == np.float32(3e38)


def test_spreads_add_up_and_zero_rows_do_not_count() -> None:
    parts = [spread_of(part) for part in (HEAVY[:200], HEAVY[200:], jnp.zeros((200, 32)))]
    total = parts[0].merge(parts[1]).merge(parts[2])
    jax.tree.map(np.testing.assert_array_equal, total, spread_of(HEAVY))
    batched = spread_of(HEAVY.reshape(1, 2, 200, 32))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[0, 1], b),
        batched, parts[1],
    )  # fmt: skip
    group = jnp.where(jnp.arange(400) < 200, 1, 2)
    grouped = Spread.grouped(HEAVY, group, 2)  # one group empty, one number no group's
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), grouped, parts[0])
    assert not any(leaf[0].any() for leaf in jax.tree.leaves(grouped))


@pytest.mark.parametrize("grid", [BYTES, AFFINE, E4M3], ids=["bytes", "affine", "fp8"])
def test_ranges_are_those_of_all_values(grid) -> None:
    x = np.asarray(HEAVY)
    steps = {BYTES: 127, AFFINE: 255, E4M3: 448}[grid]
    even = grid is not AFFINE
    width = np.abs(x).max() if even else x.max() - x.min()
    assert step(Activations(grid, "static")) == pytest.approx(width / steps, rel=1e-6)
    for percent in (99.0, 99.9, 100.0):
        share = percent if even else [100 - percent, percent]
        inner = np.percentile(np.abs(x) if even else x, share)
        width = inner if even else inner[1] - inner[0]
        found = step(Activations(grid, "static", Percentile(percent)))
        assert found == pytest.approx(width / steps, rel=0.07)  # a bin is up to 1/16 wide


def test_a_searched_range_has_the_least_error() -> None:
    """Of all factors the search tries, by the values themselves."""
    x = np.asarray(HEAVY)

    def error(scale):
        return np.sum(np.abs(x - np.clip(np.round(x / scale), -7, 7) * scale) ** 2.4)

    grid = Uniform(4, symmetric=True, convention="S3")
    whole = np.abs(x).max() / 7
    best = min(error(whole * (1 - i / 100)) for i in range(80))
    found = error(step(Activations(grid, "static", MSE())))
    assert found < 1.01 * best and 1.5 * found < error(whole)
    norm2 = error(step(Activations(grid, "static", MSE(norm=2.0))))
    assert norm2 != found


def test_ranges_of_one_sign_hold_zero() -> None:
    x = jnp.abs(HEAVY) + 1.0
    for choice in (MSE(), Percentile(99.0)):
        params = spread_of(x).params(Activations(AFFINE, "static", choice))
        assert params["zero"] == 0 and params["scale"] > 0
        params = spread_of(-x).params(Activations(AFFINE, "static", choice))
        assert params["zero"] == 255


@pytest.mark.parametrize("name", ["linen-scan-remat-tied", "vmapped-experts", "ragged-dot"])
def test_capture_tells_what_flows_in(name) -> None:
    """Per layer and per expert; all granularities of stages, which need the same."""
    case = next(c for c in CASES if c.name == name)
    plain = jq.capture(case.fn, case.params, case.batches)
    found = jq.capture(case.fn, case.params, case.batches, spread=True)
    for path, evidence in found.items():
        assert plain[path].spread is None
        spread = evidence.spread
        np.testing.assert_allclose(
            jnp.maximum(spread.high, -spread.low), evidence.abs_max.max(-1), rtol=1e-6
        )
        width = evidence.second_moment.shape[-1]
        rows = evidence.count if name != "ragged-dot" else jnp.array([4.0, 0.0, 8.0])
        np.testing.assert_array_equal(spread.counts.sum(-1), rows * width)
    weights = jq.find_weights(case.fn, case.params, case.batches[0])
    choice = Activations(AFFINE, "static", Percentile(99.9))
    plan = jq.plan(weights, {".*": jq.Scheme(BYTES, activations=choice, fallback=True)})
    one, _ = jq.quantize(case.fn, case.params, plan, evidence=found)
    by = "weight" if name == "linen-scan-remat-tied" else None
    staged, _ = jq.quantize(case.fn, case.params, plan, case.batches, sequential=by)
    assert jax.tree.structure(staged) == jax.tree.structure(one)
    for q, same in zip(*(jax.tree.leaves(t, is_leaf=is_q) for t in (staged, one)), strict=True):
        if is_q(q):  # calibrated on what bytes before it have changed a little
            params = q.activations.params
            assert params["scale"].shape == q.codes.shape[:-2]
            np.testing.assert_allclose(params["scale"], same.activations.params["scale"], rtol=0.1)


def is_q(leaf) -> bool:
    return isinstance(leaf, jq.QTensor)


def test_windows_of_a_weight_make_one_range() -> None:
    """Uses of parts of the input axis: the range is that of all of them."""
    fn = lambda p, x: x @ p["w"][:12] + (10.0 * x) @ p["w"][12:]  # noqa: E731
    params, x = {"w": _normal(0, 24, 5)}, _normal(1, 30, 12)
    spread = jq.capture(fn, params, [x], spread=True)["w"].spread
    assert spread.high == 10 * x.max() and spread.low == 10 * x.min()
    assert spread.counts.sum() == 2 * x.size


# Kept


LAYOUT = jq.Layout.of((3, 20, 12), in_axes=(1,), batch_axes=(0,))
CHOICES = [
    Activations(BYTES),
    Activations(E4M3, "tensor", compute="fake_quant"),
    Activations(AFFINE, "static", MSE(steps=9)),
    Activations(BYTES, "static", Percentile(99)),
]


def weight(choice) -> jq.QTensor:
    evidence = jq.Evidence.of(_normal(2, 3, 40, 20), spread=True)
    scheme = jq.Scheme(Uniform(4), 8, activations=choice)
    return jq.quantize_weight(_normal(0, 3, 20, 12), scheme, LAYOUT, evidence=evidence)[0]


@pytest.mark.parametrize("choice", CHOICES, ids=["token", "tensor", "searched", "percentile"])
def test_files_keep_it(choice, tmp_path: Path) -> None:
    assert from_json(to_json(choice)) == choice
    q = weight(choice)
    jq.save(tmp_path / "w", {"w": q})
    again = jq.load(tmp_path / "w")
    assert_same(again, {"w": q})
    lazy = jq.realize(jq.load(tmp_path / "w", lazy=True))
    assert_same(lazy, {"w": q})
    assert again["w"].activations.choice == choice
    bare = dataclasses.replace(q, activations=None)
    np.testing.assert_array_equal(jq.dequantize(q), jq.dequantize(bare))
    np.testing.assert_array_equal(
        jq.dequantize(q)[1], jq.dequantize(jax.tree.map(lambda a: a[1], q))
    )


def test_forged_inputs_are_refused(tmp_path: Path) -> None:
    jq.save(tmp_path / "good", {"w": weight(CHOICES[2])})
    raw = (tmp_path / "good").read_bytes()

    def inputs(body):
        return body["tree"]["dict"][0][1]["fields"]["activations"]

    def choice(body):
        return body["static"][inputs(body)["static"]]["choice"]["Activations"]

    def swap(header, body):  # the scale as the zero point
        params = inputs(body)["fields"]["params"]["dict"]
        params[0][1], params[1][1] = params[1][1], params[0][1]

    edits = {
        "an unknown granularity": lambda h, b: choice(b).update(granularity="row"),
        "a token with ranges": lambda h, b: choice(b).update(
            granularity="token", range={"MinMax": {}}
        ),
        "a grid that needs no zero": lambda h, b: choice(b).update(grid=to_json(BYTES)),
        "no ranges": lambda h, b: inputs(b)["fields"].pop("params"),
        "another class": lambda h, b: b["static"][inputs(b)["static"]].update(
            choice=to_json(BYTES)
        ),
        "a weight in its place": lambda h, b: b["tree"]["dict"][0][1]["fields"].update(
            activations=copy.deepcopy(inputs(b)["fields"]["params"]["dict"][0][1])
        ),
        "swapped": swap,
    }
    (tmp_path / "x").write_bytes(forge(raw, lambda h, b: None))
    jq.load(tmp_path / "x")
    for edit in edits.values():
        refuse(tmp_path / "x", forge(raw, edit))


def test_a_job_that_was_stopped_has_them_too(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "linen-scan-remat-tied")
    weights = jq.find_weights(case.fn, case.params, case.batches[0])
    plan = jq.plan(weights, {".*": jq.Scheme(BYTES, activations=CHOICES[2])})
    runs = [
        jq.realize(jq.quantize(case.fn, case.params, plan, case.batches, work_dir=folder)[0])
        for folder in (None, tmp_path / "work", tmp_path / "work")
    ]
    for other in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, runs[0], other)
