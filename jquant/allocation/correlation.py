"""CMPQ: how unlike the other blocks' hidden states a block's are, by canonical correlation.

    score(block) = 1 - mean over the other states of ρ₁,
    ρ₁(x, y) = the largest singular value of  C_xx^-½ C_xy C_yy^-½     (CCA, ridge-whitened)

A hidden state is averaged over the sequence, one row for each (CPTQuant, Nanda et al. 2024). With
no more rows than features every ρ is 1, so with fewer than four rows per feature states are first
cut to their N/4 principal components.

Where the states come from needs no model knowledge: the function is cut into blocks as for
calibration (`sequential="block"`, see `calibration/stages.py`), and what is alive between two of
them, all that later blocks will ever see, is the state. In a transformer that is the residual
stream. What comes out of the prologue (embeddings) is a state too, but has no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jquant.allocation.candidates import Candidates
from jquant.allocation.sensitivity import Sensitivity
from jquant.allocation.trials import OnProgress, outputs
from jquant.calibration.cutting import Recording
from jquant.calibration.data import Data
from jquant.calibration.stages import Cut, block_of
from jquant.calibration.tokens import Given
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError
from jquant.layerwise.checks import check_weights, not_used
from jquant.trees.lazy import realize
from jquant.weights.arguments import by_path
from jquant.weights.leaves import Leaves

RIDGE = 1e-3
ROWS_PER_FEATURE = 4


@jax.jit
def canonical_correlation(
    x: Float[Array, "n p"], y: Float[Array, "n q"], ridge: float | Array = RIDGE
) -> Float[Array, ""]:
    """The first canonical correlation of two sets of features over the same rows.

    Both are centred, and whitened by their covariance plus `ridge` times its mean eigenvalue. With
    fewer than four rows per feature they are first cut to N/4 principal components. Invariant to
    invertible linear maps of either, up to the ridge (of the components: to rotations only).

    Args:
        x, y: one row per sample, float.
        ridge: 1e-3 (heuristic).

    Returns:
        0 to 1, float32.

    Raises:
        ValueError: fewer than 8 rows (two components), or another number of rows in `y`.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (64, 3))
        >>> print(f"{canonical_correlation(x, x @ jnp.diag(jnp.array([1.0, 5.0, -2.0]))):.3f}")
        0.999
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2 * ROWS_PER_FEATURE:
        raise ValueError(
            f"canonical_correlation needs [rows, features] of the same {2 * ROWS_PER_FEATURE} rows "
            f"or more, got {x.shape} and {y.shape}"
        )
    return _first(whitened(x, ridge), whitened(y, ridge))


def whitened(x: Float[Array, "n p"], ridge: float | Array = RIDGE) -> Float[Array, "n r"]:
    """Rows of a state with covariance nearly 1, `r = min(p, N // 4)`, float32."""
    x = x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), 0)
    # Its size does not matter, and squares of singular values must not overflow.
    x = x / jnp.maximum(jnp.max(jnp.abs(x)), 1e-30)
    left, singular, _ = jnp.linalg.svd(x, full_matrices=False)
    kept = min(x.shape[1], max(x.shape[0] // ROWS_PER_FEATURE, 1))
    left, power = left[:, :kept], singular[:kept] ** 2
    shrunk = power / jnp.maximum(power + ridge * jnp.mean(power), 1e-30)
    return left * jnp.sqrt(shrunk)


def _first(x: Float[Array, "n r"], y: Float[Array, "n s"]) -> Float[Array, ""]:
    across = jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST)
    return jnp.minimum(jnp.linalg.norm(across, 2), 1.0)


def cmpq(
    fn: Callable[..., Any],
    params: PyTree,
    candidates: Candidates,
    batches: Iterable[Any],
    *,
    ridge: float = RIDGE,
    token_weights: Given = None,
    progress: OnProgress | None = None,
) -> Sensitivity:
    """CMPQ: 1 minus the mean canonical correlation of a block's state with all the others.

    Args:
        fn: any function `fn(params, *inputs)`.
        params: its parameters; lazy ones are read as their block comes.
        candidates: what `candidates` returned.
        batches: each one array or a tuple of inputs whose leading axis are sequences. Many short
            sequences say more than few long ones: a sequence is one row.
        ridge: see `canonical_correlation`.
        token_weights: what each token counts in the mean over a sequence; as for `quantize`.
            Sequences without any token that counts are left out.
        progress: called with the blocks done and how many there are.

    Returns:
        one number per weight, 0 to 1: that of its block; of a stack of layers the mean over layers.

    Raises:
        PlanError, WeightError: the candidates are of other parameters, or these are not finite.
        EvidenceError: no batches, fewer than 8 sequences in all, states that are not finite or
            whose tokens are not known, or weights that the batches do not reach.

    Example:
        >>> import jquant as jq
        >>> def fn(p, x):
        ...     for k in "012":
        ...         x = x + jnp.tanh(x @ p[k]["w"])
        ...     return x
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {k: {"w": jax.random.normal(q, (4, 4))} for k, q in zip("012", keys)}
        >>> x = jax.random.normal(jax.random.key(1), (64, 4))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_nearest()})
        >>> found = cmpq(fn, params, jq.allocation.candidates(plan), [x])
        >>> all(0 < score < 1 for (score,) in found.values.values())
        True

    References:
        Nanda et al., CPTQuant, 2024, https://arxiv.org/abs/2412.03599; Raghu et al., SVCCA, 2017,
        https://arxiv.org/abs/1706.05806
    """
    check_weights(candidates.plan({}), by_path(params))
    leaves, data = Leaves.of(params), Data.of(batches, token_weights)
    weights = candidates.weights
    # All weights cut, also those that are kept: the head ends the last block.
    planned = {path: weight for path, weight in weights.items() if weight.has_inputs}
    walk = Walk.start(fn, leaves, data, Recording.at(planned, sequential="block"))
    pool = _Pool([run.cut for run in walk.runs], _lengths(data.batches), data)
    states: dict[int, Array | None] = {}
    for at in _advanced(walk, leaves):
        is_last = at == len(walk.stages) - 1
        if at < 0 or not is_last:
            states[at] = pool.rows(walk.alive)
        elif any(piece.path in candidates.free for piece in walk.stages[at].pieces):
            states[at] = pool.rows(_outputs(fn, realize(params), pool))
        if progress is not None and at >= 0:
            progress(at + 1, len(walk.stages))
    scores = _scores({at: x for at, x in states.items() if x is not None}, ridge)
    values = _by_weight(walk, scores, candidates, pool.lengths)
    return Sensitivity(
        "CMPQ", "1 - correlation",
        f"mean-pooled states of {len(scores)} blocks, {sum(pool.lengths)} sequences",
        {path: (_mean(values[path]),) for path in candidates.free}, None,
        {path: block_of(path) for path in candidates.free}, ("nanda2024cptquant", "raghu2017svcca"),
    )  # fmt: skip


def _advanced(walk: Walk, leaves: Leaves) -> Iterator[int]:
    """The stages of a walk, each when it has run on the weights as they came; -1: the prologue."""
    for at in range(-1, len(walk.stages)):
        walk.advance(None if at < 0 else at, leaves.read_weight, leaves.read_weight)
        yield at


def _lengths(batches: Iterable[Any]) -> tuple[int, ...]:
    """How many sequences each batch has."""
    return tuple(next(len(x) for x in jax.tree.leaves(batch) if np.ndim(x)) for batch in batches)


def _outputs(fn: Callable[..., Any], params: PyTree, pool: _Pool) -> list[dict[int, Array]]:
    """What the function returns on each batch; by its numbers in the program if tokens count."""
    values = []
    for cut, batch in zip(pool.cuts, pool.data.batches, strict=True):
        leaves = jax.tree.leaves(outputs(fn, params, batch))
        numbers = range(len(leaves)) if pool.data.weights is None else cut.flat.outputs
        named = zip(numbers, leaves, strict=True)
        values.append({number: x for number, x in named if isinstance(number, int)})
    return values


def _by_weight(
    walk: Walk, scores: Mapping[int, float], candidates: Candidates, lengths: Sequence[int]
) -> dict[str, list[float]]:
    """The scores of the blocks that each weight with a choice lies in, one for each layer of it.

    Raises:
        EvidenceError: a block of such a weight has no score, or a weight is in no block.
    """
    # What is only looked up is in the prologue.
    values: dict[str, list[float]] = {
        path: [scores.get(-1, 0.0)]
        for path in candidates.free
        if not candidates.weights[path].has_inputs
    }
    in_blocks: dict[str, list[float]] = {}
    for at, stage in enumerate(walk.stages):
        for piece in stage.pieces:
            if piece.path not in candidates.free:
                continue
            if at not in scores:
                raise EvidenceError(
                    f"weight {str(piece)!r}: nothing that flows out of its block has a leading "
                    f"axis of {lengths[0]} sequences; pass batches of sequences"
                )
            in_blocks.setdefault(piece.path, []).append(scores[at])
    values |= in_blocks
    for path in candidates.free:
        if path not in values:
            raise EvidenceError(not_used(path))
    return values


@dataclass(frozen=True)
class _Pool:
    """How values alive between blocks become one row per sequence.

    Attributes:
        cuts: the cut function of each batch, which knows what tokens a value is of.
        lengths: how many sequences each batch has.
        data: the batches, and what each of their tokens counts.
    """

    cuts: Sequence[Cut]
    lengths: tuple[int, ...]
    data: Data

    def rows(self, alive: Sequence[Mapping[int, Any]]) -> Array | None:
        """The values of all batches, averaged over all axes but the first and last.

        Where none of a batch has an axis of sequences, tokens `[sequences · length, d]` are taken
        apart. None: a batch has neither.
        """
        rows = []
        for batch, (values, length) in enumerate(zip(alive, self.lengths, strict=True)):
            states = _states(values, length)
            if not states:
                return None
            own = jnp.concatenate([self._mean(batch, n, *x) for n, x in states.items()], -1)
            rows.append(self._counted(batch, own))
        return jnp.concatenate(rows)

    def _mean(self, batch: int, number: int, x: Array, apart: tuple[int, ...]) -> Array:
        """The mean of a value over the axes of `apart` but the first and last."""
        inner = tuple(range(1, len(apart) - 1))
        if self.data.weights is None:
            return jnp.mean(x.reshape(apart), inner)
        place, weights = self.cuts[batch].places[number], self.data.weights[batch]
        lost = place.unknown(weights.shape)
        if lost and self.data.strict:
            raise EvidenceError(
                f"a state {list(x.shape)} between blocks has tokens that are not known (lost "
                f"in {lost!r}); pass jq.TokenWeights(..., unmatched='count') to count all"
            )
        w = place.over(jnp.asarray(weights), x.shape).reshape(apart)
        sums = jnp.sum(jnp.where(w > 0, x.reshape(apart), 0.0) * w, inner)
        return sums / jnp.maximum(jnp.sum(w, inner), 1e-30)

    def _counted(self, batch: int, rows: Array) -> Array:
        """The rows of sequences that have a token which counts."""
        weights = self.data.weights
        if weights is None or len(weights[batch]) != len(rows):
            return rows
        counts = np.asarray(weights[batch]).reshape(len(rows), -1).any(1)
        return rows[np.flatnonzero(counts)]


def _states(values: Mapping[int, Any], length: int) -> dict[int, tuple[Array, tuple[int, ...]]]:
    """The floating values with an axis of sequences, each beside the shape that has it in front."""
    floats = {
        n: jnp.asarray(x, jnp.float32)
        for n, x in sorted(values.items())
        if x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)
    }
    whole = {n: (x, x.shape) for n, x in floats.items() if len(x) == length}
    flat = {
        n: (x, (length, -1, x.shape[-1]))
        for n, x in floats.items()
        if x.ndim == 2 and len(x) % length == 0
    }
    return whole or flat


def _scores(states: Mapping[int, Array], ridge: float) -> dict[int, float]:
    """1 minus the mean correlation with the others, of every state."""
    count = min((len(x) for x in states.values()), default=0)
    if states and count < 2 * ROWS_PER_FEATURE:
        raise EvidenceError(
            f"got {count} sequences; canonical correlation needs {2 * ROWS_PER_FEATURE} at least, "
            "and says more with four for each feature: pass more and shorter ones"
        )
    for at, x in states.items():
        if not bool(jnp.all(jnp.isfinite(x))):
            raise EvidenceError(f"the hidden states after block {at + 1} hold NaN or infinity")
    white = {at: _whitened(x, ridge) for at, x in states.items()}
    rho = {(a, b): _correlation(white[a], white[b]) for a in white for b in white if a < b}
    scores = {}
    for at in white:
        others = [float(r) for pair, r in rho.items() if at in pair]
        scores[at] = max(1.0 - _mean(others), 0.0) if others else 0.0
    return scores


_whitened, _correlation = jax.jit(whitened), jax.jit(_first)


def _mean(values: list[float]) -> float:
    return float(np.mean(values))
