"""The trained network of the tests is what its file says, and loses what it should in few bits."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import jquant as jq
from jquant.grids import Uniform
from tests import trained

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train_bytes.py"
HELD_OUT = 1.4  # nats per byte


def test_it_was_trained_by_the_script_as_it_is_now() -> None:
    if not SCRIPT.exists():
        pytest.skip("benchmarks are not part of the source distribution")
    # as text: a checkout may have other line ends
    now = hashlib.sha256(SCRIPT.read_text("utf-8").encode()).hexdigest()
    assert trained.metadata()["script_sha256"] == now, (
        "benchmarks/train_bytes.py has changed since it made tests/assets/bytes.safetensors; "
        "undo the change, or train anew: python -m benchmarks.train_bytes"
    )


def test_it_is_small() -> None:
    assert trained.ASSET.stat().st_size <= 4_000_000
    assert sum(leaf.size for leaf in jax.tree.leaves(trained.load()[1])) <= 2_000_000


@pytest.mark.optimized
def test_it_predicts_text_it_has_not_seen() -> None:
    fn, params, calibration, evaluation = trained.load()
    loss = math.log(jq.evaluate.perplexity(fn, params, [evaluation]))
    assert loss == pytest.approx(trained.metadata()["nats_per_byte"]["evaluation"], abs=1e-3)
    counts = np.bincount(calibration.ravel(), minlength=256) + 1.0
    unigram = -np.log(counts / counts.sum())[evaluation].mean()
    assert loss < HELD_OUT < unigram / 2


def test_evaluation_repeats_nothing_of_calibration() -> None:
    _, _, calibration, evaluation = trained.load()
    runs = [
        {row[i : i + 48].tobytes() for row in windows for i in range(len(row) - 47)}
        for windows in (calibration, evaluation)
    ]
    assert all(runs) and not runs[0] & runs[1]


@pytest.mark.optimized
def test_fewer_bits_cost_more() -> None:
    fn, params, _, evaluation = trained.load()
    weights = jq.find_weights(fn, params, evaluation[:1])
    models = {}
    for bits in (8, 4, 3, 2):
        plan = jq.plan(weights, {trained.LINEARS: jq.Scheme(Uniform(bits)), ".*": jq.keep})
        models[str(bits)] = jq.quantize(fn, params, plan)[0]
    kl = [found.kl for found in jq.evaluate.compare_all(fn, params, models, [evaluation]).values()]
    assert all(2 * fewer < more for fewer, more in itertools.pairwise(kl)), kl
    assert 0 < kl[0] < 1e-3 and kl[2] > 0.02, kl
