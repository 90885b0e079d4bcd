"""Products of codes whose scales come after, which GPUs and TPUs take, computed here."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.grids import Uniform
from jquant.inference import kernels
from jquant.inference.grouped import as_stored, fuses_on_gpus, scaled_after, signed
from jquant.inference.operand import Operand
from jquant.weights.qtensor import dequantize_weight

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 64), jnp.bfloat16)
NUMBERS = {"cuda": signed, "tpu": as_stored}
GRIDS = [
    Uniform(2, True),
    Uniform(3, symmetric=False),
    Uniform(4, symmetric=False),
    Uniform(8, symmetric=False),
    Uniform(8, True),
    Uniform(2, True, "S5"),
    Uniform(4, False, "A4"),
    Uniform(4, True, "S4"),
]


def fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, params["w"])


def on_codes() -> Any:
    """`apply` of the function, not yet traced."""
    return jq.apply(lambda params, x: fn(params, x))


def quantized(grid: Any = GRIDS[2], groups: Any = 32, dtype: Any = jnp.bfloat16) -> Any:
    w = jax.random.normal(jax.random.key(1), (64, 10), dtype) + jnp.asarray(0.3, dtype)
    layout = jq.find_weights(fn, {"w": w}, X.astype(dtype))["w"].layout
    q, _ = jq.quantize_weight(w, jq.Scheme(grid, groups=groups), layout)
    return {"w": q}


def exact(q: Any, x: Any = X) -> jax.Array:
    """The product in float32, of numbers that are rounded to no other dtype."""
    wide = replace(q["w"], dtype=jnp.dtype(jnp.float32))
    return x.astype(jnp.float32) @ dequantize_weight(wide)


@pytest.fixture(params=NUMBERS)
def here(request: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the CPU do what another platform does, and lists the tokens of what it takes."""
    seen: list[int] = []

    def counted(rows: jax.Array, q: Any) -> jax.Array:
        seen.append(rows.shape[-2])
        return scaled_after(rows, q, NUMBERS[request.param])

    others = [row for row in kernels.TABLE if request.param not in row.platforms]
    (row,) = [row for row in kernels.TABLE if request.param in row.platforms]
    mine = row._replace(kernel=counted, platforms=("cpu",))
    monkeypatch.setattr(kernels, "TABLE", (*others, mine))
    return seen


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.convention}-{g.bits}")
@pytest.mark.parametrize("groups", [16, None], ids=str)
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_it_is_the_product_with_the_decoded_weight(grid: Any, groups: Any, numbers: Any) -> None:
    q = quantized(grid, groups)
    y = jax.jit(scaled_after, static_argnums=2)(X, q["w"], numbers)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact(q), rtol=1e-5, atol=1e-4)


def test_experts_side_by_side(here: list[int]) -> None:
    w = jax.random.normal(KEY, (5, 64, 8), jnp.bfloat16)
    x = jax.random.normal(KEY, (5, 2, 64), jnp.bfloat16)

    def experts(params: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("eti,eio->eto", x, params["w"])

    plan = jq.plan(jq.find_weights(experts, {"w": w}, x), {".*": jq.Scheme(GRIDS[2], groups=32)})
    q, _ = jq.quantize(experts, {"w": w}, plan)
    y = jq.apply(experts)(q, x)
    assert here == [2] and y.dtype == jnp.bfloat16
    expected = np.asarray(experts(jq.dequantize(q), x), np.float32)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=2**-5, atol=0.1)


def test_results_are_rounded_once(here: list[int]) -> None:
    q = quantized()
    y = on_codes()(q, X)
    assert here == [3] and y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact(q).astype(jnp.bfloat16))


def test_derivatives_are_those_of_decoding(here: list[int]) -> None:
    q, run = quantized(), on_codes()

    def loss(function: Any, scale: jax.Array, x: jax.Array) -> jax.Array:
        params = {"w": replace(q["w"], params=q["w"].params | {"scale": scale})}
        return jnp.sum(function(params, x).astype(jnp.float32))

    args = (q["w"].params["scale"], X)
    mine = jax.jit(jax.grad(lambda *a: loss(run, *a), (0, 1)))(*args)
    assert here
    dense = jax.grad(lambda *a: loss(lambda p, x: fn(jq.dequantize(p), x), *a), (0, 1))(*args)
    for one, two in zip(mine, dense, strict=True):
        assert one.dtype == two.dtype
        one, two = np.asarray(one, np.float32), np.asarray(two, np.float32)
        np.testing.assert_allclose(one, two, rtol=2**-6, atol=0.05)


def test_what_it_leaves_to_decoding(here: list[int]) -> None:
    """Many tokens, a shorter last group, 32 bits, a precision."""
    run = on_codes()
    run(quantized(), jnp.ones((257, 64), jnp.bfloat16))
    run(quantized(groups=48), X)
    run(quantized(dtype=jnp.float32), X.astype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        run(quantized(), X)
    assert not here
    run(quantized(groups=None), jnp.ones((256, 64), jnp.bfloat16))
    assert here == [256]


def test_on_gpus_results_of_groups_take_less_than_the_weight() -> None:
    def taken(tokens: int, groups: int | None) -> bool:
        return fuses_on_gpus(
            quantized(groups=groups)["w"], Operand(tokens, jnp.dtype(jnp.bfloat16), None)
        )

    assert taken(15, 32) and not taken(16, 32)
    assert not taken(1, 16)  # is computed as eight
    assert taken(10**6, None)


@pytest.mark.parametrize(("platform", "products"), [("cpu", 0), ("tpu", 1), ("cuda", 1)])
def test_it_is_for_accelerators(platform: str, products: int) -> None:
    program = jax.jit(on_codes()).trace(quantized(), X)
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("batching_dims = [1] x [1]") == products
    assert ("xi4>" in text) == (platform == "cuda")
