"""Networks whose parameters stay in their files: the same values, read one layer at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jquant as jq
from jquant import models
from jquant.errors import CheckpointError
from jquant.grids import Uniform
from jquant.models import hf_folder as reading
from jquant.models.assembly import sources
from jquant.trees.lazy import is_lazy, realize

pytestmark = pytest.mark.slow

TINY = models.DecoderConfig(vocab=32, width=32, hidden=64, layers=3, heads=4, kv_heads=2)
RANDOM = np.random.default_rng(5)


def tensors(form: Any) -> dict[str, np.ndarray]:
    """Random values for every tensor of the network."""
    return {
        source.name: RANDOM.normal(size=source.shape).astype(np.float32)
        for source in sources(TINY, form)
    }


def hf_folder(folder: Path, values: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A Hugging Face directory, in as many shards as asked for."""
    folder.mkdir(exist_ok=True)
    config = dict(
        model_type="llama", vocab_size=TINY.vocab, hidden_size=TINY.width,
        intermediate_size=TINY.hidden, num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads, num_key_value_heads=TINY.kv_heads,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(values, folder / "model.safetensors")
        return folder
    names = {f"part-{k}.safetensors": sorted(values)[k::shards] for k in range(shards)}
    for file, held in names.items():
        safetensors.numpy.save_file({name: values[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in names.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def gguf_file(path: Path, values: dict[str, np.ndarray], types: dict[str, str]) -> Path:
    """A GGUF file; 2-D tensors take the type of the first matching key of `types`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(TINY.layers)
    writer.add_context_length(TINY.context)
    writer.add_embedding_length(TINY.width)
    writer.add_feed_forward_length(TINY.hidden)
    writer.add_head_count(TINY.heads)
    writer.add_head_count_kv(TINY.kv_heads)
    writer.add_layer_norm_rms_eps(TINY.norm_eps)
    writer.add_rope_freq_base(TINY.rope_theta)
    for name, value in values.items():
        chosen = [kind for key, kind in types.items() if key in name and value.ndim == 2]
        kind = gguf.GGMLQuantizationType[(chosen or ["F32"])[0]]
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def flat(params: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def stored(source: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint as float32 `[out, in]`, read by the format's own package."""
    if source.is_dir():
        found: dict[str, np.ndarray] = {}
        for file in source.glob("*.safetensors"):
            found |= safetensors.numpy.load_file(file)
        return {name: value.astype(np.float32) for name, value in found.items()}
    found = {}
    for tensor in gguf.GGUFReader(source).tensors:
        value = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        value = value.reshape([int(n) for n in reversed(tensor.shape)])
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            heads = TINY.heads if "attn_q" in tensor.name else TINY.kv_heads
            rows = np.arange(len(value)).reshape(heads, 2, -1)  # what the converter sorted them to
            value = value[np.argsort(rows.swapaxes(1, 2).reshape(-1))]
        found[tensor.name] = value
    return found


SOURCES = {
    "hf": lambda path: hf_folder(path, tensors("hf")),
    "hf shards in bfloat16": lambda path: hf_folder(
        path, {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors("hf").items()}, 3
    ),
    "gguf": lambda path: gguf_file(path, tensors("gguf"), {}),
    "gguf mixed": lambda path: gguf_file(
        path, tensors("gguf"), {"attn_q": "Q8_0", "ffn_up": "Q4_1", "token": "F16", "": "BF16"}
    ),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scan"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lazy_parameters_are_the_same(name: str, scan: bool, dtype: str, tmp_path: Path) -> None:
    path = SOURCES[name](tmp_path / "model")
    options = dict(scan_layers=scan, param_dtype=dtype)
    fn, params, _ = models.load(path, lazy=True, **options)
    other, loaded, _ = models.load(path, **options)
    assert fn == other and jax.tree.structure(params) == jax.tree.structure(loaded)
    kept, whole = flat(params), flat(loaded)
    assert all(map(is_lazy, kept.values())) and not any(map(is_lazy, whole.values()))
    values = stored(path)
    for source in sources(TINY, "hf" if path.is_dir() else "gguf"):
        value = values.pop(source.name)
        expected = (value.T if source.leaf.endswith("kernel") else value).astype(dtype)
        key, index = source.leaf, ...
        if source.layer is not None and scan:
            index = source.layer
        elif source.layer is not None:
            key = key.replace("layers/", f"layers/{source.layer}/", 1)
        for got in (kept[key][index], np.asarray(whole[key][index])):
            assert got.dtype == expected.dtype
            assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(expected).tobytes()
        part = (index, slice(1, 3)) if index is not ... else slice(1, 3)
        np.testing.assert_array_equal(kept[key][part], expected[1:3])
    assert not values
    realized = flat(realize(params))
    assert all(isinstance(leaf, jax.Array) for leaf in realized.values())
    for key, leaf in realized.items():
        np.testing.assert_array_equal(leaf, whole[key])


def test_a_layer_of_a_safetensors_stack_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hf_folder(tmp_path, tensors("hf"))
    log: list[tuple[str, int]] = []

    class Slice:
        def __init__(self, name: str, inner: Any):
            self.name, self.inner = name, inner

        def __getitem__(self, window: Any) -> np.ndarray:
            value = self.inner[window]
            log.append((self.name, value.size))
            return value

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class Spy:
        def __init__(self, *args: Any, **options: Any):
            self.inner = folder_open(*args, **options)

        def keys(self) -> Any:
            return self.inner.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

    folder_open = reading.safe_open
    monkeypatch.setattr(reading, "safe_open", Spy)
    _, params, _ = models.load(path, scan_layers=True, lazy=True)
    assert not log
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert up.shape == (3, 32, 64)
    up[1], up[2:3, 5], params["embed"]["embedding"][3:5]
    assert log == [
        ("model.layers.1.mlp.up_proj.weight", 32 * 64),
        ("model.layers.2.mlp.up_proj.weight", 64),
        ("model.embed_tokens.weight", 2 * 32),
    ]


def test_a_layer_of_a_gguf_stack_is_read_alone(tmp_path: Path, bytes_read: list[int]) -> None:
    path = gguf_file(tmp_path / "m.gguf", tensors("gguf"), {"": "Q8_0"})
    _, params, _ = models.load(path, scan_layers=True, lazy=True)
    assert not bytes_read
    attention = params["layers"]["attention"]
    attention["q"]["kernel"][1], attention["v"]["kernel"][0:2]
    params["embed"]["embedding"][3:5], params["norm"]["scale"][...]
    row = 34  # bytes of 32 weights
    assert bytes_read == [32 * row, 16 * row, 16 * row, 2 * row, 32 * 4]


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scan"])
def test_quantized_folders(scan: bool, tmp_path: Path) -> None:
    fn = models.Decoder(TINY, scan)
    params = fn.init(jax.random.key(3))
    tokens = jnp.asarray(RANDOM.integers(0, TINY.vocab, (2, 5)), jnp.int32)
    found = jq.find_weights(fn, params, tokens)
    plan = jq.plan(found, {".*": jq.Scheme(Uniform(4), groups=8)})
    qparams, _ = jq.quantize(fn, params, plan)
    models.save_quantized(tmp_path, fn, qparams)
    for load in (models.load, models.load_quantized):
        again, kept, _ = load(tmp_path, lazy=True)
        assert again == fn and all(map(is_lazy, jax.tree.leaves(kept)))
        assert jax.tree.structure(kept) == jax.tree.structure(qparams)
        for a, b in zip(jax.tree.leaves(realize(kept)), jax.tree.leaves(qparams), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a, "float32"), np.asarray(b, "float32"))


def test_weights_are_found_and_saved_without_loading(tmp_path: Path) -> None:
    fn, params, _ = models.load(hf_folder(tmp_path / "m", tensors("hf")), lazy=True)
    _, loaded, _ = models.load(tmp_path / "m")
    tokens = jnp.zeros((1, 4), jnp.int32)
    assert dict(jq.find_weights(fn, params, tokens)) == dict(jq.find_weights(fn, loaded, tokens))
    jq.save(tmp_path / "a", params)
    again = flat(jq.load(tmp_path / "a"))
    assert again.keys() == flat(loaded).keys()
    for key, leaf in flat(loaded).items():
        np.testing.assert_array_equal(again[key], leaf)


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_damage_is_named_when_it_is_read(form: str, tmp_path: Path) -> None:
    values = tensors(form)
    name = next(n for n in values if "1" in n and ("up_proj" in n or "ffn_up" in n))
    values[name][3, 5] = np.nan

    def write() -> Path:
        if form == "hf":
            return hf_folder(tmp_path / "m", values)
        return gguf_file(tmp_path / "m", values, {})

    path = write()
    _, params, _ = models.load(path, scan_layers=True, lazy=True)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert np.isfinite(kernel[0]).all() and np.isfinite(kernel[2]).all()
    with pytest.raises(CheckpointError, match=f"m: tensor '{name}' holds NaN"):
        kernel[1]
    with pytest.raises(CheckpointError, match=f"m: tensor '{name}' holds NaN"):
        jq.save(tmp_path / "x", params)
    assert not (tmp_path / "x").exists()
    values[name] = values[name][:-1]
    write()
    with pytest.raises(CheckpointError, match="the file has changed since it was loaded"):
        kernel[0]
    with pytest.raises(CheckpointError, match=r"has shape \(63, 32\)"):  # at once
        models.load(path, lazy=True)
