"""Any pytree of JAX values can be saved: by path where its nodes are not the file's own."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jquant as jq
from jquant import io
from jquant.errors import CheckpointError, TreeError
from jquant.weights.arguments import by_path

X = jax.random.normal(jax.random.key(1), (16, 8), jnp.float32)


class Pair(NamedTuple):
    w: Any
    eps: Any


@flax.struct.dataclass
class Struct:
    w: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


@chex.dataclass
class Chex:
    w: Any


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class Keyless:
    def __init__(self, *children: Any) -> None:
        self.children = children


jax.tree_util.register_pytree_node(
    Keyless, lambda node: (node.children, None), lambda _, children: Keyless(*children)
)

W = jax.random.normal(jax.random.key(0), (8, 8), jnp.float32)
MODEL = eqx.nn.MLP(8, 8, 8, 2, key=jax.random.key(0), dtype=jnp.float32)
TREES: dict[str, Any] = {
    "FrozenDict": flax.core.freeze({"a": {"w": W}}),
    "Linen": nn.Dense(8).init(jax.random.key(0), X),
    "NNX state": nnx.state(Net(nnx.Rngs(0))),
    "NNX module": Net(nnx.Rngs(0)),
    "Equinox": eqx.partition(MODEL, eqx.is_array)[0],
    "NamedTuple": [Pair(W, 1e-5)],
    "flax.struct": {"a": Struct(W)},
    "chex": Chex(w=W),
    "OrderedDict": collections.OrderedDict(b=W, a=W[0]),
    "defaultdict": collections.defaultdict(list, a=[W]),
    "tuple keys": {("a", "w"): W, ("b", "w"): W[0]},
    "optimizer": optax.adam(1e-3).init({"w": W}),
    "keyless": Keyless(W, {"b": Keyless(W[0])}),
    "random keys": [jax.random.key(0), jax.random.split(jax.random.key(1, impl="rbg"))],
    "numbers": [1e-5, -0.0, float("inf"), 3, -(2**31), True, 1 + 2j, np.float64(0.1), np.int8(3)],
    "nested": Pair(flax.core.freeze({"x": Chex(w=[W, None])}), Pair(Struct({3: W}), ())),
}  # fmt: skip


def words(leaf: Any) -> Any:
    """A leaf as something that is equal to itself, kind and bits."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tolist()
    if isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic):
        return type(leaf), repr(leaf)
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_saved_comes_back_by_path_and_like(name: str, lazy: bool, tmp_path: Path) -> None:
    tree = TREES[name]
    jq.save(tmp_path / "t", tree)
    wanted = {path: words(leaf) for path, leaf in by_path(tree).items()}
    numbers = {
        path: words(leaf)
        for (_, leaf), path in zip(
            jax.tree_util.tree_flatten_with_path(tree)[0], wanted, strict=True
        )
    }  # by_path makes arrays of them
    stored = jq.load(tmp_path / "t", lazy=lazy)
    found = jq.realize(jq.load(tmp_path / "t", lazy=lazy, like=tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert [words(leaf) for leaf in jax.tree.leaves(found)] == list(numbers.values())
    flat = jax.tree_util.tree_flatten_with_path(jq.realize(stored))[0]
    paths = {jax.tree_util.keystr(k, simple=True, separator="/"): words(leaf) for k, leaf in flat}
    assert paths == numbers
    assert set(io.read_header(tmp_path / "t").leaves) == set(numbers)
    kinds = set()
    jax.tree.leaves(stored, is_leaf=lambda node: kinds.add(type(node)) or False)
    assert kinds <= {dict, list, tuple, type(None), *(type(x) for x in jax.tree.leaves(stored))}


def test_quantized_models_of_every_library_come_back_and_run(tmp_path: Path) -> None:
    params, static = eqx.partition(MODEL, eqx.is_array)
    graph, state, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    linen = nn.Dense(8)
    cases = [
        (params, lambda p, x: jax.vmap(eqx.combine(p, static))(x)),
        (state, lambda p, x: nnx.merge(graph, p, rest).layers[1](x)),
        (flax.core.freeze(linen.init(jax.random.key(0), X)), linen.apply),
        (Pair(W, 1e-5), lambda p, x: x @ p.w + p.eps),
    ]
    for params, fn in cases:
        plan = jq.plan(jq.find_weights(fn, params, X), {".*": jq.presets.int4_nearest(4)})
        assert plan
        qparams, _ = jq.quantize(fn, params, plan)
        jq.save(tmp_path / "q", qparams)
        back = jq.load(tmp_path / "q", like=params)
        assert jax.tree.structure(back) == jax.tree.structure(qparams)
        np.testing.assert_array_equal(jq.apply(fn)(back, X), jq.apply(fn)(qparams, X))
        described = jax.eval_shape(lambda: params)  # noqa: B023
        assert jax.tree.structure(jq.load(tmp_path / "q", like=described)) == (
            jax.tree.structure(qparams)
        )


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ({"a": W}, r"like has no leaf at 'b'; near: 'a'"),
        ({"a": W, "b": W, "bee": W}, r"the file has no leaf at 'bee'; near: 'b'"),
        ({"a": W, "b": W}, r"like, at 'b', has the shape \(8, 8\), the file has \(8,\)"),
        ({"a": W, "b": "text"}, r"like, at 'b', is no array but str"),
        ({"a/b": W, "a": {"b": W}}, r"have one path, 'a/b'"),
    ],
)
def test_a_tree_that_is_not_alike_is_refused(like: Any, said: str, tmp_path: Path) -> None:
    jq.save(tmp_path / "t", {"a": W, "b": W[0]})
    with pytest.raises(TreeError, match=said):
        jq.load(tmp_path / "t", like=like)


class Twins:
    """A node with two children of one name."""


jax.tree_util.register_pytree_with_keys(
    Twins,
    lambda _: (((jax.tree_util.DictKey("a"), W), (jax.tree_util.GetAttrKey("a"), W)), None),
    lambda _, __: Twins(),
)


def test_children_of_one_name_are_refused(tmp_path: Path) -> None:
    for tree in (Twins(), {"x": [Twins()]}, {(1,): W, "(1,)": {"b": W}}):
        with pytest.raises((TreeError, ValueError)):
            jq.save(tmp_path / "t", tree)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((b'{"number":1e-05}', b'{"number":"1"}'), "malformed number"),
        ((b'{"number":1e-05}', b'{"number":[1]}'), "malformed number"),
        ((b'"key":"threefry2x32"', b'"key":"threefry2x33"'), "random key of no kind"),
        ((b'"key":"threefry2x32"', b'"key":"threefry4x32"'), "random key of no kind"),
        ((b'"key":"threefry2x32"', b'"kez":"threefry2x32"'), "no known kind"),
        ((b'"key":"threefry2x32"', b'"key":12'), "malformed random key"),
        ((b'"data":{"array":"key","crc32":"6522df69"}', b'"data":7'), "malformed random key"),
    ],
)
def test_nodes_that_lie_are_refused(
    change: tuple[bytes, bytes], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t"
    jq.save(path, {"eps": 1e-5, "key": jax.random.key(0)})
    raw = path.read_bytes()
    old, new = (part.replace(b'"', b'\\"') for part in change)
    new += b" " * (len(old) - len(new))
    assert raw.count(old) == 1 and len(old) == len(new)
    path.write_bytes(raw.replace(old, new))
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        jq.load(path)
    monkeypatch.setattr(io.native, "_checksum", lambda metadata, _: metadata["jquant.crc32"])
    with pytest.raises(CheckpointError, match=said):
        jq.load(path)
