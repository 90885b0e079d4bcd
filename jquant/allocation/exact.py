"""Exact losses: each weight quantized alone, the KL divergence that the network then has.

    loss(weight, scheme) = KL(p ‖ p with this weight on this scheme)      [nats per token]

Nothing is approximated but that losses of different weights add up. It takes a forward pass for
every weight, scheme and batch. With few bits the divergence is large and quickly known; with many
it drowns in the rounding of the network's own arithmetic. So the schemes at some positions may be
run `only`, and the others get the loss of the nearest of these times the ratio of squared weight
errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import PRNGKeyArray, PyTree

from jquant.allocation.candidates import Candidates
from jquant.allocation.sensitivity import Sensitivity
from jquant.allocation.trials import OnProgress, Trials, divergence, mean
from jquant.calibration.evidence import Evidence
from jquant.calibration.tokens import Given
from jquant.errors import PlanError


def exact_kl(
    fn: Callable[..., Any],
    params: PyTree,
    candidates: Candidates,
    batches: Iterable[Any],
    *,
    only: Sequence[int] | None = None,
    evidence: Mapping[str, Evidence] | None = None,
    key: PRNGKeyArray | None = None,
    token_weights: Given = None,
    progress: OnProgress | None = None,
) -> Sensitivity:
    """The KL divergence that each weight causes alone, under each of its candidates.

    Args:
        fn: `fn(params, *inputs)`, one array of logits `[..., vocabulary]`; hashable.
        params: its parameters; lazy ones are read, all of them.
        candidates: what `candidates` returned.
        batches: each one array or a tuple of `fn`'s inputs.
        only: positions of the candidates to run, for all weights; the losses of the others are
            scaled by the ratio of squared weight errors. None: all are run.
        evidence: path → `Evidence`, to round as the schemes say; without it to nearest.
        key: for roundings that are random.
        token_weights: what each token counts; as for `quantize`.
        progress: called with the trials done and how many there are.

    Returns:
        losses by scheme, nats per token, the mean over all tokens.

    Raises:
        PlanError: candidates of other parameters, or `only` names none.
        EvidenceError: no batches, or a divergence that is not finite.
        ValueError: outputs that are not logits.

    Example:
        >>> import jax, jax.numpy as jnp, jquant as jq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
        >>> x = jax.random.normal(jax.random.key(1), (32, 8))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_nearest()})
        >>> score = exact_kl(fn, params, jq.allocation.candidates(plan, (2, 4, 8)), [x])
        >>> two, four, eight = score.values["w"]
        >>> two > 4 * four > 16 * eight > 0
        True
    """
    trials = Trials(params, candidates, batches, evidence, key, token_weights)
    run = {path: _positions(path, len(candidates[path]), only) for path in trials.free}
    values = {path: [[] for _ in candidates[path]] for path in trials.free}
    counts: list[float] = []
    total, done = len(trials.batches) * sum(map(len, run.values())), 0
    for inputs, reference, count, weights in trials.references(fn):
        counts.append(count)
        for path, positions in run.items():
            for at in positions:
                w = trials.quantized(path, candidates[path][at])
                kl = divergence(fn, trials.swapped({path: w}), inputs, reference, weights)
                values[path][at].append(float(kl))
                done += 1
                if progress is not None:
                    progress(done, total)
    losses = {
        path: [mean(some, counts) if some else math.nan for some in values[path]]
        for path in trials.free
    }
    losses = {
        path: scaled(
            some, run[path], trials.squared_errors(path) if len(run[path]) < len(some) else some
        )
        for path, some in losses.items()
    }
    how = "every candidate run" if only is None else f"run at positions {tuple(only)}, else scaled"
    return Sensitivity(
        "exact KL", "nats per token",
        f"each weight alone, {how}; {sum(counts)} tokens",
        losses, trials.schemes(), trials.blocks,
    )  # fmt: skip


def scaled(
    losses: Sequence[float], measured: Sequence[int], squares: Sequence[float]
) -> tuple[float, ...]:
    """Losses at `measured` positions, and the others by the ratio of squared weight errors.

    Example:
        >>> scaled([float("nan"), 2.0, float("nan")], [1], [4.0, 1.0, 0.25])
        (8.0, 2.0, 0.5)
    """

    def log(x: float) -> float:
        return math.log(max(x, 1e-300))

    filled = []
    for at, loss in enumerate(losses):
        if at not in measured:
            near = min(measured, key=lambda k: abs(log(squares[k]) - log(squares[at])))
            loss = losses[near] * squares[at] / squares[near] if squares[near] > 0 else 0.0
        filled.append(max(loss, 0.0))  # a sum of float32 terms may fall below it
    return tuple(filled)


def _positions(path: str, count: int, only: Sequence[int] | None) -> list[int]:
    positions = [at for at in range(count) if only is None or at in only]
    if not positions:
        raise PlanError(
            f"only={only!r} names none of the {count} candidates of weight {path!r}: pass "
            "positions from 0 on"
        )
    return positions
