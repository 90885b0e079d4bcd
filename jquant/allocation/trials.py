"""Running a network with some weights replaced: what all measured scores have in common.

The parameters are operands of one compiled program, so a trial is a call with another array in the
place of a leaf: however many weights and schemes are tried, `divergence` compiles once per shape of
batch. All parameters are in memory, and the logits of one batch in full precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jquant.allocation.candidates import Candidates, draft, key_of_scheme
from jquant.axes.layout import Layout
from jquant.calibration.data import Data
from jquant.calibration.evidence import Evidence
from jquant.calibration.stages import block_of
from jquant.calibration.tokens import Given
from jquant.errors import EvidenceError, PlanError
from jquant.layerwise.checks import check_evidence, check_needs, check_weights
from jquant.layerwise.weight import quantize_weight
from jquant.learning.objectives import KL, logits_of, rows_of_weights
from jquant.schemes.scheme import Scheme
from jquant.trees.lazy import realize
from jquant.trees.paths import key_of
from jquant.weights.arguments import Inputs, by_path, replaced
from jquant.weights.qtensor import dequantize_weight

OnProgress = Callable[[int, int], None]  # called with the trials done, and how many there are


class Trials:
    """The parameters of a function, and the candidates for its weights; checked.

    Args:
        params: the parameters; lazy ones are read, all of them.
        candidates: what `candidates` returned.
        batches: each one array, or a tuple of the function's inputs.
        evidence: path → `Evidence`. With it weights are rounded as their schemes say, without it to
            nearest (and terms are in the Frobenius metric).
        key: for roundings that are random, used with evidence only.
        token_weights: what each token counts; see `quantize`.

    Raises:
        PlanError: the candidates are of other parameters.
        WeightError: a weight holds NaN or infinite values.
        EvidenceError: no batches, evidence that does not fit, or token weights that are none.
    """

    def __init__(
        self,
        params: PyTree,
        candidates: Candidates,
        batches: Iterable[Any],
        evidence: Mapping[str, Evidence] | None = None,
        key: PRNGKeyArray | None = None,
        token_weights: Given = None,
    ):
        if not isinstance(candidates, Candidates):
            raise PlanError(
                f"expected what allocation.candidates returns, got {type(candidates).__name__}"
            )
        shapes = by_path(params)
        for at in range(max(map(len, candidates.values()))):
            plan = candidates.plan({p: min(at, len(s) - 1) for p, s in candidates.items()})
            check_weights(plan, shapes)
            if evidence is not None:
                check_needs(plan, evidence, key, batches=False, staged=False)
                check_evidence(plan, evidence)
        self.candidates, self.evidence, self.key = candidates, evidence, key
        self.data = Data.of(batches, token_weights)
        self.batches = self.data.batches
        self.params = realize(params)
        self.leaves = by_path(self.params)

    def pairs(self) -> Iterator[tuple[Inputs, Any]]:
        """For every batch its inputs, and the weights of its tokens or None."""
        yield from self.data.pairs()

    def references(self, fn: Callable[..., Any]) -> Iterator[tuple[Inputs, Any, float, Any]]:
        """For every batch its inputs, the logits of the network as it came, how many tokens these
        are of, and the weights of the tokens or None."""
        for number, (inputs, weights) in enumerate(self.pairs()):
            logits = outputs(fn, self.params, inputs)
            count = rows(logits, weights)
            if _lost(logits, weights):  # a divergence from NaN would be taken for zero
                raise EvidenceError(
                    f"the logits of batch {number} hold NaN or infinity; look for such weights, "
                    "and for tokens outside the vocabulary"
                )
            yield inputs, logits, count, weights

    @property
    def free(self) -> tuple[str, ...]:
        """The weights that are to be tried."""
        return self.candidates.free

    @property
    def blocks(self) -> dict[str, str]:
        """The block of every weight that is to be tried, by its path."""
        return {path: block_of(path) for path in self.free}

    def weights(self) -> dict[str, Array]:
        """The weights that are to be tried, as they came."""
        return {path: self.leaves[path] for path in self.free}

    def quantized(self, path: str, scheme: Scheme) -> Array:
        """A weight on the grid of a scheme, in its own shape and dtype."""
        w, layout = self.leaves[path], self.candidates.weights[path].layout
        if self.evidence is None:
            return _nearest(w, draft(scheme), layout)
        own = None if self.key is None else key_of(self.key, path)
        evidence = self.evidence.get(path)
        return dequantize_weight(quantize_weight(w, scheme, layout, evidence=evidence, key=own)[0])

    def errors(self, path: str) -> list[Array]:
        """What each candidate does to a weight: `Q(w) - w`, float32."""
        w = self.leaves[path].astype(jnp.float32)
        schemes = self.candidates[path]
        return [self.quantized(path, scheme).astype(jnp.float32) - w for scheme in schemes]

    def squared_errors(self, path: str) -> list[float]:
        """The squared error of each candidate."""
        return [float(jnp.sum(e**2)) for e in self.errors(path)]

    def swapped(self, weights: Mapping[str, Array]) -> PyTree:
        """The parameters with other arrays in the place of some weights."""
        return replaced(self.params, weights)

    def schemes(self) -> dict[str, tuple[str, ...]]:
        """What losses by scheme belong to, in words."""
        return {path: tuple(map(key_of_scheme, self.candidates[path])) for path in self.free}


@partial(jax.jit, static_argnames="fn")
def outputs(fn: Callable[..., Any], params: PyTree, inputs: Inputs) -> Any:
    """What the function returns."""
    return fn(params, *inputs)


@partial(jax.jit, static_argnames="fn")
def divergence(
    fn: Callable[..., Any], params: PyTree, inputs: Inputs, reference: Any, weights: Any = None
) -> Float[Array, ""]:
    """KL of the logits from those of the original network, nats per token."""
    return KL()(fn(params, *inputs), reference, token_weights=weights)


def rows(logits: Any, weights: Any = None) -> float:
    """How many tokens there are logits of, by their weights."""
    (leaf,) = logits_of(logits)
    if weights is None:
        return leaf.size // leaf.shape[-1]
    return tokens(rows_of_weights(leaf, weights))


def tokens(weights: Any) -> float:
    """How many tokens there are, by their weights: a whole number where that is one."""
    total = float(np.sum(np.asarray(weights), dtype=np.float64))
    return int(total) if total.is_integer() else total


def mean(values: Sequence[float], counts: Sequence[float]) -> float:
    """The mean over batches by their tokens, in the same bits whatever their order."""
    total = math.fsum(v * n for v, n in zip(values, counts, strict=True))
    return total / math.fsum(counts)


@jax.jit
def _lost(logits: Any, weights: Any = None) -> Array:
    """Whether a logit is NaN or infinite; minus infinity is a word that cannot be."""
    (leaf,) = jax.tree.leaves(logits)
    bad = jnp.isnan(leaf) | (leaf == jnp.inf)
    if weights is None:
        return jnp.any(bad)
    return jnp.any(jnp.any(bad, -1).reshape(-1) & (rows_of_weights(leaf, weights) > 0))


@partial(jax.jit, static_argnames=("scheme", "layout"))
def _nearest(w: Array, scheme: Scheme, layout: Layout) -> Array:
    return dequantize_weight(quantize_weight(w, scheme, layout)[0])
