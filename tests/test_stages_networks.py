"""Stage by stage, on networks of every making, against a reference that is slow and plainly right.

The reference knows nothing of jaxprs. It is told the stages; for each it runs the whole network on
all batches, with the weights done so far dequantized in their places, reads the evidence, and
quantizes the stage's pieces on it.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.calibration.stages import Sequential
from jquant.grids import Uniform
from jquant.rounding import GPTQ
from jquant.trees.paths import path_of
from tests.marks import EVERY_CASE
from tests.networks import NETWORKS, Network, Stages

pytestmark = pytest.mark.slow

SCHEME = jq.Scheme(Uniform(3), None, GPTQ())

# Every weight must come out as in the reference. Programs that are cut differently add floats in
# another order, so a weight on the edge between two codes could fall on the other side; these lie
# clear of it: second moments multiplied by 1 + 1e-6 · noise change no weight of any network here.
# And calibrating in stages must change so much that its absence, or that of a stage, is seen:
DIFFERENT = 0.99  # at most this share of the weights stays as in one pass

# Every network meets one granularity, and two meet both, and one pass, the subject of other files.
# Weight by weight there are more stages, for each of which the reference runs the whole network.
BOTH = ("tied-encoder", "moe-dispatch")
FINE = ("linen-scan-axis-1", "nnx-list")
STAGED = [
    (network, sequential)
    for network in NETWORKS
    for sequential in ("weight", "block")
    if EVERY_CASE or network.name in BOTH or (network.name in FINE) == (sequential == "weight")
]


@functools.cache
def planned(network: Network) -> jq.Plan:
    weights = jq.find_weights(network.fn, network.params, *network.batches[0])
    return jq.plan(weights, dict.fromkeys(network.paths, SCHEME))


def stages_of(network: Network, sequential: Sequential) -> Stages:
    whole = (tuple(planned(network)),)
    return {"weight": network.weight, "block": network.block, None: whole}[sequential]


def by_path(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {path_of(keys): leaf for keys, leaf in leaves}


def tree_of(network: Network, leaves: dict[str, Any]) -> Any:
    """The network's parameters with these leaves."""
    structure = jax.tree.structure(network.params)
    return jax.tree.unflatten(structure, [leaves[path] for path in by_path(network.params)])


# The reference.


def place(network: Network, piece: str) -> tuple[str, tuple[slice, ...], slice]:
    """A piece's path, where it lies in the array, and where in the evidence."""
    found = re.fullmatch(r"(.*)\[(\d+)\]", piece)
    if found is None:
        return piece, (), slice(None)
    layer = slice(int(found[2]), int(found[2]) + 1)
    stacked = planned(network).weights[found[1]].batch_axes[0]
    return found[1], (*[slice(None)] * stacked, layer), layer


@functools.cache
def reference(network: Network, stages: Stages) -> dict[str, Any]:
    """Every leaf, each stage calibrated on the network with all earlier stages quantized."""
    plan = planned(network)
    original = by_path(network.params)
    current = dict(original)
    for stage in stages:
        params = tree_of(network, current)
        evidence = jq.capture(network.fn, params, network.batches, paths=tuple(plan))
        for piece in stage:
            path, where, layer = place(network, piece)
            own = evidence[path]
            if where:
                own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], own)
            layout = plan.weights[path].layout
            q, _ = jq.quantize_weight(original[path][where], plan[path], layout, evidence=own)
            current[path] = current[path].at[where].set(jq.dequantize(q))
    return current


def agreement(network: Network, one: dict[str, Any], two: dict[str, Any]) -> float:
    """The share of equal weights (ranges do not depend on evidence: equal values, equal codes)."""
    same = [np.isclose(one[p], two[p], rtol=1e-5, atol=1e-7).ravel() for p in planned(network)]
    return float(np.concatenate(same).mean())


# What the networks expect, without quantizing.


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_expected_stages_hold_every_weight_once(network: Network) -> None:
    plan = planned(network)
    for stages in (network.weight, network.block):
        held = {path: np.zeros(plan.weights[path].shape, int) for path in plan}
        for stage in stages:
            for piece in stage:
                path, where, _ = place(network, piece)
                held[path][where] += 1
        assert all((count == 1).all() for count in held.values())
    finer = [set(stage) for stage in network.weight]
    for stage in network.block:  # made of consecutive finer stages
        joined: set[str] = set()
        while joined != set(stage):
            assert finer and finer[0] <= set(stage)
            joined |= finer.pop(0)
    assert not finer


@pytest.mark.parametrize(
    "network", [n for n in NETWORKS if n.weight != n.block and n.name in BOTH], ids=str
)
def test_the_two_granularities_differ(network: Network) -> None:
    weight, block = (reference(network, stages_of(network, g)) for g in ("weight", "block"))
    assert agreement(network, weight, block) < DIFFERENT


# What jquant does.


def in_order(stages: Stages) -> Stages:
    """Within a stage, order means nothing."""
    return tuple(tuple(sorted(stage)) for stage in stages)


@pytest.mark.parametrize(
    ("network", "sequential"), [*STAGED, *((n, None) for n in NETWORKS if n.name in BOTH)], ids=str
)
def test_stages_are_those_of_the_reference(network: Network, sequential: Sequential) -> None:
    stages = stages_of(network, sequential)
    q, report = jq.quantize(
        network.fn, network.params, planned(network), network.batches, sequential=sequential
    )
    assert in_order(report.stages) == in_order(stages)

    wanted = reference(network, stages)
    found = jq.dequantize(q)
    assert jax.tree.structure(found) == jax.tree.structure(network.params)
    for path, leaf in by_path(found).items():
        if path not in planned(network):
            np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)
    assert agreement(network, by_path(found), wanted) == 1
    run = jax.jit(network.fn)
    for batch in network.batches:
        one, two = run(found, *batch), run(tree_of(network, wanted), *batch)
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    if sequential is not None:  # one pass would have been told from it
        assert agreement(network, wanted, reference(network, stages_of(network, None))) < DIFFERENT


# One network by hand.

SEEN: dict[str, list[np.ndarray]] = {}


@jax.tree_util.register_static
@dataclass(frozen=True)
class Recording:
    """GPTQ that notes the second moments it is given."""

    name: str

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"moment"})

    def __call__(
        self, w: Any, grid: Any, groups: Any = jq.Groups(), *, evidence: Any = None, key: Any = None
    ) -> Any:
        SEEN.setdefault(self.name, []).append(np.asarray(evidence.second_moment))
        return GPTQ()(w, grid, groups, evidence=evidence, key=key)


def _float32(values: np.ndarray) -> jax.Array:
    return jnp.asarray(np.asarray(values, np.float32))


@pytest.mark.parametrize("sequential", ["weight", "block", None])
def test_a_network_of_two_layers_by_hand(sequential: Sequential) -> None:
    rng = np.random.default_rng(0)
    up, bias, down = rng.normal(size=(6, 10)), rng.normal(size=10), rng.normal(size=(10, 4))
    x = rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)) / 3
    params = {"up": _float32(up), "bias": _float32(bias), "down": _float32(down)}
    batches = [_float32(rows) for rows in (x[:24], x[24:48], x[48:])]

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]

    def solved(w: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """`w[in, out]` after GPTQ, one group per output."""
        grid = Uniform(3)
        found = GPTQ()(_float32(w.T), grid, evidence=_float32(moment))
        return np.asarray(grid.decode(found.codes.astype(jnp.int32)[:, None], found.params))[:, 0].T

    first = x.T @ x
    quantized_up = solved(up, first)
    plain, staged = (np.tanh(x @ w + bias) for w in (up, quantized_up))
    second = plain.T @ plain if sequential is None else staged.T @ staged
    quantized_down = solved(down, second)

    SEEN.clear()
    plan = jq.plan(
        jq.find_weights(fn, params, batches[0]),
        {name: jq.Scheme(Uniform(3), None, Recording(name)) for name in ("up", "down")},
    )
    # Batches that can be read only once are enough.
    q, report = jq.quantize(fn, params, plan, iter(batches), sequential=sequential)
    stages = (("up", "down"),) if sequential is None else (("up",), ("down",))
    assert in_order(report.stages) == in_order(stages)
    assert {name: len(moments) for name, moments in SEEN.items()} == {"up": 1, "down": 1}
    np.testing.assert_allclose(SEEN["up"][0], first, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(SEEN["down"][0], second, rtol=1e-4, atol=1e-3)
    found = jq.dequantize(q)
    np.testing.assert_allclose(found["up"], quantized_up, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["down"], quantized_down, rtol=1e-5, atol=1e-6)
    assert report["up"].tokens == report["down"].tokens == 60
    # The error is that of the outputs, on the inputs the weight was calibrated on.
    e = (down - quantized_down).T
    error = np.sum(e @ second * e) / np.sum(down.T @ second * down.T)
    np.testing.assert_allclose(report["down"].error, error, rtol=1e-3)
    assert np.abs(plain.T @ plain - staged.T @ staged).max() > 0.5  # it can fail
