"""The example of adapters beside 4-bit codes runs, and what it records adds up."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from examples.qlora import main, timing


@pytest.fixture
def example():
    with jax.numpy_dtype_promotion("standard"):  # as users have it, and optax takes it
        yield main


def test_what_runs_say_of_each_other(example):
    memory = {"program": 90.0, "by arithmetic": 100.0}
    run = {"curve": {"0": 3.0, "5": 2.0, "10": 1.5}, "step_seconds": 1.0, "bytes": memory}
    better = run | {"curve": {"0": 2.5, "5": 1.4, "10": 1.2}, "step_seconds": 1.2}
    told = example.compared({"float32": run, "nearest": run, "QEP": better})
    assert told["steps_of_QEP_to_nearest_final"] == 5 and told["steps"] == 10
    assert told["step_time_of_float32"] == 1.2 and told["memory_by_arithmetic"] == 0.9
    assert example.compared({"QEP": run}) == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_the_small_one_runs_and_goes_on(example, tmp_path):
    arguments = ["--small", "--steps", "3", "--work", str(tmp_path)]
    result = example.main(arguments)
    for run in result["runs"].values():
        losses = list(run["curve"].values())
        assert losses[-1] < losses[0]
    assert result["compared"]["steps"] == 3
    assert example.main(arguments)["runs"] == result["runs"]  # from what is kept
    (tmp_path / "nearest.json").unlink()  # as if it had been stopped after its last measurement
    again = example.main(arguments)["runs"]["nearest"]
    assert again["curve"] == result["runs"]["nearest"]["curve"]
    assert again["training"] == result["runs"]["nearest"]["training"]


def test_float32_numbers_that_are_their_own_codes_are_the_function(example):
    params = {"w": jax.random.normal(jax.random.key(0), (6, 4)).at[0, 0].set(-0.0)}
    fn, x = lambda p, x: jnp.tanh(x @ p["w"]), jnp.ones((3, 6))
    task = example.Subject("", fn, params, "w", x, x, x)
    weights = jq.find_weights(fn, params, x)
    tree = timing.tree_of("float32, thin products", task, weights, {"w": None})
    np.testing.assert_array_equal(jq.dequantize(tree)["w"], params["w"])
    np.testing.assert_allclose(jq.apply(fn)(tree, x), fn(params, x), atol=1e-6)
    frozen, trainable = jq.adapt(tree, rank=2, key=jax.random.key(1))
    trainable["w"]["left"] += 1.0
    plain = jq.adapt(params, {"w": jq.LoRA(2)}, key=jax.random.key(1), weights=weights)[0]
    loss = lambda t, f: jnp.sum(jq.apply(fn)(jq.merge(f, t), x))  # noqa: E731
    one, two = (jax.grad(loss)(trainable, f) for f in (frozen, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)


def test_what_is_recorded_of_time_and_memory_is_what_the_page_says():
    folder = Path(main.__file__).parent
    page = (folder / "README.md").read_text("utf-8")
    few, many = json.loads((folder / "timing.json").read_text("utf-8"))["runs"]
    for run in (few, many):
        assert max(*run["of_float32"].values(), *run["of_float32_processor"].values()) <= 1.3
        for way, seconds in run["seconds"].items():
            held = run["bytes"][way]
            part = held["program"] / held["by arithmetic"]
            ratios = (run[name].get(way) for name in ("of_float32", "of_float32_processor"))
            ratio = "" if way == timing.WAYS[0] else "{:.2f} ({:.2f})".format(*ratios)
            assert f"{seconds:.3f} | {ratio} | {held['program'] / 1e6:.1f} | {part:.2f}" in page
    codes = many["bytes"][timing.WAYS[0]]
    assert codes["program"] < 1.1 * codes["by arithmetic"]


def test_what_is_recorded_of_losses_is_what_the_page_says():
    folder = Path(main.__file__).parent
    page = (folder / "README.md").read_text("utf-8")
    runs = json.loads((folder / "results.json").read_text("utf-8"))["runs"]
    curves = {start: runs[start]["curve"] for start in ("float32", "nearest", "QEP")}
    for step in curves["QEP"]:
        row = " | ".join(f"{curve[step]:.3f}" for curve in curves.values())
        assert f"| {'before' if step == '0' else f'{step} steps'} | {row} |" in page
    best = {start: min(curve.values()) for start, curve in curves.items()}
    assert best["QEP"] < best["float32"] + 0.01 and curves["QEP"]["8"] < best["nearest"]
