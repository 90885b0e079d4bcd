"""Sparse spectral training: its transformation does what it says, and the example runs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import examples.sst.sst as transformation
from examples.sst import hyperbolic, main


@pytest.fixture
def sst():
    with jax.numpy_dtype_promotion("standard"):
        yield transformation


def test_gradients_of_vectors_leave_out_the_values(sst):
    w, dw = (jax.random.normal(jax.random.key(k), (6, 4)) for k in (0, 1))
    f = sst.factorised(w)
    np.testing.assert_allclose(sst.matrix(f), w, atol=1e-5)
    (g,) = jax.vjp(sst.matrix, f)[1](dw)
    np.testing.assert_allclose(g.u, dw @ f.v, atol=1e-5)
    np.testing.assert_allclose(g.v, dw.T @ f.u, atol=1e-5)
    np.testing.assert_allclose(g.s, jnp.diag(f.u.T @ dw @ f.v), atol=1e-5)


def test_all_values_move_and_only_the_drawn_vectors(sst):
    f = sst.factorised(jax.random.normal(jax.random.key(0), (8, 6)))
    tx = sst.sparse_spectral(1e-2, 2, jax.random.key(1), draw=3, rounds=2)
    params, state = [f], tx.init([f])
    grads = [jax.tree.map(jnp.ones_like, f)]

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for count in range(1, 7):
        columns = set(np.asarray(state.weights[0].columns).tolist())
        before, (params, state) = params[0], step(params, state)
        after = params[0]
        np.testing.assert_allclose(jnp.linalg.norm(after.u, axis=0), 1, atol=1e-5)
        if count < 6:
            moved = np.flatnonzero(np.abs(np.asarray(after.u - before.u)).max(0) > 1e-6)
            assert set(moved.tolist()) == columns and len(columns) == 2
            assert np.all(np.asarray(after.s != before.s))
    np.testing.assert_allclose(after.u.T @ after.u, np.eye(6), atol=1e-4)  # decomposed anew
    assert np.all(np.asarray(after.s) >= 0)


@pytest.mark.slow
def test_the_small_one_runs():
    with jax.numpy_dtype_promotion("standard"):
        result = main.main(["--small"])
    assert set(result["runs"]) == {"full", "LoRA", "SST"}
    moving = {way: run["moving"] for way, run in result["runs"].items()}
    assert moving["LoRA"] < moving["SST"] < moving["full"]


def test_layers_of_the_poincare_ball_are_functions_like_any():
    with jax.numpy_dtype_promotion("standard"):
        told = hyperbolic.compared()
    assert told["weights"] == ["first", "second"]  # the bias is added by the ball's own addition
    assert all(told[bits]["difference"] < 1e-5 for bits in ("8 bits", "4 bits"))
    assert 0 < told["8 bits"]["error"] < told["4 bits"]["error"] < 0.2


def test_the_ball_adds_as_it_should():
    x, y = (0.5 * jax.random.normal(jax.random.key(k), (5, 3)) / 3 for k in (0, 1))
    np.testing.assert_allclose(hyperbolic.added(-x, hyperbolic.added(x, y)), y, atol=1e-5)
    np.testing.assert_allclose(hyperbolic.logarithm(hyperbolic.exponential(x)), x, atol=1e-5)
    away = jnp.linalg.norm(hyperbolic.added(-x, y), axis=-1)  # distances, by their other formula
    squares = [jnp.sum(a * a, -1) for a in (x - y, x, y)]
    cosh = 1 + 2 * squares[0] / ((1 - squares[1]) * (1 - squares[2]))
    np.testing.assert_allclose(2 * jnp.arctanh(away), jnp.arccosh(cosh), atol=1e-4)


def test_what_is_recorded_is_what_the_page_says():
    folder = Path(main.__file__).parent
    recorded = json.loads((folder / "results.json").read_text("utf-8"))
    page = (folder / "README.md").read_text("utf-8")
    for way, run in recorded["runs"].items():
        figures = " | ".join(f"{nats:.3f}" for nats in run["curve"].values())
        assert f"| {way} | {figures} | {run['moving']:,} |" in page
    gap = recorded["gap_to_full"]  # at the best of each curve
    assert gap["LoRA"] > 0.2 and all(f"{nats:.3f}" in page for nats in gap.values())
