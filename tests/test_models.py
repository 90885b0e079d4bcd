"""The decoder and both loaders against `transformers`' PyTorch models; decoding; error messages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    LLAMA3,
    byte_tokenizer,
    torch,
    torch_logits,
    torch_model,
    transformers,
    write_gguf,
)

from jquant import Scheme, dequantize, evaluate, models, plan, quantize
from jquant.calibration import find_weights
from jquant.errors import CheckpointError
from jquant.grids import Uniform
from jquant.inference import apply
from jquant.models.assembly import sources
from jquant.models.attention import attend
from jquant.models.config import from_hf

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 40)).astype(np.int32)
TINY = models.DecoderConfig(vocab=32, width=16, hidden=24, layers=3, heads=4, kv_heads=2)


def close(got: Any, expected: Any, tolerance: float = 2e-5) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def run(fn: models.Decoder, params: Any, tokens: Any = TOKENS) -> np.ndarray:
    return np.asarray(jax.jit(fn)(params, jnp.asarray(tokens)))


NETWORKS = {
    "grouped, tied": ("Llama", dict(tie_word_embeddings=True)),
    "one key per query, free head": ("Llama", dict(num_key_value_heads=4)),
    "llama 3 positions": ("Llama", dict(rope_parameters=LLAMA3)),
    "stretched positions": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4)),
    ),
    "biases everywhere": ("Llama", dict(attention_bias=True)),
    "heads of another width": ("Llama", dict(head_dim=8)),
    "qwen2": ("Qwen2", dict(rms_norm_eps=1e-5)),
    "mistral": ("Mistral", dict(sliding_window=None, num_key_value_heads=1)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_hf_directory_equals_pytorch(network: str, tmp_path: Path) -> None:
    kind, settings = NETWORKS[network]
    model = torch_model(kind, **settings)
    model.save_pretrained(tmp_path)
    expected = torch_logits(model, TOKENS)
    for scan in (False, True):
        fn, params, tokenizer = models.load(tmp_path, scan_layers=scan)
        got = run(fn, params)
        assert got.dtype == np.float32 and tokenizer is None
        close(got, expected)


def test_shards_and_half_precision(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        torch_model().to(dtype).save_pretrained(folder, max_shard_size="30KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        fn, params, _ = models.load(folder)
        assert params["layers"]["1"]["mlp"]["down"]["kernel"].dtype == jnp.float32
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        close(run(fn, params), torch_logits(model, TOKENS))


@pytest.mark.parametrize(
    "types",
    [
        {},
        {"": "F16"},
        {"token_embd": "Q8_0", "": "Q4_1"},
        {"attn": "Q8_0", "ffn": "BF16", "token": "F16"},
    ],
    ids=["F32", "F16", "Q4_1", "mixed"],
)
def test_gguf_equals_pytorch(types: dict[str, str], tmp_path: Path) -> None:
    for tied in (True, False):
        model = torch_model(tie_word_embeddings=tied)
        path = write_gguf(tmp_path / f"{tied}.gguf", model, types)
        expected = torch_logits(model, TOKENS)
        for scan in (False, True):
            fn, params, _ = models.load(path, scan_layers=scan)
            assert ("head" in params) != tied
            close(run(fn, params), expected)


def test_gguf_of_other_networks(tmp_path: Path) -> None:
    qwen = torch_model("Qwen2", rms_norm_eps=1e-5)
    fn, params, _ = models.load(write_gguf(tmp_path / "qwen2.gguf", qwen, {"": "Q8_0"}))
    assert fn.config.qkv_bias and not fn.config.out_bias
    close(run(fn, params), torch_logits(qwen, TOKENS))

    llama3 = torch_model(rope_parameters=LLAMA3, attention_bias=True)
    divisors = np.asarray(from_hf(llama3.config.to_dict()).rope_divisors)
    assert divisors.min() == 1 and divisors.max() == LLAMA3["factor"]
    path = write_gguf(tmp_path / "llama3.gguf", llama3, tensors={"rope_freqs.weight": divisors})
    fn, params, _ = models.load(path)
    assert fn.config.out_bias
    close(run(fn, params), torch_logits(llama3, TOKENS))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    "flags",
    [{}, dict(tied=True), dict(qkv_bias=True, out_bias=True), dict(experts=4, experts_used=2)],
)
def test_shapes_are_those_of_random_parameters(flags: dict, scan_layers: bool) -> None:
    plain = models.DecoderConfig(vocab=9, width=8, hidden=5, layers=2, heads=2, kv_heads=1)
    fn = models.Decoder(dataclasses.replace(plain, **flags), scan_layers)
    assert fn.shapes == jax.eval_shape(fn.init, jax.random.key(0))


def test_every_leaf_is_known_to_both_formats() -> None:
    plain = models.DecoderConfig(vocab=9, width=8, hidden=5, layers=2, heads=2, kv_heads=1)
    for flags in ({}, dict(tied=True), dict(qkv_bias=True), dict(qkv_bias=True, out_bias=True)):
        config = dataclasses.replace(plain, **flags)
        tree = jax.eval_shape(models.Decoder(config).init, jax.random.key(0))
        leaves = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for form in ("gguf", "hf"):
            found = {}
            for source in sources(config, form):
                path = source.leaf.replace("layers/", f"layers/{source.layer}/")
                turned = path.endswith("kernel")
                found[path] = source.shape[::-1] if turned else source.shape
            assert found == leaves


def test_a_decoder_is_a_value() -> None:
    one, other = models.Decoder(TINY), models.Decoder(TINY, dtype=jnp.float32)  # type: ignore
    assert one == other and hash(one) == hash(other) and one.step == other.step
    assert one != models.Decoder(TINY, scan_layers=True)
    with pytest.raises(ValueError, match="float16; supported"):
        models.Decoder(TINY, dtype="float16")


@pytest.mark.parametrize("scan", [False, True])
def test_jquant_finds_every_projection(scan: bool) -> None:
    fn = models.Decoder(TINY, scan)
    weights = find_weights(fn, fn.init(jax.random.key(0)), jnp.zeros((1, 4), jnp.int32))
    kernels = {path for path in weights if path.endswith("kernel")}
    assert len(kernels) == 1 + 7 * (1 if scan else TINY.layers)
    assert ("layers/attention/q/kernel" if scan else "layers/0/attention/q/kernel") in kernels


def test_bfloat16_computes_near_float32_and_returns_it() -> None:
    fn = models.Decoder(TINY)
    params = fn.init(jax.random.key(0))
    tokens = TOKENS % TINY.vocab
    low = run(models.Decoder(TINY, dtype="bfloat16"), params, tokens)
    assert low.dtype == np.float32
    close(low, run(fn, params, tokens), 0.05)


def test_a_token_outside_the_vocabulary_is_seen() -> None:
    fn = models.Decoder(TINY)
    params = fn.init(jax.random.key(0))
    assert np.isnan(run(fn, params, [[1, 2, TINY.vocab]])[0, 2]).all()
    assert np.isfinite(run(fn, params, [[1, 2, TINY.vocab - 1]])).all()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_steps_equal_the_full_pass(scan: bool, dtype: str) -> None:
    fn = models.Decoder(TINY, scan, dtype)
    params, tokens = fn.init(jax.random.key(0)), jnp.asarray(TOKENS[:, :12] % TINY.vocab)
    step, cache, parts = apply(fn.step), fn.init_cache(2, 16), []
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        logits, cache = step(params, cache, tokens[:, start:stop], jnp.int32(start))
        parts.append(logits)
    close(jnp.concatenate(parts, 1), run(fn, params, tokens), 1e-5 if dtype == "float32" else 2e-2)


def test_generation() -> None:
    fn = models.Decoder(TINY)
    params = fn.init(jax.random.key(3))
    prompt = TOKENS[:, :5] % TINY.vocab
    text = np.pad(prompt, ((0, 0), (0, 6)))
    for at in range(4, 10):  # the plain way: the whole text through the whole model for each token
        text[:, at + 1] = run(fn, params, text)[:, at].argmax(-1)
    seen: list[np.ndarray] = []
    got = models.generate(fn, params, prompt, 6, on_token=seen.append)
    np.testing.assert_array_equal(got, text[:, 5:])
    np.testing.assert_array_equal(np.stack(seen, 1), got)
    np.testing.assert_array_equal(models.generate(fn, params, prompt[0], 6)[0], got[0])

    end = int(got[0, 2])
    stopped = models.generate(fn, params, prompt[0], 6, eos=end)
    assert stopped.shape[1] == list(got[0]).index(end) + 1
    both = models.generate(fn, params, prompt, 6, eos=[end, 77])
    assert set(both[0, stopped.shape[1] :]) <= {end}

    def warm(seed: int) -> np.ndarray:
        return models.generate(fn, params, prompt, 20, temperature=2.0, key=jax.random.key(seed))

    np.testing.assert_array_equal(warm(1), warm(1))
    assert (warm(1) != warm(2)).any()


@pytest.mark.parametrize("scan", [False, True])
def test_quantized_parameters_run_everywhere(scan: bool) -> None:
    fn = models.Decoder(TINY, scan)
    params = fn.init(jax.random.key(3))
    prompt = TOKENS[:, :5] % TINY.vocab
    found = find_weights(fn, params, jnp.asarray(prompt))
    qparams, _ = quantize(fn, params, plan(found, {".*": Scheme(Uniform(4), groups=8)}))
    plain = dequantize(qparams)
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    got, expected = (models.generate(fn, p, prompt, 6) for p in (qparams, plain))
    np.testing.assert_array_equal(got, expected)
    assert (got != models.generate(fn, params, prompt, 6)).any()
    assert abs(evaluate.kl(fn, plain, qparams, [TOKENS % TINY.vocab])) < 1e-6


def test_generation_refuses() -> None:
    fn = models.Decoder(TINY)
    params = fn.init(jax.random.key(0))
    for prompt, count, options, message in [
        ([], 4, {}, r"T >= 1"),
        ([1.5], 4, {}, r"expected integers"),
        ([1], 0, {}, r"max_new_tokens = 0"),
        ([1] * 10, 2040, {}, r"context of 2048"),
        ([1], 4, dict(temperature=1.0), r"pass key="),
        ([1], 4, dict(temperature=-1.0), r"temperature = -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            models.stream(fn, params, jnp.asarray(prompt), count, **options)


def test_gguf_tokenizer(tmp_path: Path) -> None:
    model = torch_model(tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer=byte_tokenizer())
    _, _, tokenizer = models.load(path)
    ids = tokenizer("the 12 and<pad>")["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    # digits stay apart although a merge would join them; "and" is cut from its space by no one
    assert pieces == ["the", "Ġ", "1", "2", "Ġa", "nd", "<pad>"]
    assert tokenizer.decode(ids) == "the 12 and<pad>"
    assert tokenizer.eos_token == "</s>" and tokenizer.eos_token_id == 1
    settings = {**byte_tokenizer(), "add_bos_token": True}
    _, _, tokenizer = models.load(write_gguf(tmp_path / "b.gguf", model, tokenizer=settings))
    assert tokenizer("the")["input_ids"][0] == 0
    assert 0 not in tokenizer("the", add_special_tokens=False)["input_ids"]
    for change in (
        {"tokenizer_pre": "unheard-of"},
        {"token_merges": ["t nothing"]},
        {"eos_token_id": 4096},
        {"token_types": [3, 3]},
    ):
        settings = {**byte_tokenizer(), **change}
        with pytest.raises(CheckpointError, match="tokenizer.ggml"):
            models.load(write_gguf(tmp_path / "c.gguf", model, tokenizer=settings))


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}, default=str))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt_neox"), r"model_type = 'gpt_neox' is not supported.*llama"),
        (dict(model_type=...), r"model_type is missing"),
        (dict(hidden_act="gelu"), r"hidden_act"),
        (dict(mlp_bias=True), r"mlp_bias"),
        (dict(quantization_config={"bits": 4}), r"quantization_config.quant_method"),
        (dict(sliding_window=16), r"sliding_window = '16'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}), r"rope_type = 'yarn'"),
        (dict(rope_parameters={"full_attention": {}}), r"rope_parameters"),
        (dict(hidden_size="64"), r"hidden_size = 64; expected an integer"),
        (dict(hidden_size=...), r"hidden_size = None"),
        (dict(num_attention_heads=0), r"num_attention_heads"),
        (dict(num_key_value_heads=3), r"kv_heads = 3"),
        (dict(head_dim=10**9), r"head_dim"),
        (dict(rms_norm_eps=10**400), r"rms_norm_eps"),
        (dict(num_hidden_layers=10**7), r"'model.layers.2.input_layernorm.weight' is missing"),
        (dict(num_hidden_layers=1), r"9 tensors .* no place for, such as 'model.layers.1"),
        (dict(intermediate_size=95), r"'model.layers.0.mlp.gate_proj.weight' has shape \(96, 64\)"),
        (dict(vocab_size=97), r"embed_tokens.*\(96, 64\).*\(97, 64\)"),
    ],
)
def test_hf_directory_refuses(changes: dict, message: str, tmp_path: Path) -> None:
    torch_model().save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        models.load(tmp_path, backend="jax")


def test_damaged_hf_directories_are_refused(tmp_path: Path) -> None:
    torch_model().save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shard = tmp_path / whole["weight_map"]["model.norm.weight"]

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            models.load(tmp_path)

    saved = shard.read_bytes()
    shard.write_bytes(saved[:-10])
    refused("not a readable safetensors file")
    shard.write_bytes((2**62).to_bytes(8, "little") + saved[8:])
    refused("not a readable safetensors file")
    shard.unlink()
    refused(f"{shard.name} is missing")
    shard.write_bytes(saved)
    for file in ("../../secret.safetensors", "weights.bin", 3):
        whole["weight_map"]["model.norm.weight"] = file
        index.write_text(json.dumps(whole))
        refused("is no file of this directory")
    index.write_text('{"weight_map": {"a": ')
    refused("not JSON")
    index.write_text("[]")
    refused("expected an object, got list")
    index.unlink()
    refused("neither model.safetensors nor")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "rms_norm_eps": NaN}')
    refused("config.json is not JSON: NaN is no number")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    refused("config.json is not JSON")
    (tmp_path / "config.json").unlink()
    refused("config.json is missing")


def test_nan_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    model = torch_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight' holds NaN"):
        models.load(tmp_path)


def test_sources_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        models.load(tmp_path / "missing.gguf")

    def offline(*args: Any, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'someone/something' is neither.*network"):
        models.load("someone/something")
    torch_model().save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    assert models.load("someone/something")[0].config.width == 64


def test_attention_in_blocks_is_attention(monkeypatch) -> None:
    """Eleven queries in blocks of four, the last one short, against the formula."""
    monkeypatch.setattr("jquant.models.attention._BLOCK", 4)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 11, 6, 5))
    k, v = (jax.random.normal(key, (2, 11, 3, 5)) for key in keys[1:])
    mask = np.tril(np.ones((11, 11), bool))
    scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, axis=2), dtype=np.float64) / 5**0.5
    scores = np.where(mask, np.exp(scores), 0.0)
    chosen = scores / scores.sum(-1, keepdims=True)
    want = np.einsum("bhts,bshd->bthd", chosen, np.repeat(v, 2, axis=2))
    for causal in (True, False):
        got = attend(q, k, v, jnp.asarray(mask), causal=causal)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
