"""A leaf without elements is no weight: it is told, kept, and everything else goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.errors import WeightError
from jquant.rounding import GPTQ

X = jax.random.normal(jax.random.key(0), (40, 8))
PARAMS = {
    "a": jax.random.normal(jax.random.key(1), (8, 6)),
    "no_inputs": jnp.zeros((0, 6)),
    "no_outputs": jnp.zeros((8, 0)),
    "no_layers": jnp.zeros((0, 8, 8)),
    "no_rows": jnp.zeros((0, 4)),
    "no_experts": jnp.zeros((0, 8, 6)),
}


def fn(p, x):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["no_layers"])
    y = h @ p["a"] + x[:, :0] @ p["no_inputs"]
    y = jnp.concatenate([y, h @ p["no_outputs"]], -1)
    rows = p["no_rows"][jnp.zeros(0, jnp.int32)]
    experts = jnp.einsum("etd,edf->etf", jnp.zeros((0, 5, 8)), p["no_experts"])
    return y + rows.sum() + experts.sum()


@pytest.mark.parametrize("sequential", ["weight", None])
def test_leaves_without_elements_are_told_and_kept(sequential, tmp_path) -> None:
    weights = jq.find_weights(fn, PARAMS, X)
    assert list(weights) == ["a"]
    assert set(weights.others) == set(PARAMS) - {"a"}
    assert set(weights.others.values()) == {"it has no elements"}
    plan = jq.plan(weights, {".*": jq.Scheme(jq.grids.Uniform(4), None, GPTQ())})
    q, report = jq.quantize(fn, PARAMS, plan, [X], sequential=sequential)
    assert list(report) == ["a"] and set(jq.capture(fn, PARAMS, [X])) == {"a"}
    jq.save(tmp_path / "q.safetensors", q)
    back = jq.load(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(jq.apply(fn)(back, X), jq.apply(fn)(q, X))
    for path in set(PARAMS) - {"a"}:
        assert back[path].shape == PARAMS[path].shape


def test_such_a_weight_by_itself_is_refused() -> None:
    layout = jq.Layout.of((0, 4), in_axes=(0,))
    with pytest.raises(WeightError, match=r"shape \(0, 4\) has no elements.*keep it"):
        jq.quantize_weight(jnp.zeros((0, 4)), jq.Scheme(jq.grids.Uniform(4)), layout)


@pytest.mark.parametrize(
    "grid",
    [jq.grids.MX, jq.grids.Uniform, 4, "int4"],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_scheme_of_what_is_no_grid_is_refused(grid) -> None:
    with pytest.raises(ValueError, match=r"Scheme\.grid must be a grid, as grids\.Uniform\(4\)"):
        jq.Scheme(grid)
