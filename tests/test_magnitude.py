"""Lengths of rows that are trained beside codes (DoRA)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GRIDS
from functions import CASES, Case, _normal
from marks import mostly_slow
from test_adapters import FEW, KEY, close, derivatives, matrix, moved, quantized, same

import jquant as jq
from jquant.adapters import LoRA, Scales
from jquant.adapters import magnitude as rows
from jquant.axes.groups import Groups
from jquant.errors import PlanError
from jquant.grids import Uniform
from jquant.grids.base import code_dtype
from jquant.weights.qtensor import QTensor, canonical_weight

DORA = LoRA(1, magnitude=True)
EVERY = pytest.mark.parametrize(
    "case", mostly_slow(CASES, lambda case: case.name in FEW, ids=lambda case: case.name)
)


def lengths(w: Any) -> Any:
    return jnp.linalg.norm(w, axis=-1)


@EVERY
def test_the_function_and_its_gradients_are_those_of_dequantized_weights(case: Case) -> None:
    q, x = quantized(case), case.batches[0]
    frozen, trainable = jq.adapt(q, {".*": DORA}, key=KEY)
    close(jq.dequantize(jq.merge(frozen, trainable)), jq.dequantize(q))
    close(jq.apply(case.fn)(jq.merge(frozen, trainable), x), jq.apply(case.fn)(q, x))
    close(*derivatives(case, frozen, moved(trainable)))


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_it_is_the_papers_formula_and_its_gradient(alpha: float | None) -> None:
    """Liu et al. 2024, (5), and (11) for the length as a constant, in canonical rows."""
    _, _, q, _ = matrix()
    frozen, trainable = jq.adapt(q, {"w": LoRA(2, alpha, magnitude=True)}, key=KEY)
    base, times = canonical_weight(q["w"]), 1.0 if alpha is None else alpha / 2
    close(trainable["w"]["magnitude"], lengths(base))
    trainable = moved(trainable)

    def merged(t: Any) -> Any:
        return jq.dequantize(jq.merge(frozen, t))["w"].T

    def formula(t: Any, length: Any) -> Any:
        total = base + times * t["w"]["left"] @ t["w"]["right"]
        return t["w"]["magnitude"][:, None] * total / length[:, None]

    length = lengths(base + times * trainable["w"]["left"] @ trainable["w"]["right"])
    close(merged(trainable), formula(trainable, length))
    close(lengths(merged(trainable)), trainable["w"]["magnitude"])
    probe = _normal(7, 8, 16)
    one, two = (
        jax.grad(lambda t, f=f: jnp.sum(probe * f(t)))(trainable)
        for f in (merged, lambda t: formula(t, length))
    )
    close(one, two)


WIDE = [name for name, grid in GRIDS.items() if grid.bits > 1]  # of one bit no direction is left


@pytest.mark.parametrize("name", mostly_slow(WIDE, ["A1-4", "A4-3-half", "kmeans-4"]))
def test_rows_of_any_grid_have_the_lengths_or_are_refused(name: str) -> None:
    grid = GRIDS[name]
    w = {"w": _normal(1, 3, 256, 8)}
    fn = lambda p, x: jnp.einsum("bti,bio->bto", x, p["w"])  # noqa: E731
    size = getattr(grid, "group", None) or 32
    plan = jq.plan(jq.find_weights(fn, w, jnp.ones((3, 1, 256))), {"w": jq.Scheme(grid, size)})
    q, _ = jq.quantize(fn, w, plan)
    refused = rows.refusal(q["w"])
    if refused is not None:
        assert code_dtype(grid) is not None and name.startswith(("mx", "nv", "E", "U"))
        with pytest.raises(PlanError, match="'w': rows have no magnitude of their own, as its"):
            jq.adapt(q, {"w": DORA}, key=KEY)
        return
    frozen, trainable = jq.adapt(q, {"w": DORA}, key=KEY)
    start = jq.merge(frozen, trainable)["w"]
    assert all(
        np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)
        for a, b in zip(start.params.values(), q["w"].params.values(), strict=True)
    )
    trainable["w"]["magnitude"] *= jnp.linspace(0.5, 2.0, 8)
    after = jq.merge(frozen, trainable)["w"]
    np.testing.assert_allclose(
        lengths(canonical_weight(after)), trainable["w"]["magnitude"], rtol=8e-3
    )
    same(after.codes, q["w"].codes)
    assert {n: p.dtype for n, p in after.params.items()} == {
        n: p.dtype for n, p in q["w"].params.items()
    }


def test_rows_of_zeros_and_lengths_below_zero() -> None:
    _, _, q, _ = matrix()
    none = dataclasses.replace(q["w"], params={n: p * 0 for n, p in q["w"].params.items()})
    frozen, trainable = jq.adapt({"w": none}, {"w": DORA}, key=KEY)
    loss = lambda t: jnp.sum(jq.dequantize(jq.merge(frozen, t))["w"] ** 2)  # noqa: E731
    gradients = jax.tree.leaves(jax.grad(loss)(trainable))
    assert loss(trainable) == 0 and all(np.isfinite(g).all() for g in gradients)
    frozen, trainable = jq.adapt(q, {"w": DORA}, key=KEY)
    trainable["w"]["magnitude"] = -trainable["w"]["magnitude"]
    assert not np.asarray(jq.dequantize(jq.merge(frozen, trainable))["w"]).any()


def test_a_term_that_is_there_and_a_rotation_count() -> None:
    scheme = jq.Scheme(Uniform(2), 8, compensation=jq.LoRC(3), transforms=(jq.Hadamard(8),))
    for rank in (None, 2):
        _, _, q, _ = matrix(scheme)
        frozen, trainable = jq.adapt(q, {"w": LoRA(rank, magnitude=True)}, key=KEY)
        close(trainable["w"]["magnitude"], lengths(jq.dequantize(q)["w"].T))
        close(jq.dequantize(jq.merge(frozen, trainable)), jq.dequantize(q))
        trainable = moved(trainable)
        merged = jq.dequantize(jq.merge(frozen, trainable))
        close(lengths(merged["w"].T), trainable["w"]["magnitude"])


def test_beside_scales_and_beside_what_is_not_quantized() -> None:
    fn, params, q, x = matrix()
    frozen, trainable = jq.adapt(q, {"w": [Scales(), DORA]}, key=KEY)
    assert set(trainable["w"]) == {"left", "right", "magnitude", "scale"}
    trainable = moved(trainable)
    merged = jq.dequantize(jq.merge(frozen, trainable))["w"]
    close(lengths(merged.T), trainable["w"]["magnitude"])
    weights = jq.find_weights(fn, params, x)
    frozen, trainable = jq.adapt(params, {"w": DORA}, key=KEY, weights=weights)
    close(jq.merge(frozen, trainable), params)
    merged = jq.merge(frozen, moved(trainable))["w"]
    close(lengths(merged.T), moved(trainable)["w"]["magnitude"])


def test_saved_and_folded(tmp_path: Path) -> None:
    fn, _, q, x = matrix(jq.presets.int8_nearest(8))
    frozen, trainable = jq.adapt(q, {"w": DORA}, key=KEY)
    trainable = moved(trainable)
    merged = jq.merge(frozen, trainable)
    jq.save(tmp_path / "merged", merged)
    same(jq.apply(fn)(jq.load(tmp_path / "merged"), x), jq.apply(fn)(merged, x))
    floats, _ = jq.fold(frozen, trainable)
    same(floats, jq.dequantize(merged))
    codes, report = jq.fold(frozen, trainable, jq.presets.int8_nearest(8))
    assert isinstance(codes["w"], QTensor) and codes["w"].compensation is None
    assert 0 < report["w"].error < 1e-3


def test_nothing_of_a_stacks_size_is_decoded_for_lengths() -> None:
    """One matrix of a stack at a time."""
    layers, width = 8, 128
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    params, x = {"w": _normal(1, layers, width, width)}, _normal(2, 2, width)
    plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.Scheme(Uniform(4), 32)})
    frozen, trainable = jq.adapt(jq.quantize(fn, params, plan)[0], {"w": DORA}, key=KEY)
    step = jax.jit(jax.grad(lambda t, f: jnp.sum(jq.apply(fn)(jq.merge(f, t), x))))
    program = step.lower(trainable, frozen).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * layers * width * width


def test_refused() -> None:
    for shared, says in (
        (jq.Scheme(Uniform(4), Groups("out", 4)), "its outputs share group parameters"),
        (jq.Scheme(jq.grids.MX(), 32), "its scale of .* has no digits left"),
    ):
        _, _, q, _ = matrix(shared, 32)
        with pytest.raises(PlanError, match=f"'w': rows have no magnitude of their own, as {says}"):
            jq.adapt(q, {"w": DORA}, key=KEY)
    with pytest.raises(ValueError, match="magnitude must be True or False, got 1"):
        LoRA(1, magnitude=1)  # type: ignore[arg-type]
