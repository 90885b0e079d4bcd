"""How a function is written out flat and cut into stages, what that costs, and what is refused."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jquant as jq
from jquant.calibration import segments
from jquant.calibration.cutting import Recording
from jquant.calibration.data import Data
from jquant.calibration.running import evaluate
from jquant.calibration.store import Store
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError, PlanError
from jquant.grids import Uniform
from jquant.programs.keys import const_key, equation_key, jaxpr_key, text
from jquant.programs.straight import Flat, Piece, flatten
from jquant.programs.walker import Walker
from jquant.rounding import GPTQ
from jquant.trees.paths import path_of
from jquant.weights.leaves import Leaves

GPTQ3 = jq.Scheme(Uniform(3), 4, GPTQ())
NEAREST3 = jq.Scheme(Uniform(3), 4)


def normal(seed: int, *shape: int) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape) / shape[-2] ** 0.5
    return jnp.asarray(values.astype(np.float32))


def plan_of(fn: Any, params: Any, batch: Any, scheme: jq.Scheme = GPTQ3) -> jq.Plan:
    inputs = batch if isinstance(batch, tuple) else (batch,)
    weights = jq.find_weights(fn, params, *inputs)
    return jq.plan(weights, {re.escape(p): scheme for p, w in weights.items() if w.has_inputs})


def leaves_of(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    return [(path_of(keys), leaf) for keys, leaf in leaves], structure


def walk_of(
    fn: Any, params: Any, batches: Any, stacks: Any = None, sequential: Any = "weight"
) -> Walk:
    """The walk with every weight planned; `stacks` are the axes of those that are stacked."""
    found = {path: () for path in jq.find_weights(fn, params, *_tuple(batches[0]))}
    recording = Recording({**found, **(stacks or {})}, sequential)
    return Walk.start(fn, Leaves.of(params), Data.of(batches), recording)


def _tuple(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def names(walk: Walk) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(map(str, stage.pieces)) for stage in walk.stages)


def assert_same_bits(one: Any, two: Any) -> None:
    chex.assert_trees_all_equal_dtypes(one, two)
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, tree) for tree in (one, two)))


# Networks of any depth.

Made = tuple[Callable[..., Any], Any, list[jax.Array]]


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, width + 3, rngs=rngs)
        self.down = nnx.Linear(width + 3, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Net(nnx.Module):
    def __init__(self, depth: int, width: int, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.tanh(x))


def as_list(depth: int, width: int) -> Made:
    graph, params = nnx.split(Net(depth, width, nnx.Rngs(0)))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x)

    return fn, params, [normal(k, 2 * width, width) for k in (0, 1)]


def as_stack(depth: int, width: int) -> Made:
    params = {
        "up": normal(0, depth, width, width + 3),
        "down": normal(1, depth, width + 3, width),
        "head": normal(2, width, 5),
    }

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def block(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            return x + jnp.tanh(x @ p[0]) @ p[1], None

        x, _ = lax.scan(block, x, (params["up"], params["down"]))
        return x @ params["head"]

    return fn, params, [normal(k, 2 * width, width) for k in (3, 4)]


def quantized(made: Made, **others: Any) -> Any:
    fn, params, batches = made
    return jq.quantize(fn, params, plan_of(fn, params, batches[0]), batches, **others)[0]


# Programs.


@pytest.mark.parametrize("make", [as_list, as_stack])
def test_the_number_of_programs_does_not_depend_on_depth(make: Any, compiles: Any) -> None:
    shallow, deep = make(3, 7), make(4, 7)
    counts = []
    for fn, params, batches in (deep, shallow):
        plan = plan_of(fn, params, batches[0])
        jax.clear_caches()
        segments._PROGRAMS.clear()
        with compiles() as log:
            jq.quantize(fn, params, plan, batches)
        counts.append(len(log))
    assert counts[0] == counts[1] > 0

    with compiles() as log:
        quantized(deep)
    # A deeper stack is another array to look at, to take layers of, and to put together.
    # Codes of less than a byte are put together as bytes.
    whole = ("_finite", "dynamic_slice", "concatenate", "convert_element_type")
    assert [entry for entry in log if not any(name in entry for name in whole)] == []
    assert make is as_stack or log == []
    with compiles() as log:
        quantized(shallow)
        quantized(deep)
        quantized(deep, budget=0)
    assert log == []


def test_blocks_that_differ_in_a_constant_do_not_share_programs() -> None:
    """A wrong key would give the third block the first one's program."""
    params = {f"w{k}": normal(k, 6, 6) for k in range(4)}
    tables = [np.linspace(0.5, 1.5 + k, 6).astype(np.float32) for k in (0, 0, 1, 2)]

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for k, table in enumerate(tables):
            x = jnp.tanh(x @ params[f"w{k}"] * (1.0 + (k == 2))) + table
        return x

    batch = normal(9, 12, 6)
    seen: list[Any] = []
    plan = plan_of(fn, params, batch)
    q, _ = jq.quantize(fn, params, plan, [batch], progress=lambda move: seen.append(move))
    # Stage by stage by hand: the evidence of each weight with those before it quantized.
    current = dict(params)
    for path in params:
        evidence = jq.capture(fn, current, [batch])[path]
        found, _ = jq.quantize_weight(
            params[path], plan[path], plan.weights[path].layout, evidence=evidence
        )
        current[path] = jq.dequantize(found)
    chex.assert_trees_all_close(jq.dequantize(q), current, rtol=1e-5)


# Written out flat.


class _Plain:
    """A client that sees nothing special."""

    def special(self, value: Any) -> bool:
        return False

    def asks(self, eqn: Any, values: Any) -> bool:
        return False

    rule = drop = names = merge = leave = None


def flat_of(fn: Any, params: Any, x: Any, stacks: Any = None) -> Flat:
    """The function written out, after a check that it computes what the function does."""
    leaves, structure = leaves_of(params)
    shapes = [(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) for path, leaf in leaves]
    flat = flatten(fn, shapes, structure, (x,), stacks or {})
    arrays = dict(leaves)
    values = {
        number: arrays[piece.path][piece.index(arrays[piece.path].ndim)]
        for number, piece in flat.pieces.items()
    }
    values |= {flat.inputs[0]: x} | flat.consts
    assert {n: (v.shape, v.dtype) for n, v in values.items()} == {
        n: (flat.shapes[n].shape, flat.shapes[n].dtype) for n in values
    }
    evaluate(Walker(_Plain()), flat.steps, values)  # type: ignore[arg-type]
    wanted = fn(params, x)
    same = [
        v for v in values.values()
        if v.shape == wanted.shape and v.dtype == wanted.dtype and np.allclose(v, wanted, atol=1e-6)
    ]  # fmt: skip
    assert same, "the result is among the values"
    return flat


def primitives(flat: Flat) -> list[str]:
    return [step.eqn.primitive.name for step in flat.steps]


def pieces(flat: Flat) -> list[str]:
    return [str(piece) for piece in flat.pieces.values() if piece.where]


W, X = normal(0, 6, 6), normal(1, 8, 6)


@jax.custom_vjp
def project(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


project.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def test_calls_are_written_out_and_each_has_values_of_its_own() -> None:
    inner = jax.jit(lambda x, w: jnp.tanh(x @ w))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        x = inner(x, params["w"])
        x = inner(x, params["w"])  # the same inner jaxpr
        x = jax.checkpoint(lambda x: inner(x, params["w"]))(x)
        x = jax.nn.relu(x)  # a custom derivative
        return jax.jit(jax.jit(lambda x: project(x, params["w"])))(x)

    flat = flat_of(fn, {"w": W}, X)
    assert primitives(flat).count("dot_general") == 4
    assert not {"jit", "pjit", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"} & set(
        primitives(flat)
    )
    outs = [n for step in flat.steps for n in step.outs]
    assert len(set(outs)) == len(outs)


def test_equal_equations_on_equal_operands_are_one_step() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        def narrow() -> jax.Array:
            return x.astype(jnp.bfloat16)

        q, k = (jax.jit(lambda w: narrow() @ w.astype(jnp.bfloat16))(w) for w in params)
        return q * 2 + k * 2 + (k * 3 + q * 2)

    flat = flat_of(fn, [W, W + 1], X)
    assert primitives(flat).count("convert_element_type") == 3  # of x, and of each weight
    assert primitives(flat).count("dot_general") == 2
    assert primitives(flat).count("mul") == 3  # by another number is another step


def test_numbers_of_another_dtype_are_other_numbers() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        narrow, wide = jnp.zeros((8, 6), jnp.bfloat16), jnp.zeros((8, 6), jnp.float32)
        return (x @ params + wide) + (narrow + narrow).astype(jnp.float32)

    flat = flat_of(fn, W, X)
    assert primitives(flat).count("broadcast_in_dim") == 2


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_over_a_stack_is_written_out(reverse: bool) -> None:
    params = {"w": normal(2, 3, 6, 6), "bias": normal(3, 3, 6)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, p: Any) -> tuple[jax.Array, jax.Array]:
            w, bias, scale = p
            x = jnp.tanh(x @ w) * scale + bias
            return x, x[0]

        scales = jnp.linspace(0.5, 2.0, 3, dtype=x.dtype)
        x, rows = lax.scan(
            step, x, (params["w"], params["bias"], scales), reverse=reverse, unroll=2
        )
        return x.at[:3].add(rows)

    flat = flat_of(fn, params, X, {"w": (0,)})
    order = [2, 1, 0] if reverse else [0, 1, 2]
    assert pieces(flat) == [f"{name}[{k}]" for k in order for name in ("w", "bias")]
    assert "scan" not in primitives(flat) and primitives(flat).count("dot_general") == 3
    assert all(flat.layers[Piece("w", ((0, k),))] == (0, k) for k in range(3))
    assert primitives(flat_of(fn, params, X)).count("scan") == 1  # not asked for


def test_scans_in_scans_are_written_out() -> None:
    params = {"w": normal(4, 2, 3, 6, 6)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def inner(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ w), None

        def outer(x: jax.Array, ws: jax.Array) -> tuple[jax.Array, None]:
            return lax.scan(inner, x, ws, reverse=True)[0] + 1, None

        return lax.scan(outer, x, params["w"])[0]

    flat = flat_of(fn, params, X, {"w": (0, 1)})
    both = [f"w[{j}][{k}]" for j in (0, 1) for k in (2, 1, 0)]
    assert [name for name in pieces(flat) if name.count("[") == 2] == both
    assert "scan" not in primitives(flat) and primitives(flat).count("dot_general") == 6
    outer = flat_of(fn, params, X, {"w": (0,)})  # only the outer one
    assert pieces(outer) == ["w[0]", "w[1]"] and primitives(outer).count("scan") == 2

    plan = plan_of(fn, params, X)
    q, report = jq.quantize(fn, params, plan, [X, X + 1])
    assert report.stages == tuple((name,) for name in both)
    assert q["w"].shape == (2, 3, 6, 6)
    one = jq.quantize(fn, params, plan, [X, X + 1], sequential="block")[1]
    assert one.stages == (tuple(both[:3]), tuple(both[3:]))
    nearest = jq.quantize(fn, params, plan_of(fn, params, X, NEAREST3), [X])[0]
    whole, _ = jq.quantize_weight(params["w"], NEAREST3, plan.weights["w"].layout)
    assert_same_bits(nearest["w"], whole)  # every layer is back in its place


def test_views_between_a_stack_and_its_scan_are_taken_of_each_layer() -> None:
    params = {"w": normal(5, 6, 3, 7).astype(jnp.bfloat16)}  # layers in the middle

    def fn(params: Any, x: jax.Array) -> jax.Array:
        ws = lax.stop_gradient(params["w"].astype(jnp.float32).transpose(1, 2, 0))
        return lax.scan(lambda x, w: (x + jnp.tanh(x @ w.T @ w), None), x, ws)[0]

    flat = flat_of(fn, params, X, {"w": (1,)})
    assert [p for p in flat.pieces.values() if p.where] == [Piece("w", ((1, k),)) for k in range(3)]
    # The views of the whole stack are written down too, but only they themselves read them.
    whole = {n for n, shape in flat.shapes.items() if sorted(shape.shape) == [3, 6, 7]}
    readers = [step for step in flat.steps if whole.intersection(step.reads)]
    assert readers and all(whole.issuperset(step.outs) for step in readers)
    plan = plan_of(fn, params, X)
    assert jq.quantize(fn, params, plan, [X, X])[1].stages == (("w[0]",), ("w[1]",), ("w[2]",))


def test_a_view_that_mixes_layers_is_not_written_out() -> None:
    params = {"w": normal(5, 4, 6, 6)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        pairs = params["w"].reshape(2, 2, 6, 6)
        return lax.scan(lambda x, w: (jnp.tanh(x @ w[0] @ w[1]), None), x, pairs)[0]

    flat = flat_of(fn, params, X, {"w": (0,)})
    assert pieces(flat) == [] and "scan" in primitives(flat)


def test_a_stack_indexed_by_hand() -> None:
    params = {"w": normal(6, 3, 6, 6)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = params["w"]
        x = jnp.tanh(x @ w[1])
        x = jnp.tanh(x @ w[-1])
        x = jnp.tanh(x @ w[0:1][0])
        return x @ w[1]  # again

    flat = flat_of(fn, params, X, {"w": (0,)})
    assert pieces(flat) == ["w[1]", "w[2]", "w[0]"]
    assert flat.layers == {Piece("w", ((0, k),)): (-1, k) for k in (1, 2, 0)}
    walk = walk_of(fn, params, [X], {"w": (0,)})
    # The layer that is used first and last is calibrated with all between.
    assert names(walk) == (("w[1]", "w[2]", "w[0]"),)


def test_a_stack_that_is_also_used_whole_is_one_piece() -> None:
    params = {"w": normal(7, 3, 6, 6)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])
        return jnp.einsum("td,ldk->ltk", x, params["w"]).sum(0)

    assert names(walk_of(fn, params, [X], {"w": (0,)})) == (("w",),)
    q, report = jq.quantize(fn, params, plan_of(fn, params, X), [X, X])
    assert report.stages == (("w",),) and report["w"].tokens is not None
    assert q["w"].shape == (3, 6, 6)


def test_a_stack_of_which_some_layers_are_used_is_one_piece() -> None:
    params = {"w": normal(8, 3, 6, 6), "v": normal(9, 6, 6)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ params["w"][0])
        x = jnp.tanh(x @ params["v"])
        return x @ params["w"][2]

    assert names(walk_of(fn, params, [X], {"w": (0,)})) == (("w", "v"),)


# Keys.


def key_of(fn: Callable[..., Any], *args: Any) -> Any:
    return jaxpr_key(jax.make_jaxpr(fn)(*args))


TABLE = np.linspace(0, 1, 6, dtype=np.float32)


def computation(
    factor: float = 2.0, table: np.ndarray = TABLE, swap: bool = False, axis: int = 0
) -> Callable[..., Any]:
    def fn(x: jax.Array, y: jax.Array) -> jax.Array:
        constant = jnp.asarray(table)
        one, two = (y, x) if swap else (x, y)

        def step(c: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
            return c + row * constant, jax.jit(lambda c: jnp.sin(c) * factor)(c)

        last, rows = lax.scan(step, one[0], two)
        return jnp.flip(rows - last, axis)

    return fn


def test_equal_computations_have_equal_keys_and_others_have_not() -> None:
    args = X, X
    base = key_of(computation(), *args)
    assert base == key_of(computation(table=TABLE.copy()), *args)
    assert hash(base) == hash(key_of(computation(), *args))
    others = {
        "literal": key_of(computation(factor=2.5), *args),
        "constant": key_of(computation(table=TABLE + 1), *args),
        "wiring": key_of(computation(swap=True), X, X),
        "parameter": key_of(computation(axis=1), *args),
        "shape": key_of(computation(), X[:4], X[:4]),
        "dtype": key_of(computation(table=TABLE.astype(np.float16)),
                        *(x.astype(jnp.float16) for x in args)),
    }  # fmt: skip
    found = [base, *others.values()]
    assert len(set(found)) == len({text(key) for key in found}) == len(found)
    assert const_key(jax.random.key(0)) != const_key(jax.random.key(1))


def test_zeros_of_either_sign_and_numbers_of_either_dtype_differ() -> None:
    keys = [
        key_of(lambda x, z=z: x * z, X)
        for z in (np.float32(0.0), np.float32(-0.0), np.float32(np.nan))
    ]
    keys += [key_of(lambda d=d: jnp.zeros(3, d)) for d in (jnp.float32, jnp.bfloat16, jnp.int32)]
    assert len(set(keys)) == len(keys)


def odd_ones(x: jax.Array) -> jax.Array:
    """Equations with parameters of every kind."""
    x = jax.nn.gelu(x[:, ::-1]) + jax.nn.softmax(x) + x.at[jnp.array([1, 0])].get(mode="clip")[0]
    x = lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)
    x = lax.while_loop(lambda x: x.sum() < 0, lambda x: x + 1, x)
    x = lax.conv_general_dilated(x[None], jnp.ones((3, 6, 6), x.dtype), (1,), "SAME",
                                 dimension_numbers=("NWC", "WIO", "NWC"))[0]  # fmt: skip
    x = x + jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    return jnp.sort(computation()(x, x)).cumsum(0)


def hashed() -> str:
    key = key_of(odd_ones, X)
    sets = equation_key_of_sets()
    return hashlib.sha256((text(key) + text(sets)).encode()).hexdigest()


def equation_key_of_sets() -> Any:
    """Names of mesh axes stand in sets, whose order is another one in every process."""

    class Equation:
        class primitive:  # noqa: N801
            name = "made_up"

        params = {"axes": frozenset({"data", "model", "stage", "expert"}), "more": {"b", "a", "c"}}

    return equation_key(Equation())  # type: ignore[arg-type]


def test_the_text_of_a_key_is_the_same_in_every_process() -> None:
    root = Path(__file__).parents[1]
    assert " at 0x" not in text(key_of(odd_ones, X))
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "123"}
    code = "import tests.test_stages as t; print(t.hashed())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **settings}, cwd=root,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == hashed()


# What is kept between stages.


def decoder(depth: int) -> Made:
    """Attention with a mask that is made of the tokens, and positions."""
    params = {
        "embed": normal(0, 11, 6),
        "blocks": [
            {name: normal(7 * k + j, 6, 6) for j, name in enumerate(("q", "k", "v", "o", "up"))}
            for k in range(depth)
        ],
    }

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        time = tokens.shape[1]
        causal = jnp.tril(jnp.ones((time, time), bool))
        mask = jnp.where(causal & (tokens[:, None, :] > 0), 0.0, -1e9)
        position = jnp.sin(jnp.arange(time, dtype=jnp.float32))[:, None]
        x = params["embed"][tokens] + position
        for p in params["blocks"]:
            scores = jnp.einsum("btd,bsd->bts", x @ p["q"] + position, x @ p["k"] + position)
            x = x + jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores + mask), x @ p["v"]) @ p["o"]
            x = jnp.tanh(x @ p["up"])
        return x

    rng = np.random.default_rng(0)
    return fn, params, [jnp.asarray(rng.integers(11, size=(4, 9)), jnp.int32) for _ in range(2)]


def test_cheap_values_are_made_again_and_not_kept() -> None:
    fn, params, batches = decoder(2)
    walk = walk_of(fn, params, batches)
    (cut,) = walk.cuts.kinds.values()
    flat = cut.flat
    kept = {flat.shapes[n].shape for alive in cut.alive for n in alive}
    assert kept == {(4, 9, 6)}  # no mask [batch, time, time], no position [time, 1]
    # The mask is made of the tokens in every segment that needs it.
    readers = [
        stage.pieces[0].path
        for stage, segment in zip(walk.stages, cut.advances, strict=True)
        if flat.inputs[0] in segment.sources
    ]
    assert readers == ["embed", "blocks/0/q", "blocks/1/q"]


def test_what_is_alive_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    most = []
    for depth in (2, 5):
        fn, params, batches = decoder(depth)
        sizes = []
        put = Store.put

        def spy(store: Store, *args: Any, sizes: list[int] = sizes, put: Any = put) -> None:
            put(store, *args)
            held = [v for values in store.values for v in values.values()]
            assert store.held == sum(v.nbytes for v in held)
            sizes.append(len(held))

        with monkeypatch.context() as patch:
            patch.setattr(Store, "put", spy)
            jq.quantize(fn, params, plan_of(fn, params, batches[0]), batches)
        most.append(max(sizes))
    assert most == [4, 4]  # per batch: the residual stream, and what the attention has made


def test_values_beyond_the_budget_wait_on_the_host() -> None:
    value = jnp.ones((4, 5))
    store = Store(2 * value.nbytes, [{}, {}])
    for batch, number in ((0, 7), (1, 7), (0, 8)):
        store.put(batch, number, value)
    assert [type(v) for v in store.values[0].values()] == [type(value), np.ndarray]
    assert isinstance(store.values[1][7], jax.Array) and store.held == 2 * value.nbytes
    store.keep(0, [8])
    assert store.values == [{8: store.values[0][8]}, {7: store.values[1][7]}]
    assert store.held == value.nbytes  # what waits on the host counts nothing
    store.put(0, 9, value)
    assert isinstance(store.values[0][9], jax.Array)
    store.keep(0, [])
    store.keep(1, [])
    assert store.held == 0


@pytest.mark.parametrize("correction", [None, "qep"])
def test_a_budget_changes_no_bit(correction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, params, batches = decoder(2)
    scheme = jq.Scheme(Uniform(3), None, GPTQ(correction=correction))
    rules = {"embed": jq.keep, ".*": scheme}
    plan = jq.plan(jq.find_weights(fn, params, batches[0]), rules)
    wanted = jq.quantize(fn, params, plan, batches)[0]
    kinds: set[type] = set()
    keep = Store.keep

    def spy(store: Store, *args: Any) -> None:
        kinds.update(type(v) for values in store.values for v in values.values())
        keep(store, *args)

    monkeypatch.setattr(Store, "keep", spy)
    for budget in (0, 2000):
        kinds.clear()
        assert_same_bits(jq.quantize(fn, params, plan, batches, budget=budget)[0], wanted)
        assert (np.ndarray in kinds) and (kinds != {np.ndarray}) == (budget > 0)


# Batches that are wrong.


def two(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


TWO = {"up": normal(10, 6, 8), "down": normal(11, 8, 6)}
FIRST = normal(12, 16, 6)


def test_batches_may_differ_in_their_length() -> None:
    batches = [FIRST, FIRST[:9], FIRST[9:]]
    plan = plan_of(two, TWO, FIRST)
    found, report = jq.quantize(two, TWO, plan, batches)
    assert report["up"].tokens == report["down"].tokens == 32
    together, _ = jq.quantize(two, TWO, plan, [jnp.concatenate(batches)])
    chex.assert_trees_all_close(jq.dequantize(found), jq.dequantize(together), atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (normal(0, 16, 7), "float32[16, 7]"),
        (FIRST.astype(jnp.bfloat16), "bfloat16[16, 6]"),  # strict: no mixing of dtypes
        (FIRST.astype(jnp.int32), "int32[16, 6]"),
        (jnp.ones((), jnp.float32), "float32[]"),
        ((FIRST, FIRST), "float32[16, 6], float32[16, 6]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_the_function_does_not_take(batch: Any, told: str) -> None:
    def never(_: jq.Progress) -> None:
        raise AssertionError("work was started")

    plan = plan_of(two, TWO, FIRST)
    with pytest.raises(EvidenceError) as error:
        jq.quantize(two, TWO, plan, [FIRST, FIRST[:3], batch], progress=never)
    said = f"batch 2 has {told}, where batch 0 has float32[16, 6], and the function does not take"
    assert str(error.value).startswith(said)


def test_errors_of_other_libraries_are_told_of_the_batch_too() -> None:
    """Flax's are no ValueErrors."""
    import flax.linen as nn

    model = nn.Dense(4)
    params = {"params": {"kernel": normal(0, 6, 4), "bias": jnp.zeros(4, jnp.float32)}}
    plan = plan_of(model.apply, params, FIRST)
    with pytest.raises(EvidenceError, match=r"batch 1 has float32\[16, 7\].*does not take it"):
        jq.quantize(model.apply, params, plan, [FIRST, normal(0, 16, 7)])
    with pytest.raises(Exception, match="kernel") as error:  # the first one's are the caller's
        jq.quantize(model.apply, params, plan, [normal(0, 16, 7)])
    assert not isinstance(error.value, EvidenceError)


def test_batches_that_take_another_path() -> None:
    square = {"a": normal(1, 6, 6), "b": normal(2, 6, 6)}

    def order(params: Any, x: jax.Array) -> jax.Array:
        one, two = ("a", "b") if x.shape[0] > 9 else ("b", "a")
        return jnp.tanh(x @ params[one]) @ params[two]

    def mirrored(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ (params["a"] if x.shape[0] > 9 else params["a"].T)) @ params["b"]

    for fn in (order, mirrored):
        plan = plan_of(fn, square, FIRST)
        with pytest.raises(EvidenceError, match="batch 1 .*takes another path.* than batch 0"):
            jq.quantize(fn, square, plan, [FIRST, FIRST[:9]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_that_is_not_finite(bad: float) -> None:
    batches = [FIRST, FIRST[:9], FIRST.at[3, 2].set(bad), FIRST.at[0, 0].set(bad)]
    with pytest.raises(EvidenceError) as error:
        jq.quantize(two, TWO, plan_of(two, TWO, FIRST), batches)
    assert "input of weight 'up' is NaN or infinite, first in batch 2, at stage 1 of 2" in str(
        error.value
    )


def test_values_that_cease_to_be_finite_on_the_way() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.log(jnp.abs(x @ params["up"])) @ params["down"]

    plan = plan_of(fn, TWO, FIRST)
    with pytest.raises(EvidenceError) as error:
        jq.quantize(fn, TWO, plan, [FIRST, FIRST[:9].at[4].set(0)])
    assert "input of weight 'down' is NaN or infinite, first in batch 1, at stage 2 of 2" in str(
        error.value
    )


def test_fewer_tokens_than_inputs_are_warned_of() -> None:
    plan = plan_of(two, TWO, FIRST)
    with pytest.warns(UserWarning) as told:
        jq.quantize(two, TWO, plan, [FIRST[:4], FIRST[:3]])
    assert [str(w.message).split(";")[0] for w in told] == [
        "weight 'down': 7 tokens for 8 input channels"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jq.quantize(two, TWO, plan, [FIRST[:4], FIRST[:4]])


def test_no_batches_and_batches_of_nothing() -> None:
    plan = plan_of(two, TWO, FIRST)
    for sequential in ("weight", "block", None):
        with pytest.raises(EvidenceError, match="got no batches; pass at least one"):
            jq.quantize(two, TWO, plan, [], sequential=sequential)
        with pytest.raises(EvidenceError, match="has seen no tokens; pass batches"):
            jq.quantize(two, TWO, plan, [FIRST[:0]], sequential=sequential)


# Experts.


def experts(share: int) -> Callable[..., Any]:
    """Rows go to the first `share` of three experts in turn."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        if share == 0:
            sizes = jnp.zeros(3, jnp.int32)
        else:
            sizes = jnp.bincount(jnp.arange(x.shape[0]) % share, length=3)
        return lax.ragged_dot(x, params["up"], sizes) @ params["down"]

    return fn


def test_an_expert_that_saw_nothing_is_rounded_to_nearest() -> None:
    params = {"up": normal(13, 3, 6, 8), "down": normal(14, 8, 6)}
    fn = experts(2)
    leave = jq.Scheme(Uniform(3), 4, GPTQ(), fallback=True)
    plan, plain = (plan_of(fn, params, FIRST, scheme) for scheme in (leave, NEAREST3))
    found, report = jq.quantize(fn, params, plan, [FIRST, FIRST[:9]])
    nearest, _ = jq.quantize(fn, params, plain, [FIRST, FIRST[:9]])
    assert report["up"].tokens == 0 and np.isfinite(report["up"].error)
    one, two = (np.asarray(q["up"].codes.astype(jnp.int32)) for q in (found, nearest))
    np.testing.assert_array_equal(one[2], two[2])
    assert (one[:2] != two[:2]).any()


def test_experts_none_of_which_saw_anything() -> None:
    params = {"up": normal(13, 3, 6, 8), "down": normal(14, 8, 6)}
    fn = experts(0)
    with pytest.raises(EvidenceError, match="weight 'up' has seen no tokens"):
        jq.quantize(fn, params, plan_of(fn, params, FIRST), [FIRST])


# Plans that do not fit.


@pytest.mark.parametrize("sequential", ["weight", "block", None])
def test_a_weight_the_function_does_not_use(sequential: Any) -> None:
    def half(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["up"]

    plan = plan_of(two, TWO, FIRST)
    with pytest.raises(EvidenceError, match="weight 'down' is not used by the function on these"):
        jq.quantize(half, TWO, plan, [FIRST], sequential=sequential)


def never(params: Any, x: Any) -> Any:
    raise AssertionError("work was started")


def test_stages_there_are_not() -> None:
    plan = plan_of(two, TWO, FIRST)
    for batches in ([FIRST], None):
        with pytest.raises(PlanError, match="'weight', 'block' or None, got 'layer'"):
            jq.quantize(never, TWO, plan, batches, sequential="layer")  # type: ignore[arg-type]


def test_a_correction_needs_stages() -> None:
    scheme = jq.Scheme(Uniform(3), None, GPTQ(correction="qep"))
    plan = plan_of(two, TWO, FIRST, scheme)
    with pytest.raises(EvidenceError, match="'down': GPTQ's correction needs the drift.*'weight'"):
        jq.quantize(never, TWO, plan, [FIRST], sequential=None)
    evidence = jq.capture(two, TWO, [FIRST])
    with pytest.raises(EvidenceError, match="needs the drift of its inputs"):
        jq.quantize(never, TWO, plan, [FIRST], evidence=evidence)
