"""Emulated arithmetic: native bit for bit, through control flow, and at random in law."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax import lax

import jquant as jq
from jquant.arithmetic import Operation
from jquant.errors import FormatError, UnsupportedPrimitiveError
from jquant.grids import Float
from jquant.numerics import noise
from jquant.programs.walker import trace
from tests.marks import covering

KEY = jax.random.key(0)
BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16}
BINARY = {"add": (lax.add, np.add), "sub": (lax.sub, np.subtract), "mul": (lax.mul, np.multiply),
          "div": (lax.div, np.divide)}  # fmt: skip
UNARY = {"sqrt": (lax.sqrt, np.sqrt)}
quiet = functools.partial(np.errstate, all="ignore")


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def exactly(function, dtype, *inputs):
    """An operation on narrow numbers, rounded once: NumPy's in enough bits, then a cast."""
    wide = np.float64 if dtype == FLOAT16 else np.float32  # ml_dtypes casts from float32
    with quiet():
        return function(*(x.astype(wide) for x in inputs)).astype(dtype)


def assert_same(found, wanted, but=None):
    """Equal bits; one NaN is as good as another."""
    found, wanted = np.asarray(found), np.asarray(wanted).astype(np.asarray(found).dtype)
    same = (found.view(f"u{found.itemsize}") == wanted.view(f"u{wanted.itemsize}")) | (
        np.isnan(found) & np.isnan(wanted)
    )
    same = same if but is None else same | but
    assert same.all(), (found[~same][:5], wanted[~same][:5])


def numbers(dtype, count=4096, seed=0):
    """Bit patterns at random, among them special ones, of which every one meets every other."""
    random = np.random.default_rng(seed)
    some = random.integers(0, 1 << 16, count).astype(np.uint16).view(dtype)
    near = (
        np.array([1, 3, 0.1, 1e-3]).astype(dtype).view(np.uint16)[:, None] + np.arange(3)
    ).ravel()
    tiny, largest = ml_dtypes.finfo(dtype).smallest_normal, ml_dtypes.finfo(dtype).max
    edges = np.array([0.0, 1.0, np.inf, np.nan, float(tiny), float(largest)])
    edges = np.concatenate([edges, -edges]).astype(dtype)
    edges = np.concatenate([edges, near.astype(np.uint16).view(dtype),
                            np.array([1, 2, 0x3FF], np.uint16).view(dtype)])  # fmt: skip
    one, two = np.meshgrid(edges, edges)
    other = random.permutation(some)
    return np.concatenate([some, one.ravel()]), np.concatenate([other, two.ravel()])


def flushed(dtype, *values):
    """Where float32 arithmetic on a CPU takes bfloat16's subnormals for zero."""
    tiny = np.finfo(np.float32).tiny
    with quiet():
        small = [(np.abs(v.astype(np.float32)) < tiny) & (v != 0) for v in values]
    return functools.reduce(np.logical_or, small) if dtype == BFLOAT16 else None


@pytest.mark.parametrize("name", [*BINARY, *UNARY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_carries_narrow_types_bit_for_bit(name, dtype):
    kind = DTYPES[dtype]
    operation, oracle = {**BINARY, **UNARY}[name]
    inputs = numbers(kind)[: 1 if name in UNARY else 2]
    wanted = exactly(oracle, kind, *inputs)
    with quiet():
        wide = [jnp.asarray(x.astype(np.float32)) for x in inputs]
    found = jq.emulate(operation, dtype)(*wide)
    assert found.dtype == jnp.float32
    skip = flushed(kind, *inputs, wanted)
    assert_same(found, wanted, skip)
    assert_same(jax.jit(operation)(*inputs), wanted, skip)  # what XLA makes of the type itself


@pytest.mark.parametrize("name", [*BINARY, *UNARY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_carries_them_with_their_subnormals(name, dtype, double):
    kind = DTYPES[dtype]
    operation, oracle = {**BINARY, **UNARY}[name]
    inputs = numbers(kind)[: 1 if name in UNARY else 2]
    with quiet():
        wide = [jnp.asarray(x.astype(np.float32).astype(np.float64)) for x in inputs]
    assert_same(jq.emulate(operation, dtype)(*wide), exactly(oracle, kind, *inputs))


@pytest.mark.parametrize("name", [*BINARY, *UNARY])
def test_float64_carries_float32(name, double):
    operation, oracle = {**BINARY, **UNARY}[name]
    bits = np.random.default_rng(0).integers(0, 1 << 32, (2, 4096)).astype(np.uint32)
    inputs = bits.view(np.float32)[: 1 if name in UNARY else 2]
    with quiet():
        wanted = oracle(*inputs)
        wide = [jnp.asarray(x.astype(np.float64)) for x in inputs]
    assert_same(jq.emulate(operation, "float32")(*wide), wanted)


halves = st.floats(width=16)
add16 = jq.emulate(lax.add, Float(5, 10, overflow="infinity"))
mul16 = jq.emulate(lax.mul, "float16")


@given(x=halves, y=halves)
@example(1.0, 2.0**-11)  # a tie to even, below
@example(1.0 + 2.0**-10, 2.0**-11)  # and above
@example(65504.0, 16.0)  # half a step beyond the largest number: infinity
@example(2.0**-24, 0.5)  # half the least number: zero
@example(-0.0, 0.0)
def test_any_two_halves(x, y):
    x, y = np.float16(x), np.float16(y)
    for emulated, oracle in ((add16, np.add), (mul16, np.multiply)):
        found = emulated(jnp.float32(x), jnp.float32(y))
        assert_same(found, exactly(oracle, FLOAT16, x, y))


def cut(x, keep):
    """A significand of so many bits by NumPy: exact for normal numbers."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(mantissa, keep + 1)), exponent - keep - 1)


@pytest.mark.parametrize("keep", [1, 7, 10, 22, 23])
def test_significands_keep_the_exponents_of_the_carrier(keep):
    x = np.ldexp(np.random.default_rng(keep).normal(size=2048), np.arange(2048) % 230 - 110)
    x = x.astype(np.float32)
    assert_same(jq.emulate(lambda x: x, keep)(x), cut(x, keep))


@pytest.mark.parametrize("keep", [1, 10, 23, 36, 51, 52])
def test_significands_of_float64(keep, double):
    x = np.ldexp(np.random.default_rng(keep).normal(size=2048), np.arange(2048) % 1900 - 950)
    assert_same(jq.emulate(lambda x: x, keep)(x), cut(x, keep))
    assert_same(jq.emulate(lambda x: x, jnp.int32(keep))(x), cut(x, keep))


def test_what_is_no_number_stays():
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000, 0, 0x80000000])
    x = jnp.asarray(odd.astype(np.uint32).view(np.float32))
    for format in (1, 10, Float(5, 10, overflow="infinity"), "bfloat16"):
        for run in (jq.emulate(lambda x: x * 1, format),):
            assert_same(run(x), x)
        assert_same(jq.emulate(lambda x: x * 1, format, "stochastic")(KEY, x), x)


def test_ranges_saturate_or_overflow():
    x = jnp.array([3e4, 300.0, -1e9], jnp.float32)
    double_ = lambda x: x + x  # noqa: E731
    assert jq.emulate(double_, Float(5, 10))(x).tolist() == [6e4, 600.0, -65504.0]
    assert jq.emulate(double_, "float16")(4 * x)[0] == jnp.inf
    assert jq.emulate(double_, Float(4, 3))(x).tolist() == [448.0, 448.0, -448.0]
    assert jq.emulate(double_, 10)(x)[2] == cut(np.float32(-2e9), 10)
    random = jq.emulate(double_, Float(5, 10), "stochastic")(KEY, x)
    assert random[2] == -65504


# Programs


def body(x):
    return x * np.float32(0.9) + np.float32(0.3)


def halved(x, steps):
    """`body` in NumPy's own half precision."""
    for _ in range(steps):
        x = x * np.float16(0.9) + np.float16(0.3)
    return x


X = np.linspace(0.5, 9, 7).astype(np.float16)
WIDE = X.astype(np.float32)


def twice(x):
    return body(body(x))


@jax.custom_jvp
def custom(x):
    return body(x)


custom.defjvp(lambda primals, tangents: (custom(primals[0]), tangents[0]))


@jax.custom_vjp
def custom_back(x):
    return body(x)


custom_back.defvjp(lambda x: (body(x), None), lambda _, g: (g,))

CONSTANTS = np.array([0.9], np.float32)  # a constant of an inner program

PROGRAMS = {
    "plain": (body, 1),
    "jit": (jax.jit(twice), 2),
    "jit in jit": (jax.jit(lambda x: jax.jit(body)(twice(x))), 3),
    "constants": (jax.jit(lambda x: x * CONSTANTS + np.float32(0.3)), 1),
    "scan": (lambda x: lax.scan(lambda x, _: (body(x), None), x, None, length=9)[0], 9),
    "scan of rows": (lambda x: lax.scan(lambda _, x: (0, twice(x)), 0, x)[1], 2),
    "while": (lambda x: lax.while_loop(lambda c: c[1] < 5, lambda c: (body(c[0]), c[1] + 1),
                                       (x, 0))[0], 5),
    "fori": (lambda x: lax.fori_loop(0, 6, lambda _, x: body(x), x), 6),
    "nested": (lambda x: lax.fori_loop(0, 3, lambda _, x: lax.fori_loop(
        0, 2, lambda _, x: body(x), x), x), 6),
    "cond": (lambda x: lax.cond(x[0] > 0, twice, lambda x: x, x), 2),
    "after cond": (lambda x: body(lax.cond(x[0] > 0, twice, lambda x: x, x)), 3),
    "after cond in a loop": (
        lambda x: lax.fori_loop(
            0, 3, lambda _, x: body(lax.cond(x[0] > 0, body, lambda x: x, x)), x
        ),
        6,
    ),
    "after remat": (lambda x: body(jax.checkpoint(twice)(x)), 3),
    "switch": (lambda x: lax.switch(2, [jnp.sin, jnp.cos, body], x), 1),
    "remat": (jax.checkpoint(twice), 2),
    "custom_jvp": (custom, 1),
    "custom_vjp": (custom_back, 1),
    "map": (lambda x: lax.map(body, x), 1),
    "vmap": (jax.vmap(body), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_through_control_flow(name):
    fn, steps = PROGRAMS[name]
    wanted = halved(X, steps)
    assert_same(jq.emulate(fn, "float16")(WIDE), wanted)
    assert_same(jax.jit(jq.emulate(fn, 10))(WIDE), wanted)
    assert (np.asarray(fn(WIDE)) != wanted).any()


@pytest.mark.parametrize(("source", "name"), covering(["hash", "threefry"], PROGRAMS))
def test_at_random_through_control_flow(name, source):
    fn, steps = PROGRAMS[name]
    run = jq.emulate(fn, 5, "stochastic", source=source)
    found = run(KEY, WIDE)
    assert_same(run(KEY, WIDE), found)
    assert_same(jax.jit(run)(KEY, WIDE), found)
    assert_same(found, cut(np.asarray(found), 5))  # numbers of the format
    assert (np.asarray(run(jax.random.key(1), WIDE)) != np.asarray(found)).any()
    assert np.abs(found - np.asarray(fn(WIDE))).max() < 2 * steps * 2.0**-5 * 16


def test_all_numbers_are_of_the_format_or_only_results():
    """What enters, constants and conversions too, or only what is computed."""

    def fn(x, n):
        return (
            x,
            n.astype(jnp.float32),
            jnp.full(2, 0.1, jnp.float32),
            x * 0.1,
            jnp.where(n > 0, x, 0.1),
            x > 0.1,
        )

    x, n = jnp.array([0.1, 0.3], jnp.float32), jnp.array([2049, 7])
    everything = jq.emulate(fn, 10)(x, n)
    for leaf in everything[:-1]:
        assert_same(leaf, cut(np.asarray(leaf), 10))
    assert everything[1][0] == 2048
    tenth = cut(np.float32(0.1), 10)
    assert everything[3][0] == cut(np.float32(tenth) * np.float32(tenth), 10)
    results = jq.emulate(fn, 10, operations="arithmetic")(x, n)
    for at, leaf in enumerate(fn(x, n)):
        if at != 3:
            assert_same(results[at], leaf)
    assert_same(results[3], cut(np.asarray(x * np.float32(0.1)), 10))


def test_integers_and_keys_are_left_alone():
    def fn(key, n):
        return jax.random.split(key), (n * 3) % 7, jax.random.bits(key, (3,))

    keys, remainder, bits = jq.emulate(fn, 4)(KEY, jnp.arange(9))
    wanted = fn(KEY, jnp.arange(9))
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(wanted[0]))
    np.testing.assert_array_equal(remainder, wanted[1])
    np.testing.assert_array_equal(bits, wanted[2])


def test_pytrees_go_in_and_out():
    fn = lambda p, x: {"y": p["w"] * x, "n": None}  # noqa: E731
    out = jq.emulate(fn, 3)({"w": jnp.float32(1.3)}, 1.0)
    assert out["n"] is None and float(out["y"]) == 1.25


def test_complex_numbers_part_by_part():
    x = jnp.array([1.3 + 0.7j, -0.2 + 3.3j], jnp.complex64)
    found = np.asarray(jq.emulate(lambda x: x * 1, 4)(x))
    np.testing.assert_array_equal(found.real, cut(np.asarray(x.real), 4))
    np.testing.assert_array_equal(found.imag, cut(np.asarray(x.imag), 4))
    spectrum = np.asarray(jq.emulate(jnp.fft.fft, 6)(jnp.arange(8.0)))
    np.testing.assert_array_equal(spectrum.imag, cut(spectrum.imag, 6))
    random = np.asarray(jq.emulate(lambda x: jnp.abs(x * 1), 4, "stochastic")(KEY, x))
    np.testing.assert_array_equal(random, cut(random, 4))


# Sums

A = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float16)
B = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float16)


def test_the_result_of_a_sum_is_rounded_once():
    found = jq.emulate(jnp.matmul, 10)(A.astype("f"), B.astype("f"))
    assert_same(found, (A.astype(np.float64) @ B.astype(np.float64)).astype(np.float16))


def test_products_and_partial_sums_in_order():
    total = np.zeros((2, 3, 4), np.float16)
    for k in range(5):
        total = total + A[:, :, k, None] * B[:, None, k]
    run = functools.partial(jq.emulate, format=10, sums="sequential")
    assert_same(run(jnp.matmul)(A.astype("f"), B.astype("f")), total)
    assert (total != (A.astype("f") @ B.astype("f")).astype(np.float16)).any()

    partial = np.zeros((3, 5), np.float16)
    for row in A:
        partial = partial + row
    assert_same(run(lambda x: jnp.sum(x, 0))(A.astype("f")), partial)

    everything = np.float16(0)  # the last axis of those that are summed runs fastest
    for term in A.ravel():
        everything = everything + term
    assert_same(run(jnp.sum)(A.astype("f")), everything)

    up, down = [np.float16(0)], [np.float16(0)]
    for term in A[0, 0]:
        up.append(up[-1] + term)
    for term in A[0, 0, ::-1]:
        down.append(down[-1] + term)
    assert_same(run(jnp.cumsum)(A[0, 0].astype("f")), np.array(up[1:]))
    back = run(lambda x: lax.cumsum(x, reverse=True))(A[0, 0].astype("f"))
    assert_same(back, np.array(down[:0:-1]))
    product = functools.reduce(lambda a, b: a * b, A[0, 0])
    assert_same(run(jnp.prod)(A[0, 0].astype("f")), product)


def test_sums_at_random():
    """In order, a long sum of small terms keeps its mean, where nearest stagnates."""
    x = jnp.full(400, 0.01)
    keys = jax.random.split(KEY, 300)
    run = jq.emulate(jnp.sum, 6, "stochastic", sums="sequential", operations="arithmetic")
    totals = np.asarray(jax.vmap(run, (0, None))(keys, x))
    assert abs(totals.mean() - 4) < 4 * totals.std() / np.sqrt(300)
    assert float(jq.emulate(jnp.sum, 6, sums="sequential")(x)) < 2.1


# At random


@pytest.mark.parametrize("format", [10, Float(5, 10), "bfloat16", 3])
@pytest.mark.parametrize("source", ["hash", "threefry"])
def test_mean_and_variance(format, source):
    count, target = 1 << 16, jq.emulate(lambda x: x, format)
    run = jq.emulate(
        lambda x, y: x * y, format, "stochastic", operations="arithmetic", source=source
    )
    for a, b in ((1.3, 0.7), (-2.0, 1.7e-3), (0.33, 3e-6) if format != 3 else (5.1, 7.7)):
        exact = np.float64(np.float32(a) * np.float32(b))
        y = np.asarray(run(KEY, jnp.full(count, a), jnp.full(count, b)), np.float64)
        below, above = np.unique(y)
        assert below < exact < above
        assert_same(target(jnp.asarray([below, above])), np.array([below, above], np.float32))
        share = (exact - below) / (above - below)
        variance = share * (1 - share) * (above - below) ** 2
        assert abs(y.mean() - exact) < 4 * np.sqrt(variance / count)
        fourth = share * (1 - share) * (1 - 3 * share * (1 - share)) * (above - below) ** 4
        assert abs(y.var() - variance) < 4 * np.sqrt(fourth / count) + 2 * variance / count


@pytest.mark.parametrize("keep", [10, 23, 30])
def test_mean_in_float64(keep, double):
    count, exact = 1 << 16, np.float64(1.3) * np.float64(0.7)
    run = jq.emulate(lambda x, y: x * y, keep, "stochastic", operations="arithmetic")
    y = np.asarray(run(KEY, jnp.full(count, 1.3), jnp.full(count, 0.7)))
    step = 2.0**-keep / 2
    share = exact / step - np.floor(exact / step)
    assert set(np.unique(y / step)) == {np.floor(exact / step), np.floor(exact / step) + 1}
    mean = np.mean(y / step - np.floor(exact / step))
    assert abs(mean - share) < 4 * np.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("format", [10, 3, Float(5, 10), "bfloat16"])
def test_numbers_of_the_format_stay(format):
    exact = jq.emulate(lambda x: x, format)(jnp.asarray(np.random.default_rng(0).integers(
        0, 1 << 32, 20000).astype(np.uint32).view(np.float32)))  # fmt: skip
    keep = jq.emulate(lambda x: lax.optimization_barrier(x) * 1, format, "stochastic")
    tiny = jnp.abs(exact) < np.finfo(np.float32).tiny  # which multiplying takes for zero
    for seed in range(3):
        assert_same(keep(jax.random.key(seed), exact), exact, np.asarray(tiny))


def test_subnormal_halves_stay_and_have_the_right_mean():
    step = 2.0**-24
    x = jnp.broadcast_to(jnp.arange(1024, dtype=jnp.float32) * step, (256, 1024))
    run = jq.emulate(lambda x: x * 1, Float(5, 10), "stochastic", operations="arithmetic")
    for seed in range(8):
        assert_same(run(jax.random.key(seed), x), x)
    y = np.asarray(run(KEY, jnp.full(1 << 16, 700.3 * step))) / step
    assert set(y) == {700, 701} and abs(y.mean() - 700.3) < 4 * np.sqrt(0.21 / (1 << 16))


def test_steps_operations_and_elements_are_independent():
    """A walk of many steps spreads as independent steps do: any correlation would add up."""
    steps, members, step = 256, 512, 2.0**-6

    def walk(x):
        def both(x, _):
            return (x + step / 4) - step / 4, None

        return lax.scan(both, x, None, length=steps)[0]

    run = jq.emulate(walk, 6, "stochastic", operations="arithmetic")
    ends = np.asarray(run(KEY, jnp.full(members, 1.5)))
    variance = 2 * steps * step**2 * 3 / 16
    assert abs(ends.mean() - 1.5) < 4 * np.sqrt(variance / members)
    assert abs(ends.var() / variance - 1) < 4 * np.sqrt(2 / members)


def test_a_batch_is_its_members():
    fn = lambda x: lax.fori_loop(0, 5, lambda _, x: jnp.sin(x) * 1.7, x)  # noqa: E731
    for source in ("hash", "threefry"):
        run = jq.emulate(fn, 6, "stochastic", source=source)
        keys, x = jax.random.split(KEY, 4), jnp.linspace(0.1, 2, 12).reshape(4, 3)
        together = jax.vmap(run)(keys, x)
        assert_same(together, jnp.stack([run(k, row) for k, row in zip(keys, x, strict=True)]))
        shared = jax.vmap(run, (None, 0))(KEY, x)
        assert_same(shared, jnp.stack([run(KEY, row) for row in x]))


def test_the_sharding_changes_nothing():
    x, run = jnp.linspace(0, 3, 16), jq.emulate(lambda x: jnp.sin(x) * x, 6, "stochastic")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "d")
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("d")))
    assert_same(run(KEY, spread), run(KEY, x))


def test_old_keys_serve_too():
    run = jq.emulate(jnp.sin, 6, "stochastic")
    assert_same(run(jax.random.PRNGKey(0), WIDE), run(KEY, WIDE))


# Precisions and formats


def test_one_program_for_all_precisions(compiles):
    fn = lambda x: lax.fori_loop(0, 4, lambda _, x: jnp.sin(x) * 1.7, x)  # noqa: E731
    sweep = {b: jq.emulate(fn, jnp.int32(b)) for b in range(3, 20)}
    sweep[3](WIDE)
    with compiles() as log:
        found = {b: run(WIDE) for b, run in sweep.items()}
    assert log == []
    for b in (3, 10, 19):
        assert_same(found[b], jq.emulate(fn, b)(WIDE))
    many = jax.vmap(lambda b: jq.emulate(fn, b)(WIDE))(jnp.arange(3, 20))
    assert_same(many, jnp.stack(list(found.values())))
    random = jax.jit(lambda b: jq.emulate(fn, b, "stochastic")(KEY, WIDE))(7)
    assert_same(random, jq.emulate(fn, 7, "stochastic")(KEY, WIDE))


def test_a_second_call_compiles_nothing(compiles):
    fn = lambda x: jnp.sin(x) * 1.7  # noqa: E731
    jq.emulate(fn, 9)(WIDE)
    with compiles() as log:
        jq.emulate(fn, 9)(WIDE + 1)
    assert not [line for line in log if "run" in line]


def scoped(x):
    y = jnp.exp(x) * 1.1
    with jax.named_scope("physics"):
        y = jax.jit(lambda y: jnp.log(y) * y)(y)
    return y


def test_formats_by_rule():
    x = jnp.array([0.3, 1.7], jnp.float32)
    fine = np.asarray(jnp.exp(x) * 1.1)
    part = jq.emulate(scoped, {"physics/.*": 5, ".*": None})(x)
    assert_same(part, cut(np.asarray(cut(np.log(fine), 5) * fine), 5))
    only = jq.emulate(lambda x: jnp.exp(x) * 1.1, {"exp": 4})(x)
    assert_same(only, cut(np.asarray(jnp.exp(x)), 4) * np.float32(1.1))
    by_dtype = jq.emulate(scoped, {"float32": 7})(x)
    assert_same(by_dtype, jq.emulate(scoped, 7)(x))
    first = jq.emulate(scoped, {"exp|log": None, ".*": 7})(x)
    assert (first != by_dtype).any()
    traced = jax.jit(lambda b: jq.emulate(scoped, {"physics/.*": b, ".*": None})(x))(5)
    assert_same(traced, part)

    def rule(operation: Operation):
        return 5 if operation.scope.startswith("physics") else None

    assert_same(jq.emulate(scoped, rule)(x), part)


def test_gradients():
    fn = lambda x: jnp.sum(jnp.sin(x) * x)  # noqa: E731
    straight = jax.grad(jq.emulate(fn, 8))(WIDE)
    np.testing.assert_allclose(straight, jax.grad(fn)(WIDE), rtol=0.2, atol=0.1)
    assert (np.asarray(straight) != np.asarray(jax.grad(fn)(WIDE))).any()
    low = np.asarray(jq.emulate(jax.grad(fn), 8)(WIDE))
    assert_same(low, cut(low, 8))
    looped = lambda x: jnp.sum(lax.scan(lambda x, _: (body(x), None), x, None, length=3)[0])  # noqa: E731
    np.testing.assert_allclose(jax.grad(jq.emulate(looped, 8))(WIDE), 0.9**3, rtol=1e-2)
    random = jax.grad(jq.emulate(jax.checkpoint(looped), 8, "stochastic"), argnums=1)
    np.testing.assert_allclose(random(KEY, WIDE), 0.9**3, rtol=1e-2)


def test_words_of_steps_and_streams_do_not_correlate():
    seed = noise.seed(KEY)
    n = 1 << 15
    words = [noise.hashed(seed, (n,), stream) for stream in (0, 1, 2, 77)]
    words += [noise.hashed(noise.fold(seed, jnp.uint32(k)), (n,)) for k in (0, 1, 2, 1000)]
    signs = 1.0 - 2.0 * ((np.stack(words)[..., None] >> np.arange(32, dtype=np.uint32)) & 1)
    for one in range(len(words)):
        for two in range(one):
            across = signs[one].T @ signs[two] / n
            assert np.abs(across).max() < 6 / np.sqrt(n)
            assert (np.asarray(words[one]) == np.asarray(words[two])).mean() < 1e-3


def test_the_program_grows_by_what_is_rounded_and_loops_stay():
    fn = lambda x: lax.fori_loop(0, 100, lambda _, x: body(x), x)  # noqa: E731
    few = str(trace(jq.emulate(fn, 10), WIDE)[0])
    assert few.count("while") + few.count("scan") >= 1 and len(few.splitlines()) < 140


@pytest.mark.parametrize("format", [10, jnp.float16])
def test_what_is_read_at_two_places_is_computed_once(format):
    """Differences of neighbours would be computed 2^n times, each with its rounding."""

    def operations(length):
        def fn(x):
            for _ in range(length):
                x = x - jnp.roll(x, 1)
            return x

        return jax.jit(jq.emulate(fn, format)).lower(WIDE).compile().cost_analysis()["flops"]

    assert operations(8) < 2.2 * operations(4)


@pytest.mark.parametrize("format", [10, jnp.float16])
def test_no_kernel_rounds_what_it_pieces_together(format):
    """It would ask for every element which piece it is from, and not be vectorised."""

    def fn(x):
        around = jnp.roll(x * x, 1)
        return around[1:] - around[:-1]

    program = jax.jit(jq.emulate(fn, format)).lower(WIDE).compile().as_text()
    pieced = [line for line in program.splitlines() if " concatenate(" in line]
    assert pieced and all("ROOT" in line for line in pieced)  # the last thing that a kernel does


@pytest.mark.parametrize("format", [10, jnp.float16])
def test_bits_that_are_only_moved_stay_bits(format):
    """Words carried as floats: a subnormal, infinities, NaN with a payload, quiet or not."""
    words = np.array([0, 1 << 31, 1, 0x7F800000, 0x7FC00001, 0x7F800001, 0x3F800000], np.uint32)

    def fn(words, x):
        carried = lax.bitcast_convert_type(words, jnp.float32)

        def step(_, state):
            carried, x = state
            x = x - jnp.roll(x, 1)
            mixed = jnp.concatenate([carried[1:], carried[:1], x])
            return mixed[: len(words)], x

        carried, x = lax.fori_loop(0, 3, step, (carried, x))
        return lax.bitcast_convert_type(carried, jnp.uint32), x

    moved, _ = jq.emulate(fn, format)(words, WIDE)
    np.testing.assert_array_equal(moved, np.roll(words, -3))


# Bad input


@pytest.mark.parametrize(
    ("format", "says"),
    [
        (0, "from 1 to 52, got 0"),
        (53, "from 1 to 52, got 53"),
        (True, "got True"),
        (10.0, "bits of significand"),
        ("elephant", "got 'elephant'"),
        ("int8", "dtype must be one of .* got int8"),
        ("float64", "got float64"),
        (Float(2, 1, scale="float32"), "signed Float without scale"),
        (jnp.ones(3, int), "jax.vmap over several"),
        (jnp.float32(10), "integer scalar"),
        (jnp.int32(60), "from 1 to 52, got 60"),
        ({}, "without rules"),
        ({"(": 10}, "not a regular expression"),
        ({"add": "thin"}, "rule 'add': expected"),
    ],
)
def test_formats_that_are_none(format, says):
    with pytest.raises(FormatError, match=says):
        jq.emulate(jnp.sin, format)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rounding", "up"), ("operations", "some"), ("sums", "pairwise"), ("source", "dice")],
)
def test_options_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .* got '{value}'"):
        jq.emulate(jnp.sin, 10, **{name: value})


def test_more_bits_than_the_carrier_holds():
    with pytest.raises(FormatError, match="float32, which holds 23 bits, not 24.*enable_x64"):
        jq.emulate(jnp.sin, 24)(jnp.float32(1.0))
    with pytest.raises(FormatError, match="no more bits than 23 bits.*to round at random"):
        jq.emulate(jnp.sin, 23, "stochastic")(KEY, jnp.float32(1.0))
    assert_same(jq.emulate(jnp.sin, 23)(WIDE), jnp.sin(WIDE))


def test_narrow_carriers_are_refused_unless_left_alone():
    x = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(FormatError, match="input gives bfloat16.*'bfloat16': None"):
        jq.emulate(lambda x: x + x, 5)(x)
    found = jq.emulate(lambda x: (x + x).astype(jnp.float32) * 1.3, {"bfloat16": None, ".*": 3})(x)
    assert found.tolist() == [2.5, 2.5]


def test_at_random_without_a_key():
    run = jq.emulate(jnp.sin, 10, "stochastic")
    with pytest.raises(
        ValueError, match=r"jax.random.key\(seed\), \*inputs.*first argument was float32"
    ):
        run(jnp.ones(2, jnp.float32))
    with pytest.raises(ValueError, match="was nothing"):
        run()


def test_unknown_primitives_are_named():
    def fn(x):
        y = jax.pure_callback(np.sin, jax.ShapeDtypeStruct((2,), jnp.float32), x)
        return y * 1.0

    x = jnp.array([0.3, 0.7], jnp.float32)
    with pytest.raises(UnsupportedPrimitiveError, match="primitive 'pure_callback'.*None"):
        jq.emulate(fn, 10)(x)
    found = jq.emulate(fn, {"pure_callback": None, ".*": 3})(x)
    assert_same(found, cut(np.sin(cut(np.asarray(x), 3)).astype("f"), 3))
    with pytest.raises(UnsupportedPrimitiveError, match="conv_general_dilated adds in an order"):
        jq.emulate(lambda x: jnp.convolve(x, x), 10, sums="sequential")(x)


def test_rules_that_decide_nothing():
    with pytest.raises(FormatError, match="'coss' decides nothing.*'cos'"):
        jq.emulate(jnp.cos, {"coss": 5, ".*": 7})(1.0)
    with pytest.raises(FormatError, match="'cos' decides nothing"):
        jq.emulate(jnp.cos, {".*": 5, "cos": 7})(1.0)
    with pytest.raises(FormatError, match="a function gives static formats"):
        jax.jit(lambda b: jq.emulate(jnp.cos, lambda operation: b)(1.0))(5)
