"""Quantized inputs: the products of codes, the laws of tokens, where it works, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lorc_apply import SPLIT, W, bare, close, heads, scanned, tied

import jquant as jq
from jquant import Activations, LoRC, Percentile
from jquant.errors import EvidenceError, PlanError, UnsupportedPrimitiveError
from jquant.grids import HQQ, MSE, MX, NF4, Float, Power, Uniform
from jquant.inference import codes as products
from jquant.layerwise.weight import stored_bits
from jquant.rounding import GPTQ
from jquant.weights.qtensor import weight_bits
from tests.functions import CASES, _normal

BYTES = Uniform(8, symmetric=True, convention="S3")
AFFINE = Uniform(8)
E4M3, E5M2, E2M1 = (Float(*bits, scale="float32") for bits in ((4, 3), (5, 2), (2, 1)))
TOKEN = Activations(BYTES)
LAYOUT = jq.Layout.of((20, 12), in_axes=(0,))


def weight(grid, groups=None, choice: Activations | None = TOKEN, evidence=None, low=None):
    """A weight `[20, 12]` on a grid, that asks for quantized inputs."""
    scheme = jq.Scheme(grid, groups, compensation=low, activations=choice)
    return jq.quantize_weight(W["w"][0], scheme, LAYOUT, evidence=evidence)[0]


def times(q, x):
    return jq.apply(_times)(q, x)


def _times(w, x):
    return x @ w


def ways(q, x):
    """The product by codes, and that of the rounded input and the decoded weight."""
    ask = dataclasses.replace(q.activations.choice, compute="fake_quant")
    inputs = dataclasses.replace(q.activations, choice=ask)
    return times(q, x), times(dataclasses.replace(q, activations=inputs), x)


def near(found, wanted, much=4e-6) -> None:
    """Equal but for the rounding of sums: relative to the largest."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=much * float(jnp.abs(wanted).max()))


X = _normal(9, 9, 20) * jnp.exp(_normal(8, 9, 1)) + 0.5

# The product of codes

WEIGHTS = {
    "bytes": (Uniform(8, symmetric=True), None),
    "affine bytes": (Uniform(8), None),
    "affine bytes in ragged groups": (Uniform(8), 7),
    "int4 groups": (Uniform(4, scale_dtype="float16"), 8),
    "int2, one scale of a row": (Uniform(2), None),
    "zeros beyond the codes": (Uniform(4, convention="A3"), 8),
    "zeros between the codes": (Uniform(4, range=HQQ()), 7),
    "signed scales": (Uniform(4, True, "S4"), 8),
    "odd levels in ragged groups": (Uniform(3, True, "S5"), 7),
    "fp8": (E4M3, None),
    "fp4 in groups": (E2M1, 8),
    "fp8, a power of two": (MX("E4M3"), None),
}
INPUTS = {"bytes": BYTES, "affine": AFFINE, "int4": Uniform(4, symmetric=True), "fp8": E4M3}


PAIRS = [
    *((name, "affine") for name in WEIGHTS),
    *(("affine bytes", name) for name in ("bytes", "int4", "fp8")),
    ("bytes", "bytes"),
    ("zeros between the codes", "fp8"),
    ("fp8", "fp8"),
]


@pytest.mark.parametrize(("name", "inputs"), PAIRS, ids=[", ".join(pair) for pair in PAIRS])
def test_codes_give_what_rounded_inputs_give(name, inputs) -> None:
    grid = INPUTS[inputs]
    q = weight(*WEIGHTS[name], Activations(grid))
    integers = isinstance(q.grid, Uniform) and isinstance(grid, Uniform)
    assert TOKEN.way(q.grid, q.groups) == ("integer" if isinstance(q.grid, Uniform) else "float")
    assert q.activations.choice.way(q.grid, q.groups) == ("integer" if integers else "float")
    found, wanted = ways(q, X)
    near(found, wanted)
    assert float(jnp.abs(wanted - times(bare(q), X)).max()) > 1e-3  # inputs are rounded


def literal(x, codes, scale, zero, bits, low, high):
    """Integer arithmetic as ZeroQuant and Jacob et al. have it, in int64; x is [tokens, in]."""
    x, low, high = (np.asarray(a, np.float32) for a in (x, low, high))
    if zero is None:
        step, offset = np.maximum(high, -low) / np.float32(2 ** (bits - 1) - 1), 0
        c = np.clip(np.round(x / step), -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    else:
        step = (high - low) / np.float32(2**bits - 1)
        offset = np.clip(np.round(-low / step), 0, 2**bits - 1)
        c = np.clip(np.round(x / step) + offset, 0, 2**bits - 1)
    inputs = (c - offset).astype(np.int64)
    total = inputs @ np.asarray(codes, np.int64).T
    return total * np.float64(step) * np.asarray(scale, np.float64)[:, 0]


@pytest.mark.parametrize("granularity", ["token", "tensor", "static"])
@pytest.mark.parametrize("affine", [False, True])
def test_as_the_papers_have_it(granularity, affine) -> None:
    grid = AFFINE if affine else BYTES
    other = 1.7 * X  # what static ranges were read from
    evidence = jq.Evidence.of(other, spread=True)
    q = weight(BYTES, None, Activations(grid, granularity, compute="integer"), evidence)
    seen = np.asarray(other if granularity == "static" else X)
    axes = 1 if granularity == "token" else (0, 1)
    low, high = seen.min(axes, keepdims=True), seen.max(axes, keepdims=True)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    wanted = literal(X, q.codes, q.params["scale"], 0 if affine else None, 8, low, high)
    near(times(q, X), wanted.astype(np.float32))


def equations(fn, *args):
    """All equations of a program, in calls and loops too."""
    found, todo = [], [jax.make_jaxpr(fn)(*args).jaxpr]
    while todo:
        for eqn in todo.pop().eqns:
            found.append(eqn)
            for value in jax.tree.leaves(list(eqn.params.values())):
                inner = getattr(value, "jaxpr", value)
                todo += [inner] if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize(
    ("grid", "groups", "ask", "kinds"),
    [
        (Uniform(4), None, TOKEN, {("int8", "int8", "int32")}),
        (Uniform(8), 7, TOKEN, {("int8", "int8", "int32")}),
        (E2M1, None, TOKEN, {("bfloat16", "bfloat16", "float32")}),
        (NF4, 8, TOKEN, {("float32", "float32", "float32")}),
        (Uniform(4), jq.Groups("out", 6), TOKEN, {("float32", "float32", "float32")}),
        (Uniform(4), None, Activations(BYTES, compute="fake_quant"), {("float32",) * 3}),
    ],
)
def test_what_is_multiplied(grid, groups, ask, kinds) -> None:
    q = weight(grid, groups, ask)
    dots = [e for e in equations(times, q, X) if e.primitive.name == "dot_general"]
    seen = {tuple(str(v.aval.dtype) for v in (*e.invars, *e.outvars)) for e in dots}
    assert seen == kinds
    if ask.way(q.grid, q.groups) == "integer":
        floats = [e.outvars[0].aval for e in equations(times, q, X)]
        assert not [a for a in floats if a.dtype == jnp.float32 and a.size == q.size]


def test_few_tokens_are_filled_up() -> None:
    """XLA's CPU takes longer for one token than for eight."""
    dots = [e for e in equations(times, weight(BYTES), X[:1]) if e.primitive.name == "dot_general"]
    assert [e.outvars[0].aval.shape for e in dots] == [(8, 12)]


def test_eight_bit_floats_meet_as_such_where_there_are_units_for_them() -> None:
    q = weight(E4M3, None, Activations(E5M2))
    kinds = {
        tuple(str(v.aval.dtype) for v in e.invars)
        for e in equations(times, q, X)
        if e.primitive.name == "dot_general"
    }
    assert kinds == {("bfloat16", "bfloat16"), ("float8_e5m2", "float8_e4m3fn")}


def test_sums_of_the_largest_codes_do_not_wrap() -> None:
    """Both zero points at the end of the codes, and all codes at the other end."""
    width, layout = 40_000, jq.Layout.of((40_000, 1), in_axes=(0,))
    for codes, x in ((255, 1.0), (0, -1.0), (255, -1.0)):
        q = jq.QTensor(
            jnp.full((1, width), codes, jnp.uint8),
            {"scale": jnp.ones((1, 1)), "zero": jnp.full((1, 1), 255 - codes, jnp.uint8)},
            Uniform(8), jq.Groups(), layout, jnp.dtype("float32"), None,
            jq.qtensor.Inputs(Activations(AFFINE, compute="integer")),
        )  # fmt: skip
        sign = 1 if codes else -1
        near(times(q, jnp.full((1, width), x)), jnp.full((1, 1), 255.0 * width * x * sign), 1e-6)


def test_too_long_for_integers(monkeypatch) -> None:
    monkeypatch.setattr(products, "LONGEST", 19)
    q = weight(BYTES, None, Activations(BYTES))
    dots = [e for e in equations(lambda q, x: jq.apply(lambda w, x: x @ w)(q, x), q, X)]
    assert not [e for e in dots if "int8" in str(e) and e.primitive.name == "dot_general"]
    with pytest.raises(UnsupportedPrimitiveError, match=r"\(20, 12\).*integers"):
        fresh = weight(BYTES, None, Activations(BYTES, compute="integer"))
        jq.apply(lambda w, x: x @ w)(fresh, X)


# Tokens


@pytest.mark.parametrize("grid", [BYTES, E4M3], ids=["int8", "fp8"])
@pytest.mark.parametrize("compute", ["auto", "fake_quant"])
def test_a_token_is_its_own(grid, compute) -> None:
    q = weight(Uniform(4), 8, Activations(grid, compute=compute))
    y = times(q, X)
    others = X.at[1:].multiply(100.0)
    np.testing.assert_array_equal(times(q, others)[0], y[0])
    np.testing.assert_allclose(times(q, X[:1])[0], y[0], rtol=1e-6, atol=1e-6)
    scales = 2.0 ** jnp.arange(-4, 5, dtype=jnp.float32)[:, None]
    np.testing.assert_array_equal(times(q, X * scales), y * scales)
    whole = weight(Uniform(4), 8, Activations(grid, "tensor", compute=compute))
    assert not np.allclose(times(whole, others)[0], times(whole, X)[0], rtol=1e-3)
    assert not np.allclose(times(whole, X * scales), times(whole, X) * scales, rtol=1e-3)


def test_static_ranges_are_nobody_s_own() -> None:
    evidence = jq.Evidence.of(X, spread=True)
    q = weight(BYTES, None, Activations(BYTES, "static"), evidence)
    y = times(q, X)
    np.testing.assert_array_equal(times(q, X.at[1:].multiply(0.1))[0], y[0])
    assert not np.allclose(times(q, 4 * X), 4 * y, rtol=1e-2)  # clips


def test_tokens_beat_tensors_where_norms_vary() -> None:
    x = _normal(3, 64, 20) * jnp.exp(2 * _normal(4, 64, 1))
    size = jnp.linalg.norm(x, axis=1, keepdims=True)
    errors = []
    for granularity in ("token", "tensor"):
        q = weight(BYTES, None, Activations(BYTES, granularity))
        errors.append(float(jnp.mean(((times(q, x) - times(bare(q), x)) / size) ** 2)))
    assert 100 * errors[0] < errors[1]


@pytest.mark.parametrize("granularity", ["token", "tensor", "static"])
@pytest.mark.parametrize("grid", [BYTES, AFFINE, E4M3], ids=["bytes", "affine", "fp8"])
def test_what_is_no_number_stays_where_it_is(granularity, grid) -> None:
    evidence = jq.Evidence.of(X, spread=True)
    q = weight(Uniform(4), 8, Activations(grid, granularity), evidence)
    bad = X.at[1, 3].set(jnp.nan).at[4, 0].set(jnp.inf).at[5, 2].set(-jnp.inf)
    ill = np.array([1, 4, 5])
    for found in ways(q, bad):
        assert np.isnan(found[ill]).all()
        near(np.delete(found, ill, 0), np.delete(times(q, jnp.delete(X, ill, 0)), (), 0))


def test_zeros_and_tiny_and_huge_tokens() -> None:
    x = jnp.stack([0 * X[0], 1e-30 * X[1], 1e30 * X[2]])
    for grid in (BYTES, AFFINE, E4M3):
        for found in ways(weight(Uniform(8), None, Activations(grid)), x):
            assert np.isfinite(found).all() and (found[0] == 0).all()
            near(found[1] * 1e30, found[1] * 1e30)
            near(found[2], times(bare(weight(Uniform(8))), x)[2], 0.1)


# Where the function is any function


@pytest.mark.parametrize("fn", [*SPLIT[1:], tied], ids=lambda fn: fn.__name__)
def test_all_shapes_of_products(fn) -> None:
    grid = E4M3 if fn in (heads, scanned) else BYTES
    params = {k: v for k, v in W.items() if (k == "w") != (fn is heads)}
    x, results = _normal(9, 7, 20), []
    for compute in ("auto", "fake_quant"):
        scheme = jq.Scheme(
            grid, None, compensation=LoRC(2), activations=Activations(grid, compute=compute)
        )
        plan = jq.plan(jq.find_weights(fn, params, x), {".*": scheme})
        q, _ = jq.quantize(fn, params, plan)
        results.append(jq.apply(fn)(q, x))
    # Rounding a sum otherwise may round the next input otherwise: a step of it, not more.
    much = 2e-2 if fn.__name__ in ("scanned", "bfloat", "heads") else 1e-5
    near(results[0], results[1], much)
    wanted = fn(jq.dequantize(q), x)
    assert results[0].dtype == wanted.dtype
    assert 1e-5 < float(jnp.abs(results[1] - wanted).max() / jnp.abs(wanted).max()) < 0.2


def by_hand(x, axes, top=127):
    step = jnp.max(jnp.abs(x), axes, keepdims=True) / top
    return jnp.round(x / step) * step


def test_a_token_is_all_that_is_contracted() -> None:
    """Heads are contracted together, experts each have tokens of their own."""
    one, two = _normal(9, 7, 3, 4), _normal(8, 2, 7, 6)
    join = lambda p, x: jnp.einsum("tnh,nhd->dt", x, p)  # noqa: E731
    turned = lambda p, x: jnp.einsum("tnh,hnd->td", x, p)  # noqa: E731
    each = lambda p, x: jnp.einsum("edf,etd->etf", p, x)  # noqa: E731
    grouped = lambda p, x: jnp.einsum("abtd,badf->tabf", x, p)  # noqa: E731
    four = _normal(7, 2, 3, 7, 6)
    for fn, w, x, axes, whole in (
        (join, _normal(0, 3, 4, 5), one, (1, 2), None),
        (turned, _normal(0, 4, 3, 5), one, (1, 2), None),
        (each, _normal(1, 2, 6, 5), two, 2, (1, 2)),
        (grouped, _normal(1, 3, 2, 6, 5), four, 3, (2, 3)),
    ):
        weights = jq.find_weights(fn, w, x)
        q, _ = jq.quantize(fn, w, jq.plan(weights, {".*": jq.Scheme(BYTES, activations=TOKEN)}))
        near(jq.apply(fn)(q, x), fn(jq.dequantize(q), by_hand(x, axes)))
        if whole is not None:
            ask = Activations(BYTES, "tensor")  # one range for the tokens of each expert
            q, _ = jq.quantize(fn, w, jq.plan(weights, {".*": jq.Scheme(BYTES, activations=ask)}))
            near(jq.apply(fn)(q, x), fn(jq.dequantize(q), by_hand(x, whole)))


def test_a_compensation_sees_the_input_as_it_is() -> None:
    q = weight(Uniform(2), None, TOKEN, low=LoRC(3))
    plain = dataclasses.replace(q, compensation=None)
    left, right = q.compensation.factors()
    near(times(q, X), times(plain, X) + X @ right.T @ left.T)


ANY = "linen-scan-remat-tied vmapped-experts ragged-dot conv-grouped-strided"


@pytest.mark.parametrize("name", ANY.split())
def test_any_function(name) -> None:
    case = next(c for c in CASES if c.name == name)
    weights = jq.find_weights(case.fn, case.params, case.batches[0])
    full = jax.jit(case.fn)(case.params, case.batches[0])
    scheme = jq.Scheme(Uniform(8), activations=Activations(AFFINE, "static"), fallback=True)
    q, _ = jq.quantize(case.fn, case.params, jq.plan(weights, {".*": scheme}), case.batches)
    run = jax.jit(jq.apply(case.fn))
    found = run(q, case.batches[0])
    without = run(jax.tree.map(lambda x: x, bare(q)), case.batches[0])
    assert not np.array_equal(jax.tree.leaves(found)[0], jax.tree.leaves(without)[0])
    jax.tree.map(lambda a, b: near(a, b, 0.08), found, full)


def test_static_ranges_follow_their_layer() -> None:
    """A stack indexed in a Python loop, turned, and squeezed: each layer has its own range."""

    def each(p, x):
        for layer in range(3):
            x = jnp.tanh(x @ p["w"][layer]) @ p["o"][layer].T * 10.0**layer
        return x

    params = {"w": W["w"], "o": W["w"][::-1]}
    ask = Activations(BYTES, "static", Percentile(100.0))  # read from the spread
    plan = jq.plan(
        jq.find_weights(each, params, X),
        {"w": jq.Scheme(BYTES, activations=ask), ".*": jq.keep},
    )
    q, _ = jq.quantize(each, params, plan, [X], sequential=None)
    scales, x = q["w"].activations.params["scale"], X
    for layer in range(3):
        assert scales[layer] == pytest.approx(float(jnp.abs(x).max()) / 127, rel=1e-4)
        x = jnp.tanh(x @ W["w"][layer]) @ params["o"][layer].T * 10.0**layer
    x, w = X, jq.dequantize(q)["w"]
    for layer in range(3):
        x = jnp.clip(jnp.round(x / scales[layer]), -127, 127) * scales[layer]
        x = jnp.tanh(x @ w[layer]) @ params["o"][layer].T * 10.0**layer
    near(jq.apply(each)(q, X), x, 1e-2)
    turned = {"w": q["w"], "o": None}
    back = lambda p, x: jnp.einsum("ndl,ltd->ltn", p["w"].transpose(2, 1, 0), x)  # noqa: E731
    stack = jnp.stack([X, 10 * X, 100 * X])
    wanted = [
        jq.apply(_times)(jax.tree.map(lambda a, k=k: a[k], q["w"]), stack[k]) for k in range(3)
    ]
    near(jq.apply(back)(turned, stack), jnp.stack(wanted))


def test_rows_of_a_ragged_product_have_their_group_s_range() -> None:
    fn = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 0, 5]))  # noqa: E731
    x = X[:7] * jnp.where(jnp.arange(7) < 2, 1.0, 100.0)[:, None]
    params = {"w": W["w"]}
    scheme = jq.Scheme(BYTES, activations=Activations(BYTES, "static"), fallback=True)
    q, _ = jq.quantize(fn, params, jq.plan(jq.find_weights(fn, params, x), {".*": scheme}), [x])
    steps = q["w"].activations.params["scale"][jnp.array([0, 0, 2, 2, 2, 2, 2])][:, None]
    assert steps[0] < steps[2] / 10
    seen = jnp.clip(jnp.round(x / steps), -127, 127) * steps
    close(jq.apply(fn)(q, x)[:2], fn(jq.dequantize(q), seen)[:2])
    near(jq.apply(fn)(q, x), fn(jq.dequantize(q), seen))


def test_views_wait_for_their_product() -> None:
    """Slices of outputs and inputs, reshapes: the input of each product is rounded."""

    def fn(p, x):
        a, b = jnp.split(p, 2, axis=1)
        return (
            x @ a + x[:, :8] @ p[:8, 6:] + x @ p.reshape(4, 5, 12).reshape(20, 12)[:, ::2] + x @ b
        )

    x = by_hand(X[:, :8], 1), by_hand(X, 1)

    def wanted(p):
        a, b = jnp.split(p, 2, axis=1)
        return x[1] @ a + x[0] @ p[:8, 6:] + x[1] @ p[:, ::2] + x[1] @ b

    q = weight(Uniform(4), 8)
    near(jq.apply(fn)(q, X), wanted(jq.dequantize(q)))
    with pytest.raises(UnsupportedPrimitiveError, match="through a view"):
        jq.apply(fn)(weight(Uniform(4), 8, Activations(BYTES, compute="integer")), X)


def test_products_out_of_sight_are_refused() -> None:
    @jax.custom_vjp
    def project(x, w):
        return x @ w

    project.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    q = weight(Uniform(4), 8)
    with pytest.raises(UnsupportedPrimitiveError, match="'custom_vjp_call'.*out of sight"):
        jq.apply(lambda w, x: project(x, w))(q, X)
    with pytest.raises(UnsupportedPrimitiveError, match="scan, after a view"):
        jq.apply(lambda w, x: jax.lax.scan(lambda c, v: (c, x @ v), 0, w.reshape(1, 20, 12))[1])(
            q, X
        )


def test_under_vmap_and_grad() -> None:
    stacked, factors = jnp.stack([X, 3 * X - 1]), jnp.arange(12, dtype=jnp.float32)
    for choice in (TOKEN, Activations(AFFINE, "tensor"), Activations(E4M3)):
        q = weight(Uniform(4), 8, choice)
        each = jnp.stack([times(q, x) for x in stacked])
        close(jax.vmap(jq.apply(_times), (None, 0))(q, stacked), each)
        for one in (q, dataclasses.replace(q, activations=None)):
            slope = jax.grad(lambda x, q=one: jnp.sum(times(q, x) * factors))(X)
            close(slope, jnp.broadcast_to(jq.dequantize(q) @ factors, X.shape))


def test_a_second_call_compiles_nothing(compiles) -> None:
    scheme = jq.Scheme(Uniform(8), 7, activations=TOKEN)
    params, x = {"w": W["w"]}, X
    q, _ = jq.quantize(
        scanned, params, jq.plan(jq.find_weights(scanned, params, x), {".*": scheme})
    )
    jq.apply(scanned)(q, x)
    more = x + 1.0
    with compiles() as log:
        jq.apply(scanned)(q, more)
    assert log == []


def test_packed_codes_are_unpacked_when_they_are_used() -> None:
    """Sixteen unrolled layers of 4-bit codes may not all lie there as bytes."""
    sizes = []
    for layers in (4, 16):
        params = [_normal(k, 256, 256) / 16 for k in range(layers)]

        def fn(params, x):
            for w in params:
                x = jnp.tanh(x @ w)
            return x

        x = _normal(9, 8, 256)
        scheme = jq.Scheme(Uniform(4), activations=TOKEN)
        q, _ = jq.quantize(fn, params, jq.plan(jq.find_weights(fn, params, x), {".*": scheme}))
        compiled = jax.jit(jq.apply(fn)).lower(q, x).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] - sizes[0] < 12 * 256 * 256 / 3


# What is refused


def test_choices_that_contradict_themselves() -> None:
    for bad in (
        dict(granularity="row"), dict(compute="int8"), dict(range="minmax"), dict(range=MSE()),
        dict(range=Percentile(99.0)), dict(grid=NF4), dict(grid=Power(4)), dict(grid=MX()),
        dict(grid=Uniform(8, True, "S4")), dict(grid=Uniform(4, True, "S5")),
        dict(grid=Uniform(8, range=MSE())), dict(grid=E4M3, compute="integer"),
        dict(grid=Float(4, 3), granularity="static"), dict(grid=8),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"Activations\."):
            Activations(**{"grid": BYTES, **bad})
    for share in (50, 101, True):
        with pytest.raises(ValueError, match=r"Percentile\.percent"):
            Percentile(share)


def test_integers_asked_of_what_has_none() -> None:
    ask = Activations(BYTES, compute="integer")
    for grid, groups in ((NF4, 64), (E4M3, None), (Uniform(4), jq.Groups("out", 64))):
        with pytest.raises(PlanError, match=r"compute='integer'.*pass"):
            jq.Scheme(grid, groups, activations=ask)
    with pytest.raises(ValueError, match=r"Scheme\.activations must be"):
        jq.Scheme(Uniform(8), activations=BYTES)  # type: ignore[arg-type]
    for name, word in (("conv-grouped-strided", "conv"), ("ragged-dot", "ragged_dot")):
        case = next(c for c in CASES if c.name == name)
        plan = jq.plan(
            jq.find_weights(case.fn, case.params, case.batches[0]),
            {".*": jq.Scheme(Uniform(8), activations=ask)},
        )
        with pytest.raises(PlanError, match=f"enters a {word}, which has no product of integers"):
            jq.quantize(case.fn, case.params, plan)
    plan = jq.plan(jq.find_weights(scanned, W, X), {"w": jq.Scheme(Uniform(8), activations=ask)})
    with pytest.raises(PlanError, match="no product of integers"):  # there and back
        jq.quantize(scanned, W, plan)


def test_static_ranges_of_what_nobody_has_seen() -> None:
    fn, params = (lambda p, x: x @ p["w"]), {"w": W["w"][0]}
    weights = jq.find_weights(fn, params, X)
    plan = jq.plan(weights, {".*": jq.Scheme(BYTES, activations=Activations(BYTES, "static"))})
    with pytest.raises(EvidenceError, match="'w': static ranges.*pass calibration batches"):
        jq.quantize(fn, params, plan)
    plain = jq.Evidence.of(X)
    q, _ = jq.quantize(fn, params, plan, evidence={"w": plain})  # the largest is enough for that
    assert q["w"].activations.params["scale"] == pytest.approx(float(jnp.abs(X).max()) / 127)
    for ask in (Activations(AFFINE, "static"), Activations(BYTES, "static", MSE())):
        plan = jq.plan(weights, {".*": jq.Scheme(BYTES, activations=ask)})
        with pytest.raises(EvidenceError, match=r"'w'.*needs the spread.*spread=True"):
            jq.quantize(fn, params, plan, evidence={"w": plain})
    looked, table = (lambda p, t: p["w"][t]), jnp.array([1, 2])
    plan = jq.plan(jq.find_weights(looked, params, table), {".*": plan["w"]})
    with pytest.raises(EvidenceError, match="'w': static ranges"):
        jq.quantize(looked, params, plan, [table])
    both = {"w": W["w"][:, :12]}
    back = lambda p, x: x @ p["w"][0] @ p["w"][0].T  # noqa: E731
    plan = jq.plan(jq.find_weights(back, both, X[:, :12]), {".*": plan["w"]})
    with pytest.raises(PlanError, match="and elsewhere over.*one static range"):
        jq.quantize(back, both, plan, [X[:, :12]])
    learned = jq.Scheme(
        BYTES, None, jq.rounding.DiscQuant(), activations=Activations(BYTES, "static")
    )
    with pytest.raises(EvidenceError, match="learned on the whole network"):
        jq.quantize(
            fn, params, jq.plan(weights, {".*": learned}), [X],
            objective=jq.objectives.MSE(), key=jax.random.key(0),
        )  # fmt: skip


def test_bits_and_words() -> None:
    evidence = jq.Evidence.of(X, spread=True)
    static = jq.Scheme(Uniform(8), activations=Activations(AFFINE, "static"))
    q, _ = jq.quantize_weight(W["w"][0], static, LAYOUT, evidence=evidence)
    assert weight_bits(q) == stored_bits((12, 20), static)
    assert weight_bits(q) == weight_bits(dataclasses.replace(q, activations=None)) + 40 / 240
    scheme = jq.Scheme(Uniform(4), 8, GPTQ(), activations=TOKEN)
    assert jq.report.describe(scheme) == "Uniform 4b, in 8, GPTQ, inputs Uniform 8b token"
    keys = ("yao2022zeroquant", "wu2023zeroquantfp")
    cited = jq.cite(jq.Scheme(E4M3, activations=Activations(E4M3)))
    assert all(key in cited for key in keys)
