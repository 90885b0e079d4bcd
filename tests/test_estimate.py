"""What `estimate` says beforehand is what `quantize` reports afterwards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jquant as jq
from jquant.errors import EvidenceError
from jquant.io import read_header

WIDTH = 16


def network(p, x):
    for layer in p["layers"]:
        x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"]
    return x


def parameters(depth: int) -> dict:
    keys = iter(jax.random.split(jax.random.key(0), 2 * depth))
    make = jax.random.normal
    return {
        "layers": [
            {"up": make(next(keys), (WIDTH, 24)), "down": make(next(keys), (24, WIDTH))}
            for _ in range(depth)
        ]
    }


BATCHES = [jax.random.normal(jax.random.key(1), (32, WIDTH)), jnp.ones((8, WIDTH))]


def planned(params: dict, rounding=None) -> jq.Plan:
    scheme = jq.Scheme(jq.grids.Uniform(4), 8, rounding or jq.rounding.GPTQ())
    return jq.plan(jq.find_weights(network, params, BATCHES[0]), {".*": scheme})


@pytest.mark.parametrize(
    "sequential", [pytest.param("weight", marks=pytest.mark.slow), "block", None]
)
def test_stages_evidence_and_disk_are_those_of_the_job(sequential, tmp_path) -> None:
    params = parameters(2)
    plan = planned(params)
    said = jq.estimate(network, params, plan, BATCHES, sequential=sequential)
    q, report = jq.quantize(network, params, plan, BATCHES, sequential=sequential)
    assert said.stages == report.stages
    assert said.evidence_bytes == report.evidence_bytes
    jq.save(tmp_path / "q", q)
    stored = sum(leaf.bytes for leaf in read_header(tmp_path / "q").leaves.values())
    assert abs(said.result_bytes - stored) <= 4 * len(plan)
    assert said.peak_bytes > said.evidence_bytes + said.alive_bytes + said.weight_bytes
    assert all(said.seconds[doing] > 0 for doing in ("reading", "rounding"))
    assert "about" in str(list(said.table().columns[1].cells))


@pytest.mark.slow
def test_equal_stages_are_compiled_once(compiles) -> None:
    """As many programs for four layers as for three."""
    counted = []
    for depth in (3, 4):
        params = parameters(depth)
        plan = planned(params)
        jax.clear_caches()
        with compiles() as log:
            jq.estimate(network, params, plan, BATCHES)
        counted.append(len(log))
    assert counted[0] == counted[1]


def test_memory_between_stages_does_not_grow_with_depth() -> None:
    said = [
        jq.estimate(network, parameters(depth), planned(parameters(depth)), BATCHES)
        for depth in (3, 6)
    ]
    assert said[0].alive_bytes == said[1].alive_bytes > 0
    assert said[0].weight_bytes == said[1].weight_bytes
    assert said[1].flops > 1.9 * said[0].flops


def test_without_data_there_is_nothing_to_read() -> None:
    params = parameters(1)
    said = jq.estimate(network, params, planned(params, jq.rounding.Nearest()))
    assert said.flops == 0 and said.evidence_bytes == 0 and len(said.stages) == 2


def test_it_refuses_what_quantize_refuses() -> None:
    params = parameters(1)
    with pytest.raises(EvidenceError, match="needs the second moment"):
        jq.estimate(network, params, planned(params))
