"""Quantized trees go through the savers of others and come back bit for bit."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from cases import GRIDS
from conftest import CACHE

import jquant as jq
from jquant.errors import CheckpointError, TreeError
from jquant.grids import Uniform
from jquant.io.leaves import JAX_DTYPES
from jquant.trees.lazy import Lazy
from jquant.weights.activations import Activations


def same(a: Any, b: Any) -> None:
    """Equal structure, dtypes, shapes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y) or hasattr(x, "dtype")
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def weight(grid: Any, shape: tuple[int, ...] = (2, 12, 5), **scheme: Any) -> jq.QTensor:
    layout = jq.Layout.of(shape, in_axes=(1,), batch_axes=(0,))
    w = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    evidence = jq.Evidence.of(jax.random.normal(jax.random.key(1), (2, 64, 12)), spread=True)
    return jq.quantize_weight(w, jq.Scheme(grid, 4, **scheme), layout, evidence=evidence)[0]


@pytest.mark.parametrize("dtype", sorted(JAX_DTYPES))
def test_every_dtype_is_given_away_as_numpys_and_comes_back(dtype: str) -> None:
    kind = JAX_DTYPES[dtype]
    for shape in ((), (0,), (3,), (2, 5), (2, 0, 3), (3, 4, 0), (1, 8)):
        raw = np.random.default_rng(0).integers(0, 256, (*shape, kind.itemsize), np.uint8)
        width = 2 if "int2" in dtype else 4 if "4" in dtype and kind.itemsize == 1 else 8
        if width < 8 and "float8" not in dtype:
            raw &= (1 << width) - 1
        if dtype == "bool":
            raw &= 1
        array = raw.view(kind).reshape(shape)
        if dtype in ("int2", "int4"):  # NumPy has their sign in the upper bits
            array = (raw.reshape(shape).astype(np.int8) - (1 << (width - 1))).astype(kind)
        given = jq.io.plain({"a": array})
        assert all(np.dtype(x.dtype).isbuiltin == 1 for x in given.values())
        back = jq.io.restore(given)["a"]
        assert back.dtype == kind and back.shape == shape
        assert np.asarray(back).tobytes() == array.tobytes()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_grid_comes_back(grid: Any) -> None:
    rng = np.random.default_rng(0)
    q = jax.tree.map(  # codes and parameters of the right shapes and dtypes need no computing
        lambda x: jnp.asarray(rng.integers(0, 2, x.shape).astype(x.dtype)),
        {"w": [jax.eval_shape(lambda: weight(grid))]},
    )
    same(jq.io.restore(jq.io.plain(q)), q)


@functools.cache  # made when it is first used: that compiles, which collecting tests should not
def everything() -> dict[str, Any]:
    return {
        "layers": [{"w": weight(Uniform(4)), "b": jnp.ones(3, jnp.bfloat16)}, {}],
        "two bits": [weight(Uniform(2))],
        "mx/w": weight(jq.grids.MX()),
        "low": weight(Uniform(3), compensation=jq.LoRC(2)),
        "static": weight(Uniform(8), activations=Activations(Uniform(8), "static")),
        "jquant": jnp.arange(3),
        "eps": 1e-5,
        "key": jax.random.key(3),
        "pair": (None, np.arange(3, dtype=np.float32)),
    }  # fmt: skip


def orbax(plain: Any, folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "x", plain)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "x")


def orbax_like(plain: Any, folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "x", plain)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "x", jax.eval_shape(lambda: plain))


def manager(plain: Any, folder: Path) -> Any:
    with ocp.CheckpointManager(folder / "x") as manager:
        manager.save(7, args=ocp.args.StandardSave(plain))
        manager.wait_until_finished()
        return manager.restore(7, args=ocp.args.StandardRestore())


def lazily(plain: Any, folder: Path) -> Any:
    orbax(plain, folder)
    return jq.realize(jq.io.lazy_orbax(folder / "x"))


def savez(plain: Any, folder: Path) -> Any:
    file = io.BytesIO()
    np.savez(file, **plain)
    file.seek(0)
    return dict(np.load(file))


SAVERS: dict[str, Callable[[Any, Path], Any]] = {
    "nothing": lambda plain, _: plain,
    "orbax": orbax,
    "orbax with a target": orbax_like,
    "checkpoint manager": manager,
    "orbax, lazily": lazily,
    "flax msgpack": lambda plain, _: flax.serialization.msgpack_restore(
        flax.serialization.to_bytes(plain)
    ),
    "flax with a target": lambda plain, _: flax.serialization.from_bytes(
        {name: 0 for name in plain}, flax.serialization.to_bytes(plain)
    ),
    "flax state dict": lambda plain, _: flax.serialization.to_state_dict(plain),
    "numpy.savez": savez,
    "safetensors": lambda plain, _: safetensors.numpy.load(
        safetensors.numpy.save({name: np.asarray(x) for name, x in plain.items()})
    ),
}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of Orbax's own
@pytest.mark.parametrize("saver", SAVERS)
def test_every_saver_takes_it_and_gives_it_back(saver: str, tmp_path: Path) -> None:
    same(jq.io.restore(SAVERS[saver](jq.io.plain(everything()), tmp_path)), everything())


def test_lazy_leaves_are_read() -> None:
    array = np.arange(6, dtype=np.float32)
    leaf = Lazy(array.shape, array.dtype, lambda window: array[window], "test")
    same(jq.io.restore(jq.io.plain({"a": leaf})), {"a": jnp.asarray(array)})


def test_what_is_no_plain_tree_is_refused() -> None:
    good = jq.io.plain({"w": weight(Uniform(4)), "b": jnp.ones(3, jnp.float32)})
    bad = {
        "'jquant' is not among": {"a": jnp.ones(2)},
        "'b' is missing": {name: x for name, x in good.items() if name != "b"},
        "1 tensors belong to no leaf": {**good, "more": jnp.ones(2)},
        r"array 'b' was float32 \(3,\) .* and is float32 \(4,\)": {
            **good,
            "b": jnp.ones(4, jnp.float32),
        },
        r"array 'w/codes' was uint8 \(2, 5, 6\) .* and is int8": {
            **good,
            "w/codes": good["w/codes"].astype(jnp.int8),
        },
        "not JSON": {**good, "jquant": good["jquant"][1:]},
        "is not of version": {**good, "jquant": np.frombuffer(b'{"version":2}', np.uint8)},
    }
    for said, arrays in bad.items():
        with pytest.raises(CheckpointError, match=said):
            jq.io.restore(arrays)
    with pytest.raises(TreeError, match="at 'x', is no array but str"):
        jq.io.plain({"x": "text"})


SHARDED = """
import tempfile, warnings
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jquant as jq

assert jax.device_count() == 8
w = jax.random.normal(jax.random.key(0), (2, 32, 4))
layout = jq.Layout.of(w.shape, in_axes=(1,), batch_axes=(0,))
plain = jq.quantize_weight(w, jq.Scheme(jq.grids.Uniform(4), 8), layout)[0]
path = tempfile.mkdtemp() + "/w"
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    for spec in (P(None, "y"), P("x", None, "y")):
        put = lambda a: jax.device_put(a, NamedSharding(mesh, P(*spec[: a.ndim])))
        q = jax.tree.map(put, plain)
        tree = {"w": q, "b": put(w), "key": jax.random.key(0)}
        jq.save(path, tree)
        for back in (jq.load(path), jq.io.restore(jq.io.plain(tree))):
            for x, y in zip(jax.tree.leaves(back["w"]), jax.tree.leaves(plain), strict=True):
                assert x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
            assert np.array_equal(back["b"], w)
        assert jq.io.plain(tree)["b"].sharding == tree["b"].sharding
        codes, kept = jq.io.plain(tree)["w/codes"], q.codes.sharding
        if kind == AxisType.Explicit:
            kept = NamedSharding(mesh, P(*spec[:2]))
        assert codes.sharding.is_equivalent_to(kept, 3), (spec, codes.sharding)
print("fine")
"""


def test_arrays_over_several_devices_are_saved_and_stay_where_they_are() -> None:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True,
        check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr[-2000:]
