"""GGUF's block types as something to round to: what the search of scales promises."""

from __future__ import annotations

from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import layer

import jquant as jq
from jquant import formats
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.calibration.evidence import Evidence
from jquant.grids import GGUF, MSE
from jquant.grids.gguf_kinds import KINDS
from jquant.grids.grouped import Grouped
from jquant.rounding import GPTQ, Nearest
from jquant.weights.qtensor import QTensor

LONG = ("Q2_K", "Q4_K", "Q5_K")  # to compile
SEARCH = MSE(steps=20, resolution=40, norm=2.0)


def grouped(kind: str, **options: Any) -> Grouped:
    grid = GGUF(kind, **options)
    return Grouped(grid, Groups("in", grid.group))


def each(*kinds: str, slow: tuple[str, ...] = LONG) -> pytest.MarkDecorator:
    """A parameter `kind`; those that take long are slow."""
    marks = [pytest.mark.slow]
    return pytest.mark.parametrize(
        "kind", [pytest.param(kind, marks=marks if kind in slow else ()) for kind in kinds]
    )


def loss(grid: Grouped, w: jax.Array, importance: jax.Array, fitted_to: Any) -> np.ndarray:
    """The weighted squared error of nearest codes, of every row and super-block."""

    def run(w: jax.Array) -> jax.Array:
        params = grid.fit(w, fitted_to)
        return grid.decode(grid.nearest(w, params), params)

    error = np.asarray(importance * (jax.jit(run)(w) - w) ** 2, np.float64)
    return error.reshape(len(w), -1, min(256, w.shape[1])).sum(-1)


def written(q: QTensor, kind: str) -> np.ndarray:
    """The values that gguf-py has for the bytes of a weight, which come back as they were."""
    codec = formats.gguf(kind)
    tensors = codec.encode(q)
    back = codec.decode(tensors)
    for name, leaf in {"codes": q.codes, **q.params}.items():
        other = back.codes if name == "codes" else back.params[name]
        assert other.dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(other), np.asarray(leaf))
    return gguf.quants.dequantize(tensors["weight"], gguf.GGMLQuantizationType[kind])


@each("Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K")
def test_a_search_is_never_worse_than_ranges_in_any_super_block(kind: str) -> None:
    w, moment = layer(4, 512)
    importance = jnp.diagonal(moment)[None]
    plain = loss(grouped(kind), w, importance, importance)
    best = loss(grouped(kind, range=SEARCH), w, importance, importance)
    assert (best <= plain * (1 + 1e-5)).all() and best.sum() < 0.8 * plain.sum()
    unweighed = loss(grouped(kind, range=SEARCH), w, importance, None)
    assert best.sum() < 0.99 * unweighed.sum()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_a_search_beats_gguf_py(kind: str) -> None:
    w = layer(4, 512)[0]
    own = gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(np.asarray(w), own), own)
    best = loss(grouped(kind, range=SEARCH), w, jnp.ones(()), None)
    # Of 8 bits a step of the search is as much as three codes.
    most = 0.99 if kind == "Q8_0" else 0.9
    assert best.sum() < most * float(((theirs - w) ** 2).sum())


@each(*KINDS)
def test_what_was_rounded_is_what_gguf_reads(kind: str) -> None:
    w, moment = layer(4, 512)
    grid = grouped(kind, range=MSE(steps=2, norm=2.0))
    result = Nearest()(w, grid.grid, grid.groups, evidence=moment)
    layout = Layout.of(w.shape, in_axes=(1,))
    q = QTensor(result.codes, result.params, grid.grid, grid.groups, layout, w.dtype)
    np.testing.assert_array_equal(written(q, kind), np.asarray(jq.dequantize(q)))


@each("Q3_K", "Q4_0", slow=("Q3_K",))
def test_gptq_rounds_on_values_that_the_file_holds(kind: str) -> None:
    """By its correction too; with steps of both signs."""
    w, _ = layer(4, 256)
    x = jax.random.normal(jax.random.key(0), (512, 256)) @ (
        jnp.eye(256) + 0.05 * jax.random.normal(jax.random.key(1), (256, 256))
    )
    evidence = Evidence.of(x, full=x + 0.1 * jnp.roll(x, 1, axis=1))
    grid = grouped(kind, range=SEARCH)
    result = GPTQ(correction="qep")(w, grid.grid, grid.groups, evidence=evidence)
    layout = Layout.of(w.shape, in_axes=(1,))
    q = QTensor(result.codes, result.params, grid.grid, grid.groups, layout, w.dtype)
    steps = result.params["scale_code" if kind == "Q3_K" else "scale"]
    assert (np.asarray(steps, np.float32) < 0).any()
    np.testing.assert_array_equal(written(q, kind), np.asarray(jq.dequantize(q)))
    gptq = GPTQ()(w, grid.grid, grid.groups, evidence=evidence)
    assert float(gptq.info["error"]) < 0.8 * float(gptq.info["nearest_error"])


def test_stochastic_rounding_has_no_bias_where_steps_are_negative() -> None:
    grid, params = GGUF("Q4_0"), {"scale": jnp.full((4096,), -1.0, jnp.float16)}
    w = jnp.full((4096, 1), 1.25)
    lo, hi = grid.bracket(w, params)
    from jquant.rounding.stochastic import _either

    luck = jax.random.uniform(jax.random.key(0), w.shape)
    values = grid.decode(_either(w, luck, grid, params), params)
    assert set(np.unique(values)) == {1.0, 2.0} and int((hi - lo).min()) == 1
    assert abs(float(values.mean()) - 1.25) < 0.05
