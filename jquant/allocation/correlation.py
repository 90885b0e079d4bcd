"""CMPQ: how unlike the other blocks' hidden states a block's are, by canonical correlation.

    score(block) = 1 - mean over the other states of ρ₁,
    ρ₁(x, y) = the largest singular value of  C_xx^-½ C_xy C_yy^-½     (CCA, ridge-whitened)

A hidden state is averaged over the sequence, one row for each (CPTQuant, Nanda et al. 2024). With
no more rows than features every ρ is 1, so with fewer than four rows per feature states are first
cut to their N/4 principal components.

Where the states come from needs no model knowledge: the function is cut into blocks as for
calibration (granularity "block", see `calibration/stages.py`), and what is alive between two of
them, all that later blocks will ever see, is the state. In a transformer that is the residual
stream. What comes out of the prologue (embeddings) is a state too, but has no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jquant.allocation.candidates import Candidates
from jquant.allocation.sensitivity import Sensitivity
from jquant.allocation.trials import Told, outputs
from jquant.arguments import by_path, inputs_of
from jquant.calibration.flat import Piece
from jquant.calibration.stages import block_of
from jquant.calibration.walk import Walk
from jquant.checks import check_finite, check_weights, not_used
from jquant.errors import EvidenceError
from jquant.lazy import read, realize

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
    progress: Told | None = None,
) -> Sensitivity:
    """CMPQ: 1 minus the mean canonical correlation of a block's state with all the others.

    Args:
        fn: any function `fn(params, *inputs)`.
        params: its parameters; lazy ones are read as their block comes.
        candidates: what `candidates` returned.
        batches: each one array or a tuple of inputs whose leading axis are sequences. Many short
            sequences say more than few long ones: a sequence is one row.
        ridge: see `canonical_correlation`.
        progress: called with the blocks done and how many there are.

    Returns:
        one number per weight, 0 to 1: that of its block; of a stack of layers the mean over layers.

    Raises:
        PlanError, WeightError: the candidates are of other parameters, or these are not finite.
        EvidenceError: no batches, fewer than 8 sequences in all, states that are not finite, or
            weights that the batches do not reach.

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
    arrays, structure = by_path(params), jax.tree.structure(params)
    check_weights(candidates.plan({}), arrays)
    batches = [inputs_of(batch, number) for number, batch in enumerate(batches)]
    weights = candidates.weights
    # All weights cut, also those that are kept: the head ends the last block.
    planned = {path: w.stack_axes for path, w in weights.items() if w.has_inputs}
    walk = Walk.start(fn, list(arrays.items()), structure, planned, batches, "block")

    def current(piece: Piece) -> Array:
        leaf = arrays[piece.path]
        array = jnp.asarray(read(leaf, piece.index(len(leaf.shape))))
        if not isinstance(leaf, jax.Array):
            check_finite(piece.path, array)
        return array

    walk.advance(None, current, current)
    lengths = [next(len(x) for x in jax.tree.leaves(batch) if np.ndim(x)) for batch in batches]
    states = {-1: _pooled(walk.alive, lengths)}
    for at in range(len(walk.stages)):
        walk.advance(at, current, current)
        last = at == len(walk.stages) - 1
        if not last:
            states[at] = _pooled(walk.alive, lengths)
        elif any(piece.path in candidates.free for piece in walk.stages[at].pieces):
            whole = realize(params)
            found = [outputs(fn, whole, batch) for batch in batches]
            states[at] = _pooled([dict(enumerate(jax.tree.leaves(x))) for x in found], lengths)
        if progress is not None:
            progress(at + 1, len(walk.stages))
    scores = _scores({at: x for at, x in states.items() if x is not None}, ridge)
    values: dict[str, list[float]] = {}
    for at, stage in enumerate(walk.stages):
        for piece in stage.pieces:
            if piece.path in candidates.free:
                if at not in scores:
                    raise EvidenceError(
                        f"weight {str(piece)!r}: nothing that flows out of its block has a leading "
                        f"axis of {lengths[0]} sequences; pass batches of sequences"
                    )
                values.setdefault(piece.path, []).append(scores[at])
    for path in candidates.free:
        if path not in values and weights[path].has_inputs:
            raise EvidenceError(not_used(path))
    # What is only looked up is in the prologue.
    looked_up = scores.get(-1, 0.0)
    return Sensitivity(
        "CMPQ", "1 - correlation",
        f"mean-pooled states of {len(scores)} blocks, {sum(lengths)} sequences",
        {p: (_mean(values.get(p, [looked_up])),) for p in candidates.free}, None,
        {path: block_of(path) for path in candidates.free}, ("nanda2024cptquant", "raghu2017svcca"),
    )  # fmt: skip


def _pooled(alive: list[dict[int, Any]], lengths: list[int]) -> Array | None:
    """One row per sequence: the values alive, averaged over all axes but the first and last.

    Where none has an axis of sequences, tokens `[sequences · length, d]` are taken apart.
    """
    found = []
    for values, length in zip(alive, lengths, strict=True):
        floats = [
            jnp.asarray(x, jnp.float32)
            for _, x in sorted(values.items())
            if x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)
        ]
        whole = [x for x in floats if len(x) == length]
        flat = [x for x in floats if x.ndim == 2 and len(x) % length == 0]
        whole = whole or [x.reshape(length, -1, x.shape[-1]) for x in flat]
        rows = [jnp.mean(x, tuple(range(1, x.ndim - 1))) for x in whole]
        if not rows:
            return None
        found.append(jnp.concatenate(rows, -1))
    return jnp.concatenate(found)


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
    found = {}
    for at in white:
        others = [float(r) for pair, r in rho.items() if at in pair]
        found[at] = max(1.0 - _mean(others), 0.0) if others else 0.0
    return found


_whitened, _correlation = jax.jit(whitened), jax.jit(_first)


def _mean(values: list[float]) -> float:
    return float(np.mean(values))
