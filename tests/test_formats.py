"""Formats of quantized checkpoints: the bytes of others, both ways, and what they mean."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import mostly_slow
from oracles import formats as oracle
from oracles.compressed_tensors import COMPRESSED_TENSORS, Stored
from safetensors.numpy import load_file, save_file

import jquant as jq
from jquant import formats, models
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.errors import CheckpointError, FormatError
from jquant.formats.base import Codec, Spec
from jquant.formats.block_types import KINDS, Whole
from jquant.formats.config import quantized_modules
from jquant.grids import GGUF, Uniform, code_dtype
from jquant.grids.grouped import Grouped
from jquant.rounding import GPTQ
from jquant.weights.qtensor import LowRank, QTensor, weight_bits


def torch_model(**settings: Any) -> Any:
    """See `checkpoints`, which skips a test where there is no PyTorch: codecs need none."""
    import checkpoints

    return checkpoints.torch_model(**settings)


def torch_logits(*args: Any) -> Any:
    import checkpoints

    return checkpoints.torch_logits(*args)


def write_gguf(*args: Any, **options: Any) -> Any:
    import checkpoints

    return checkpoints.write_gguf(*args, **options)


OUT = 8
kinds = pytest.mark.parametrize("kind", KINDS)

# Every codec but those of GGUF, with a shape that it holds; some have a last group that is ragged,
# or rows that end within a word.
CODECS: dict[str, tuple[Codec, tuple[int, int]]] = {
    **{f"pack-{b}": (formats.pack_quantized(b, group=10), (6, 30)) for b in range(2, 9)},
    **{
        f"pack-{b}-zeros": (formats.pack_quantized(b, group=7, symmetric=False), (5, 21))
        for b in (2, 3, 4, 7, 8)
    },
    "pack-channel": (formats.pack_quantized(strategy="channel", group=None), (6, 30)),
    "pack-tensor": (
        formats.pack_quantized(strategy="tensor", group=None, symmetric=False), (6, 30)
    ),
    "pack-index": (formats.pack_quantized(group=10, index=True), (6, 30)),
    "int": (formats.int_quantized(), (6, 30)),
    "int-4-zeros": (formats.int_quantized(4, strategy="group", group=6, symmetric=False), (6, 30)),
    "float-channel": (formats.float_quantized(), (6, 30)),
    "float-tensor": (formats.float_quantized(strategy="tensor", scale_dtype="float32"), (6, 30)),
    "float-block": (formats.float_quantized(strategy="block", block=(4, 8)), (6, 30)),
    "nvfp4": (formats.nvfp4_pack_quantized(), (6, 32)),
    "mxfp4": (formats.mxfp4_pack_quantized(), (6, 64)),
    **{
        f"gptq-{b}-v{v}": (formats.gptq(b, group=32, version=v), (32, 64))
        for b in (2, 3, 4, 8) for v in (1, 2)
    },
    "gptq-whole": (formats.gptq(group=None, index=False), (32, 64)),
    "awq": (formats.awq(group=16), (16, 32)),
    **{f"mlx-{b}": (formats.mlx(bits=b, group=32), (6, 96)) for b in (2, 3, 4, 5, 6, 8)},
    "mlx-whole-words": (formats.mlx(group=128, scale_dtype="float16"), (6, 256)),
    **{f"mlx-{mode}": (formats.mlx(mode), (6, 64)) for mode in ("mxfp4", "mxfp8", "nvfp4")},
    "qarray-int4": (formats.qarray("int4", tile=8, symmetric=False), (6, 32)),
    "qarray-int8": (formats.qarray("int8"), (6, 32)),
}  # fmt: skip
each_codec = pytest.mark.parametrize(("codec", "shape"), CODECS.values(), ids=CODECS)


def random_blocks(kind: str, seed: int, blocks: int = 3) -> np.ndarray:
    """Random bytes, but that float16 scales are finite and powers of two make normal numbers."""
    random, row = np.random.default_rng(seed), KINDS[kind]
    raw = random.integers(0, 256, (OUT, blocks, row.nbytes), dtype=np.uint8)
    for name, array in row.arrays.items():
        if name in ("scale", "offset") and isinstance(array, Whole):
            size = (OUT, blocks, 1)
            numbers = random.normal(size=size).astype(np.float16).view(np.uint8)
            powers = random.integers(2, 254, size, dtype=np.uint8)
            raw[..., array.start : array.stop] = powers if kind == "MXFP4" else numbers
    return raw.reshape(OUT, -1)


def random_arrays(codec: Codec, shape: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random codes, all of the grid's, and parameters."""
    random, (low, high) = np.random.default_rng(seed), codec.grid.codes
    arrays: dict[str, np.ndarray] = {}
    for name, spec in codec.storage.arrays(shape).items():
        if jnp.issubdtype(spec.dtype, jnp.integer):
            arrays[name] = random.integers(low, high + 1, spec.shape).astype(spec.dtype)
        else:
            arrays[name] = np.exp2(random.uniform(-6, 6, spec.shape)).astype(spec.dtype)
    for row in codec.storage.rows:  # type: ignore[attr-defined]
        for step in row.steps:  # a block of outputs shares a scale
            if (size := getattr(step, "size", None)) is not None:
                arrays[row.array] = np.repeat(arrays[row.array][::size], size, 0)[: shape[0]]
    return arrays


def weight_of(codec: Codec, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> QTensor:
    params = {name: jnp.asarray(array) for name, array in arrays.items() if name != "codes"}
    layout = Layout.of(shape, in_axes=(1,))
    return QTensor(jnp.asarray(arrays["codes"]), params, codec.grid, codec.groups, layout,
                   jnp.dtype("float32"))  # fmt: skip


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two dicts of arrays are equal to the bit, dtypes and shapes too."""
    return set(a) == set(b) and all(
        np.asarray(a[n]).dtype == np.asarray(b[n]).dtype
        and np.shape(a[n]) == np.shape(b[n])
        and np.asarray(a[n]).tobytes() == np.asarray(b[n]).tobytes()
        for n in a
    )


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are equal."""
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(map(np.array_equal, *leaves))


def array(stored: Stored) -> np.ndarray:
    dtype, shape, raw = stored
    return np.frombuffer(bytes.fromhex(raw), np.dtype(dtype)).reshape(shape)


# GGUF.


@kinds
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_blocks_come_back_to_the_byte(kind: str, seed: int) -> None:
    codec, raw = formats.gguf(kind), random_blocks(kind, seed)
    assert same(codec.encode(codec.decode({"weight": raw})), {"weight": raw})


@kinds
def test_blocks_mean_what_gguf_says(kind: str) -> None:
    raw = random_blocks(kind, 1)
    q = formats.gguf(kind).decode({"weight": raw})
    stands_for = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    got = np.asarray(jax.jit(jq.dequantize)(q))
    np.testing.assert_array_equal(got, stands_for)
    if kind != "MXFP4":  # whose negative zero gguf's table has as zero
        assert got.tobytes() == stands_for.tobytes()


@kinds
def test_a_weight_that_was_rounded_is_written_and_read(kind: str) -> None:
    codec, w = formats.gguf(kind), layer(OUT, 512)[0]
    grid = Grouped(codec.grid, codec.groups)
    params = grid.fit(w)
    codes = grid.nearest(w, params).astype(code_dtype(codec.grid))
    q = QTensor(codes, params, codec.grid, codec.groups, Layout.of(w.shape, in_axes=(1,)), w.dtype)
    tensors = codec.encode(q)
    stands_for = gguf.quants.dequantize(tensors["weight"], gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(np.asarray(jq.dequantize(q)), stands_for)
    bits = {"Q2": 0.7, "Q3": 0.4, "Q4": 0.2, "MX": 0.3, "Q5": 0.1, "Q6": 0.05, "Q8": 0.02}[kind[:2]]
    assert np.abs(stands_for - np.asarray(w)).mean() < bits * np.abs(np.asarray(w)).mean()
    assert equal(codec.decode(tensors), q)


# JAX has integers of 2, 4 and 8 bits: codes of 3 bits lie in 4, those of 5 and 6 in 8.
WIDER = {"Q3_K": 1.33, "Q5_0": 1.55, "Q5_1": 1.5, "Q5_K": 1.57, "Q6_K": 1.31}


@kinds
def test_codes_in_memory_take_little_more_than_blocks_in_a_file(kind: str) -> None:
    row = KINDS[kind]
    q = formats.gguf(kind).decode({"weight": random_blocks(kind, 0)})
    bits = sum(leaf.size * _width(leaf.dtype) for leaf in jax.tree.leaves(q))
    assert bits / q.size <= WIDER.get(kind, 1.15) * 8 * row.nbytes / row.weights
    assert kind in WIDER or weight_bits(q) == bits / q.size


def _width(dtype: Any) -> int:
    return (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits


@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K"])
def test_gptq_knows_which_super_block_a_column_is_in(kind: str) -> None:
    w, moment = layer(6, 160)
    grid, groups = GGUF(kind), Groups("in", 8)
    result = GPTQ()(w, grid, groups, evidence=moment)
    error = w - Grouped(grid, groups).decode(result.codes, result.params)
    loss = float(jnp.sum((error @ moment) * error))
    np.testing.assert_allclose(float(result.info["error"]), loss, rtol=2e-3)
    assert loss < 0.9 * float(result.info["nearest_error"])


def test_a_scale_of_zero_is_no_nan() -> None:
    raw = np.zeros((2, KINDS["Q4_K"].nbytes), np.uint8)
    q = formats.gguf("Q4_K").decode({"weight": raw})
    params = {name: leaf for name, leaf in q.params.items()}
    codes = Grouped(q.grid, q.groups).nearest(jnp.ones(q.shape), params)
    assert not np.asarray(codes).any() and not np.asarray(jq.dequantize(q)).any()


# The others.


@each_codec
def test_arrays_come_back_from_their_tensors(codec: Codec, shape: tuple[int, int]) -> None:
    arrays = random_arrays(codec, shape)
    q = weight_of(codec, arrays, shape)
    tensors = codec.encode(q)
    assert {n: Spec(t.shape, t.dtype) for n, t in tensors.items()} == codec.storage.tensors(shape)
    again = codec.decode(tensors)
    assert same({"codes": again.codes, **again.params}, arrays)
    assert same(codec.encode(again), tensors)
    assert jax.tree.structure(again) == jax.tree.structure(q)


@pytest.mark.parametrize("name", ["gptq-2-v1", "gptq-3-v1", "gptq-4-v1", "gptq-8-v2", "awq"])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_any_words_of_whole_rows_come_back(name: str, seed: int) -> None:
    (codec, shape), random = CODECS[name], np.random.default_rng(seed)
    tensors = codec.encode(weight_of(codec, random_arrays(codec, shape), shape))
    for key in ("qweight", "qzeros"):
        words = random.integers(-(2**31), 2**31, tensors[key].shape)
        tensors[key] = words.astype(np.int32)
    assert same(codec.encode(codec.decode(tensors)), tensors)


@pytest.mark.parametrize("name", COMPRESSED_TENSORS)
def test_compressed_tensors_own_files(name: str) -> None:
    stored, weight = COMPRESSED_TENSORS[name]
    tensors = {key: array(one) for key, one in stored.items()}
    codec = {
        "pack-3-asymmetric": formats.pack_quantized(
            3, group=10, symmetric=False, scale_dtype="bfloat16"
        ),
        "pack-5-channel": formats.pack_quantized(
            5, strategy="channel", group=None, scale_dtype="float16"
        ),
        "int-8-tensor": formats.int_quantized(strategy="tensor", scale_dtype="float32"),
        "float-block": formats.float_quantized(
            strategy="block", block=(2, 4), scale_dtype="float32"
        ),
        "nvfp4": formats.nvfp4_pack_quantized(),
        "mxfp4": formats.mxfp4_pack_quantized(),
    }[name]
    q = codec.decode(tensors, array(weight).dtype)
    assert np.asarray(jq.dequantize(q)).tobytes() == array(weight).tobytes()
    assert same(codec.encode(q), tensors)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized_is_the_documented_layout(bits: int, symmetric: bool) -> None:
    random, half = np.random.default_rng(bits), 1 << (bits - 1)
    q = random.integers(-half, half, (5, 24))
    zero = None if symmetric else random.integers(-half, half, (5, 3))
    scale = random.normal(size=(5, 3)).astype(np.float32)
    tensors = oracle.pack_quantized(q, scale, zero, bits)
    codec = formats.pack_quantized(bits, group=8, symmetric=symmetric, scale_dtype="float32")
    got = np.asarray(jq.dequantize(codec.decode(tensors)))
    less = 0 if zero is None else np.repeat(zero, 8, 1)
    np.testing.assert_array_equal(got, (q - less).astype(np.float32) * np.repeat(scale, 8, 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_is_the_documented_layout(bits: int, version: Any) -> None:
    random = np.random.default_rng(bits)
    q = random.integers(0, 1 << bits, (32, 64))
    zero = random.integers(1 if version == 1 else 0, 1 << bits, (32, 2))
    scale = random.normal(size=(32, 2)).astype(np.float16)
    tensors = oracle.gptq(q, scale, zero, bits, version)
    got = formats.gptq(bits, group=32, version=version).decode(tensors)
    expected = (q - np.repeat(zero, 32, 1)) * np.repeat(scale, 32, 1).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jq.dequantize(got)), expected)


def test_awq_is_the_documented_layout() -> None:
    random = np.random.default_rng(0)
    q, zero = random.integers(0, 16, (16, 32)), random.integers(0, 16, (16, 2))
    scale = random.normal(size=(16, 2)).astype(np.float16)
    got = formats.awq(group=16).decode(oracle.awq(q, scale, zero))
    expected = (q - np.repeat(zero, 16, 1)) * np.repeat(scale, 16, 1).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jq.dequantize(got)), expected)


def test_zero_points_of_the_first_gptq_borrow_as_gptqmodel_has_it() -> None:
    """The zero points 0, 0, 1, 0, 5, 0, 15, 0 less one, word for word (GPTQModel 7.2.0)."""
    fields = np.array([[15, 14, 15, 14, 3, 15, 13, 15]])
    codec, shape = formats.gptq(group=None, index=False), (8, 8)
    tensors = {
        "qweight": np.zeros((1, 8), np.int32),
        "qzeros": oracle.stream(fields, 4),
        "scales": np.ones((1, 8), np.float16),
    }
    q = codec.decode(tensors)
    assert q.shape == shape and q.params["zero"][:, 0].tolist() == [0, 0, 1, 0, 5, 0, 15, 0]


def test_words_that_gptqmodel_read() -> None:
    """Random words, read by GPTQModel 7.2.0 after its conversion of version 1."""
    words = np.array([0xFD1164C7, 0xD2DC1087, 0x48427F81], np.uint32).view(np.int32)
    zeros = np.array([[0xAD2EC015, 0x91688A3A, 0xB6630C5D]], np.uint32).view(np.int32)
    tensors = {
        "qweight": np.ascontiguousarray(np.broadcast_to(words[:, None], (3, 32))),
        "qzeros": zeros,
        "scales": np.full((1, 32), 0.125, np.float16),
        "g_idx": np.zeros(32, np.int32),
    }
    w = np.asarray(jq.dequantize(formats.gptq(3, group=32).decode(tensors))) / 0.125
    assert w[0].tolist() == [
        1, -6, -3, -4, 0, -4, -2, -6, -1, 1, 1, -3, -6, -5, -2, -6,
        -2, -3, -3, -5, -1, -3, -6, -2, 1, 1, -5, -5, -2, -6, -4, -4,
    ]  # fmt: skip
    assert w[:8, 0].tolist() == [1, 4, 6, 6, 2, 1, 3, 5]
    packed = np.array([[0x9D52E3DA], [0x74BDDEA3]], np.uint32).view(np.int32)
    awq = {
        "qweight": packed,
        "qzeros": np.array([[0x4C8300DD]], np.uint32).view(np.int32),
        "scales": np.full((1, 8), 0.5, np.float16),
    }
    assert np.asarray(jq.dequantize(formats.awq(group=2).decode(awq)))[:4].tolist() == [
        [-1.5, -5.0], [-0.5, 5.0], [0.0, -1.5], [-1.5, 1.5],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["float-channel", "nvfp4", "mxfp4", "gptq-3-v1"])
def test_a_weight_of_a_file_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    codec, shape = CODECS[name]
    q = weight_of(codec, random_arrays(codec, shape), shape)
    jq.save(tmp_path / "w.safetensors", {"w": q})
    again = jq.load(tmp_path / "w.safetensors")["w"]
    assert same(codec.encode(again), codec.encode(q))


# What is refused.


@each_codec
def test_what_is_missing_left_over_or_misshapen_is_named(
    codec: Codec, shape: tuple[int, int]
) -> None:
    tensors = codec.encode(weight_of(codec, random_arrays(codec, shape), shape))
    for name, tensor in tensors.items():
        for other, says in (
            ({n: t for n, t in tensors.items() if n != name}, "is missing"),
            ({**tensors, name: tensor.astype(np.float64)}, "float64|two sizes"),
            ({**tensors, name: tensor[None]}, r"\(1, |matrix|two sizes"),
        ):
            with pytest.raises(CheckpointError, match=f"{name}.*({says})|({says}).*{name}"):
                codec.decode(other)
    with pytest.raises(CheckpointError, match="'more' is none of"):
        codec.decode({**tensors, "more": np.zeros(1)})


def _changed(name: str, **changes: Any) -> tuple[Codec, dict[str, np.ndarray]]:
    codec, shape = CODECS[name]
    tensors = codec.encode(weight_of(codec, random_arrays(codec, shape), shape))
    for key, change in changes.items():
        tensors[key] = change(tensors[key].copy())
    return codec, tensors


def _put(at: int, value: Any) -> Any:
    def put(tensor: np.ndarray) -> np.ndarray:
        tensor.reshape(-1)[at] = value
        return tensor

    return put


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pack-4", {"weight_scale": _put(0, np.nan)}, "'scale' holds NaN"),
        ("pack-4", {"weight_scale": _put(3, np.inf)}, "'scale' holds NaN or infinity"),
        ("pack-3", {"weight_packed": _put(2, -1)}, "'weight_packed' .*not zero"),
        ("pack-4", {"weight_shape": lambda t: t * 0}, "'weight_shape' does not hold two sizes"),
        ("pack-4", {"weight_shape": lambda t: t + [0, 10]}, "'weight_packed' is int32"),
        ("pack-4", {"weight_shape": lambda t: t + [0, 1]}, "31 inputs; .* groups of 10"),
        ("pack-4", {"weight_shape": lambda t: t + 2**40}, "'weight_shape'"),
        ("pack-index", {"weight_g_idx": _put(0, 1)}, "'weight_g_idx' puts 9 inputs.*desc_act"),
        ("gptq-4-v1", {"g_idx": _put(3, -1)}, "'g_idx' puts 1 inputs into group -1, which has 0"),
        ("int-4-zeros", {"weight": _put(0, 8)}, r"'weight' holds codes outside 0 \.\. 15"),
        (
            "float-channel",
            {"weight": lambda t: (t * np.nan).astype(t.dtype)},
            "'weight' holds numbers that are NaN",
        ),
        ("nvfp4", {"weight_scale": lambda t: (t * np.nan).astype(t.dtype)}, "'scale' holds NaN"),
        ("nvfp4", {"weight_global_scale": _put(0, np.nan)}, "'divisor' holds NaN"),
        ("mxfp4", {"weight_scale": _put(0, 255)}, "'scale' holds NaN"),
        ("mlx-4", {"biases": _put(0, np.inf)}, "'bias' holds NaN or infinity"),
        ("mlx-4", {"weight": lambda t: t[:, :-1]}, "88 inputs; MLX affine has groups of 32"),
        ("mlx-4", {"weight": lambda t: t[:, :-4]}, "'scales' is bfloat16"),
        ("mlx-mxfp8", {"weight": _put(0, 127)}, "'weight' holds numbers that are NaN"),
    ],
)
def test_damaged_tensors_are_refused(name: str, changes: dict, message: str) -> None:
    codec, tensors = _changed(name, **changes)
    with pytest.raises(CheckpointError, match=message):
        codec.decode(tensors)


def test_damaged_blocks_are_refused() -> None:
    raw = random_blocks("Q4_1", 0)
    raw[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match="'scale' holds NaN"):
        formats.gguf("Q4_1").decode({"weight": raw})
    with pytest.raises(CheckpointError, match="20"):
        formats.gguf("Q4_1").decode({"weight": raw[:, :-1]})
    with pytest.raises(FormatError, match="'IQ4_XS' has no codec; .*Q4_K"):
        formats.gguf("IQ4_XS")


def _with(**fields: Any) -> Any:
    return lambda q: dataclasses.replace(q, **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(grid=Uniform(4, scale_dtype="bfloat16")), r"Uniform\(bits=4, symmetric=False"),
        (_with(grid=Uniform(3, symmetric=True, scale_dtype="bfloat16")), "bits=3"),
        (_with(groups=Groups("in", 15)), "size=15"),
        (_with(groups=Groups("out", 10)), "axis='out'"),
        (lambda q: dataclasses.replace(q, params={"scale": q.params["scale"].astype("float32")}),
         r"'scale' as float32 \(6, 3\); it holds bfloat16"),
        (_with(codes=jnp.zeros((2, 6, 30), jnp.int4)), "one matrix"),
        (_with(compensation=LowRank(jnp.ones((6, 1)), jnp.ones((1, 30)))), r"\(LowRank\)"),
        (_with(params={}), r"\['codes'\]"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused(change: Any, message: str) -> None:
    codec, shape = CODECS["pack-4"][0], (6, 30)
    with pytest.raises(FormatError, match=message):
        codec.encode(change(weight_of(codec, random_arrays(codec, shape), shape)))


def test_rows_of_a_block_share_a_scale() -> None:
    codec, shape = CODECS["float-block"]
    arrays = random_arrays(codec, shape)
    arrays["scale"][1] *= 2
    with pytest.raises(FormatError, match="'scale': parameters of 4 neighbouring rows differ"):
        codec.encode(weight_of(codec, arrays, shape))


@pytest.mark.parametrize(
    "make",
    [
        lambda: formats.pack_quantized(9),
        lambda: formats.pack_quantized(True),
        lambda: formats.pack_quantized(strategy="channel"),
        lambda: formats.pack_quantized(group=None),
        lambda: formats.pack_quantized(group=0),
        lambda: formats.pack_quantized(scale_dtype="float64"),
        lambda: formats.float_quantized(block=(2, 2)),
        lambda: formats.float_quantized(strategy="block", block=(2, 0)),
        lambda: formats.gptq(5),
        lambda: formats.gptq(group=-1),
        lambda: formats.gptq(version=3),  # type: ignore[arg-type]
        lambda: formats.mlx("affine8"),  # type: ignore[arg-type]
        lambda: formats.mlx(bits=7),
        lambda: formats.mlx(bits=True),
        lambda: formats.mlx(group=16),
        lambda: formats.mlx(scale_dtype="uint8"),
        lambda: formats.mlx("mxfp4", bits=8),
        lambda: formats.mlx("nvfp4", group=32),
        lambda: formats.qarray("int3"),
        lambda: formats.qarray(tile=-1),
    ],
)
def test_formats_that_are_none_are_refused(make: Any) -> None:
    with pytest.raises(FormatError):
        make()


# Models.


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", mostly_slow(["Q4_0", "Q8_0"], ["Q4_0"]))
def test_a_gguf_model_runs_on_its_codes(kind: str, scan: bool, tmp_path: Path) -> None:
    model = torch_model(tie_word_embeddings=scan)  # a Llama: rows of q and k are sorted
    path = write_gguf(tmp_path / "m.gguf", model, types={"": kind})
    fn, dense, _ = models.load(path, scan_layers=scan)
    _, kept, _ = models.load(path, scan_layers=scan, quantized="keep")
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    weights = [q for q in jax.tree.leaves(kept, is_leaf=_is_q) if _is_q(q)]
    assert len(weights) == (1 + 7 if scan else 2 + 14)
    assert equal(jq.dequantize(kept), dense)
    got = np.asarray(jax.jit(jq.apply(fn))(kept, tokens))
    np.testing.assert_allclose(got, np.asarray(jax.jit(fn)(dense, tokens)), atol=1e-5)
    _, lazy, _ = models.load(path, scan_layers=scan, quantized="keep", lazy=True)
    leaves = jax.tree.leaves(lazy)
    assert all(isinstance(leaf, jq.Lazy) for leaf in leaves)
    assert equal(jq.realize(lazy), kept)


K_QUANTS = {
    "attn_q": "Q2_K", "attn_k": "Q3_K", "attn_v": "Q6_K", "attn_output": "Q4_K",
    "ffn_gate": "Q5_K", "ffn_up": "Q4_K", "ffn_down": "Q3_K", "token_embd": "Q6_K",
    "output": "Q6_K",
}  # fmt: skip


@pytest.mark.parametrize("types", [{"ffn": "Q4_K"}, pytest.param(K_QUANTS, marks=pytest.mark.slow)])
def test_a_gguf_model_of_k_quants_gives_the_logits_of_what_gguf_says(
    types: dict[str, str], tmp_path: Path
) -> None:
    model = torch_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    path = write_gguf(tmp_path / "m.gguf", model, types=types)
    fn, kept, _ = models.load(path, quantized="keep")
    weights = [q for q in jax.tree.leaves(kept, is_leaf=_is_q) if _is_q(q)]
    assert len(weights) == (9 if types is K_QUANTS else 3)
    assert {q.grid for q in weights} == {GGUF(kind) for kind in types.values()}
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    expected = torch_logits(model, np.array(tokens))  # of the arrays that gguf dequantizes
    got = jq.apply(fn)(kept, tokens)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def _is_q(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def test_layers_of_different_types_are_no_stack(tmp_path: Path) -> None:
    types = {"blk.0.ffn_down": "Q8_0", "": "Q4_0"}
    path = write_gguf(tmp_path / "m.gguf", torch_model(), types=types)
    models.load(path, quantized="keep")
    with pytest.raises(CheckpointError, match=r"mlp/down/kernel: layers differ.*scan_layers"):
        models.load(path, quantized="keep", scan_layers=True)


def test_types_without_a_codec_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", torch_model(hidden_size=256), types={"ffn_up": "TQ2_0"})
    models.load(path)
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up.weight' has type TQ2_0.*dequantize"):
        models.load(path, quantized="keep")
    with pytest.raises(ValueError, match="quantized must be one of"):
        models.load(path, quantized="yes")  # type: ignore[arg-type]


def test_damaged_scales_of_a_model_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", torch_model(), types={"": "Q4_0"})
    start = models.loading.read_gguf(path).tensors["blk.1.ffn_up.weight"].start  # type: ignore[attr-defined]
    raw = bytearray(path.read_bytes())
    raw[start : start + 2] = np.array([np.inf], np.float16).tobytes()
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"'blk.1.ffn_up.weight': .*'scale' holds NaN"):
        models.load(path, quantized="keep")


FOLDERS: dict[str, tuple[Codec, dict[str, Any]]] = {
    "pack-quantized": (
        formats.pack_quantized(3, group=32, symmetric=False, scale_dtype="float32"),
        {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
    ),
    "float-quantized": (
        formats.float_quantized(scale_dtype="float32"),
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    ),
    "int-quantized": (
        formats.int_quantized(scale_dtype="float32"),
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    ),
    "mxfp4-pack-quantized": (
        formats.mxfp4_pack_quantized(),
        {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32},
    ),
    "gptq": (formats.gptq(group=32, version=2), {"bits": 4, "group_size": 32}),
    "awq": (formats.awq(group=32), {"bits": 4, "group_size": 32, "version": "gemm"}),
}


def write_folder(folder: Path, name: str, **more: Any) -> None:
    """A Hugging Face folder of a random Llama; its linear layers but the head are quantized."""
    codec, settings = FOLDERS[name]
    torch_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    grid = Grouped(codec.grid, codec.groups)

    @jax.jit
    def rounded(w: jax.Array) -> tuple[jax.Array, Any]:
        params = grid.fit(w)
        return grid.nearest(w, params).astype(code_dtype(codec.grid)), params

    for weight in [n for n in tensors if "_proj.weight" in n]:
        w = jnp.asarray(tensors.pop(weight))
        codes, params = rounded(w)
        layout = Layout.of(w.shape, in_axes=(1,))
        q = QTensor(codes, params, codec.grid, codec.groups, layout, w.dtype)
        module = weight.removesuffix("weight")
        tensors |= {module + key: tensor for key, tensor in codec.encode(q).items()}
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    weights = {"weights": settings, "targets": ["Linear"], "input_activations": None, **more}
    config["quantization_config"] = (
        {"quant_method": name, **settings, "checkpoint_format": "gptq_v2"} if name == "gptq"
        else {"quant_method": name, **settings} if name == "awq"
        else {"quant_method": "compressed-tensors", "format": name, "ignore": ["lm_head"],
              "config_groups": {"group_0": weights}}
    )  # fmt: skip
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", mostly_slow(FOLDERS, ["pack-quantized", "gptq"]))
def test_a_folder_of_quantized_modules(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, name)
    fn, dense, _ = models.load(tmp_path)
    _, kept, _ = models.load(tmp_path, quantized="keep")
    q = kept["layers"]["1"]["mlp"]["down"]["kernel"]
    assert q.grid == FOLDERS[name][0].grid and q.shape == (96, 64)
    assert not _is_q(kept["head"]["kernel"]) and not _is_q(kept["embed"]["embedding"])
    np.testing.assert_array_equal(
        np.asarray(jq.dequantize(q)), np.asarray(dense["layers"]["1"]["mlp"]["down"]["kernel"])
    )
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    got = np.asarray(jax.jit(jq.apply(fn))(kept, tokens))
    np.testing.assert_allclose(got, np.asarray(jax.jit(fn)(dense, tokens)), atol=1e-5)


@pytest.mark.parametrize("quantized", ["keep", "dequantize"])
def test_what_is_no_number_is_told_with_its_module(quantized: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 5] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*'scale' holds NaN"):
        models.load(tmp_path, quantized=quantized)


def test_quantized_inputs_of_a_folder(tmp_path: Path) -> None:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    write_folder(tmp_path, "int-quantized", input_activations=inputs)
    _, kept, _ = models.load(tmp_path, quantized="keep")
    choice = kept["layers"]["0"]["attention"]["q"]["kernel"].activations.choice
    assert choice == jq.Activations(Uniform(8, symmetric=True))
    write_folder(tmp_path, "int-quantized", input_activations={**inputs, "dynamic": False})
    models.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"_proj'.*inputs are quantized.*dequantize'"):
        models.load(tmp_path, quantized="keep")


SPECS = {
    f"m.fc.{name}": Spec(shape, np.dtype(dtype))
    for name, (shape, dtype) in {
        "weight_packed": ((4, 4), "int32"),
        "weight_scale": ((4, 1), "bfloat16"),
        "weight_shape": ((2,), "int64"),
        "qweight": ((4, 8), "int32"),
    }.items()
}
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True,
                                            "strategy": "group", "group_size": 32}}  # fmt: skip
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"g": GROUP},
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "expected an object"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported; .*gptq"),
        ({"quant_method": ["gptq"]}, "is not supported"),
        ({"quant_method": "gptq", "bits": 5}, "module 'm.fc': bits=5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "x"}, "group='x'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {}}}, "dynamic = "),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version = 'gemv'"),
        ({**CT, "config_groups": None}, "config_groups = None"),
        (
            {**CT, "config_groups": {"g": {**GROUP, "targets": ["re:.*up"]}}},
            "none of config_groups",
        ),
        ({**CT, "config_groups": {"g": {**GROUP, "targets": ["re:("]}}}, "target 're:"),
        ({**CT, "config_groups": {"g": {**GROUP, "weights": None}}}, "weights = None"),
        ({**CT, "format": "marlin-24"}, "format 'marlin-24' is none of"),
        ({**CT, "transform_config": {"r": 1}}, "transform_config = "),
        ({**CT, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme = "),
        ({**CT, "sparsity_config": {"format": "sparse-24"}}, "format = 'sparse-24'"),
    ],
)
def test_configs_that_say_what_is_not_done_are_refused(config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        quantized_modules(config, SPECS)


def test_a_module_is_found_by_name_before_expression_before_class() -> None:
    def group(target: str, bits: int) -> dict[str, Any]:
        return {"targets": [target], "weights": {**GROUP["weights"], "num_bits": bits}}

    groups = {"a": group("Linear", 2), "b": group("re:.*fc", 3), "c": group("m.fc", 4)}
    for bits, names in ((4, "abc"), (3, "ab"), (2, "a")):
        config = {**CT, "config_groups": {name: groups[name] for name in names}}
        assert quantized_modules(config, SPECS)["m.fc"].codec.grid.bits == bits
