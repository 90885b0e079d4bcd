"""Learned roundings on the whole network: every weight moves with all others in sight.

The network is the function itself, with learned weights in the places of the original ones and all
other leaves as they are; what is wanted is what the original parameters give on the same batch,
computed anew for every batch, as logits are too large to keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jquant.calibration.data import Data
from jquant.calibration.evidence import Evidence
from jquant.inference import apply
from jquant.layerwise.outcome import Outcome
from jquant.learning.descend import Learned, Problem, Record, learn
from jquant.learning.objectives import Objective, Weighed
from jquant.learning.trace import Trace
from jquant.schemes.scheme import Plan
from jquant.weights.arguments import by_path
from jquant.weights.qtensor import QTensor, is_qtensor


@dataclass(frozen=True)
class Network:
    """`fn` with some of its leaves, by number, taken from elsewhere."""

    fn: Callable[..., Any]
    structure: Any
    places: tuple[int, ...]

    @staticmethod
    def of(
        fn: Callable[..., Any], structure: Any, leaves: Mapping[str, Any], paths: Collection[str]
    ) -> Network:
        """The function of the leaves with these paths; the others may be quantized."""
        run = apply(fn) if any(is_qtensor(x) for p, x in leaves.items() if p not in paths) else fn
        numbers = {path: number for number, path in enumerate(leaves)}
        return Network(run, structure, tuple(numbers[path] for path in paths))

    def __call__(
        self, weights: Sequence[Array], fixed: Sequence[Any], inputs: tuple[Any, ...]
    ) -> Any:
        leaves = list(fixed)
        for place, weight in zip(self.places, weights, strict=True):
            leaves[place] = weight
        return self.fn(jax.tree.unflatten(self.structure, leaves), *inputs)


@dataclass(frozen=True, eq=False)
class Feed:
    """Batches, with what the original parameters give on them."""

    run: Callable[..., Any]
    params: PyTree
    data: Data

    def __len__(self) -> int:
        return len(self.data.batches)

    def __getitem__(self, number: int, /) -> tuple[Any, Any, tuple[Any, ...]]:
        inputs, weights = self.data.batches[number], self.data.weights
        # What tokens count, the objective takes first.
        taken = inputs if weights is None else (weights[number], *inputs)
        return inputs, self.run(self.params, *inputs), taken


@dataclass(frozen=True, eq=False)
class Setting:
    """Weights that are to be learned, and the network around them.

    Attributes:
        fn, params: the original function and its parameters, all in memory.
        plan: the weights to learn, all of one rounding.
        quantized: the weights beside them that are quantized already.
        evidence: what is known of the inputs of weights, for grids that can use it.
    """

    fn: Callable[..., Any]
    params: PyTree
    plan: Plan
    quantized: Mapping[str, QTensor]
    evidence: Mapping[str, Evidence]


def learn_whole(
    setting: Setting,
    data: Data,
    objective: Objective,
    *,
    key: PRNGKeyArray | None,
    record: Record | None,
    told: Callable[[int], None] | None,
) -> tuple[dict[str, tuple[QTensor, Outcome]], Trace]:
    """Learn the weights of a plan together.

    Args:
        setting: the weights, and the network around them.
        data: the batches; where their tokens are weighed, the objective takes the weights first.
        objective: of the function's outputs.
        key, record, told: see `learn`.
    """
    start = time.perf_counter()
    plan, original = setting.plan, by_path(setting.params)
    leaves = original | dict(setting.quantized)
    structure = jax.tree.structure(setting.params, is_leaf=is_qtensor)
    problem = Problem(
        Network.of(setting.fn, structure, leaves, plan),
        objective if data.weights is None else Weighed(objective),
        [None if path in plan else leaf for path, leaf in leaves.items()],
        Feed(jax.jit(setting.fn), setting.params, data),
    )
    weights = [
        Learned(path, original[path], scheme, plan.weights[path].layout, setting.evidence.get(path))
        for path, scheme in plan.items()
    ]
    learned, trace = learn(problem, weights, key=key, record=record, told=told)
    jax.block_until_ready([q.codes for q, _ in learned])
    each = (time.perf_counter() - start) / len(weights)
    return {
        weight.name: (q, Outcome.of(info, weight.evidence, each))
        for weight, (q, info) in zip(weights, learned, strict=True)
    }, trace
