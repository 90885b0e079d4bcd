"""The example of adapters beside 4-bit codes runs, and what it records adds up."""

import jax
import pytest

from examples.qlora import main


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
