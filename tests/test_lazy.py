"""Lazy leaves give what they stand for, read no more than they must, and are never kept."""

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import io
from jquant.errors import CheckpointError
from jquant.grids import Uniform
from jquant.io.leaves import JAX_DTYPES
from jquant.trees.lazy import Lazy, is_lazy, read, realize, span, stack

pytestmark = pytest.mark.slow


def lazy_of(array: np.ndarray, log: list[Any] | None = None, name: str = "test") -> Lazy:
    """A `Lazy` of an array, which logs the windows it is asked for."""

    def window(index: Any) -> np.ndarray:
        if log is not None:
            log.append((name, index))
        return array[index]

    return Lazy(array.shape, array.dtype, window, name)


def weight(bits: int = 4, shape: tuple[int, ...] = (3, 16, 6), seed: int = 0) -> jq.QTensor:
    """A stack of weights rounded to nearest."""
    w = jax.random.normal(jax.random.key(seed), shape)
    layout = jq.Layout.of(shape, in_axes=(len(shape) - 2,), batch_axes=range(len(shape) - 2))
    return jq.quantize_weight(w, jq.Scheme(Uniform(bits), groups=8), layout)[0]


def same(a: Any, b: Any) -> None:
    """Equal structure, dtypes, shapes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = (np.ascontiguousarray(read(leaf)) for leaf in (x, y))
        assert x.tobytes() == y.tobytes()


# The leaf itself


def windows(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Indices of leading axes: integers (from either end) and slices, some of them empty."""
    axes = [
        st.one_of(
            st.integers(-size, size - 1) if size else st.just(slice(None)),
            st.tuples(st.integers(-size - 1, size + 1), st.integers(-size - 1, size + 1)).map(
                lambda ends: slice(*ends)
            ),
            st.just(slice(None)),
        )
        for size in shape
    ]
    return st.integers(0, len(shape)).flatmap(lambda rank: st.tuples(*axes[:rank]))


@hypothesis.given(data=st.data())
def test_indexing_is_numpys(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    index = data.draw(windows(shape))
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    leaf, expected = lazy_of(array), array[index]
    for found in (leaf[index], leaf[(*index, ...)], read(leaf, index), read(array, index)):
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read(jnp.asarray(array), index), expected)
    np.testing.assert_array_equal(leaf.T[...], array.T)
    turned = data.draw(windows(shape[::-1]))
    np.testing.assert_array_equal(leaf.T[turned], array.T[turned])
    full = tuple(slice(*w.indices(n)[:2]) for w, n in zip(index, shape, strict=False)) if all(
        isinstance(entry, slice) for entry in index
    ) else ()  # fmt: skip
    full = tuple(slice(w.start, max(w.start, w.stop)) for w in full)
    full += tuple(slice(0, n) for n in shape[len(full) :])
    first, block, inner = span(shape, full)
    run = array.reshape(-1)[first : first + int(np.prod(block, dtype=int))]
    np.testing.assert_array_equal(run.reshape(block)[inner], array[full])


@pytest.mark.parametrize(
    "index", [3, -4, (0, 0, 0), slice(None, None, 2), None, [0], (0, "a"), (..., 0), 1.0]
)
def test_other_indices_are_refused(index: Any) -> None:
    array = np.ones((3, 2), np.float32)
    for leaf in (lazy_of(array), array, jnp.asarray(array)):
        with pytest.raises(IndexError):
            read(leaf, index)


def test_it_is_a_leaf_that_looks_like_an_array() -> None:
    leaf = lazy_of(np.ones((3, 5), np.float16))
    assert jax.tree.leaves({"a": leaf}) == [leaf] and is_lazy(leaf)
    assert (leaf.ndim, leaf.size, leaf.nbytes) == (2, 15, 30)
    assert np.asarray(leaf).dtype == np.float16 and np.asarray(leaf, np.float32).sum() == 15
    with pytest.raises(ValueError, match="holds no array"):
        np.array(leaf, copy=False)


def test_a_source_that_breaks_its_promise_is_named() -> None:
    leaf = Lazy((2, 2), np.dtype("float32"), lambda window: np.ones((2, 2)), "some bytes")
    with pytest.raises(ValueError, match=r"some bytes: promised float32 \(2, 2\), read float64"):
        leaf[...]
    leaf = Lazy((2, 2), np.dtype("float64"), lambda window: np.ones((2, 2)), "some bytes")
    with pytest.raises(ValueError, match=r"some bytes: promised float64 \(1, 2\), read"):
        leaf[1:]


def test_views_run_on_what_is_read_and_on_nothing_else() -> None:
    log: list[Any] = []
    arrays = [np.full((4, 3), float(k), np.float32) for k in range(5)]
    layers = [lazy_of(array, log, f"layer {k}") for k, array in enumerate(arrays)]
    whole = stack([layer.T.map(np.negative, "float32", "negative") for layer in layers])
    whole = whole.astype("bfloat16")
    assert whole.shape == (5, 3, 4) and whole.dtype == jnp.bfloat16 and not log
    expected = -np.stack(arrays).swapaxes(1, 2).astype(jnp.bfloat16)
    np.testing.assert_array_equal(whole[2], expected[2])
    assert log == [("layer 2", (slice(0, 4), slice(0, 3)))]
    log.clear()
    np.testing.assert_array_equal(whole[1:3, 2], expected[1:3, 2])
    assert log == [(f"layer {k}", (slice(0, 4), slice(2, 3))) for k in (1, 2)]
    np.testing.assert_array_equal(whole[...], expected)
    assert whole[2:2].shape == (0, 3, 4)
    assert layers[0].astype("float32") is layers[0]


def test_identities_tell_leaves_apart() -> None:
    a, b = (lazy_of(np.ones((2, 2), np.float32), name=name) for name in "ab")
    views = [a, b, a.T, a.astype("float16"), a.map(np.exp, "float32", "exp"), stack([a, b]),
             stack([b, a]), stack([a])]  # fmt: skip
    assert len({view.identity for view in views}) == len(views)


@pytest.mark.parametrize("other", [np.ones((2, 3), np.float32), np.ones((2, 2)), None])
def test_only_alike_arrays_stack(other: np.ndarray | None) -> None:
    first = lazy_of(np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="one shape and dtype"):
        stack([] if other is None else [first, lazy_of(other)])


def test_memory_maps_are_copied_out_of_their_file(tmp_path: Path) -> None:
    kept = np.memmap(tmp_path / "m", np.float32, "w+", shape=(4, 2))
    kept[...] = np.arange(8).reshape(4, 2)
    part = read(kept, slice(1, 3))
    assert type(part) is np.ndarray and part.flags.owndata
    kept[...] = 0
    assert part.tolist() == [[2, 3], [4, 5]]


def test_windows_of_jax_arrays_share_a_program(compiles) -> None:
    array = jnp.arange(24.0).reshape(8, 3)
    read(array, slice(0, 1)), read(array, 0)
    with compiles() as log:
        found = [np.asarray(read(array, k)).tolist() for k in range(8)]
        found += [np.asarray(read(array, slice(k, k + 1)))[0].tolist() for k in range(8)]
    assert found == 2 * array.tolist() and not log


def test_realize_reaches_into_quantized_weights(tmp_path: Path) -> None:
    q = weight()
    tree = {"w": q, "n": None, "b": np.arange(3, dtype=np.int64), "x": jnp.ones(2)}
    jq.save(tmp_path / "w", tree)
    kept = jq.load(tmp_path / "w", lazy=True)
    found = realize(kept)
    same(found, jq.load(tmp_path / "w"))
    assert isinstance(found["w"].codes, jax.Array) and isinstance(found["b"], np.ndarray)
    np.testing.assert_array_equal(jq.dequantize(found)["w"], jq.dequantize(tree)["w"])


def test_weights_are_found_without_reading() -> None:
    log: list[Any] = []
    params = {"w": lazy_of(np.ones((8, 4), np.float32), log)}
    found = jq.find_weights(lambda p, x: x @ p["w"], params, jnp.ones((2, 8)))
    assert found["w"].shape == (8, 4) and not log


# Checkpoints of jquant


def dtypes() -> list[str]:
    return [name for name in JAX_DTYPES if not name.startswith("complex")]


def test_every_dtype_is_the_same_lazily(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (5, 3, 2))
    tree = {name: bits.astype(JAX_DTYPES[name]) for name in dtypes()}
    tree |= {"scalar": np.float32(3.5)[None][0:1].reshape(()), "none": np.ones((0, 3), np.float32)}
    jq.save(tmp_path / "x", tree)
    for name, leaf in jq.load(tmp_path / "x", lazy=True).items():
        assert is_lazy(leaf) and leaf.dtype == tree[name].dtype, name
        for index in ((), 0, slice(1, 1)) if leaf.size > 1 else ((),):
            found, expected = leaf[index], tree[name][index]
            assert found.shape == expected.shape
            assert np.ascontiguousarray(found).tobytes() == np.array(expected).tobytes(), name


@hypothesis.given(data=st.data(), bits=st.integers(2, 8), columns=st.integers(1, 5))
def test_windows_of_bit_streams(tmp_path_factory, data, bits: int, columns: int) -> None:
    """Codes of any width begin anywhere inside a byte."""
    q = weight(bits, (5, 3, columns))
    path = tmp_path_factory.mktemp("stream") / "w"
    jq.save(path, {"w": q})
    kept, index = jq.load(path, lazy=True)["w"], data.draw(windows(q.codes.shape))
    expected = np.asarray(q.codes)
    for leaf in (kept.codes, jq.load(path, lazy=True)["w"].codes):
        np.testing.assert_array_equal(leaf[index].astype(int), expected[index].astype(int))
    np.testing.assert_array_equal(kept.codes[...].astype(int), expected.astype(int))
    assert kept.shape == q.shape and kept.size == q.size


def test_a_window_reads_its_own_bytes_once_the_checksum_is_known(
    tmp_path: Path, bytes_read: list[int]
) -> None:
    stacked = np.arange(6 * 1000, dtype=np.float32).reshape(6, 10, 100)
    jq.save(tmp_path / "x", {"a": stacked, "q": weight(3, (6, 16, 8))})
    kept = jq.load(tmp_path / "x", lazy=True)
    assert not bytes_read
    kept["a"][2]
    assert bytes_read == [stacked.nbytes, stacked.nbytes // 6]
    kept["a"][3, 4], kept["a"][1:3, 5], kept["q"].codes[0], kept["q"].codes[1]
    assert bytes_read[2:] == [400, 8000, 6 * 16 * 8 * 3 // 8, 48, 48]
    bytes_read.clear()
    kept["a"][...]
    assert bytes_read == [stacked.nbytes]


@pytest.mark.parametrize("index", [..., slice(1, 2)], ids=["whole", "window"])
def test_a_corrupt_array_is_named_when_it_is_read(index: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    jq.save(path, {"a": np.ones((2, 9), np.float32), "b": np.zeros((2, 9), np.float32)})
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # in the other half of b than the window
    raw[-40] ^= 1
    path.write_bytes(raw)
    kept = jq.load(path, lazy=True)
    assert kept["a"][index].all()
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(CheckpointError, match=r"x: tensor 'b' is corrupt"):
            kept["b"][index]
    raw[12] ^= 1  # the header is looked at at once
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        jq.load(path, lazy=True)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    jq.save(path, {"a": jnp.ones(3)})
    before = jq.load(path, lazy=True)["a"]
    jq.save(path, {"a": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match="x: the file has changed since it was loaded"):
        before[...]
    after = jq.load(path, lazy=True)["a"]
    assert after[...].tolist() == [0, 0, 0] and before.identity != after.identity
    assert after.identity == jq.load(path, lazy=True)["a"].identity
    path.unlink()
    with pytest.raises(CheckpointError, match="x: cannot be read any more"):
        after[...]


# Saving


def test_lazy_leaves_save_to_the_same_bytes(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "m", np.float32, "w+", shape=(4, 2))
    mapped[...] = 7
    tree = {"q": weight(4), "r": [weight(3, (8, 4))], "b": jnp.ones(3, jnp.bfloat16), "m": mapped}
    jq.save(tmp_path / "a", tree)
    jq.save(tmp_path / "b", jq.load(tmp_path / "a", lazy=True))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    jq.save(tmp_path / "b", jq.load(tmp_path / "b", lazy=True))  # onto the file it is read from
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def counted(size: int, alive: list[int], read_bytes: Callable[[], None] = lambda: None) -> Lazy:
    """A leaf whose arrays are counted while they live: `alive` is [now, most]."""

    def window(index: Any) -> np.ndarray:
        read_bytes()
        array = np.ones(size, np.float32)
        alive[0] += 1
        alive[1] = max(alive)

        def gone() -> None:
            alive[0] -= 1

        weakref.finalize(array, gone)
        return array[index]

    return Lazy((size,), np.dtype(np.float32), window, "counted")


def test_saving_holds_one_leaf_at_a_time(tmp_path: Path) -> None:
    alive = [0, 0]
    tree = {f"layer {k}": counted(1 << 16, alive) for k in range(20)}
    gc.disable()
    tracemalloc.start()
    try:
        jq.save(tmp_path / "x", tree)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert alive == [0, 1]
    assert peak < 3 * 4 * (1 << 16)  # of 20 leaves
    same(jq.load(tmp_path / "x"), {name: jnp.ones(1 << 16) for name in tree})


def test_saving_leaves_no_copies_of_codes_behind(tmp_path: Path) -> None:
    """NumPy's copy of a 4-bit JAX array, a byte per code, would live as long as the array."""
    tree = [weight(4, (128, 256), seed) for seed in range(8)]
    codes = sum(q.codes.size for q in tree)
    jq.save(tmp_path / "x", tree[:1])  # whatever is made once, is made
    tracemalloc.start()
    try:
        jq.save(tmp_path / "x", tree)
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < codes // 4 and peak < codes


def test_a_bad_leaf_leaves_the_old_file_alone(tmp_path: Path) -> None:
    jq.save(tmp_path / "x", {"a": jnp.ones(2)})

    def fail() -> None:
        raise CheckpointError("elsewhere: torn")

    q = weight(3, (8, 4))
    bad = lazy_of(np.full(q.codes.shape, 9, np.uint8))
    codes = jq.QTensor(bad, q.params, q.grid, q.groups, q.layout, q.dtype)
    floats = jq.QTensor(q.params["scale"], q.params, q.grid, q.groups, q.layout, q.dtype)
    for leaf, message in (
        (counted(4, [0, 0], fail), "elsewhere: torn"),
        (codes, r"at 'b': codes outside 0..7"),
        (floats, r"at 'b': codes must be an array of integers, got float32"),
        (lazy_of(np.array(["a"])), r"at 'b': dtype <U1 is none of JAX's"),
    ):
        with pytest.raises(ValueError, match=message):
            jq.save(tmp_path / "x", {"a": jnp.zeros(2), "b": leaf})
    assert jq.load(tmp_path / "x")["a"].tolist() == [1.0, 1.0]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# Orbax


ORBAX = {
    "layers": [{"w": jnp.arange(24.0).reshape(2, 3, 4)}, [jnp.ones(3, jnp.bfloat16)]],
    "a.b": np.arange(4, dtype=np.int64),
    "n": 3,
    "zeros": jnp.zeros((2, 2), jnp.int8),
}


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}], ids=str)
def test_orbax_checkpoints(options: dict[str, bool], tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    path = tmp_path / "run" / "item"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(ORBAX))
    kept = io.lazy_orbax(path)
    assert jax.tree.structure(kept) == jax.tree.structure(ORBAX)
    for leaf, expected in zip(jax.tree.leaves(kept), jax.tree.leaves(ORBAX), strict=True):
        expected = np.asarray(expected)
        assert is_lazy(leaf) and leaf.shape == expected.shape and leaf.dtype == expected.dtype
        assert np.ascontiguousarray(leaf[...]).tobytes() == expected.tobytes()
    same(realize(kept)["layers"], ORBAX["layers"])
    assert kept["layers"][0]["w"][1, 0:2].tolist() == [[12, 13, 14, 15], [16, 17, 18, 19]]
    jq.save(tmp_path / "x", kept["layers"])
    same(jq.load(tmp_path / "x"), ORBAX["layers"])
    assert jax.tree.map(repr, io.lazy_orbax(tmp_path / "run")) == jax.tree.map(repr, kept)
    with pytest.raises(CheckpointError, match="nowhere: no Orbax checkpoint of a tree$"):
        io.lazy_orbax(tmp_path / "nowhere")
    (path / "_METADATA").touch()
    with pytest.raises(CheckpointError, match="the file has changed"):
        kept["zeros"][...]


def test_orbax_standard_checkpointer(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", ORBAX)
    same(realize(io.lazy_orbax(tmp_path / "x"))["layers"], ORBAX["layers"])


def test_orbax_checkpoint_managers(tmp_path: Path) -> None:
    """A manager's folder is its latest step, a step's its only or its default item."""
    ocp = pytest.importorskip("orbax.checkpoint")

    def saved(name: str, steps: dict[int, Any], **options: Any) -> Path:
        with ocp.CheckpointManager(
            tmp_path / name, options=ocp.CheckpointManagerOptions(**options)
        ) as manager:
            for step, args in steps.items():
                manager.save(step, args=args)
        return tmp_path / name

    def tree(value: float) -> Any:
        return ocp.args.StandardSave({"w": jnp.full(2, value)})

    def found(path: Path) -> float:
        return float(io.lazy_orbax(path)["w"][0].item())

    root = saved("plain", {step: tree(step) for step in (3, 20, 100)})
    assert found(root) == found(root / "100") == found(root / "100" / "default") == 100
    assert found(root / "3") == 3
    (root / "200.orbax-checkpoint-tmp-7" / "default").mkdir(parents=True)
    (root / "200.orbax-checkpoint-tmp-7" / "default" / "_METADATA").write_text("{}")
    assert found(root) == 100  # a step that is being written is none yet
    prefixed = {"step_prefix": "ckpt", "step_format_fixed_length": 6}
    assert found(saved("prefix", {step: tree(step) for step in (3, 20)}, **prefixed)) == 20
    both = ocp.args.Composite(params=tree(1), other=ocp.args.JsonSave({"a": 1}))
    assert found(saved("one tree", {5: both})) == 1
    for one, two in (("params", "optimizer"), ("layer_1", "layer_2"), ("1", "2")):
        root = saved(f"{one} {two}", {5: ocp.args.Composite(**{one: tree(1), two: tree(2)})})
        for path in (root, root / "5"):
            with pytest.raises(CheckpointError, match=f"5: no Orbax.*{min(one, two)}, "):
                io.lazy_orbax(path)
        assert found(root / "5" / two) == 2
    for name in ("a_1", "b_2"):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "mixed" / name, {"w": jnp.ones(2)})
    with pytest.raises(CheckpointError, match="mixed: no Orbax.*a_1, b_2"):
        io.lazy_orbax(tmp_path / "mixed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: no Orbax checkpoint of a tree$"):
        io.lazy_orbax(tmp_path / "empty")


def test_orbax_windows_touch_only_their_chunks(tmp_path: Path) -> None:
    """Four chunks, each a file of its own: one can be read where the others are gone."""
    ocp = pytest.importorskip("orbax.checkpoint")
    array = jnp.arange(4.0 * 8).reshape(4, 8)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        args = ocp.args.PyTreeSave({"w": array}, {"w": ocp.SaveArgs(chunk_byte_size=32)})
        checkpointer.save(tmp_path / "x", args=args)
    leaf = io.lazy_orbax(tmp_path / "x")["w"]
    for chunk in ("0.0", "0.1", "1.1"):
        (tmp_path / "x" / "w" / chunk).unlink()
    np.testing.assert_array_equal(leaf[2:, :4], array[2:, :4])
    with pytest.raises(CheckpointError, match="array 'w' cannot be read"):
        leaf[...]


def test_matrices_of_a_stack_are_transposed_by_windows() -> None:
    table = np.arange(24.0).reshape(2, 3, 4)
    leaf = Lazy(table.shape, table.dtype, lambda window: table[window], "a stack")
    assert leaf.mT.shape == (2, 4, 3)
    np.testing.assert_array_equal(leaf.mT[...], table.swapaxes(1, 2))
    np.testing.assert_array_equal(leaf.mT[1:, 2, 1:], table.swapaxes(1, 2)[1:, 2, 1:])
    assert leaf[0].shape == (3, 4) and leaf.mT.identity == "a stack, transposed"
