"""A leaf without elements is no weight: it is told, kept, and everything else goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.errors import EvidenceError, WeightError
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


NOTHING = {
    "dense layers of no features": (
        lambda p, x: jnp.concatenate([x, jnp.tanh(x @ p["a"]) @ p["b"]], 1),
        {"a": (8, 0), "b": (0, 3)},
    ),
    "no experts": (
        lambda p, x: jax.lax.ragged_dot(x, p["a"], jnp.zeros(0, jnp.int32)), {"a": (0, 8, 6)},
    ),
    "no layers, of merged axes": (
        lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["a"].reshape(0, 8, 8))[0],
        {"a": (2, 0, 8, 8)},
    ),
    "a convolution without outputs": (
        lambda p, x: jax.lax.conv_general_dilated(
            x[None], p["a"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        {"a": (3, 8, 0)},
    ),
    "an adapter of rank 0": (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), {"a": (8, 0), "b": (0, 6)},
    ),
    "joined": (lambda p, x: x @ jnp.concatenate([p["a"], p["w"]], 1), {"a": (8, 0)}),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_beside_a_weight_changes_nothing(name) -> None:
    beside, shapes = NOTHING[name]
    params = {"w": PARAMS["a"], **{path: jnp.zeros(shape) for path, shape in shapes.items()}}
    fn = lambda p, x: (x @ p["w"], beside(p, x))  # noqa: E731
    weights = jq.find_weights(fn, params, X)
    assert list(weights) == ["w"] and set(weights.others) == set(shapes)
    evidence = jq.capture(fn, params, [X[:0], X])["w"]
    times = float(evidence.count) / len(X)
    assert times in (1, 2)
    moment = times * np.asarray(X, np.float64).T @ np.asarray(X, np.float64)
    np.testing.assert_allclose(evidence.second_moment, moment, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_inputs_near_the_ends_of_their_dtype(dtype) -> None:
    fn = lambda p, x: x.astype(jnp.float32) @ p["w"]  # noqa: E731
    most = jnp.full((3, 8), jnp.finfo(dtype).max, dtype)
    if dtype == "float16":  # whose squares float32 has
        assert float(jq.capture(fn, {"w": PARAMS["a"]}, [most])["w"].abs_max[0]) == 65504
    else:
        with pytest.raises(EvidenceError, match="weight 'w' is finite, but so large"):
            jq.capture(fn, {"w": PARAMS["a"]}, [most])
    least = jnp.full((3, 8), jnp.finfo(dtype).smallest_subnormal, dtype)
    found = jq.capture(fn, {"w": PARAMS["a"]}, [least])["w"]
    assert np.isfinite(found.second_moment).all() and float(found.count) == 3


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
