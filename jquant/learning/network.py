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

from jquant.calibration.evidence import Evidence
from jquant.inference import apply
from jquant.layerwise.weight import Outcome
from jquant.learning.descend import Learned, Record, learn
from jquant.learning.objectives import Objective, Weighed
from jquant.learning.trace import Trace
from jquant.schemes.scheme import Plan
from jquant.weights.arguments import inputs_of
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


@dataclass(frozen=True)
class Feed:
    """Batches, with what the original parameters give on them."""

    run: Callable[..., Any]
    params: PyTree
    batches: Sequence[Any]
    weights: Sequence[Any] | None = None  # of their tokens: what the objective takes first, then

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int, /) -> tuple[Any, Any, tuple[Any, ...]]:
        inputs = inputs_of(self.batches[number], number)
        said = inputs if self.weights is None else (self.weights[number], *inputs)
        return inputs, self.run(self.params, *inputs), said


def learn_whole(
    fn: Callable[..., Any],
    params: PyTree,
    leaves: Mapping[str, Any],
    plan: Plan,
    batches: Sequence[Any],
    objective: Objective,
    *,
    token_weights: Sequence[Any] | None = None,
    evidence: Mapping[str, Evidence],
    key: PRNGKeyArray | None,
    record: Record | None,
    told: Callable[[int], None] | None,
) -> tuple[dict[str, tuple[QTensor, Outcome]], Trace]:
    """Learn the weights of a plan together.

    Args:
        fn, params: the original function and its parameters, all in memory.
        leaves: path → leaf, in the order of the tree, for all parameters; other weights may be
            quantized already.
        plan: the weights to learn, all of one rounding.
        batches: as for `quantize`.
        objective: of the function's outputs.
        token_weights: of every batch; the objective takes them by this name.
        evidence: what is known of the inputs of weights, for grids that can use it.
        key, record, told: see `learn`.
    """
    start = time.perf_counter()
    network = Network.of(fn, jax.tree.structure(params), leaves, plan)
    weights = [
        Learned(path, leaves[path], scheme, plan.weights[path].layout, evidence.get(path))
        for path, scheme in plan.items()
    ]
    fixed = [None if path in plan else leaf for path, leaf in leaves.items()]
    feed = Feed(jax.jit(fn), params, batches, token_weights)
    if token_weights is not None:
        objective = Weighed(objective)
    found, trace = learn(
        network, objective, weights, fixed, feed, key=key, record=record, told=told
    )
    jax.block_until_ready([q.codes for q, _ in found])
    each = (time.perf_counter() - start) / len(weights)
    return {
        weight.name: (q, Outcome.of(info, weight.evidence, each))
        for weight, (q, info) in zip(weights, found, strict=True)
    }, trace
