"""A few rows at a time: the same as all at once, however rows are cut into runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jquant as jq
from jquant import formats
from jquant.exporters.arrays import array_of
from jquant.formats import base, rows
from jquant.grids import Uniform, code_dtype
from jquant.io.bitstream import pack_bits, unpack_bits
from jquant.weights.qtensor import QTensor

CODECS = {
    "4 bits": formats.pack_quantized(4, group=32),
    "3 bits, zeros": formats.pack_quantized(3, group=32, symmetric=False),
    "int8": formats.int_quantized(8),
    "fp8": formats.float_quantized(),
    "nvfp4": formats.nvfp4_pack_quantized(),
    "gptq": formats.gptq(4, group=32),
    "gptq, 3 bits": formats.gptq(3, group=32),
    "awq": formats.awq(group=32),
    **{kind: formats.gguf(kind) for kind in ("Q4_0", "Q5_1", "Q8_0", "MXFP4", "Q3_K", "Q4_K")},
    "Q6_K": formats.gguf("Q6_K"),
}
SHAPE = (96, 256)


def weight(codec: base.Codec) -> QTensor:
    rng = np.random.default_rng(0)
    low, high = codec.grid.codes
    arrays: Any = {}
    for name, spec in codec.storage.arrays(SHAPE).items():
        if name == "codes":
            codes = rng.integers(low, high + 1, spec.shape)
        elif spec.dtype.name[0] in "iu":
            codes = rng.integers(0, 4, spec.shape)
        else:
            codes = 2.0 ** rng.integers(-3, 4, spec.shape)
        arrays[name] = codes.astype(spec.dtype)
    layout = jq.Layout.of(SHAPE, in_axes=(1,))
    return QTensor(arrays.pop("codes"), arrays, codec.grid, codec.groups, layout, "float32")


@pytest.mark.parametrize("name", CODECS)
def test_runs_of_rows_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = CODECS[name]
    q = weight(codec)
    whole = codec.encode(q)
    monkeypatch.setattr(rows, "_RUN", 1000)  # three rows of the shape, of which it has 96
    parts = codec.encode(q)
    assert whole.keys() == parts.keys()
    for tensor in whole:
        assert whole[tensor].dtype == parts[tensor].dtype
        assert whole[tensor].tobytes() == parts[tensor].tobytes(), tensor
    back = codec.lazy(parts)
    for mine, theirs in ((q.codes, back.codes), *((q.params[k], back.params[k]) for k in q.params)):
        read: Any = theirs[...]
        assert read.dtype == mine.dtype and read.tobytes() == np.asarray(mine).tobytes()


def test_arrays_are_decoded_by_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Uniform(4, scale_dtype="float16")
    q = weight(base.Codec("", grid, jq.Groups("in", 32), CODECS["gptq"].storage))
    expected = np.asarray(jq.dequantize(q))
    monkeypatch.setattr(rows, "_RUN", 1000)
    np.testing.assert_array_equal(array_of(q)[...], expected)
    np.testing.assert_array_equal(array_of(q)[3:7], expected[3:7])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 1001, (1 << 18) + 3])
def test_widths_that_divide_a_byte_are_a_dense_stream(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, count).astype(np.uint8)
    planes = (codes[:, None] >> np.arange(bits)) & 1
    expected = np.packbits(planes.reshape(-1).astype(np.uint8), bitorder="little")
    stream = pack_bits(codes, bits)
    np.testing.assert_array_equal(stream, expected)
    np.testing.assert_array_equal(unpack_bits(stream, bits, count), codes)


def test_codes_of_small_dtypes_lie_as_jax_has_them() -> None:
    """Their upper halves are zero, so that equal numbers are equal bytes."""
    q = weight(CODECS["4 bits"])
    read: Any = CODECS["4 bits"].lazy(CODECS["4 bits"].encode(q)).codes[...]
    assert read.dtype == code_dtype(q.grid)
    assert not (read.view(np.uint8) >> 4).any()
