"""How far a quantized model has moved: perplexity, KL divergence, agreement.

    KL = mean over tokens of  sum_v p_full(v) (log p_full(v) - log p_quantized(v))      [nats]

KL to the full-precision model is the measure to trust: it sees every change of the distribution,
needs no labels, and is 0 for an unchanged model. Perplexity is `exp` of the mean negative log
likelihood of each next token; agreement is how often the likeliest token is the same.

The models run one after the other on a few rows at a time through `jquant.inference.apply`, so
one compiled program serves every batch. A vocabulary is large: probabilities are formed for a chunk
of tokens at once, never for all, and only one number per token comes to the host, where the sums
are exact (`math.fsum` over float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jquant.calibration.tokens import Given, Weights, check_any, weighed
from jquant.inference import apply
from jquant.trees.lazy import realize

TOKENS_PER_FORWARD = 1024  # rounded down to whole rows: bounds the logits in memory
TOKENS_AT_ONCE = 128  # tokens whose probabilities exist at one time
Progress = Callable[[int], None]
Tokens = Int[Array | np.ndarray, "b t"]
Batch = Tokens | tuple[Any, ...]  # tokens, or these and other inputs


@dataclass(frozen=True)
class Comparison:
    """How far a quantized model is from the full one.

    Attributes:
        kl: mean KL(full || quantized), nats per token.
        perplexity_full, perplexity_quantized: of each model alone.
        agreement: how often both find the same token likeliest, 0 to 1.
        tokens: how many positions were compared.
    """

    kl: float
    perplexity_full: float
    perplexity_quantized: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.4f} nats/token, "
            f"perplexity {self.perplexity_full:.3f} -> {self.perplexity_quantized:.3f}, "
            f"agreement {self.agreement:.1%} ({self.tokens} tokens)"
        )


def compare(
    fn: Callable[..., Array],
    params: Any,
    qparams: Any,
    batches: Iterable[Batch],
    *,
    token_weights: Given = None,
    progress: Progress | None = None,
) -> Comparison:
    """Every measure in one pass over `batches`.

    Args:
        fn: `fn(params, tokens[B, T]) -> logits[B, T, V]`.
        params, qparams: the two sets of parameters; either may hold quantized weights and lazy
            leaves, which are read.
        batches: token arrays `[B, T]`, T >= 2; B and T may vary (each T compiles once). Or tuples
            of such an array and other inputs of `fn` whose first axis is B.
        token_weights: what each token counts: a function `(*inputs) -> array [B, T]`, or one array
            for each batch; None: each counts 1. Tokens of weight 0 are left out.
        progress: called with the number of positions done so far.

    Returns:
        A `Comparison`. KL and agreement are means over all positions, the perplexities over those
        whose next token is known (all but the last of a row), by the smaller weight of the two.

    Raises:
        ValueError: no batches, a batch of another shape or type, or logits that are not finite.

    Example:
        >>> def fn(params, tokens):
        ...     return params[tokens]
        >>> table = jax.random.normal(jax.random.key(0), (8, 8))
        >>> compare(fn, table, table, [jnp.arange(8).reshape(2, 4)]).kl
        0.0
    """
    return compare_all(
        fn, params, {"qparams": qparams}, batches, token_weights=token_weights, progress=progress
    )["qparams"]


def compare_all(
    fn: Callable[..., Array],
    params: Any,
    models: Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    token_weights: Given = None,
    progress: Progress | None = None,
) -> dict[str, Comparison]:
    """`compare` for several quantized models by name; the full one runs once for all of them.

    Raises:
        ValueError: as `compare`, naming the model; or no models.

    Example:
        >>> def fn(params, tokens):
        ...     return params[tokens]
        >>> table = jax.random.normal(jax.random.key(0), (8, 8))
        >>> models = {"half": table / 2, "same": table}
        >>> comparisons = compare_all(fn, table, models, [jnp.arange(8).reshape(2, 4)])
        >>> comparisons["half"].kl > 0, comparisons["same"].kl
        (True, 0.0)
    """
    if not models:
        raise ValueError("models is empty; pass {name: quantized parameters}")
    run, params = apply(fn), realize(params)
    models = {name: realize(qparams) for name, qparams in models.items()}
    tallies = {name: _Tally() for name in models}
    done = 0
    for tokens, others, weights, real in _microbatches(batches, token_weights):
        full = run(params, tokens, *others)
        _check_logits(full, tokens, "params")
        for name, qparams in models.items():
            logits = run(qparams, tokens, *others)
            _check_logits(logits, tokens, name)
            tallies[name].add(name, _pair(full, logits, tokens), real, weights)
        done += real * tokens.shape[1]
        if progress is not None:
            progress(done)
    return {name: tally.comparison() for name, tally in tallies.items()}


class _Tally:
    """One number per token, of one model against the full one."""

    def __init__(self) -> None:
        self.kls: list[float] = []
        self.full: list[float] = []
        self.quantized: list[float] = []
        self.same: list[float] = []
        self.weights: list[float] = []  # of tokens; none where each counts 1
        self.pairs: list[float] = []  # of a token and its next

    def add(
        self, name: str, measures: tuple[Array, Array, Array], real: int, weights: Weights | None
    ) -> None:
        divergence, nll, agree = (np.asarray(part)[..., :real, :] for part in measures)
        if weights is not None:
            own, pairs = _weights_of(weights)
            self.weights += own.ravel().tolist()
            self.pairs += pairs[:, :-1].ravel().tolist()
            divergence = np.where(own > 0, divergence, 0.0)
            nll = np.where(pairs > 0, nll, 0.0)
        _check_finite(nll[0], "params", len(self.kls))
        _check_finite(nll[1], name, len(self.kls))
        _check_finite(divergence, f"params against {name}", len(self.kls))
        self.kls += divergence.ravel().tolist()
        self.same += agree.ravel().astype(float).tolist()
        self.full += nll[0, :, :-1].ravel().tolist()
        self.quantized += nll[1, :, :-1].ravel().tolist()

    def comparison(self) -> Comparison:
        return Comparison(
            kl=_mean(self.kls, self.weights),
            perplexity_full=_exp(_mean(self.full, self.pairs)),
            perplexity_quantized=_exp(_mean(self.quantized, self.pairs)),
            agreement=_mean(self.same, self.weights),
            tokens=sum(w > 0 for w in self.weights) or len(self.kls),
        )


def perplexity(
    fn: Callable[..., Array],
    params: Any,
    batches: Iterable[Batch],
    *,
    token_weights: Given = None,
    progress: Progress | None = None,
) -> float:
    """`exp` of the mean negative log likelihood of each next token; arguments as for `compare`."""
    run, params = apply(fn), realize(params)
    losses: list[float] = []
    counted: list[float] = []
    for tokens, others, weights, real in _microbatches(batches, token_weights):
        logits = run(params, tokens, *others)
        _check_logits(logits, tokens, "params")
        nll = np.asarray(_single(logits, tokens))[:real]
        if weights is not None:
            _, pairs = _weights_of(weights)
            counted += pairs[:, :-1].ravel().tolist()
            nll = np.where(pairs > 0, nll, 0.0)
        _check_finite(nll, "params", len(losses))
        losses += nll[:, :-1].ravel().tolist()
        if progress is not None:
            progress(len(losses))
    return _exp(_mean(losses, counted))


def kl(
    fn: Callable[..., Array],
    params: Any,
    qparams: Any,
    batches: Iterable[Batch],
    *,
    token_weights: Given = None,
    progress: Progress | None = None,
) -> float:
    """Mean KL(full || quantized) in nats per token; arguments as for `compare`."""
    return compare(fn, params, qparams, batches, token_weights=token_weights, progress=progress).kl


def agreement(
    fn: Callable[..., Array],
    params: Any,
    qparams: Any,
    batches: Iterable[Batch],
    *,
    token_weights: Given = None,
    progress: Progress | None = None,
) -> float:
    """The share of positions where both models find the same token likeliest; as `compare`."""
    return compare(
        fn, params, qparams, batches, token_weights=token_weights, progress=progress
    ).agreement


@jax.jit
def _pair(
    full: Float[Array, "b t v"], quantized: Float[Array, "b t v"], tokens: Int[Array, "b t"]
) -> tuple[Array, Array, Array]:
    """Per token: the divergence `[B, T]`, both losses `[2, B, T]`, whether the top is the same."""

    def one(token: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        p, q, target = token
        log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        # where p is 0 the term is 0, also if a log is minus infinity
        terms = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - log_q))
        losses = -jnp.stack((log_p[target], log_q[target]))
        return jnp.sum(terms), losses, jnp.argmax(p) == jnp.argmax(q)

    divergence, losses, same = _over_tokens(one, (full, quantized, _targets(tokens)), tokens.size)
    shape = tokens.shape
    return divergence.reshape(shape), losses.T.reshape(2, *shape), same.reshape(shape)


@jax.jit
def _single(logits: Float[Array, "b t v"], tokens: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """The loss of each token's successor; the last of a row has none and is dropped by callers."""

    def one(token: tuple[Array, Array]) -> Array:
        return -jax.nn.log_softmax(token[0])[token[1]]

    return _over_tokens(one, (logits, _targets(tokens)), tokens.size).reshape(tokens.shape)


def _over_tokens(one: Callable[[Any], Any], values: Any, count: int) -> Any:
    """`one` for each token, `TOKENS_AT_ONCE` at a time."""
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), values)
    flat = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.float32), flat)
    return jax.lax.map(one, flat, batch_size=TOKENS_AT_ONCE)


def _targets(tokens: Int[Array, "b t"]) -> Int[Array, "b t"]:
    return jnp.roll(tokens, -1, axis=1).astype(jnp.int32)


def _weights_of(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Of every token `[B, T]`, and the smaller one of it and its next; the last of a row has 0."""
    own = weights.astype(np.float64)
    pairs = np.zeros_like(own)
    pairs[:, :-1] = np.minimum(own[:, :-1], own[:, 1:])
    return own, pairs


def _microbatches(
    batches: Iterable[Batch], token_weights: Given
) -> Iterator[tuple[np.ndarray, list[np.ndarray], Weights | None, int]]:
    """Few rows at a time, for one T always as many as its first batch allows; short ones padded.

    Yields the rows of tokens, those of other inputs, the weights of the real rows, and how many of
    them there are.
    """
    rows_of: dict[int, int] = {}
    seen: list[Weights] = []
    arrays = (np.asarray(batch) if isinstance(batch, list) else batch for batch in batches)
    for i, ((batch, *rest), weights) in enumerate(weighed(arrays, token_weights)):
        tokens, others = np.asarray(batch), [np.asarray(x) for x in rest]
        _check_batch(f"batch {i}", tokens, others, weights)
        if weights is not None:
            seen.append(np.any(weights, keepdims=True))
        if not len(tokens):
            continue
        most = max(1, TOKENS_PER_FORWARD // tokens.shape[1])
        rows = rows_of.setdefault(tokens.shape[1], min(most, len(tokens)))
        for start in range(0, len(tokens), rows):
            part, *more = (x[start : start + rows] for x in (tokens.astype(np.int32), *others))
            filled = [_filled(x, rows) for x in more]
            own = None if weights is None else weights[start : start + rows]
            yield _filled(part, rows), filled, own, len(part)
    if not rows_of:
        raise ValueError("batches is empty; pass token arrays [B, T] (an iterator is used up once)")
    check_any(seen)


def _check_batch(
    name: str, tokens: np.ndarray, others: Iterable[np.ndarray], weights: Weights | None
) -> None:
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.shape[1] < 2:
        raise ValueError(
            f"{name} is {tokens.dtype} {tokens.shape}; expected integer tokens [B, T] with "
            "T >= 2 (wrap one array as [tokens], one row as tokens[None])"
        )
    misfits = [x for x in others if x.shape[:1] != tokens.shape[:1]]
    if weights is not None and weights.shape != tokens.shape:
        misfits.append(weights)
    if misfits:
        raise ValueError(
            f"{name} has {misfits[0].dtype} {misfits[0].shape} beside tokens {tokens.shape}; "
            "expected other inputs with the same first axis, token_weights of their shape"
        )


def _filled(x: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(x, ((0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)), mode="edge")


def _check_logits(logits: Any, tokens: np.ndarray, name: str) -> None:
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 3 or shape[:2] != tokens.shape:
        raise ValueError(
            f"fn({name}, tokens{list(tokens.shape)}) gave {shape}; expected logits "
            f"[{tokens.shape[0]}, {tokens.shape[1]}, vocabulary]; wrap fn to return only those"
        )


def _check_finite(values: np.ndarray, name: str, done: int) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"{name}: the logits give {values[tuple(bad[0])]} at row {bad[0][-2]}, token "
            f"{bad[0][-1]} of the batch after {done} positions; look for NaN or infinite weights "
            "or scales, and for tokens outside the vocabulary"
        )


def _mean(values: list[float], weights: list[float]) -> float:
    """The mean; by weights, where there are some. NaN where these leave nothing."""
    if not weights:
        return math.fsum(values) / len(values)
    whole = math.fsum(weights)
    total = math.fsum(x * w for x, w in zip(values, weights, strict=True))
    return total / whole if whole > 0 else math.nan


def _exp(loss: float) -> float:
    """`exp`, or infinity where a broken model's loss is past what a float can hold."""
    return math.exp(loss) if loss < 709 else math.inf
