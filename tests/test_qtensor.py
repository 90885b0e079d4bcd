"""A quantized weight where an array is wanted: told what to call; a pytree everywhere else."""

import copy
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.errors import QuantizedWeightError


def fn(params: Any, x: Any) -> Any:
    return x @ params["w"]


X = jnp.ones((2, 8), jnp.float32)
PARAMS = {"w": jnp.arange(32, dtype=jnp.float32).reshape(8, 4)}
PLAN = jq.plan(jq.find_weights(fn, PARAMS, X), {".*": jq.Scheme(jq.grids.Uniform(8))})
QPARAMS = jq.quantize(fn, PARAMS, PLAN)[0]

AS_ARRAY: dict[str, Callable[[Any], Any]] = {
    "x @ w": lambda w: X @ w,
    "w @ x": lambda w: w @ X.T,
    "numpy @ w": lambda w: np.ones((2, 8)) @ w,
    "the function": lambda w: fn({"w": w}, X),
    "the function, compiled": lambda w: jax.jit(fn)({"w": w}, X),
    "the function, mapped": lambda w: jax.vmap(fn, (None, 0))({"w": w}, X),
    "w[0]": lambda w: w[0],
    "w[:, 1]": lambda w: w[:, 1],
    "w.T": lambda w: w.T,
    "w.at": lambda w: w.at[0].set(1.0),
    "w.astype": lambda w: w.astype(jnp.bfloat16),
    "w.reshape": lambda w: w.reshape(-1),
    "w.sum": lambda w: w.sum(),
    "w.nbytes": lambda w: w.nbytes,
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
    "np.sum": np.sum,
    "jnp.sum": jnp.sum,
    "jnp.dot": lambda w: jnp.dot(X, w),
    "jnp.take": lambda w: jnp.take(w, 0, axis=0),
    "jnp.einsum": lambda w: jnp.einsum("bi,io->bo", X, w),
    "w + 1": lambda w: w + 1,
    "1 - w": lambda w: 1 - w,
    "x * w": lambda w: jnp.ones((8, 4), jnp.float32) * w,
    "numpy / w": lambda w: np.ones((8, 4)) / w,
    "w ** 2": lambda w: w**2,
    "-w": lambda w: -w,
    "abs": abs,
    "w < 1": lambda w: w < 1,
    "float": float,
    "list": list,
    "in": lambda w: 1.0 in w,
}


@pytest.mark.parametrize("use", AS_ARRAY)
def test_used_as_an_array_it_says_what_to_call(use: str) -> None:
    with pytest.raises(
        TypeError, match=r"float32\[8, 4\].*jq\.apply\(fn\).*jq\.dequantize"
    ) as caught:
        AS_ARRAY[use](QPARAMS["w"])
    assert isinstance(caught.value, QuantizedWeightError) and isinstance(caught.value, ValueError)


def test_it_is_a_pytree_and_a_value_as_before() -> None:
    q = QPARAMS["w"]
    leaves, structure = jax.tree.flatten(QPARAMS)
    again = jax.tree.unflatten(structure, leaves)
    chex.assert_trees_all_equal(again, QPARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(again, QPARAMS)
    assert jax.tree.structure(jax.tree.map(jnp.copy, q)) == jax.tree.structure(q)
    assert jax.tree.map(lambda leaf: leaf.shape, q).codes == q.codes.shape
    assert jq.tree_map_weights(lambda leaf: leaf.shape, QPARAMS) == {"w": (8, 4)}
    assert q == q and q is not None and bool(q) and copy.deepcopy(q).shape == (8, 4)
    assert (jnp.ndim(q), jnp.shape(q), jnp.size(q), q.dtype) == (2, (8, 4), 32, jnp.float32)
    assert jnp.result_type(q) == jnp.float32 and jnp.zeros_like(q).shape == (8, 4)
    assert not isinstance(q, jax.Array) and isinstance(q, jq.QTensor)
    assert [hasattr(q, name) for name in ("codes", "shape", "T", "astype", "unheard_of")] == [
        True, True, False, False, False
    ]  # fmt: skip
    for moved in (jax.device_put(q), jax.block_until_ready(q), jax.jit(lambda a: a)(q)):
        assert jax.tree.structure(moved) == jax.tree.structure(q)
    assert jq.apply(fn)(QPARAMS, X).shape == (2, 4)


def test_one_that_holds_no_arrays_asks_itself_nothing() -> None:
    """JAX builds trees of placeholders; their attributes are missing, not endless."""
    hollow = jax.tree.map(lambda leaf: object(), QPARAMS["w"])
    for name in ("shape", "ndim", "size", "T"):
        assert not hasattr(hollow, name)
    assert not hasattr(object.__new__(jq.QTensor), "dtype")


def test_what_is_quantized_is_not_quantized_again() -> None:
    with pytest.raises(jq.errors.WeightError, match=r"'w' is quantized already.*dequantize"):
        jq.quantize(fn, QPARAMS, PLAN)
    again, _ = jq.quantize(fn, jq.dequantize(QPARAMS), PLAN)  # what it advises
    assert again["w"].shape == (8, 4)
