"""The example of gated forecasting networks runs, on a generated series."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.pgn import main


@pytest.fixture(scope="module")
def example():
    with jax.numpy_dtype_promotion("standard"):  # as users have it, and optax takes it
        yield main


def test_states_see_what_came_before_and_not_what_comes(example):
    layer = example.PGN(4, 5, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 9, 4))
    moved = layer(x.at[:, 6].add(1.0)) - layer(x)
    assert (jnp.abs(moved[:, :6]) == 0).all() and (jnp.abs(moved[:, 6:]).max(-1) > 0).all()
    np.testing.assert_allclose(layer(x, last=2), layer(x)[:, -2:], atol=1e-5)
    # by the words of the paper, for the state at 6
    kernel, bias = layer.gather.kernel[...][:, 0], layer.gather.bias[...]
    h = (x[0, 1:6] * kernel).sum(0) + bias
    gate, candidate = jnp.split(layer.gate(jnp.concatenate([x[0, 6], h])), 2)
    gate = jax.nn.sigmoid(gate)
    wanted = h * gate + (1 - gate) * jnp.tanh(candidate)
    np.testing.assert_allclose(layer(x)[0, 6], wanted, atol=1e-5)


def test_parts_of_a_series_do_not_overlap(example):
    parts = example.windows(np.arange(1000, dtype=np.float32))
    ends = {name: (float(y.min()), float(y.max())) for name, (_, y) in parts.items()}
    assert ends["train"][1] < ends["validate"][0] and ends["validate"][1] < ends["test"][0]
    x, y = parts["test"]
    np.testing.assert_allclose(y[:, 0] - x[:, -1], y[0, 1] - y[0, 0], rtol=1e-3)


@pytest.mark.slow
def test_it_runs(example):
    result = example.main(["--small"])
    rows = result["TPGN"]["bits"]
    assert rows["float32"]["bits"] == 32 > rows["W8A8"]["bits"] > rows["W4 nearest"]["bits"]
    assert rows["W8A8"]["mse"] == pytest.approx(rows["float32"]["mse"], rel=0.05)


def test_what_is_recorded_is_what_the_page_says():
    folder = Path(main.__file__).parent
    recorded = json.loads((folder / "results.json").read_text("utf-8"))
    page = (folder / "README.md").read_text("utf-8")
    for name in ("TPGN", "PGN", "GRU"):
        for row in recorded[name]["bits"].values():
            assert f"{row['mse']:.4f} ({row['bits']:.1f})" in page
        assert f"{name}, {recorded[name]['parameters']:,}" in page
    full = {name: recorded[name]["bits"]["float32"]["mse"] for name in ("TPGN", "PGN", "GRU")}
    assert full["TPGN"] < full["PGN"] < full["GRU"] / 6
    week = recorded["naive"]["the same hour a week ago"]
    assert full["TPGN"] < 0.88 * week < week < full["PGN"] and f"{week:.4f}" in page
    part = {n: recorded[n]["bits"]["W4"]["mse"] / full[n] for n in ("TPGN", "PGN")}
    assert part["TPGN"] < 1.006 and part["PGN"] < 1.041
