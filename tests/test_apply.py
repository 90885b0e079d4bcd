"""`apply(fn)(qparams, x)` is `fn(dequantize(qparams), x)`, under every transformation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.grids import GGUF, MX, NV, Float, Grid, Uniform
from tests.functions import CASES, Case, _normal
from tests.marks import mostly_slow


def _quantized(case: Case, scheme: jq.Scheme | None = None):
    weights = jq.find_weights(case.fn, case.params, case.batches[0])
    plan = jq.plan(weights, {".*": scheme or jq.Scheme(Uniform(4), 3)})
    return jq.quantize(case.fn, case.params, plan)[0]


def _close(found, wanted) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, wanted)


@pytest.mark.parametrize(
    ("groups", "case"),
    mostly_slow(
        [(3, case) for case in CASES] + [(jq.Groups("out", 2), case) for case in CASES[::3]],
        lambda pair: pair[0] == 3,
        ids=lambda pair: f"{'in' if pair[0] == 3 else 'out'}-{pair[1]}",
    ),
)
def test_equals_the_function_of_dequantized_parameters(case: Case, groups) -> None:
    q, x, run = _quantized(case, jq.Scheme(Uniform(4), groups)), case.batches[0], jax.jit(case.fn)
    wanted = run(jq.dequantize(q), x)
    assert not np.allclose(jax.tree.leaves(wanted)[0], jax.tree.leaves(run(case.params, x))[0])
    _close(jax.jit(jq.apply(case.fn))(q, x), wanted)
    if case.name in ("ragged-dot", "views"):  # one operation after the other: one by one compiled
        _close(jq.apply(case.fn)(q, x), wanted)


@pytest.mark.parametrize(
    "grid", mostly_slow([MX(), NV(), Float(8, 7)], [NV()], ids=["mx", "nv", "bfloat16"])
)
def test_scales_of_one_byte_and_grids_without_parameters(grid: Grid) -> None:
    for case in (c for c in CASES if c.name in ("linen-scan-remat-tied", "views")):
        q = _quantized(case, jq.Scheme(grid, 3))
        wanted = jax.jit(case.fn)(jq.dequantize(q), case.batches[0])
        assert np.isfinite(jax.tree.leaves(wanted)[0]).all()
        _close(jax.jit(jq.apply(case.fn))(q, case.batches[0]), wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vmap_over_inputs(case: Case) -> None:
    if case.name == "ragged-dot":
        return  # JAX has no batching rule for one group-size vector under vmapped rows in 0.10
    q = _quantized(case)
    stacked = jnp.stack(case.batches)
    run, full = jax.jit(case.fn), jq.dequantize(q)
    wanted = np.stack([run(full, batch) for batch in case.batches])
    _close(jax.jit(jax.vmap(jq.apply(case.fn), (None, 0)))(q, stacked), wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_with_respect_to_inputs(case: Case) -> None:
    q, x = _quantized(case), case.batches[0]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = jnp.float32(1.0)  # tokens: differentiate by a factor on the output instead

        def loss(fn, p, x):
            return jnp.sum(jnp.sin(x * fn(p, case.batches[0])))
    else:

        def loss(fn, p, x):
            return jnp.sum(jnp.sin(fn(p, x)))

    if case.name == "plain-cond-while":  # a while loop has forward derivatives only

        def derivative(fn, p):
            return jax.jvp(lambda x: loss(fn, p, x), (x,), (x,))[1]
    else:

        def derivative(fn, p):
            return jax.grad(loss, 2)(fn, p, x)

    derivative = jax.jit(derivative, static_argnums=0)
    _close(derivative(jq.apply(case.fn), q), derivative(case.fn, jq.dequantize(q)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_second_call_compiles_nothing(case: Case, compiles) -> None:
    q = _quantized(case)
    jq.apply(case.fn)(q, case.batches[0])
    with compiles() as log:
        jq.apply(case.fn)(q, case.batches[1])
    assert log == []


def test_parameters_without_quantized_leaves_pass_through() -> None:
    case = CASES[0]
    _close(jq.apply(case.fn)(case.params, case.batches[0]), case.fn(case.params, case.batches[0]))


def _deep(layers: int, width: int = 256):
    params = [_normal(k, width, width) / 16 for k in range(layers)]

    def unrolled(params, x):
        for w in params:
            x = jnp.tanh(x @ w.astype(jnp.bfloat16).astype(x.dtype).T)
        return x

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]

    return params, unrolled, scanned


def _temporary_bytes(fn, params, x, grid: Grid) -> int:
    weights = jq.find_weights(fn, params, x)
    q = jq.quantize(fn, params, jq.plan(weights, {".*": jq.Scheme(grid, 64)}))[0]
    analysis = jax.jit(jq.apply(fn)).lower(q, x).compile().memory_analysis()
    return analysis.temp_size_in_bytes


# What decoding waits for is added to parameters, to their bits, or to codes, as the grid has them.
@pytest.mark.parametrize(
    ("style", "grid"),
    [
        ("unrolled", Uniform(4)),
        ("scanned", Uniform(4)),
        ("unrolled", MX()),
        ("scanned", Float(5, 2)),
    ],
    ids=["unrolled-uniform", "scanned-uniform", "unrolled-mx", "scanned-float"],
)
def test_dequantized_weights_are_never_all_held(style: str, grid: Grid) -> None:
    x = _normal(9, 8, 256)
    sizes = []
    for layers in (4, 16):
        params, unrolled, scanned = _deep(layers)
        fn, tree = (unrolled, params) if style == "unrolled" else (scanned, jnp.stack(params))
        sizes.append(_temporary_bytes(fn, tree, x, grid))
    # Twelve more layers may not bring their float32 weights; XLA:CPU unpacks codes to bytes in
    # loops.
    assert sizes[1] - sizes[0] < 12 * 256 * 256 * 4 / 3
    assert sizes[1] < 16 * 256 * 256 * 4 / 3


def test_looked_up_rows_are_decoded_alone() -> None:
    table = {"embed": _normal(0, 4096, 16)}
    fn = lambda p, t: p["embed"][t]  # noqa: E731
    tokens = jnp.array([[3, 5], [4095, 0]])
    weights = jq.find_weights(fn, table, tokens)
    q, _ = jq.quantize(fn, table, jq.plan(weights, {"embed": jq.Scheme(Uniform(4), 8)}))
    _close(jq.apply(fn)(q, tokens), fn(jq.dequantize(q), tokens))
    compiled = jax.jit(jq.apply(fn)).lower(q, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 16 * 4 / 4


def test_a_stack_on_another_axis_is_scanned_as_codes() -> None:
    """MaxText keeps its layers on axis 1."""
    w = _normal(0, 6, 3, 6)

    def fn(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(w, 1, 0))[0]

    x = _normal(1, 2, 6)
    weights = jq.find_weights(fn, w, x)
    assert weights[""].batch_axes == (1,)
    q, _ = jq.quantize(fn, w, jq.plan(weights, {"": jq.Scheme(Uniform(4), 4)}))
    _close(jq.apply(fn)(q, x), fn(jq.dequantize(q), x))


def test_a_quantized_stack_can_be_sliced_as_a_pytree() -> None:
    w = {"w": _normal(0, 3, 4, 6)}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, p["w"])[0]  # noqa: E731
    x = _normal(1, 2, 4)
    q, _ = jq.quantize(fn, w, jq.plan(jq.find_weights(fn, w, x), {".*": jq.Scheme(Uniform(4), 2)}))
    layer = jax.tree.map(lambda leaf: leaf[1], q)
    assert layer["w"].shape == (4, 6)
    np.testing.assert_array_equal(jq.dequantize(layer)["w"], jq.dequantize(q)["w"][1])


@pytest.mark.parametrize(
    "grid", mostly_slow([GGUF("Q4_K"), GGUF("Q5_K"), Uniform(8), MX("INT8")], [GGUF("Q4_K")])
)
def test_a_large_product_between_a_sum_and_a_norm(grid: Grid) -> None:
    """Where XLA's CPU compiler fuses decoding, product and norm, sums of bytes came out wrong."""
    params = {"w": _normal(0, 512, 256) / 16}
    x, h = _normal(1, 16, 256, 512), _normal(2, 16, 256, 256)

    def fn(p, x, h):
        y = h + x @ p["w"]
        return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True))

    weights = jq.find_weights(fn, params, x, h)
    q, _ = jq.quantize(
        fn,
        params,
        jq.plan(weights, {"w": jq.Scheme(grid, None if isinstance(grid, (GGUF, Float)) else 32)}),
    )
    _close(jax.jit(jq.apply(fn))(q, x, h), jax.jit(fn)(jq.dequantize(q), x, h))
