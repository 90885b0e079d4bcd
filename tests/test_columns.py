"""Groups of inputs that are no neighbours (`desc_act`): read exactly, multiplied, written again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import formats as oracle
from safetensors.numpy import load_file, save_file
from test_formats import same, write_folder

import jquant as jq
from jquant import formats, models
from jquant.axes.layout import Layout
from jquant.errors import CheckpointError, FormatError
from jquant.grids import Uniform
from jquant.weights.columns import Columns
from jquant.weights.inputs import Inputs
from jquant.weights.qtensor import QTensor, weight_bits


def gptq_tensors(
    bits: int, version: int = 2, out: int = 32, width: int = 64, group: int = 16, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a weight whose groups are drawn by lot, and the array `[out, in]` it is."""
    random = np.random.default_rng(seed)
    index = random.permutation(np.arange(width) // group)
    count = -(-width // group)
    q = random.integers(0, 1 << bits, (out, width))
    zero = random.integers(1 if version == 1 else 0, 1 << bits, (out, count))
    scale = random.normal(size=(out, count)).astype(np.float16)
    tensors = oracle.gptq(q, scale, zero, bits, version, index)
    return tensors, (q - zero[:, index]) * scale[:, index].astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_with_inputs_in_any_order(bits: int, version: Any) -> None:
    tensors, expected = gptq_tensors(bits, version)
    codec = formats.gptq(bits, group=16, version=version)
    q = codec.decode(tensors)
    np.testing.assert_array_equal(np.asarray(jq.dequantize(q)), expected)
    assert same(codec.encode(q), tensors)
    assert weight_bits(q) == bits + (16 + bits) / 16 + 32 / 32


def test_a_last_group_that_is_short_may_lie_anywhere() -> None:
    tensors, expected = gptq_tensors(4, group=24)
    codec = formats.gptq(4, group=24, version=2)
    q = codec.decode(tensors)
    np.testing.assert_array_equal(np.asarray(jq.dequantize(q)), expected)
    assert same(codec.encode(q), tensors)


def test_compressed_tensors_in_the_order_of_activations() -> None:
    random = np.random.default_rng(0)
    index = random.permutation(np.arange(30) // 10).astype(np.int32)
    q, scale = random.integers(-8, 8, (6, 30)), random.normal(size=(6, 3)).astype(np.float32)
    tensors = oracle.pack_quantized(q, scale, None, 4) | {"weight_g_idx": index}
    codec = formats.pack_quantized(4, group=10, scale_dtype="float32", index=True)
    got = codec.decode(tensors)
    np.testing.assert_array_equal(
        np.asarray(jq.dequantize(got)), q.astype("float32") * scale[:, index]
    )
    assert same(codec.encode(got), tensors)
    with pytest.raises(FormatError, match=r"parts besides the codes \(Columns\)"):
        formats.pack_quantized(4, group=10, scale_dtype="float32").encode(got)


X = jax.random.normal(jax.random.key(0), (7, 64), jnp.float32)


def one(**fields: Any) -> QTensor:
    q = formats.gptq(4, group=16, version=2).decode(gptq_tensors(4)[0])
    return dataclasses.replace(q, **fields)


def stack() -> QTensor:
    own = [
        formats.gptq(4, group=16, version=2).decode(gptq_tensors(4, out=64, seed=k)[0])
        for k in range(3)
    ]
    whole = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    return dataclasses.replace(whole, layout=Layout.of((3, 64, 64), in_axes=(2,), batch_axes=(0,)))


FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "transposed": (lambda w, x: x @ w.T, one),
    "from the left": (lambda w, x: w @ x.T, one),
    "of half precision": (lambda w, x: x.astype(jnp.bfloat16) @ w.T.astype(jnp.bfloat16), one),
    "along its outputs": (lambda w, x: x[:, :32] @ w, one),
    "looked up": (lambda w, x: w[jnp.array([3, 1, 3])] + x[:3], one),
    "in heads": (
        lambda w, x: jnp.einsum("tgd,ogd->to", x.reshape(7, 4, 16), w.reshape(32, 4, 16)), one
    ),
    "a part of it": (lambda w, x: x[:, 8:24] @ w[:, 8:24].T, one),
    "scanned": (
        lambda w, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w.T / 64), None), x, w)[0], stack
    ),
    "of one layer": (lambda w, x: x @ w[1].T, stack),
    "mapped": (lambda w, x: jax.vmap(lambda w: x @ w.T)(w), stack),
    "with their own inputs": (
        lambda w, x: jnp.einsum("etd,eod->eto", jnp.stack([x, 2 * x, -x]), w), stack
    ),
    "by experts": (
        lambda w, x: jax.lax.ragged_dot(x, w.swapaxes(1, 2), jnp.array([2, 4, 1])), stack
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_are_those_of_the_array(name: str) -> None:
    fn, make = FUNCTIONS[name]
    q = make()
    got, expected = jq.apply(fn)(q, X), fn(jq.dequantize(q), X)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    wide, scale = np.asarray(expected, np.float64), float(jnp.abs(expected).max())
    coarse = 2e-2 if expected.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(got, np.float64), wide, atol=coarse * scale)


def test_a_product_orders_its_input_and_no_weight() -> None:
    program = str(jax.make_jaxpr(jq.apply(lambda w, x: x @ w.T))(one(), X))
    assert "argsort" not in program and "gather" in program


@pytest.mark.parametrize("compute", ["auto", "integer"])
def test_inputs_are_rounded_as_they_come(compute: Any) -> None:
    choice = jq.Activations(Uniform(8, symmetric=True), compute=compute)
    q, w = one(activations=Inputs(choice)), jq.dequantize(one())
    scale = jnp.abs(X).max(-1, keepdims=True) / 127
    expected = (jnp.round(X / scale) * scale) @ w.T
    got = jq.apply(lambda w, x: x @ w.T)(q, X)
    np.testing.assert_allclose(got, expected, atol=2e-2 * float(jnp.abs(expected).max()))


def test_it_is_saved_loaded_and_checked(tmp_path: Path) -> None:
    q = stack()
    jq.save(tmp_path / "q.safetensors", {"w": q})
    back = jq.load(tmp_path / "q.safetensors")["w"]
    assert jax.tree.structure(back) == jax.tree.structure(q)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(q)))
    for order in (jnp.zeros((3, 63), jnp.int32), jnp.zeros((64,), jnp.int32)):
        jq.save(
            tmp_path / "q.safetensors", {"w": dataclasses.replace(q, transforms=(Columns(order),))}
        )
        with pytest.raises(CheckpointError, match="order of columns does not fit"):
            jq.load(tmp_path / "q.safetensors")


def test_what_is_no_order_is_not_written() -> None:
    q = one(transforms=(Columns(jnp.zeros(64, jnp.int32)),))
    with pytest.raises(FormatError, match="no order of the inputs"):
        formats.gptq(4, group=16, version=2).encode(q)


def shuffle(folder: Path, but: str) -> dict[str, np.ndarray]:
    """Put the inputs of all modules of a folder of GPTQ but one into groups by lot."""
    tensors, random = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name in [n for n in tensors if n.endswith("g_idx")]:
        if but not in name:
            tensors[name] = random.permutation(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_of_gptq_in_the_order_of_activations(scan: bool, tmp_path: Path) -> None:
    write_folder(tmp_path, "gptq")
    shuffle(tmp_path, but="layers.0.mlp.up_proj")
    fn, dense, _ = models.load(tmp_path, scan_layers=scan)
    _, kept, _ = models.load(tmp_path, scan_layers=scan, quantized="keep")
    assert all(map(np.array_equal, jax.tree.leaves(jq.dequantize(kept)), jax.tree.leaves(dense)))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    got = np.asarray(jq.apply(fn)(kept, tokens))
    np.testing.assert_allclose(got, np.asarray(fn(dense, tokens)), atol=1e-5)
    _, lazy, _ = models.load(tmp_path, scan_layers=scan, quantized="keep", lazy=True)
    assert all(map(np.array_equal, jax.tree.leaves(jq.realize(lazy)), jax.tree.leaves(kept)))


def test_they_are_exported_as_they_were_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", "gptq")
    tensors = shuffle(tmp_path / "in", but="none")
    fn, kept, _ = models.load(tmp_path / "in", quantized="keep")
    jq.export(fn, kept, tmp_path / "out", format="gptq_v2")
    back = load_file(tmp_path / "out" / "model.safetensors")
    names = [name for name in tensors if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    assert len(names) == 4 * 14
    assert same({name: back[name] for name in names}, {name: tensors[name] for name in names})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] is True and config["checkpoint_format"] == "gptq_v2"
    with pytest.raises(FormatError, match=r"parts besides the codes \(Columns\)"):
        jq.export(fn, kept, tmp_path / "other", format="compressed-tensors")
