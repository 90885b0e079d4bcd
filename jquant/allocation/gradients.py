"""Losses from gradients: what a few backward passes say of all weights and schemes at once.

With `e = Q_b(W) - W` the error of a weight at b bits,

    taylor       s(b) = mean over batches of |<∇L, e>|,   L the loss of the text itself
    fisher       s(b) = ½ Σ F e²,   F the diagonal of the Fisher information
    kl_gradient  s(b) = <∇KL(network at the low width), Q_low(W) - Q_high(W)> · |e_b|² / |e_low|²

`taylor` is TDMPQ's true first-order term (Nanda et al. 2024 only name it). It says how far the loss
moves either way, and a trained network is nearly flat to first order. `fisher` is the second order
of KL to the original network, whose first order is zero: with `g` the gradient of the mean loss
over N tokens of labels drawn from the network's own distribution, the mean of `N g²` is F without
bias, whatever the batch. `kl_gradient` is mlx-lm's dynamic quantization (`dynamic_quant.py`): the
gradient sees all errors of the low width together. It knows one width; to the others it is scaled
by squared weight errors (ours).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jquant.allocation.candidates import Candidates
from jquant.allocation.exact import scaled
from jquant.allocation.sensitivity import Sensitivity
from jquant.allocation.trials import OnProgress, Trials, mean
from jquant.allocation.trials import tokens as tokens_of
from jquant.calibration.evidence import Evidence
from jquant.calibration.tokens import Given
from jquant.errors import PlanError
from jquant.learning.objectives import KL, logits_of, rows_of_weights
from jquant.weights.arguments import replaced

Loss = Callable[..., Array]

LOW = 4  # bits at which the KL gradient is taken where nothing else is said (mlx-lm's low_bits)


def next_token_loss(
    logits: Float[Array, "*b t v"],
    tokens: Int[Array, "*b t"],
    *others: Any,
    token_weights: Any = None,
) -> Float[Array, ""]:
    """Mean negative log likelihood of each next token, nats; the last of a row has none.

    With `token_weights[*b, t]` the mean is weighted, by the smaller weight of a token and its next.
    `others` are inputs that do not matter.

    Example:
        >>> round(float(next_token_loss(jnp.zeros((1, 3, 4)), jnp.array([[0, 1, 2]]))), 4)
        1.3863
    """
    log_p = jax.nn.log_softmax(logits[..., :-1, :].astype(jnp.float32))
    likely = jnp.take_along_axis(log_p, tokens[..., 1:, None], -1)
    if token_weights is None:
        return -jnp.mean(likely)
    wide = jnp.asarray(token_weights).astype(jnp.float32)
    pairs = jnp.minimum(wide[..., 1:], wide[..., :-1])
    total = jnp.sum(pairs)
    summed = jnp.sum(jnp.where(pairs > 0, likely[..., 0], 0.0) * pairs)
    return -summed / jnp.where(total > 0, total, 1.0)


def check_loss(loss: Loss, token_weights: Given) -> None:
    """Refuse token weights beside a loss that is not told of them."""
    if token_weights is not None and loss is not next_token_loss:
        raise PlanError(
            "token_weights are told to the default loss only; weigh tokens in the loss(outputs, "
            "*inputs) that you pass, and leave token_weights out"
        )


def told(weights: Any) -> dict[str, Any]:
    """What a loss is told of the weights of tokens."""
    return {} if weights is None else {"token_weights": weights}


def size(inputs: tuple[Any, ...], weights: Any) -> float:
    """How many tokens a batch has."""
    return np.size(jax.tree.leaves(inputs)[0]) if weights is None else tokens_of(weights)


def taylor(
    fn: Callable[..., Any],
    params: PyTree,
    candidates: Candidates,
    batches: Iterable[Any],
    *,
    loss: Loss = next_token_loss,
    evidence: Mapping[str, Evidence] | None = None,
    key: PRNGKeyArray | None = None,
    token_weights: Given = None,
    progress: OnProgress | None = None,
) -> Sensitivity:
    """TDMPQ's first-order term with the actual error: `|<∇L, Q(W) - W>|`, averaged over batches.

    Args:
        fn: any function; hashable.
        params: its parameters; lazy ones are read, all of them.
        candidates: what `candidates` returned.
        batches: each one array or a tuple of `fn`'s inputs.
        loss: `loss(outputs, *inputs)`, a scalar; hashable. Default: of each next token, where the
            outputs are logits and the only input is tokens.
        evidence, key: as for `exact_kl`.
        token_weights: what each token counts; as for `quantize`.
        progress: called with the batches done and how many there are.

    Returns:
        losses by scheme, in the units of `loss`.

    Raises:
        PlanError, EvidenceError: as `exact_kl`.

    Example:
        >>> import jquant as jq
        >>> fn, params = lambda p, t: p["e"][t] @ p["w"], {"e": jnp.eye(8), "w": jnp.eye(8) + 0.1}
        >>> tokens = jnp.arange(8)[None]
        >>> plan = jq.plan(jq.find_weights(fn, params, tokens), {"w": jq.presets.int4_nearest()})
        >>> taylor(fn, params, jq.allocation.candidates(plan), [tokens]).units
        'units of the loss'
    """
    check_loss(loss, token_weights)
    trials = Trials(params, candidates, batches, evidence, key, token_weights)
    terms = {path: [[] for _ in candidates[path]] for path in trials.free}
    weights, counts = trials.weights(), []
    for done, (inputs, own) in enumerate(trials.pairs(), start=1):
        gradient = _gradient(fn, loss, weights, trials.params, _Batch(inputs, inputs, own))
        counts.append(size(inputs, own))
        for path, g in gradient.items():
            for at, e in enumerate(trials.errors(path)):
                terms[path][at].append(abs(float(jnp.vdot(g, e))))
        if progress is not None:
            progress(done, len(trials.batches))
    losses = {path: tuple(mean(s, counts) for s in some) for path, some in terms.items()}
    return Sensitivity(
        "TDMPQ, first order", "units of the loss",
        f"|<gradient, error>| averaged over {len(counts)} batches",
        losses, trials.schemes(), trials.blocks, ("nanda2024cptquant",),
    )  # fmt: skip


def fisher(
    fn: Callable[..., Any],
    params: PyTree,
    candidates: Candidates,
    batches: Iterable[Any],
    *,
    key: PRNGKeyArray,
    evidence: Mapping[str, Evidence] | None = None,
    token_weights: Given = None,
    progress: OnProgress | None = None,
) -> Sensitivity:
    """The second-order term of KL with the actual error and the diagonal Fisher information.

    Args:
        fn: `fn(params, *inputs)`, one array of logits `[..., vocabulary]`; hashable.
        params, candidates, batches: as for `exact_kl`.
        key: draws the labels; a batch draws by what is in it, so their order does not matter.
        evidence: as for `exact_kl`; random roundings use `key`.
        token_weights: what each token counts; as for `quantize`.
        progress: called with the batches done and how many there are.

    Returns:
        losses by scheme, nats per token.

    Raises:
        PlanError, EvidenceError, ValueError: as `exact_kl`.

    Example:
        >>> import jquant as jq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
        >>> x = jax.random.normal(jax.random.key(1), (64, 8))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_nearest()})
        >>> score = fisher(
        ...     fn, params, jq.allocation.candidates(plan, (3, 4)), [x], key=jax.random.key(2)
        ... )
        >>> score.values["w"][0] > score.values["w"][1] > 0
        True

    References:
        Dong et al., HAWQ-V2, 2019, https://arxiv.org/abs/1911.03852 (traces of the Hessian); Kim et
        al., SqueezeLLM, 2023, https://arxiv.org/abs/2306.07629 (the diagonal Fisher information).
    """
    trials = Trials(params, candidates, batches, evidence, key, token_weights)
    weights = trials.weights()
    total = 0.0
    information = {path: jnp.zeros(w.shape, jnp.float32) for path, w in weights.items()}
    for done, (inputs, counted) in enumerate(trials.pairs(), start=1):
        own = jax.random.fold_in(key, _digest(inputs))
        gradient, count = _score(fn, weights, trials.params, inputs, own, counted)
        total += float(count)
        # N g² estimates F of one token; batches count by their tokens.
        information = _added(information, gradient, jnp.asarray(count, jnp.float32) ** 2)
        if progress is not None:
            progress(done, len(trials.batches))
    losses = {}
    for path in trials.free:
        f = information.pop(path) / total
        losses[path] = tuple(float(0.5 * jnp.sum(f * e**2)) for e in trials.errors(path))
    return Sensitivity(
        "Fisher", "nats per token",
        f"half the diagonal Fisher information times the squared error, {total:g} tokens",
        losses, trials.schemes(), trials.blocks, ("dong2020hawq", "kim2024squeezellm"),
    )  # fmt: skip


def kl_gradient(
    fn: Callable[..., Any],
    params: PyTree,
    candidates: Candidates,
    batches: Iterable[Any],
    *,
    low: int | None = None,
    evidence: Mapping[str, Evidence] | None = None,
    key: PRNGKeyArray | None = None,
    token_weights: Given = None,
    progress: OnProgress | None = None,
) -> Sensitivity:
    """mlx-lm's score: the gradient of KL where all weights are coarse, times what finer ones gain.

    Args:
        fn: `fn(params, *inputs)`, one array of logits `[..., vocabulary]`; hashable.
        params, candidates, batches: as for `exact_kl`.
        low: position of the candidate at which the gradient is taken, for all weights; None: the
            one whose codes have 4 bits or the most below that (mlx-lm's default is 4). A network
            that is broken there says little. The finest candidate is the other end.
        evidence, key: as for `exact_kl`.
        token_weights: what each token counts; as for `quantize`.
        progress: called with the batches done and how many there are.

    Returns:
        losses by scheme, nats per token to first order at the low width (about twice the weight's
        share, as KL is quadratic near zero). A weight whose term is negative, so that its error
        makes up for those of others, gets the least positive one per number.

    Raises:
        PlanError, EvidenceError, ValueError: as `exact_kl`; no candidate at position `low`.

    Example:
        >>> import jquant as jq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
        >>> x = jax.random.normal(jax.random.key(1), (64, 8))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_nearest()})
        >>> score = kl_gradient(fn, params, jq.allocation.candidates(plan, (3, 4, 8)), [x])
        >>> score.values["w"][0] > score.values["w"][1] > score.values["w"][2] > 0
        True

    References:
        mlx-lm, dynamic_quant.py, https://github.com/ml-explore/mlx-lm
    """
    trials = Trials(params, candidates, batches, evidence, key, token_weights)
    at = {path: _low(path, candidates, low) for path in trials.free}
    coarse = {path: trials.quantized(path, candidates[path][k]) for path, k in at.items()}
    counts, gradients = [], {path: jnp.zeros(w.shape, jnp.float32) for path, w in coarse.items()}
    for done, (inputs, reference, count, own) in enumerate(trials.references(fn), start=1):
        batch = _Batch(inputs, (reference,), own)
        gradient = _gradient(fn, KL(), coarse, trials.params, batch)
        counts.append(count)
        gradients = _summed(gradients, gradient, jnp.float32(counts[-1]))
        if progress is not None:
            progress(done, len(trials.batches))
    terms, squares = {}, {}
    for path in trials.free:
        errors = trials.errors(path)
        squares[path] = [float(jnp.sum(e**2)) for e in errors]
        gain = errors[at[path]] - errors[-1]
        terms[path] = float(jnp.vdot(gradients.pop(path), gain)) / math.fsum(counts)
    positive = [term / candidates.size(path) for path, term in terms.items() if term > 0]
    losses = {}
    for path, term in terms.items():
        if term <= 0:
            term = min(positive, default=0.0) * candidates.size(path)
        some = [term if k == at[path] else math.nan for k in range(len(squares[path]))]
        losses[path] = scaled(some, [at[path]], squares[path])
    return Sensitivity(
        "KL gradient", "nats per token, first order",
        f"gradient with all weights at their low width, {sum(counts)} tokens; scaled to the others",
        losses, trials.schemes(), trials.blocks, ("hannun2023mlx",),
    )  # fmt: skip


def _low(path: str, candidates: Candidates, low: int | None) -> int:
    count = len(candidates[path])
    if low is not None:
        if not 0 <= low < count - 1:
            raise PlanError(
                f"low={low!r}, but weight {path!r} has candidates 0 to {count - 1}, and the last "
                "is what the low one is compared with"
            )
        return low
    few = [k for k, s in enumerate(candidates[path][:-1]) if s.grid.bits <= LOW]
    return max(few, default=0)


class _Batch(NamedTuple):
    """The inputs of a function, what a loss compares its outputs with, the weights of tokens."""

    inputs: tuple[Any, ...]
    goal: tuple[Any, ...]
    weights: Any = None


@partial(jax.jit, static_argnames=("fn", "loss"))
def _gradient(
    fn: Callable[..., Any], loss: Loss, weights: dict[str, Array], params: PyTree, batch: _Batch
) -> dict[str, Array]:
    """The gradient of the loss with respect to some weights, float32."""

    def at(wide: dict[str, Array]) -> Array:
        now = {path: w.astype(weights[path].dtype) for path, w in wide.items()}
        outputs = fn(replaced(params, now), *batch.inputs)
        return loss(outputs, *batch.goal, **told(batch.weights))

    return jax.grad(at)({path: w.astype(jnp.float32) for path, w in weights.items()})


@partial(jax.jit, static_argnames="fn")
def _score(
    fn: Callable[..., Any],
    weights: dict[str, Array],
    params: PyTree,
    inputs: tuple[Any, ...],
    key: PRNGKeyArray,
    own: Any = None,
) -> tuple[dict[str, Array], Array | int]:
    """The gradient of the mean loss of labels drawn from the network, and how many there are.

    With weights the loss of each counts by their root: the square of the sum's gradient is then, as
    labels do not depend on each other, the weighted sum of squares.
    """

    def at(wide: dict[str, Array]) -> tuple[Array, Array | int]:
        now = {path: w.astype(weights[path].dtype) for path, w in wide.items()}
        (logits,) = logits_of(fn(replaced(params, now), *inputs))
        flat = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
        labels = jax.random.categorical(key, jax.lax.stop_gradient(flat))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(flat), labels[:, None], -1)
        if own is None:
            return -jnp.mean(log_p), len(flat)
        counted = rows_of_weights(logits, own)
        total = jnp.sum(counted)
        summed = jnp.sum(jnp.where(counted > 0, log_p[:, 0], 0.0) * jnp.sqrt(counted))
        return -summed / jnp.where(total > 0, total, 1.0), total

    wide = {path: w.astype(jnp.float32) for path, w in weights.items()}
    return jax.grad(at, has_aux=True)(wide)


@partial(jax.jit, donate_argnums=0)
def _added(total: dict[str, Array], gradient: dict[str, Array], factor: Array) -> dict[str, Array]:
    return jax.tree.map(lambda t, g: t + factor * g**2, total, gradient)


@partial(jax.jit, donate_argnums=0)
def _summed(total: dict[str, Array], gradient: dict[str, Array], factor: Array) -> dict[str, Array]:
    return jax.tree.map(lambda t, g: t + factor * g, total, gradient)


def _digest(inputs: tuple[Any, ...]) -> int:
    """A number made of all that is in a batch."""
    code = 0
    for leaf in jax.tree.leaves(inputs):
        code = zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).tobytes(), code)
    return code
