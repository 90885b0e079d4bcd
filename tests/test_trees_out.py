"""Trees as checkpoints of Orbax, jquant's own and qwix's: the bytes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jquant as jq
from jquant import exporters, formats
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.errors import ExportError, FormatError
from jquant.exporters import trees
from jquant.exporters.described import Described
from jquant.exporters.qwix import hold, nearest, qarray_of
from jquant.exporters.targets import TARGETS, held
from jquant.formats.qarrays import values_of
from jquant.grids import GGUF, HQQ, MX, NF4, NV, Affine, Float, Uniform, code_dtype
from jquant.grids.grouped import Grouped
from jquant.trees.lazy import Lazy
from jquant.weights.inputs import Inputs
from jquant.weights.qtensor import LowRank, QTensor


def weight(
    grid: Any, shape: tuple[int, ...] = (32, 6), groups: Groups = Groups(), **axes: Any
) -> QTensor:
    """Random codes and scales."""
    rng = np.random.default_rng(0)
    layout = Layout.of(shape, **({"in_axes": (0,)} | axes))
    w = jax.eval_shape(layout.canonical, jax.ShapeDtypeStruct(shape, jnp.float32))
    low, high = grid.codes
    codes = rng.integers(low, high + 1, w.shape).astype(code_dtype(grid))
    params = {}
    for name, like in jax.eval_shape(Grouped(grid, groups).fit, w).items():
        is_code = np.dtype(like.dtype).name[0] in "iu"
        numbers = rng.integers(low, high + 1, like.shape) if is_code else (
            2.0 ** rng.integers(-3, 3, like.shape) * (1 if name == "scale" else 0.7)
        )  # fmt: skip
        params[name] = jnp.asarray(numbers.astype(like.dtype))
    return QTensor(jnp.asarray(codes), params, grid, groups, layout, jnp.dtype("float32"))


def nothing(params: Any, x: Any) -> Any:
    """A function of nobody's."""
    raise AssertionError("it is not called")


def read(folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / "default").absolute())


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# Orbax


def test_any_tree_comes_back_from_orbax(tmp_path: Path) -> None:
    low = LowRank(jnp.ones((6, 1)), jnp.ones((1, 32)))
    q = weight(Uniform(4), groups=Groups("in", 8))
    tree = {
        "a": [weight(NF4), replace(q, compensation=low)],
        "b": {"c": weight(NV(), groups=Groups("in", 16)), "d": jnp.arange(3, dtype=jnp.bfloat16)},
        "e": replace(q, activations=Inputs(jq.Activations(Uniform(8, True)))),
    }
    done = jq.export(nothing, tree, tmp_path / "out", format="orbax")
    assert set(done.weights) == {"a/0", "a/1", "b/c", "e"} and done.kept == ("b/d",)
    assert done.nbytes > 0 and {p.name for p in (tmp_path / "out").iterdir()} >= {"default"}
    same(jq.io.restore(jq.io.lazy_orbax(tmp_path / "out")), tree)
    same(jq.io.restore(read(tmp_path / "out")), tree)
    assert exporters.edited(tmp_path / "out") == []
    files = [p for p in (tmp_path / "out" / "default").rglob("*") if p.is_file()]
    file = max(files, key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert exporters.edited(tmp_path / "out") == [file.relative_to(tmp_path / "out").as_posix()]


def test_leaves_may_be_lazy_and_are_read_one_after_the_other(tmp_path: Path) -> None:
    order: list[str] = []

    def lazy(name: str) -> Lazy:
        def values(window: Any) -> np.ndarray:
            order.append(name)
            return np.full((4, 4), len(name), np.float32)[window]

        return Lazy((4, 4), np.dtype("float32"), values, name)

    tree = {"a": lazy("a"), "bb": lazy("bb"), "w": weight(Uniform(4))}
    for target in ("orbax", "qwix"):
        order.clear()
        jq.export(nothing, tree, tmp_path / target, format=target)
        assert order == ["a", "bb"]
    assert not any(".arrays" in str(path) for path in tmp_path.rglob("*"))
    same(jq.io.restore(read(tmp_path / "orbax"))["bb"], jnp.full((4, 4), 2.0))


# qwix


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_kernel_is_what_the_codec_writes(bits: int, symmetric: bool, tmp_path: Path) -> None:
    """The codec is of matrices alone, and was checked against qwix."""
    q = weight(Uniform(bits, symmetric), groups=Groups("in", 8))
    jq.export(nothing, {"kernel": q}, tmp_path / "out", format="qwix")
    arrays = read(tmp_path / "out")["kernel"]["array"]
    codec = formats.qarray(f"int{bits}", tile=8, symmetric=symmetric)
    as_matrix = replace(q, layout=Layout.of((6, 32), in_axes=(1,)))
    assert (arrays["zero_point"] is None) == symmetric
    same({k: np.asarray(v) for k, v in arrays.items() if v is not None}, codec.encode(as_matrix))


SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any], Groups, tuple[int, ...]]] = {
    "heads out": ((32, 2, 4), {}, Groups("in", 8), (4, 2, 4)),
    "heads in, within one": ((4, 8, 6), {"in_axes": (0, 1)}, Groups("in", 4), (4, 2, 6)),
    "heads in, several": ((4, 8, 6), {"in_axes": (0, 1)}, Groups("in", 16), (2, 1, 6)),
    "heads in, all": ((4, 8, 6), {"in_axes": (0, 1)}, Groups(), (1, 1, 6)),
    "a stack": ((3, 16, 4), {"in_axes": (1,), "batch_axes": (0,)}, Groups("in", 8), (3, 2, 4)),
    "groups of outputs": ((8, 6), {}, Groups("out", 3), (8, 2)),
    "a table": ((12, 8), {"in_axes": (1,)}, Groups("in", 4), (12, 2)),
    "a convolution": ((3, 3, 4, 5), {"in_axes": (0, 1, 2)}, Groups("in", 2), (3, 3, 2, 5)),
    "groups of channels": (
        (3, 4, 6), {"in_axes": (0, 1), "batch_axes": (2,), "split_shape": (3, 4, 2, 3)},
        Groups("in", 2), (3, 2, 6),
    ),
}  # fmt: skip
QGRIDS = (
    Uniform(2), Uniform(3, True), Uniform(4, convention="A2", scale_dtype="float16"), Uniform(5),
    Uniform(8, True, scale_dtype="bfloat16"), Float(4, 3, scale="float32"), MX(), MX("E5M2"), NV(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "name"),
    [(QGRIDS[2], name) for name in SHAPES] + [(grid, "heads in, within one") for grid in QGRIDS],
)
def test_a_qarray_stands_for_the_same_numbers(grid: Any, name: str) -> None:
    shape, axes, groups, tiles = SHAPES[name]
    q = weight(grid, shape, groups, **axes)
    arrays = qarray_of(q)
    assert arrays["qvalue"].shape == shape and arrays["scale"].shape == tiles
    assert arrays["scale"].dtype.name in ("float32", "float16", "bfloat16")
    np.testing.assert_array_equal(values_of(arrays), np.asarray(jq.dequantize(q)))


def test_words_by_hand() -> None:
    layout = Layout.of((2, 2, 1), in_axes=(0, 1))
    codes, zero = jnp.array([[0, 3, 1, 2]], jnp.uint2), jnp.array([[1, 3]], jnp.uint2)
    params = {"scale": jnp.array([[0.5, 2.0]]), "zero": zero}
    q = QTensor(codes, params, Uniform(2), Groups("in", 2), layout, jnp.dtype("float32"))
    arrays = {name: array.tolist() for name, array in qarray_of(q).items()}
    assert arrays == {
        "qvalue": [[[-2], [1]], [[-1], [0]]], "scale": [[[0.5]], [[2.0]]],
        "zero_point": [[[-1]], [[1]]],
    }  # fmt: skip


def described(q: QTensor, **changes: Any) -> Described:
    return replace(Described.of(q), **changes)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (described(weight(NF4)), "the grid Codebook"),
        (described(weight(Affine(4))), "the grid Affine"),
        (described(weight(GGUF("Q4_1"))), "the grid GGUF"),
        (described(weight(Float(4, 3))), "the grid Float"),
        (described(weight(MX("E3M2"))), "the grid Float"),
        (described(weight(Uniform(4, range=HQQ()))), "convention A4"),
        (described(weight(Uniform(4)), parts=("LoRC",)), r"parts besides the codes \(LoRC\)"),
        (described(weight(Uniform(8, True)), inputs=jq.Activations(Uniform(8, True))),
         "quantized inputs"),
        (described(weight(Uniform(4), groups=Groups("in", 12))), "do not divide 32"),
        (described(weight(Uniform(4), (4, 6, 5), Groups("in", 8), in_axes=(0, 1))),
         "no tiles of axes of 4 × 6"),
    ],
)  # fmt: skip
def test_what_a_qarray_cannot_hold_is_refused_with_what_it_can(
    case: Described, message: str
) -> None:
    with pytest.raises(FormatError, match=rf"'k': qwix cannot hold .*{message}.*nearest that it"):
        held(TARGETS["qwix"], "k", case)
    hold(nearest(case))
    TARGETS["orbax"].hold(case)


def test_plans_of_any_function_are_refused_by_path(tmp_path: Path) -> None:
    params = {"a": jnp.ones((32, 8)), "b": jnp.ones((8, 4))}
    fn = lambda p, x: x @ p["a"] @ p["b"]  # noqa: E731
    weights = jq.find_weights(fn, params, jnp.ones((2, 32)))
    plan = jq.plan(weights, {"a": jq.Scheme(Uniform(4), 8), "b": jq.Scheme(NF4)})
    exporters.need_held(fn, plan, "orbax")
    with pytest.raises(FormatError, match="'b': qwix cannot hold the grid Codebook"):
        exporters.need_held(fn, plan, "qwix")
    tree = {"a": weight(Uniform(4)), "b": weight(NF4)}
    with pytest.raises(FormatError, match="'b': qwix cannot hold the grid Codebook"):
        jq.export(fn, tree, tmp_path / "out", format="qwix")
    with pytest.raises(FormatError, match="nothing is quantized"):
        jq.export(fn, params, tmp_path / "out", format="orbax")
    assert not any(tmp_path.iterdir())


# The folder appears whole, or not at all


def changed(original: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda folder, tree: original(folder, jax.tree.map(change, tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: np.flip(a), "has other values"),
        (lambda a: a[None], r"is .*\(1, "),
        (lambda a: a.astype(np.float32), "is float32"),
    ],
)
@pytest.mark.parametrize("target", ["orbax", "qwix"])
def test_what_is_not_read_back_as_it_was_is_no_export(
    target: str, change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"w": weight(Uniform(4)), "b": np.arange(4, dtype=np.float32)}
    jq.export(nothing, tree, tmp_path / "out", format=target)
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    monkeypatch.setattr(trees, "save_orbax", changed(trees.save_orbax, change))
    with pytest.raises(ExportError, match=message):
        jq.export(nothing, tree, tmp_path / "out", format=target, force=True)
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*")) == before


def test_other_numbers_of_a_qarray_are_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "qarray_of", lambda q: qarray_of(weight(Uniform(4), (6, 32))))
    with pytest.raises(ExportError, match="weight 'w' stands for other numbers"):
        jq.export(nothing, {"w": weight(Uniform(4))}, tmp_path / "out", format="qwix")
    assert not any(tmp_path.iterdir())


def test_a_place_in_use_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"w": weight(Uniform(4))}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("x")
    with pytest.raises(ExportError, match="no export of jquant"):
        jq.export(nothing, tree, tmp_path / "theirs", format="orbax", force=True)

    def full(folder: Path, arrays: Any) -> None:
        folder.mkdir()
        raise OSError(28, "No space left")

    monkeypatch.setattr(trees, "save_orbax", full)
    with pytest.raises(OSError, match="No space"):
        jq.export(nothing, tree, tmp_path / "out", format="orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
