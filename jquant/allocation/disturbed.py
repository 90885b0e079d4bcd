"""Scores of whole blocks by disturbing them: pruning (PMPQ) and noise (TDMPQ as released).

CPTQuant (Nanda et al. 2024) asks what a network loses when one block is disturbed in a way that has
nothing to do with quantizing. PMPQ sets the 30 % smallest weights of each matrix of the block to
zero; here the score is how far that moves the logits, in nats, and never negative (the released
scripts take differences of perplexity or accuracy, whose signs contradict each other). TDMPQ adds
noise to the first matrix of the block and takes the loss as it then is, without the loss from
before; its true first-order term is `gradients.taylor`.

Scores are one number per weight, the same for all of a block and divided by its size; what a scheme
then costs is a heuristic, see `sensitivity.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jquant.allocation.candidates import Candidates
from jquant.allocation.gradients import Loss, check_loss, next_token_loss, size, told
from jquant.allocation.sensitivity import Sensitivity
from jquant.allocation.trials import OnProgress, Trials, divergence, mean
from jquant.axes.layout import Layout
from jquant.calibration.tokens import Given
from jquant.errors import PlanError
from jquant.numerics.narrow import as_dtype
from jquant.trees.paths import key_of

Unit = Literal["block", "weight"]

PAPERS = ("nanda2024cptquant",)


def pmpq(
    fn: Callable[..., Any],
    params: PyTree,
    candidates: Candidates,
    batches: Iterable[Any],
    *,
    fraction: float = 0.3,
    unit: Unit = "block",
    token_weights: Given = None,
    progress: OnProgress | None = None,
) -> Sensitivity:
    """PMPQ: the KL divergence that pruning a block causes, per million weights.

    Args:
        fn: `fn(params, *inputs)`, one array of logits `[..., vocabulary]`; hashable.
        params, candidates, batches: as for `exact_kl`. Only weights with a choice are pruned.
        fraction: of each matrix, by magnitude; 0.3 is the paper's. Layers of a stack are pruned
            each for itself.
        unit: "block" (the paper's: all weights up to the first numbered key of their paths) or
            "weight".
        token_weights: what each token counts; as for `quantize`.
        progress: called with the trials done and how many there are.

    Returns:
        one number per weight, nats per token and million weights.

    Raises:
        PlanError: `fraction` is not between 0 and 1, or `unit` does not exist.
        EvidenceError, ValueError: as `exact_kl`.

    Example:
        >>> import jquant as jq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
        >>> x = jax.random.normal(jax.random.key(1), (32, 8))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_nearest()})
        >>> choice = jq.allocation.candidates(plan)
        >>> a, b = (pmpq(fn, params, choice, [x], fraction=f).values["w"][0] for f in (0.1, 0.5))
        >>> 0 < a < b
        True

    References:
        Nanda et al., CPTQuant, 2024, https://arxiv.org/abs/2412.03599
    """
    if not (isinstance(fraction, int | float) and 0 <= fraction <= 1):
        raise PlanError(f"fraction must be between 0 and 1, got {fraction!r}")
    trials = Trials(params, candidates, batches, token_weights=token_weights)
    units = _units(trials, unit)
    rises: dict[str, list[float]] = {name: [] for name in units}
    counts: list[float] = []
    total, done = len(units) * len(trials.batches), 0
    for inputs, reference, count, weights in trials.references(fn):
        counts.append(count)
        for name, paths in units.items():
            pruned = {
                path: _pruned(trials.leaves[path], fraction, candidates.weights[path].layout)
                for path in paths
            }
            rise = divergence(fn, trials.swapped(pruned), inputs, reference, weights)
            rises[name].append(float(rise))
            done += 1
            if progress is not None:
                progress(done, total)
    values = {}
    for name, paths in units.items():
        millions = sum(candidates.size(path) for path in paths) / 1e6
        values |= dict.fromkeys(paths, (max(mean(rises[name], counts), 0.0) / millions,))
    values = {path: values[path] for path in trials.free}
    return Sensitivity(
        "PMPQ", "nats per token and million weights",
        f"{fraction:.0%} of each matrix of a {unit} pruned by magnitude; {sum(counts)} tokens",
        values, None, trials.blocks, PAPERS,
    )  # fmt: skip


def tdmpq(
    fn: Callable[..., Any],
    params: PyTree,
    candidates: Candidates,
    batches: Iterable[Any],
    *,
    key: PRNGKeyArray,
    noise: float = 1.0,
    loss: Loss = next_token_loss,
    token_weights: Given = None,
    progress: OnProgress | None = None,
) -> Sensitivity:
    """TDMPQ as released: the loss with noise in the first matrix of a block.

    Despite its name there is no derivative in it, and as the noise is as large for all weights, it
    says which block's first matrix is small. It is here to be compared with; see `taylor`.

    Args:
        fn: any function; hashable.
        params, candidates, batches: as for `exact_kl`.
        key: draws the noise, once per block, by its name.
        noise: standard deviation, in the units of the weights; 1 is the released code's.
        loss: as for `taylor`.
        token_weights: what each token counts; as for `quantize`.
        progress: called with the trials done and how many there are.

    Returns:
        one number per weight: the mean loss of its block.

    Raises:
        PlanError, EvidenceError: as `exact_kl`.

    Example:
        >>> import jquant as jq
        >>> fn, params = lambda p, t: p["e"][t] @ p["w"], {"e": jnp.eye(8), "w": jnp.eye(8)}
        >>> tokens = jnp.arange(8)[None]
        >>> plan = jq.plan(jq.find_weights(fn, params, tokens), {"w": jq.presets.int4_nearest()})
        >>> choice = jq.allocation.candidates(plan)
        >>> score = tdmpq(fn, params, choice, [tokens], key=jax.random.key(0))
        >>> score.values["w"][0] > 0
        True

    References:
        Nanda et al., CPTQuant, 2024, https://arxiv.org/abs/2412.03599
    """
    check_loss(loss, token_weights)
    trials = Trials(params, candidates, batches, token_weights=token_weights)
    units = _units(trials, "block")
    noisy = {}
    for name, paths in units.items():
        own = key_of(key, name)
        w = trials.leaves[paths[0]]
        drawn = noise * jax.random.normal(own, w.shape, jnp.float32)
        noisy[name] = {paths[0]: as_dtype(w.astype(jnp.float32) + drawn, w.dtype)}
    losses: dict[str, list[float]] = {name: [] for name in units}
    counts: list[float] = []
    total, done = len(units) * len(trials.batches), 0
    for inputs, weights in trials.pairs():
        counts.append(size(inputs, weights))
        for name in units:
            losses[name].append(
                float(_loss(fn, loss, trials.swapped(noisy[name]), inputs, weights))
            )
            done += 1
            if progress is not None:
                progress(done, total)
    values = {path: (mean(losses[name], counts),) for name, some in units.items() for path in some}
    return Sensitivity(
        "TDMPQ, noise", "units of the loss",
        f"loss with noise of {noise:g} in the first matrix of a block; {len(counts)} batches",
        {path: values[path] for path in trials.free}, None, trials.blocks, PAPERS,
    )  # fmt: skip


def _units(trials: Trials, unit: str) -> dict[str, list[str]]:
    """The weights that are disturbed together, by name, in the order of depth."""
    if unit not in ("block", "weight"):
        raise PlanError(f"unit must be 'block' or 'weight', got {unit!r}")
    units: dict[str, list[str]] = {}
    for path, block in trials.blocks.items():
        units.setdefault(block if unit == "block" else path, []).append(path)
    return units


@partial(jax.jit, static_argnames=("fraction", "layout"))
def _pruned(w: Array, fraction: float, layout: Layout) -> Array:
    """A weight without the smallest of each matrix; exactly that many, ties by position."""
    canonical = layout.canonical(w)
    flat = canonical.reshape(*canonical.shape[:-2], -1)
    order = jnp.argsort(jnp.argsort(jnp.abs(flat), axis=-1), axis=-1)
    kept = jnp.where(order < int(fraction * flat.shape[-1]), jnp.zeros((), flat.dtype), flat)
    return layout.original(kept.reshape(canonical.shape))


@partial(jax.jit, static_argnames=("fn", "loss"))
def _loss(
    fn: Callable[..., Any], loss: Loss, params: PyTree, inputs: tuple[Any, ...], weights: Any = None
) -> Array:
    return loss(fn(params, *inputs), *inputs, **told(weights))
