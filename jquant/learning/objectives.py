"""What learned roundings descend: how far outputs of a quantized function are from the original's.

An objective is any pure function `objective(outputs, reference, *inputs) -> scalar` of the outputs
of the function with the weights as they are now, those with the original weights, and the inputs of
the batch. With p and q the two distributions and z the logits,

    KL       mean over tokens of  Σ_v p (log p - log q)
    Fisher   mean over tokens of  ½ (Σ_v p Δz² - (Σ_v p Δz)²),  KL to second order in Δz
    MSE      mean squared difference, relative to the mean square of the reference

`Reconstruction(objective)` says that it is to be descended stage by stage, on the outputs of the
stage, not on the whole network's. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jquant import deprecated

Objective = Callable[..., Array]

__getattr__ = partial(deprecated.attribute, __name__)

TokenWeights = Bool[Array, "*tokens"] | Float[Array, "*tokens"]  # not negative

TOKENS_AT_ONCE = 256  # tokens whose probabilities exist at one time, in float32


@dataclass(frozen=True)
class KL:
    """Kullback–Leibler divergence of the outputs from the reference, in nats per token.

    Outputs are one array of logits `[..., vocabulary]`; probabilities are formed for few tokens at
    a time, forward and backward. Called with `token_weights=`, bool or float of the leading axes of
    the logits, it is the weighted mean, and tokens of weight 0 are left out.

    Args:
        temperature: of both distributions.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
        >>> round(KL()(*logits).item(), 4)
        0.1308
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"KL.temperature must be positive, got {self.temperature}")

    def __call__(
        self, outputs: Any, reference: Any, *inputs: Any, token_weights: TokenWeights | None = None
    ) -> Float[Array, ""]:
        del inputs

        def one(q: Array, p: Array) -> Array:
            log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
            return jnp.sum(jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - log_q)))

        return _over_tokens(one, outputs, reference, 1 / self.temperature, token_weights)


@dataclass(frozen=True)
class Fisher:
    """Squared differences of logits, weighed by the Fisher information of the reference.

    The quadratic form that KL is near the original network: what the softmax does not see (a
    constant added to all logits) and words that nobody would say cost nothing. `token_weights` as
    for `KL`.

    Example:
        >>> logits = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, -1.0]])
        >>> round(Fisher()(*logits).item(), 4)
        0.21
    """

    def __call__(
        self, outputs: Any, reference: Any, *inputs: Any, token_weights: TokenWeights | None = None
    ) -> Float[Array, ""]:
        del inputs

        def one(q: Array, p: Array) -> Array:
            share, moved = jax.nn.softmax(p), q - p
            return 0.5 * jnp.sum(share * (moved - jnp.sum(share * moved)) ** 2)

        return _over_tokens(one, outputs, reference, 1.0, token_weights)


@dataclass(frozen=True)
class MSE:
    """Mean squared difference, relative to the mean square of the reference; summed over outputs.

    Outputs may be any pytree; those that are not floating do not count.

    Example:
        >>> MSE()(jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])).item()
        0.10000000149011612
    """

    def __call__(self, outputs: Any, reference: Any, *inputs: Any) -> Float[Array, ""]:
        del inputs
        total = jnp.zeros((), jnp.float32)
        for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(reference), strict=True):
            if jnp.issubdtype(b.dtype, jnp.floating):
                a, b = a.astype(jnp.float32), b.astype(jnp.float32)
                power = jnp.mean(b**2)
                total += jnp.mean((a - b) ** 2) / jnp.where(power > 0, power, 1.0)
        return total


@dataclass(frozen=True)
class Reconstruction:
    """An objective that is descended stage by stage: reconstruction.

    The weights of a stage (a block, with `sequential="block"`) are learned together, on inputs
    which the quantized stages before it have produced; the reference is what the original network
    has at the same place: where the stage joins the residual stream, or returns.

    Args:
        objective: of the stage's outputs, a list of arrays.
        inputs: "quantized", or "full": what the original network has in front of the stage, so that
            stages do not depend on each other. This is ZeroQuant's layer-by-layer distillation
            (LKD): what earlier stages have lost is not made up for.

    Raises:
        ValueError: `inputs` is neither.

    References:
        Yao et al., ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale
        Transformers, 2022, https://arxiv.org/abs/2206.01861 (LKD)
    """

    objective: Objective = MSE()
    inputs: Literal["quantized", "full"] = "quantized"

    def __post_init__(self) -> None:
        if self.inputs not in ("quantized", "full"):
            raise ValueError(
                f"Reconstruction.inputs must be 'quantized' or 'full', got {self.inputs!r}"
            )

    def __call__(self, outputs: Any, reference: Any, *inputs: Any) -> Array:
        return self.objective(outputs, reference, *inputs)


@dataclass(frozen=True)
class Weighed:
    """An objective that is given the weights of tokens in front of the inputs."""

    objective: Objective

    def __call__(self, outputs: Any, reference: Any, token_weights: Any, *inputs: Any) -> Array:
        return self.objective(outputs, reference, *inputs, token_weights=token_weights)


def rows_of_weights(logits: Array, token_weights: Any) -> Float[Array, " tokens"]:
    """The weight of every token of logits `[..., vocabulary]`, float32.

    Raises:
        ValueError: the weights do not have the leading axes of the logits.
    """
    shape, tokens = logits.shape[:-1], token_weights.shape
    if shape[: len(tokens)] != tokens:
        raise ValueError(
            f"token_weights {list(tokens)} are not of the leading axes of the logits "
            f"{list(logits.shape)}; wrap fn to return one row of logits for each token"
        )
    wide = jnp.asarray(token_weights).astype(jnp.float32)
    wide = wide.reshape(*tokens, *[1] * (len(shape) - len(tokens)))
    return jnp.broadcast_to(wide, shape).reshape(-1)


def _over_tokens(
    one: Callable[[Array, Array], Array],
    outputs: Any,
    reference: Any,
    factor: float,
    token_weights: Any = None,
) -> Float[Array, ""]:
    """The mean of `one(found, wanted)` over tokens, by their weights."""
    (outputs,), (reference,) = logits_of(outputs), logits_of(reference)
    if token_weights is not None:
        weights = rows_of_weights(reference, token_weights)
        real = (weights > 0).reshape(*reference.shape[:-1], 1)
        outputs, reference = (
            jnp.where(real, x, jnp.zeros((), x.dtype)) for x in (outputs, reference)
        )
    rows, vocabulary = outputs.size // outputs.shape[-1], outputs.shape[-1]
    many = -(-rows // TOKENS_AT_ONCE)
    size = -(-rows // many)
    pad = ((0, many * size - rows), (0, 0))
    parts = [
        jnp.pad(x.reshape(rows, vocabulary), pad).reshape(many, size, -1)
        for x in (outputs, reference)
    ]

    if token_weights is not None:
        parts.append(jnp.pad(weights, pad[0]).reshape(many, size))

    @jax.checkpoint
    def few(carry: Array, pair: list[Array]) -> tuple[Array, None]:
        q, p = (factor * x.astype(jnp.float32) for x in pair[:2])
        each = jax.vmap(one)(q, p)
        return carry + jnp.sum(each if len(pair) == 2 else each * pair[2]), None

    # Tokens that only fill up are equal in both, and cost nothing.
    total, _ = jax.lax.scan(few, jnp.zeros((), jnp.float32), parts)
    if token_weights is None:
        return total / rows
    whole = jnp.sum(weights)
    return jnp.where(whole > 0, total / jnp.where(whole > 0, whole, 1.0), 0.0)


def logits_of(outputs: Any) -> list[Array]:
    """The one array of logits that outputs are. ValueError: they are something else."""
    leaves = jax.tree.leaves(outputs)
    if len(leaves) != 1 or leaves[0].ndim < 1 or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in leaves)
        raise ValueError(
            f"this objective needs one array of logits [..., vocabulary], got "
            f"{shapes or 'nothing'}; wrap fn to return only those, or pass a function of your own"
        )
    return leaves
