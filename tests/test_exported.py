"""Programs on quantized weights that `jax.export` writes run elsewhere, and give the same bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GRIDS
from jax import export

import jquant as jq
from jquant.errors import CheckpointError
from jquant.grids import Float, Uniform
from jquant.io.exported import read_static, write_static
from jquant.weights.activations import Activations

W = jax.random.normal(jax.random.key(0), (16, 8))
X = jax.random.normal(jax.random.key(1), (12, 16))


def fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["head"][0]


def quantized(scheme: jq.Scheme) -> Any:
    params = {"w": W, "head": [W.T]}
    plan = jq.plan(jq.find_weights(fn, params, X), {"w": scheme})
    return jq.quantize(fn, params, plan, [X])[0]


INT8 = Uniform(8, symmetric=True, convention="S3")
SCHEMES = {
    **{name: jq.Scheme(grid, 8) for name, grid in GRIDS.items()},
    "mx": jq.Scheme(jq.grids.MX()),
    "low rank": jq.Scheme(Uniform(3), 8, compensation=jq.LoRC(2)),
    "quantized low rank": jq.Scheme(Uniform(3), 8, compensation=jq.LoRC(2, factor_grid=Uniform(8))),
    "static inputs": jq.Scheme(INT8, None, activations=Activations(INT8, "static")),
    "fp8 inputs": jq.Scheme(Float(4, 3), None, activations=Activations(Float(4, 3))),
}


def statics(tree: Any) -> list[tuple[type, Any]]:
    """Every node of jquant's in a tree, with its static data."""
    found: list[tuple[type, Any]] = []

    def look(node: Any) -> bool:
        if type(node).__module__.startswith("jquant.weights."):
            found.append((type(node), jax.tree_util.default_registry.flatten_one_level(node)[1]))
        return False

    jax.tree.leaves(tree, is_leaf=look)
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_static_data_come_back_equal_and_hash_alike(name: str) -> None:
    layout, scheme = jq.Layout.of(W.shape, in_axes=(0,)), SCHEMES[name]
    known = jax.eval_shape(lambda x: jq.Evidence.of(x, spread=True), X)
    nodes = statics(  # which takes no computing
        jax.eval_shape(lambda w, e: jq.quantize_weight(w, scheme, layout, evidence=e)[0], W, known)
    )
    assert nodes
    for kind, static in nodes:
        back = read_static(write_static(static), kind)
        assert back == static and hash(back) == hash(static)


@pytest.mark.parametrize("name", ["mx", "quantized low rank", "static inputs"])
def test_exported_programs_run_equal_after_reading(name: str) -> None:
    pytest.importorskip("flatbuffers")  # what JAX writes programs with
    qparams = quantized(SCHEMES[name])
    raw = export.export(jax.jit(jq.apply(fn)))(qparams, X).serialize()
    program = export.deserialize(raw)
    np.testing.assert_array_equal(program.call(qparams, X), jq.apply(fn)(qparams, X))
    assert program.in_tree == jax.tree.structure(((qparams, X), {}))


def test_programs_may_give_quantized_weights_and_evidence() -> None:
    pytest.importorskip("flatbuffers")
    qparams = quantized(SCHEMES["mx"])
    evidence = jq.Evidence.of(X, spread=True)
    program = export.deserialize(
        export.export(jax.jit(lambda q, e: (q, e.merge(e))))(qparams, evidence).serialize()
    )
    found, twice = program.call(qparams, evidence)
    jax.tree.map(np.testing.assert_array_equal, (found, twice), (qparams, evidence.merge(evidence)))


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"[[]]", b'[{"NoGrid": {}}, 1, 2, 3]', b"\xff", b"[" * 9999]
)
def test_damaged_static_data_are_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError):
        read_static(raw, jq.QTensor)


def test_a_grid_of_the_users_own_is_refused_by_name() -> None:
    class Mine(Uniform):
        pass

    with pytest.raises(ValueError, match="Mine.* cannot be stored"):
        write_static((Mine(4),))
