"""Other people's switches: JAX's strictest settings change no result, and no type.

Most of it is slow, as it compiles everything once more for every switch, and a leg of `.ci/run`, on
eight devices that the host pretends to be:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 ./run tests -m "" tests/test_switches.py
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BLOCKS, GRIDS, ROUNDINGS
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.calibration.evidence import Evidence
from jquant.layerwise.weight import quantize_weight
from jquant.rounding import GPTQ, Descent, DiscQuant, Nearest
from jquant.schemes.scheme import Scheme
from jquant.weights.qtensor import dequantize_weight

slow = pytest.mark.slow

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def strictest() -> Iterator[None]:
    """All switches that can be seen from types alone."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


# Types: everything is traced, nothing compiled.

IN, SHAPE = Groups("in", 8), (2, 8, 20)
ACTIVATIONS = {
    "token": jq.Activations(jq.grids.Uniform(8)),
    "static": jq.Activations(jq.grids.Uniform(8), granularity="static"),
    "percentile": jq.Activations(
        jq.grids.Uniform(8), granularity="static", range=jq.Percentile(99.0)
    ),
    "mse": jq.Activations(jq.grids.Uniform(8), granularity="static", range=jq.grids.MSE()),
}
SCHEMES: dict[str, Scheme] = {
    **{f"nearest {name}": Scheme(grid, IN) for name, grid in GRIDS.items()},
    **{
        f"{name} {groups}": Scheme(GRIDS["A1-4"], BLOCKS[groups][1], rounding)
        for name, rounding in ROUNDINGS.items()
        for groups in BLOCKS
    },
    "gptq out": Scheme(GRIDS["A1-4"], Groups("out", 4), ROUNDINGS["gptq-dynamic"]),
    "qep": Scheme(GRIDS["A1-4"], IN, GPTQ(correction="qep")),
    "gptaq": Scheme(GRIDS["A1-4"], IN, GPTQ(correction="gptaq")),
    "gptq power": Scheme(GRIDS["power-3-groups"], IN, GPTQ()),
    "low rank": Scheme(GRIDS["A1-4"], IN, GPTQ(), compensation=jq.LoRC(2)),
    **{
        f"inputs {name}": Scheme(GRIDS["A1-4"], IN, Nearest(), activations=choice)
        for name, choice in ACTIVATIONS.items()
    },
}


FEW = ("nearest A4-4-hqq", "nearest kmeans-4", "gptq-dynamic in-8", "gptaq", "low rank")


REST = [name for name in SCHEMES if name not in FEW]
TOGETHER = [FEW, *(pytest.param(REST[k::8], marks=slow) for k in range(8))]


@pytest.mark.parametrize("names", TOGETHER, ids=["few", *map(str, range(8))])
def test_strict_switches_change_no_type(names: list[str]) -> None:
    """64-bit types that nobody asked for, promoted ranks and dtypes: of all grids and roundings."""

    def solved(name: str, w: Any, x: Any, full: Any, key: Any) -> Any:
        evidence = Evidence.of(x, full=full, spread=True)
        layout = Layout.of(SHAPE, in_axes=(2,), batch_axes=(0,))
        evidence = evidence.merge(evidence)
        q, info = quantize_weight(w, SCHEMES[name], layout, evidence=evidence, key=key)
        return q, info, dequantize_weight(q), evidence

    def types() -> dict[str, list[Any]]:
        jax.clear_caches()  # inner programs are traced once per process otherwise
        rows = jax.ShapeDtypeStruct((2, 30, 20), jnp.float32)
        w, key = jax.ShapeDtypeStruct(SHAPE, jnp.float32), jax.random.key(0)
        seen = {}
        for name in names:
            try:
                result = jax.eval_shape(functools.partial(solved, name), w, rows, rows, key)
            except Exception as error:
                error.add_note(f"of {name}")
                raise
            seen[name] = [(x.shape, x.dtype) for x in jax.tree.leaves(result)]
        return seen

    wanted = types()
    with strictest():
        assert types() == wanted


@pytest.mark.parametrize(
    "name", ["nearest A1-4-mse", "gptq in-8", "discquant in-8", "adaround in-8", "low rank"]
)
def test_weights_of_float64_and_bfloat16_change_no_type_but_their_own(name: str) -> None:
    """What is learned, and what is kept, is float32 whatever the weights and inputs are."""

    def solved(w: Any, x: Any) -> Any:
        layout, key = Layout.of(SHAPE, in_axes=(2,), batch_axes=(0,)), jax.random.key(0)
        evidence = Evidence.of(x, spread=True)
        q, info = quantize_weight(w, SCHEMES[name], layout, evidence=evidence, key=key)
        return (q, info), dequantize_weight(q)

    def types(dtype: Any) -> list[Any]:
        w, rows = jax.ShapeDtypeStruct(SHAPE, dtype), jax.ShapeDtypeStruct((2, 30, 20), dtype)
        kept, decoded = jax.eval_shape(solved, w, rows)
        assert decoded.dtype == dtype
        return [(x.shape, x.dtype) for x in jax.tree.leaves(kept)]

    with strictest():
        wanted = types(jnp.float32)
        assert types(jnp.float64) == types(jnp.bfloat16) == wanted


@pytest.mark.parametrize(
    "name", ["nearest A1-4-mse", "gptq in-8", "discquant in-8", "adaround in-8", "low rank"]
)
def test_evidence_of_float64_changes_no_type(name: str) -> None:
    """Whoever adds up second moments by hand with x64 has them in float64."""

    def solved(w: Any, evidence: Evidence) -> Any:
        layout = Layout.of(SHAPE, in_axes=(2,), batch_axes=(0,))
        key = jax.random.key(0)
        return quantize_weight(w, SCHEMES[name], layout, evidence=evidence, key=key)

    def types(dtype: Any) -> list[Any]:
        evidence = Evidence(
            jax.ShapeDtypeStruct((2, 20, 20), dtype), jax.ShapeDtypeStruct((2,), dtype)
        )
        w = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
        return [(x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(solved, w, evidence))]

    with strictest():
        assert types(jnp.float64) == types(jnp.float32)


# Values: a small network is quantized, kept, and run.


def network(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"]) @ p["b"] + jnp.expand_dims(p["c"], 0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {"a": normal(0, 32, 32), "b": normal(1, 32, 16), "c": normal(2, 16)}
BATCHES = [normal(3, 64, 32), normal(4, 64, 32)]
KEY = jax.random.key(0)
VALUES: dict[str, Scheme] = {
    "nearest": Scheme(jq.grids.Uniform(4)),
    "gptq": Scheme(jq.grids.Uniform(4), None, GPTQ()),
    "qep": jq.presets.int4_qep(),
    "range": Scheme(jq.grids.Uniform(3, range=jq.grids.MSE())),
    "hqq": Scheme(jq.grids.Uniform(4, range=jq.grids.HQQ())),
    "nf4": Scheme(jq.grids.NF4),
    "kmeans": Scheme(jq.grids.KMeans(3)),
    "power": Scheme(jq.grids.Power(4)),
    "discquant": Scheme(
        jq.grids.Uniform(4), None, DiscQuant(rho=1.0, unit="nearest", descent=Descent(4, 0.1))
    ),
    "low rank": Scheme(jq.grids.Uniform(3), None, GPTQ(), compensation=jq.LoRC(4)),
    "inputs": Scheme(jq.grids.Uniform(8), activations=jq.Activations(jq.grids.Uniform(8))),
}
SWITCHES: dict[str, Context] = {
    "x64": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "nan": lambda: jax.debug_nans(True),
    "dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "transfers": lambda: jax.transfer_guard("disallow"),
}


def journey(
    scheme: Scheme,
    params: Any,
    batches: list[Any],
    fn: Callable[..., Any] = network,
    file: Path | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """The quantized parameters, and what the function makes of them."""
    plan = jq.plan(jq.find_weights(fn, params, batches[0]), {".*": scheme})
    qparams, _ = jq.quantize(fn, params, plan, batches, key=KEY, **options)
    if file is not None:
        jq.save(file, qparams)
        qparams = jq.load(file)
    return qparams, jq.apply(fn)(qparams, batches[0])


def numbers(tree: Any) -> list[np.ndarray]:
    return [np.asarray(jax.device_get(x)).astype(np.float32) for x in jax.tree.leaves(tree)]


def assert_same(found: tuple[Any, Any], wanted: tuple[Any, Any], ties: float = 0.0) -> None:
    """Equal codes, but for a share of ties; parameters and results but for the order of sums."""
    for q, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted[0]), strict=True):
        assert (q.shape, q.dtype) == (other.shape, other.dtype)
        if jnp.issubdtype(q.dtype, jnp.integer):
            one, two = numbers([q, other])
            assert np.mean(one != two) <= ties and np.abs(one - two).max() <= (ties > 0)
        else:
            np.testing.assert_allclose(*numbers([q, other]), rtol=1e-3 + ties, atol=1e-5)
    if not ties:
        np.testing.assert_allclose(*numbers([found[1], wanted[1]]), rtol=1e-3, atol=1e-4)


@functools.cache
def usual(name: str, fn: Callable[..., Any] = network) -> tuple[Any, Any]:
    """The journey without a switch or a mesh."""
    return journey(VALUES[name], *jax.tree.map(jnp.asarray, (PARAMS, BATCHES)), fn=fn)


# What is promoted is seen from types alone, above: few schemes meet those two switches here.
CASES = [
    pytest.param(switch, name, marks=() if (switch, name) == ("transfers", "gptq") else slow)
    for switch in SWITCHES
    for name in VALUES
    if switch not in ("ranks", "dtypes") or name in ("gptq", "qep", "low rank", "inputs")
]


@pytest.mark.parametrize(("switch", "name"), CASES)
def test_switches_change_no_code(switch: str, name: str, tmp_path: Path) -> None:
    params, batches = jax.tree.map(jnp.asarray, (PARAMS, BATCHES))
    wanted = usual(name)
    with SWITCHES[switch]():
        found = journey(VALUES[name], params, batches, file=tmp_path / "q")
        # Operations one by one are not what is fused: powers differ in their last bit.
        assert_same(found, wanted, ties=0.005 if (switch, name) == ("no jit", "power") else 0.0)
        evidence = jq.capture(network, params, batches)
    assert evidence["b"].second_moment.dtype == jnp.float32


# Without jit JAX lowers nothing.
@slow
@pytest.mark.parametrize("switch", sorted(SWITCHES.keys() - {"no jit"}))
def test_switches_and_estimates(switch: str) -> None:
    params, batches = jax.tree.map(jnp.asarray, (PARAMS, BATCHES))
    plan = jq.plan(jq.find_weights(network, params, batches[0]), {".*": VALUES["gptq"]})
    with SWITCHES[switch]():
        assert jq.estimate(network, params, plan, batches).flops > 0


# Meshes: the axes that `jax.make_mesh` makes are explicit, and shardings are part of types.

DEVICES = jax.device_count()
many = pytest.mark.skipif(DEVICES < 8, reason="needs 8 devices, see above")


def explicit(p: Any, x: Any) -> Any:
    """The network as it is written for explicit axes: one product says where its result lies."""
    h = jnp.tanh(x @ p["a"])
    out = None if jax.typeof(x).sharding.mesh.empty else P(jax.typeof(x).sharding.spec[0])
    y = jnp.einsum("tf,fo->to", h, p["b"], out_sharding=out)
    return y + jnp.expand_dims(p["c"], 0)


def layered(p: Any, x: Any) -> Any:
    def layer(h: Any, w: Any) -> tuple[Any, None]:
        return jnp.tanh(h @ w), None

    return lax.scan(jax.checkpoint(layer), x, p["s"])[0]


# Mesh axes of each parameter and of the batches: `d` for data, `m` for the model.
LAYOUTS: dict[str, tuple[dict[str, P], P]] = {
    "replicated": ({}, P()),
    "data": ({}, P("d")),
    "inputs": ({"a": P("m"), "b": P("m")}, P()),
    "outputs": ({"a": P(None, "m"), "b": P(None, "m"), "c": P("m")}, P("d")),
    "both": ({"a": P(None, "m"), "b": P("m")}, P("d")),
}


def mesh_of(kind: AxisType = AxisType.Explicit) -> Any:
    shape = (2, 4) if DEVICES >= 8 else (1, 1)
    return jax.make_mesh(
        shape, ("d", "m"), axis_types=(kind,) * 2, devices=jax.devices()[: math.prod(shape)]
    )


def lain(params: Any, batches: Any, layout: str, mesh: Any) -> tuple[Any, Any]:
    specs, spec = LAYOUTS[layout]
    put = jax.device_put
    lying = {k: put(x, NamedSharding(mesh, specs.get(k, P()))) for k, x in params.items()}
    return lying, [put(x, NamedSharding(mesh, spec)) for x in batches]


def assert_placed(qparams: Any, params: Any) -> None:
    """What codes decode to lies where the weights do."""
    for name, q in qparams.items():
        if isinstance(q, jq.QTensor):
            back = jq.dequantize(q)
            assert back.sharding.is_equivalent_to(params[name].sharding, back.ndim), name
        else:
            assert q.sharding == params[name].sharding


# Both kinds of axes meet each layout with two schemes of six, and each scheme three layouts.
ON_NAMES = ("nearest", "gptq", "discquant", "inputs", "qep", "low rank")
ON_MESHES = [
    pytest.param(kind, layout, ON_NAMES[(at + shift) % 6], marks=[slow, many])
    for turn, kind in enumerate((AxisType.Explicit, AxisType.Auto))
    for at, layout in enumerate(LAYOUTS, start=2 * turn)
    for shift in (0, 3)
]


@pytest.mark.parametrize(("kind", "layout", "name"), ON_MESHES)
def test_meshes_change_no_code(kind: AxisType, layout: str, name: str) -> None:
    wanted = usual(name, explicit)
    mesh = mesh_of(kind)
    params, batches = lain(PARAMS, BATCHES, layout, mesh)
    with jax.set_mesh(mesh):
        fn = explicit if kind == AxisType.Explicit else network
        found = journey(VALUES[name], params, batches, fn=fn)
        assert_same(found, wanted)
        assert_placed(found[0], params)


@slow
@many
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_adapters_on_a_mesh(kind: AxisType) -> None:
    """Gradients of what is trained beside codes are those of one device."""

    def gradient(fn: Any, params: Any, x: Any) -> Any:
        plan = jq.plan(jq.find_weights(fn, params, x), {".*": VALUES["nearest"]})
        qparams, _ = jq.quantize(fn, params, plan)
        frozen, trainable = jq.adapt(qparams, rank=2, key=jax.random.key(0))
        trainable = jax.tree.map(lambda a: a + 0.1, trainable)
        loss = lambda t, f: jnp.sum(jq.apply(fn)(jq.merge(f, t), x) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(trainable, frozen)

    wanted = gradient(explicit, PARAMS, BATCHES[0])
    mesh = mesh_of(kind)
    params, batches = lain(PARAMS, BATCHES, "both", mesh)
    with jax.set_mesh(mesh):
        fn = explicit if kind == AxisType.Explicit else network
        found = gradient(fn, params, batches[0])
    for one, two in zip(numbers(found), numbers(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-4)


@slow
@many
@pytest.mark.parametrize("sequential", ["weight", None])
def test_meshes_and_loops(sequential: Any) -> None:
    """Stacks of layers, walked one by one, and read in a scan that recomputes."""
    stack = {"s": normal(5, 3, 32, 32)}
    wanted = journey(
        VALUES["gptq"],
        *jax.tree.map(jnp.asarray, (stack, BATCHES)),
        fn=layered,
        sequential=sequential,
    )
    params, batches = lain(stack, BATCHES, "data", mesh_of())
    found = journey(VALUES["gptq"], params, batches, fn=layered, sequential=sequential)
    assert_same(found, wanted)


@slow
@many
def test_a_resumed_job_lies_where_the_first_did(tmp_path: Path) -> None:
    mesh = mesh_of()
    params, batches = lain(PARAMS, BATCHES, "both", mesh)
    with jax.set_mesh(mesh):
        first, again = (
            journey(VALUES["gptq"], params, batches, fn=explicit, work_dir=tmp_path)[0]
            for _ in range(2)
        )
    for q, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert q.sharding == other.sharding
        np.testing.assert_array_equal(*numbers([q, other]))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_apply_asks_for_no_element_off_the_cpu(platform: str) -> None:
    """What holds decoding back on the CPU would be a message per weight on a mesh."""
    qparams, _ = journey(VALUES["nearest"], *jax.tree.map(jnp.asarray, (PARAMS, BATCHES)))
    program = jq.apply(network).trace(qparams, jnp.asarray(BATCHES[0]))
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert "popcnt" not in text and "stablehlo.slice" not in text


@slow
@many
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_apply_sends_no_message_that_the_function_does_not(kind: AxisType) -> None:
    params, batches = lain(PARAMS, BATCHES, "data", mesh_of(kind))
    qparams, _ = journey(VALUES["nearest"], params, batches)
    counts = [
        len(re.findall("all-reduce|all-gather|collective-permute|all-to-all", text))
        for text in (
            jax.jit(fn).lower(tree, batches[0]).compile().as_text()
            for fn, tree in ((network, params), (jq.apply(network), qparams))
        )
    ]
    assert counts[0] == counts[1] == 0
