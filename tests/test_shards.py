"""Trees straight into their places, and folders that several processes have written."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant.errors import CheckpointError, TreeError
from jquant.io import native, shards

COUNT = 8 if jax.device_count() >= 8 else 1


def mesh_of(kind: AxisType = AxisType.Explicit) -> Any:
    shape = (2, COUNT // 2) if COUNT > 1 else (1, 1)
    return jax.make_mesh(shape, ("d", "m"), axis_types=(kind,) * 2, devices=jax.devices()[:COUNT])


def tree_of(bits: int = 3) -> dict[str, Any]:
    """A quantized weight [64, 48] of groups, one of whole rows, arrays and a number."""
    rng = np.random.default_rng(bits)
    params = {
        "a": rng.normal(size=(64, 48)).astype(np.float32),
        "b": rng.normal(size=(48, 16)).astype(np.float32),
    }
    rules = {"a": jq.Scheme(jq.grids.Uniform(bits), 16), "b": jq.Scheme(jq.grids.Uniform(4))}

    def fn(p: Any, x: Any) -> Any:
        return x @ p["a"] @ p["b"]

    plan = jq.plan(jq.find_weights(fn, params, jnp.ones((2, 64))), rules)
    qparams, _ = jq.quantize(fn, params, plan)
    rest = {"c": jnp.arange(48.0), "wide": np.arange(3), "n": 2, "key": jax.random.key(3)}
    return {**qparams, **rest, "list": [jnp.ones((), jnp.bfloat16), None]}


def assert_same_bits(one: Any, two: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if isinstance(a, jax.Array) and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# Into place.


@pytest.mark.parametrize("bits", [2, 3])
def test_loaded_into_place(bits: int, tmp_path: Path) -> None:
    """Codes and groups lie as the weight would; what the mesh does not divide lies everywhere."""
    tree, path, mesh = tree_of(bits), tmp_path / "q", mesh_of()
    jq.save(path, tree)
    placed = jq.load(
        path,
        shardings={
            "a": NamedSharding(mesh, P("m", "d")),
            "b": NamedSharding(mesh, P("m")),
            ".*": NamedSharding(mesh, P()),
        },
    )
    assert_same_bits(placed, tree)
    assert placed["a"].codes.sharding.spec == P("d", "m")
    assert placed["a"].params["scale"].sharding.spec == P("d", "m")
    assert placed["b"].params["scale"].sharding.spec == P(None, "m" if COUNT == 1 else None)
    assert placed["c"].sharding == NamedSharding(mesh, P())
    here = SingleDeviceSharding(jax.devices()[-1])
    jq.save(path, placed)  # from a mesh, as from one device
    moved = jq.load(path, shardings=lambda p, shape: here if p in "ab" else None, like=placed)
    assert_same_bits(moved, tree)
    assert moved["a"].codes.devices() == {jax.devices()[-1]}


def test_each_leaf_is_read_only_where_it_is_needed() -> None:
    windows: list[Any] = []

    def read(window: Any) -> np.ndarray:
        windows.append(window)
        return np.zeros((8, 8), np.float32)[window]

    lazy = {"a": jq.Lazy((8, 8), np.dtype("float32"), read, "zeros")}
    jq.io.place(lazy, NamedSharding(mesh_of(), P("m")))
    mine = 2 if COUNT > 1 else 8
    assert all(w[0].stop - w[0].start == mine for w in windows)
    assert len(windows) == 8 // mine  # copies on other devices are of one reading


@pytest.mark.parametrize(
    ("shardings", "error", "told"),
    [
        (lambda mesh: {"a": NamedSharding(mesh, P())}, TreeError, "'b' of shape (48, 16); add"),
        (lambda mesh: {"z.*": NamedSharding(mesh, P())}, ValueError, "matches no path"),
        (lambda mesh: NamedSharding(mesh, P(None, "m")), TreeError, "cannot lie as"),
        (lambda mesh: lambda path, shape: "m", TreeError, "shardings give str for 'a'"),
    ],
)  # fmt: skip
def test_shardings_that_do_not_fit(
    shardings: Any, error: type[Exception], told: str, tmp_path: Path
) -> None:
    jq.save(tmp_path / "q", tree_of())
    with pytest.raises(error, match=re.escape(told)):
        jq.load(tmp_path / "q", shardings=shardings(mesh_of()))
    with pytest.raises(ValueError, match="pass one"):
        jq.load(tmp_path / "q", shardings=lambda path, shape: None, lazy=True)


@pytest.mark.skipif(COUNT < 8, reason="needs 8 devices")
def test_a_mesh_that_does_not_divide_a_weight() -> None:
    with pytest.raises(TreeError, match=r"'w' of shape \(6, 6\) .* the mesh must divide"):
        jq.io.place({"w": np.zeros((6, 6))}, NamedSharding(mesh_of(), P("m")))


# Folders of shards: what two processes write is made here by one, a half of each array from each.


def halves(self: shards.Spread) -> list[tuple[int, shards.Ends]]:
    shape = tuple(self.array.shape)
    if not shape or shape[-1] < 2:
        return [(1, ((0,) * len(shape), shape))]
    cut, nothing = max(1, shape[-1] // 3), (0,) * (len(shape) - 1)
    return [(0, ((*nothing, 0), (*shape[:-1], cut))), (1, ((*nothing, cut), shape))]


def part(self: shards.Spread, ends: shards.Ends) -> Any:
    return np.asarray(self.array)[tuple(map(slice, *ends))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards.Spread, "boxes", halves)
    monkeypatch.setattr(shards.Spread, "part", part)
    encoder = shards.encoded(tree_of())
    names = [shards.name_of("abc", process) for process in range(2)]
    for process, name in enumerate(names):
        tensors = shards.tensors_of(encoder, process)
        root = {"dict": [[key, tensor.node] for key, tensor in tensors.items()]}
        native._write(tmp_path / name, root, [], tensors, {})
    (tmp_path / "shard-old-00000.safetensors").write_bytes(b"")
    shards.write_index(tmp_path, encoder, names, {})
    monkeypatch.undo()
    return tmp_path


def test_a_folder_of_shards(folder: Path) -> None:
    """Put together of windows of both files; the files of what was there before are gone."""
    assert len(list(folder.iterdir())) == 3
    tree = tree_of()
    assert_same_bits(jq.load(folder), tree)
    mesh = mesh_of()
    placed = jq.load(folder, shardings=NamedSharding(mesh, P()), like=tree)
    assert_same_bits(placed, tree)
    lazy = jq.load(folder, lazy=True)
    codes = np.asarray(tree["a"].codes)
    np.testing.assert_array_equal(lazy["a"].codes[5:9], codes[5:9])
    sizes = [path.stat().st_size for path in folder.glob("shard-*")]
    header = 4096  # codes of three bits stay streams of three bits
    assert sum(sizes) < 64 * 48 * 3 / 8 + 48 * 4 * 4 + 16 * 48 * 4 + 1000 + 2 * header


def test_one_process_saves_and_loads_a_folder(tmp_path: Path) -> None:
    """What is written where arrays are spread over processes, on the devices of one."""
    mesh, tree = mesh_of(), tree_of()
    spread = jq.io.place(tree, lambda p, s: NamedSharding(mesh, P(*("m", "d")[: len(s)])
                                                          if p in "abc" else P()))  # fmt: skip
    native._save_spread(tmp_path / "q", spread, {})
    assert_same_bits(jq.load(tmp_path / "q"), tree)


def other_sum(folder: Path) -> None:
    """An index that is sound, beside a checksum that is not its own."""
    path = folder / shards.INDEX
    outer = json.loads(path.read_text())
    path.write_text(json.dumps(outer | {"crc32": f"{int(outer['crc32'], 16) ^ 1:08x}"}))


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The index after a change, with a checksum that fits."""

    def edit(folder: Path) -> None:
        path = folder / shards.INDEX
        body = json.loads(json.loads(path.read_text())["jquant"])
        change(body)
        text = json.dumps(body)
        crc = f"{zlib.crc32(text.encode()):08x}"
        path.write_text(json.dumps({"crc32": crc, "jquant": text}))

    return edit


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda f: (f / shards.INDEX).unlink(), "without an index"),
    "no shard": (lambda f: (f / shards.name_of("abc", 1)).unlink(), "00001.safetensors is missing"),
    "half an index": (lambda f: (f / shards.INDEX).write_text("{}"), "checksum"),
    "another checksum": (other_sum, "checksum"),
    "a path": (edited(lambda b: b["files"].__setitem__(0, "../x")), "names of files"),
    "a version": (edited(lambda b: b.update(version=9)), "version"),
    "a box twice": (edited(lambda b: b["boxes"]["c"].append(b["boxes"]["c"][0])), "do not fill"),
    "a gap": (edited(lambda b: b["boxes"]["c"].pop()), "do not fill"),
    "an overlap": (edited(lambda b: b["boxes"]["c"][0][3].__setitem__(0, 40)), "do not fill"),
    "another shape": (edited(lambda b: b["boxes"]["c"][0].__setitem__(1, "wide:0")), "no file"),
    "a file too many": (edited(lambda b: b["boxes"]["c"][0].__setitem__(0, 7)), "no file"),
    "no boxes": (edited(lambda b: b.update(boxes=3)), "boxes are malformed"),
    "a box of words": (edited(lambda b: b["boxes"]["c"].__setitem__(0, "x")), "malformed box"),
    "no array": (edited(lambda b: b["boxes"].pop("c")), "missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders(name: str, folder: Path) -> None:
    change, told = HOSTILE[name]
    change(folder)
    with pytest.raises(CheckpointError, match=told):
        jq.load(folder)


def test_a_damaged_shard(folder: Path) -> None:
    path = folder / shards.name_of("abc", 1)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="corrupt"):
        jq.load(folder)


def test_lazy_leaves_are_quantized_where_they_are_to_lie() -> None:
    """The same codes as of arrays on one device; a layer of a stack is read where it lies too."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 32, 32)).astype(np.float32)
    stack = jq.Lazy(w.shape, w.dtype, w.__getitem__, "a stack")
    mesh = mesh_of(AxisType.Auto)

    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["s"][0]) @ p["s"][1]

    x = rng.normal(size=(64, 32)).astype(np.float32)
    plan = jq.plan(jq.find_weights(fn, {"s": w}, x), {".*": jq.presets.int4_gptq(8)})
    plain, _ = jq.quantize(fn, {"s": w}, plan, [x])
    lazy = jq.io.place({"s": stack}, NamedSharding(mesh, P(None, "d", "m")), lazy=True)
    assert isinstance(lazy["s"], jq.Lazy)
    assert jq.realize(lazy)["s"].sharding.spec == P(None, "d", "m")
    qparams, _ = jq.quantize(fn, lazy, plan, [x])
    assert_same_bits(qparams, plain)
    assert qparams["s"].codes.sharding.mesh == mesh
