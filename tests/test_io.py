"""Checkpoints give back every bit, take the bytes they should, and appear whole or not at all."""

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cases import GRIDS
from marks import covering, mostly_slow

import jquant as jq
from jquant import io
from jquant.axes.groups import to_groups
from jquant.errors import CheckpointError, TreeError
from jquant.grids import MSE, Uniform
from jquant.grids.base import code_dtype
from jquant.io.bitstream import pack_bits, stream_bytes, unpack_bits
from jquant.io.container import Entry
from jquant.io.leaves import JAX_DTYPES, claim

# name: (grid, groups, shape, in axes, batch axes)
SCHEMES = {
    **{
        f"{bits} bits{' symmetric' if symmetric else ''}": (
            Uniform(bits, symmetric), jq.Groups("in", 8), (24, 6), (0,), (),
        )
        for bits, symmetric in covering(range(2, 9), (False, True))
    },
    "ragged groups": (Uniform(4), jq.Groups("in", 7), (24, 5), (0,), ()),
    "groups along out": (Uniform(3), jq.Groups("out", 4), (9, 10), (1,), ()),
    "whole axis": (Uniform(5, True), jq.Groups("in"), (3, 16, 4), (1,), (0,)),
    "attention": (Uniform(4), jq.Groups("in", 4), (2, 12, 3, 4), (1,), (0,)),
    "batch axis in the middle": (Uniform(4), jq.Groups("in", 4), (12, 3, 5), (0,), (1,)),
    "searched range": (Uniform(3, range=MSE()), jq.Groups("in", 8), (16, 4), (0,), ()),
    "float zero": (Uniform(4, convention="A3"), jq.Groups("in", 8), (16, 4), (0,), ()),
    "restricted": (Uniform(4, True, "S3"), jq.Groups("in", 8), (16, 4), (0,), ()),
    "mx": (jq.grids.MX(), None, (2, 70, 5), (1,), (0,)),
    "nv": (jq.grids.NV(), None, (2, 40, 5), (1,), (0,)),
    "12 bits": (jq.grids.Float(4, 7, scale="float32"), jq.Groups("in", 8), (2, 24, 5), (1,), (0,)),
    "16 bits": (jq.grids.Float(8, 7), jq.Groups("out", 4), (16, 9), (0,), ()),
    "16 bits unsigned": (jq.grids.Float(6, 10, signed=False), jq.Groups(), (16, 9), (0,), ()),
    "bfloat16 scales": (Uniform(4, scale_dtype="bfloat16"), jq.Groups(), (16, 4), (0,), ()),
    # Uniform grids are above; those that only search for their parameters are stored alike.
    **{
        name: (grid, jq.Groups("in", 8), (2, 20, 5), (1,), (0,))
        for name, grid in GRIDS.items()
        if not isinstance(grid, Uniform) and not name.endswith("-mse")
    },
}  # fmt: skip


def quantized(grid, groups, shape, in_axes, batch_axes=(), dtype="float32", seed=0) -> jq.QTensor:
    """A weight rounded to nearest."""
    w = jax.random.normal(jax.random.key(seed), shape, dtype)
    layout = jq.Layout.of(shape, in_axes=in_axes, batch_axes=batch_axes)
    return jq.quantize_weight(w, jq.Scheme(grid, groups), layout)[0]


def assert_same(a, b) -> None:
    """Equal structure, dtypes, shapes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
        if x.dtype.name in ("int2", "int4", "uint2", "uint4", "int1", "uint1"):
            np.testing.assert_array_equal(x.astype(np.int8), y.astype(np.int8))
        else:
            assert x.tobytes() == y.tobytes()


# Bit streams


def word(bits: int) -> type:
    """The type of codes of this width."""
    return np.uint8 if bits <= 8 else np.uint16


@hypothesis.given(bits=st.integers(1, 16), codes=st.lists(st.integers(0, 65535), max_size=70))
def test_streams_are_the_bits_one_after_the_other(bits: int, codes: list[int]) -> None:
    values = (np.array(codes, np.uint16) & ((1 << bits) - 1)).astype(word(bits))
    stream = pack_bits(values, bits)
    number = sum(int(v) << (bits * i) for i, v in enumerate(values))
    assert stream.tobytes() == number.to_bytes(stream_bytes(len(codes), bits), "little")
    np.testing.assert_array_equal(unpack_bits(stream, bits, len(codes)), values)


# The codes 0 1 2 … modulo the width, written by hand: any change breaks every file there is.
GOLDEN = {
    1: "aaaa", 2: "e4e4e4e4", 3: "88c6fa88c6fa", 4: "1032547698badcfe",
    5: "2088418a3928a9c59a7b", 8: "000102030405060708090a0b0c0d0e0f",
    9: "0002081840a080810308122858c0a0818307",
    16: "".join(f"{k:02x}00" for k in range(16)),
}  # fmt: skip


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_streams(bits: int) -> None:
    codes = (np.arange(16) % (1 << bits)).astype(word(bits))
    assert pack_bits(codes, bits).tobytes().hex() == GOLDEN[bits]


@pytest.mark.parametrize("bits", range(1, 17))
def test_streams_across_chunks(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (1 << 18) + 13).astype(word(bits))
    back = unpack_bits(pack_bits(codes, bits), bits, codes.size)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)


def test_streams_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="a code of 8 does not fit in 3 bits"):
        pack_bits(np.array([8], np.uint8), 3)
    with pytest.raises(ValueError, match="take 2 bytes, got 3"):
        unpack_bits(np.zeros(3, np.uint8), 4, 3)
    with pytest.raises(ValueError, match="a code of 512 does not fit in 9 bits"):
        pack_bits(np.array([512], np.uint16), 9)
    with pytest.raises(ValueError, match="from 1 to 16"):
        pack_bits(np.zeros(3, np.uint8), 17)


def test_a_stream_wider_than_its_integers_is_refused() -> None:
    node = {"array": "a", "crc32": "0", "dtype": "int8", "shape": [2], "bits": 12, "low": 0}
    entry = Entry("U8", (3,), 0, 3)
    assert claim({**node, "dtype": "int16"}, entry).shape == (2,)
    with pytest.raises(CheckpointError, match="does not fit its 3 bytes"):
        claim(node, entry)


# Round trips


# One of each kind of layout, and of each width of codes that is stored in another way.
QUICK = (
    "2 bits", "3 bits symmetric", "4 bits symmetric", "7 bits symmetric", "ragged groups",
    "attention", "mx", "nv", "12 bits", "16 bits", "batch axis in the middle", "groups along out",
    "nf4", "kmeans-4",
)  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(SCHEMES, QUICK))
def test_every_scheme_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    grid, groups, shape, in_axes, batch_axes = SCHEMES[name]
    q = quantized(grid, groups, shape, in_axes, batch_axes)
    jq.save(tmp_path / "w", {"w": q})
    back = jq.load(tmp_path / "w")
    assert_same(back, {"w": q})
    np.testing.assert_array_equal(jq.dequantize(back)["w"], jq.dequantize(q))
    assert io.read_header(tmp_path / "w").leaves["w"].shape == shape


@pytest.mark.parametrize("dtype", sorted(JAX_DTYPES))
def test_every_dtype_comes_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    values = np.arange(-4, 5).clip(-2 if "int2" in dtype else -4, 1 if "2" in dtype else 4)
    values = np.abs(values) % 2 if dtype.startswith(("uint", "bool", "int1")) else values
    array = values.astype(JAX_DTYPES[dtype]).reshape(3, 3)
    jq.save(tmp_path / "a", [array])
    (back,) = jq.load(tmp_path / "a")
    assert back.dtype == array.dtype
    assert np.asarray(back).tobytes() == array.tobytes()


def test_floats_keep_their_payloads(tmp_path: Path) -> None:
    bits = np.array([0x7FC01234, 0xFF800000, 0x80000000, 0x00000001], np.uint32)
    jq.save(tmp_path / "a", {"a": bits.view(np.float32)})
    assert np.asarray(jq.load(tmp_path / "a")["a"]).view(np.uint32).tolist() == bits.tolist()


def test_trees_come_back_as_they_were(tmp_path: Path) -> None:
    q = quantized(Uniform(4), jq.Groups("in", 8), (16, 4), (0,))
    tree = {
        "layers": [{"w": q, "b": jnp.zeros(3)}, {"w": q, "b": None}],
        "pair": (jnp.ones((), jnp.bfloat16), np.arange(3)),
        "empty": {},
        "nothing": [[], ()],
        3: jnp.zeros((0, 5)),
        "3": jnp.ones(2),
        "a/b": jnp.ones(1),
        "a": {"b": jnp.zeros(1)},
        "__metadata__": jnp.zeros(2),
        "é\n": jnp.ones(1, jnp.int8),
    }
    # JAX cannot order int and str keys of one dict, so these stand one level apart.
    tree = {"mixed": {3: tree.pop(3)}, **tree}
    jq.save(tmp_path / "t", tree)
    assert_same(jq.load(tmp_path / "t"), tree)
    header = io.read_header(tmp_path / "t")
    assert len(header.leaves) == len(jax.tree.leaves(tree, is_leaf=lambda x: x is q))
    for bare in (q, jnp.ones(3), [], None):
        jq.save(tmp_path / "t", bare)
        assert_same(jq.load(tmp_path / "t"), bare)


@hypothesis.given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    size=st.none() | st.integers(1, 24),
    axis=st.sampled_from(["in", "out"]),
)
def test_any_shape_comes_back(tmp_path_factory, bits, symmetric, shape, size, axis) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    # Random codes and parameters of the right shapes: nothing here needs compiling.
    layout = jq.Layout.of(shape, in_axes=(1,), batch_axes=(0,))
    groups, grid, rng = jq.Groups(axis, size), Uniform(bits, symmetric), np.random.default_rng(bits)
    codes = rng.integers(grid.codes[0], grid.codes[1] + 1, (shape[0], shape[2], shape[1]))
    abstract = jax.ShapeDtypeStruct(codes.shape, "float32")
    params = jax.eval_shape(lambda w: grid.fit(to_groups(w, groups)), abstract)
    params = {
        k: jnp.asarray(rng.integers(0, 3, p.shape).astype(p.dtype)) for k, p in params.items()
    }
    codes = jnp.asarray(codes.astype(code_dtype(grid)))
    q = jq.QTensor(codes, params, grid, groups, layout, jnp.dtype("bfloat16"))
    jq.save(path, [q])
    assert_same(jq.load(path), [q])


# What a file is


def test_a_file_is_as_small_as_arithmetic_says(tmp_path: Path) -> None:
    rows = columns = 1024
    q = quantized(Uniform(4), jq.Groups("in", 64), (columns, rows), (0,))
    jq.save(tmp_path / "w", {"w": q})
    groups = rows * columns // 64
    expected = rows * columns * 4 // 8 + groups * 4 + groups * 4 // 8  # codes, scales, zeros
    header = io.read_header(tmp_path / "w")
    assert header.leaves["w"].bytes == expected
    assert expected < header.file_bytes < expected * 1.01


def test_other_readers_of_safetensors_can_open_it(tmp_path: Path) -> None:
    q = quantized(Uniform(3), jq.Groups("in", 8), (16, 4), (0,))
    jq.save(tmp_path / "w", {"w": q, "b": jnp.arange(3.0)}, metadata={"who": "test"})
    read = safetensors.numpy.load_file(tmp_path / "w")
    assert read["b"].tolist() == [0.0, 1.0, 2.0]
    codes = unpack_bits(read["w/codes"], 3, 64).reshape(4, 16)
    np.testing.assert_array_equal(codes, np.asarray(q.codes).astype(np.uint8))


def test_header_and_single_weights_read_alone(tmp_path: Path) -> None:
    q = quantized(Uniform(4), jq.Groups("in", 8), (16, 4), (0,), dtype="bfloat16")
    tree = {"a": {"w": q, "b": jnp.ones(4)}, "c": jnp.zeros(2)}
    jq.save(tmp_path / "w", tree, metadata={"model": "tiny"})
    header = io.read_header(tmp_path / "w")
    assert header.metadata == {"model": "tiny"} and header.version == 1
    assert list(header.leaves) == ["a/w", "a/b", "c"]
    stored = header.leaves["a/w"]
    assert (stored.shape, stored.dtype, stored.grid) == ((16, 4), "bfloat16", Uniform(4))
    assert_same(io.load_matching(tmp_path / "w", "a/w"), {"a/w": q})
    assert set(io.load_matching(tmp_path / "w", ".*b|c")) == {"a/b", "c"}
    with pytest.raises(ValueError, match="matches none of 3 paths"):
        io.load_matching(tmp_path / "w", "w")


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.array(["a"]), r"at 'x/0': dtype <U1 is none of JAX's"),
        (object(), r"the tree, at 'x/0', is no array but object"),
        (2**70, r"the tree, at 'x/0', is the number 1.181e\+21, which is beyond"),
        (jax.nn.relu, r"the tree, at 'x/0', is no array but .*close over it"),
        (eqx.nn.Lambda(jax.nn.relu), r"the tree, at 'x/0/fn', is no array .*eqx.partition"),
        (jax.ShapeDtypeStruct((2,), "float32"), r"at 'x/0', is only described .*Pass arrays"),
        (functools.reduce(lambda t, _: [t], range(70), 1), "more than 64 levels"),
    ],
)
def test_other_trees_are_refused_by_path(leaf, message: str, tmp_path: Path) -> None:
    with pytest.raises(TreeError, match=message):
        jq.save(tmp_path / "x", {"x": [leaf]})
    assert not list(tmp_path.iterdir())


def test_codes_outside_their_grid_are_refused(tmp_path: Path) -> None:
    q = quantized(Uniform(3), jq.Groups("in", 8), (16, 4), (0,))
    bad = jq.QTensor(jnp.full_like(q.codes, 9), q.params, q.grid, q.groups, q.layout, q.dtype)
    with pytest.raises(ValueError, match="at 'w': codes outside 0..7"):
        jq.save(tmp_path / "x", {"w": bad})


def test_a_grid_of_the_users_own_is_refused(tmp_path: Path) -> None:
    class Mine(Uniform):
        pass

    q = quantized(Mine(4), jq.Groups("in", 8), (16, 4), (0,))
    with pytest.raises(ValueError, match="at 'w': .*cannot be stored"):
        jq.save(tmp_path / "x", {"w": q})


# Atomic writing


def test_an_error_leaves_the_old_file_alone(tmp_path: Path) -> None:
    jq.save(tmp_path / "x", {"a": jnp.ones(2)})

    with pytest.raises(OSError, match="disk"), io.container.replace_file(tmp_path / "x") as file:
        file.write(b"half")
        raise OSError("disk")
    assert jq.load(tmp_path / "x")["a"].tolist() == [1.0, 1.0]
    assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(FileNotFoundError):
        jq.save(tmp_path / "no" / "x", {"a": jnp.ones(2)})
    with pytest.raises(IsADirectoryError):
        jq.save(tmp_path, {"a": jnp.ones(2)})


def test_links_and_permissions_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    jq.save(tmp_path / "link", {"a": jnp.ones(2)})
    assert (tmp_path / "link").is_symlink()
    assert jq.load(tmp_path / "real")["a"].tolist() == [1.0, 1.0]
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("old", [False, True])
def test_killed_while_writing(old: bool, tmp_path: Path) -> None:
    """A process that dies half-way leaves the old file, or none, never a part of the new one."""
    target = tmp_path / "x"
    if old:
        jq.save(target, {"a": jnp.ones(2)})
    script = """
        import os, signal, sys
        from jquant.io.container import replace_file
        with replace_file(sys.argv[1]) as file:
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.exists() == old
    if old:
        assert jq.load(target)["a"].tolist() == [1.0, 1.0]
    jq.save(target, {"a": jnp.zeros(2)})  # what is left over does not stand in the way
    assert jq.load(target)["a"].tolist() == [0.0, 0.0]


def test_the_format_is_what_it_was(tmp_path: Path) -> None:
    """A file written by hand from the description in native.py, byte for byte."""
    jq.save(tmp_path / "x", {"a": jnp.arange(2, dtype=jnp.float32)})
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header["a"] == {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert raw[8 + length :] == np.array([0, 1], "<f4").tobytes()
    body = {
        "version": 1,
        "tree": {"dict": [["a", {"array": "a", "crc32": "e8c76a1f"}]]},
        "static": [],
    }
    assert json.loads(header["__metadata__"]["jquant"]) == body
    assert len(raw) % 8 == 0
