"""What of a leaf is trained: a low-rank term beside it, what its codes are scaled by, or all of it.

An adapter is a static choice. `begin` takes a leaf apart into what stays and the float32 arrays
that are trained, `joined` puts both together. What comes of a quantized weight is a `QTensor` with
a low-rank part or other group parameters, so products, files and exporters need not know of
adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from jquant.adapters import magnitude as rows
from jquant.axes.layout import Layout
from jquant.errors import PlanError
from jquant.numerics.narrow import as_dtype
from jquant.trees.placement import automatic, entries_of, put, typed
from jquant.weights.qtensor import LowRank, QTensor

Trained = dict[str, Array]
_OF_LORA = ("left", "right", "magnitude")


@runtime_checkable
class Adapter(Protocol):
    """What of a leaf is trained; see the module."""

    def trains(self, name: str) -> bool:
        """Whether a trained array of this name is one of its own."""
        ...

    def refusal(self, leaf: Any, layout: Layout | None) -> str | None:
        """Why it is nothing for a leaf, and what to pass instead; None: it is for such."""
        ...

    def begin(
        self, path: str, leaf: Any, layout: Layout | None, key: PRNGKeyArray | None
    ) -> tuple[Any, Trained]:
        """What of a leaf stays, and what is trained, by name.

        Raises:
            PlanError: there is no such adapter of this leaf.
        """
        ...

    def joined(self, leaf: Any, trained: Trained, layout: Layout | None) -> Any:
        """The leaf that both together stand for."""
        ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class LoRA:
    """A low-rank term `left @ right` that is trained beside a weight.

    Trained are `left`, `[*batch, out, rank]`, zeros, and `right`, `[*batch, rank, in]`, normal with
    the variance 1 / in: the weight is what it was until the first step. Both are float32.

    Args:
        rank: at least 1, at most the shorter side of the weight (8: LoRA's paper sees little more
            from higher ones). None: the low-rank term that the weight has already, of `LoRC` or a
            checkpoint, is trained on, from its own factors. Otherwise such a term stays as it is,
            beside the new one.
        alpha: the term counts `alpha / rank`. None: it counts 1. With Adam a larger one is a larger
            learning rate of `left`.
        magnitude: whether the length of each row of the weight, all that goes to one output, is
            trained apart from its direction (DoRA): `magnitude`, `[*batch, out]`, float32, begins
            at the lengths that rows have. Gradients take the length of the sum as a constant, as
            the paper does. A quantized weight is scaled by its group parameters, in their dtype;
            those must be floats of 16 bits or more, of one output each.

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> LoRA(4).alpha is None
        True

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021,
        https://arxiv.org/abs/2106.09685
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023,
        https://arxiv.org/abs/2305.14314
        Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023,
        https://arxiv.org/abs/2310.08659
        Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024,
        https://arxiv.org/abs/2402.09353
    """

    rank: int | None = 8
    alpha: float | None = None
    magnitude: bool = False

    def __post_init__(self) -> None:
        rank, alpha = self.rank, self.alpha
        if rank is not None and (type(rank) is not int or rank < 1):
            raise ValueError(f"LoRA.rank must be an int of at least 1, or None, got {rank!r}")
        if alpha is not None and not (type(alpha) in (int, float) and 0 < alpha < math.inf):
            raise ValueError(f"LoRA.alpha must be a positive number or None, got {alpha!r}")
        if rank is None and alpha is not None:
            raise ValueError("LoRA(None) trains factors that count 1 already; leave alpha out")
        if type(self.magnitude) is not bool:
            raise ValueError(f"LoRA.magnitude must be True or False, got {self.magnitude!r}")

    @property
    def papers(self) -> tuple[str, ...]:
        own = "li2023loftq" if self.rank is None else "dettmers2023qlora"
        return ("hu2021lora", own, *(("liu2024dora",) if self.magnitude else ()))

    def trains(self, name: str) -> bool:
        return name in _OF_LORA

    def refusal(self, leaf: Any, layout: Layout | None) -> str | None:
        if isinstance(leaf, QTensor):
            return None
        if layout is None or self.rank is None:
            return (
                "is not quantized; pass weights=jq.find_weights(fn, params, x), which says how it "
                "lies, to train a LoRA(rank) beside it, or adapters.Whole() to train all of it"
            )
        return None

    def begin(
        self, path: str, leaf: Any, layout: Layout | None, key: PRNGKeyArray | None
    ) -> tuple[Any, Trained]:
        stays, trained = (
            _given(path, leaf) if self.rank is None else self._new(path, leaf, layout, key)
        )
        if not self.magnitude:
            return stays, trained
        refusal = rows.refusal(leaf) if isinstance(leaf, QTensor) else None
        if refusal is not None:
            raise PlanError(
                f"weight {path!r}: rows have no magnitude of their own, as {refusal}; pass "
                "LoRA without magnitude for it, or quantize it in groups along its inputs with "
                "scales in 16 or 32 bits"
            )
        return stays, trained | {"magnitude": _beside(leaf, rows.lengths(leaf, layout))}

    def _new(
        self, path: str, leaf: Any, layout: Layout | None, key: PRNGKeyArray | None
    ) -> tuple[Any, Trained]:
        """A weight, and a term that is zero."""
        assert self.rank is not None
        if isinstance(leaf, QTensor):
            shape = leaf.codes.shape
        else:
            assert layout is not None
            shape = jax.eval_shape(layout.canonical, leaf).shape
        *batch, out, width = shape
        if self.rank > min(out, width):
            raise PlanError(
                f"LoRA of rank {self.rank} on weight {path!r} of {out} × {width}: pass a rank of "
                f"at most {min(out, width)}, or jq.keep for it"
            )
        if key is None:
            raise PlanError(
                f"weight {path!r}: LoRA({self.rank}) begins at random; pass "
                "key=jax.random.key(seed)"
            )
        right = jax.random.normal(key, (*batch, self.rank, width), jnp.float32) / math.sqrt(width)
        return leaf, {
            "left": _beside(leaf, jnp.zeros((*batch, out, self.rank), jnp.float32)),
            "right": _beside(leaf, right),
        }

    def joined(self, leaf: Any, trained: Trained, layout: Layout | None) -> Any:
        left, right = trained["left"], trained["right"]
        if self.alpha is not None:
            assert self.rank is not None
            left = left * (self.alpha / self.rank)
        magnitude = trained.get("magnitude")
        if isinstance(leaf, QTensor):
            both = replace(leaf, compensation=_together(leaf.compensation, LowRank(left, right)))
            return both if magnitude is None else rows.turned(both, magnitude)
        assert layout is not None
        added = partial(_added, layout=layout)
        return automatic(added, leaf, LowRank(left, right), magnitude, out=typed(leaf))


def _given(path: str, leaf: QTensor) -> tuple[QTensor, Trained]:
    """A weight without its low-rank term, and the term's factors."""
    if leaf.compensation is None:
        raise PlanError(
            f"weight {path!r} has no low-rank term that LoRA(None) could train; pass LoRA(rank), "
            "or quantize it with compensation=LoRC(rank)"
        )
    left, right = leaf.compensation.factors()
    trained = {"left": _beside(leaf, left), "right": _beside(leaf, right)}
    return replace(leaf, compensation=None), trained


def _together(one: LowRank | None, two: LowRank) -> LowRank:
    """The sum of two low-rank terms as one."""
    if one is None:
        return two
    (left, right), (more_left, more_right) = one.factors(), two.factors()
    return LowRank(jnp.concatenate([left, more_left], -1), jnp.concatenate([right, more_right], -2))


def _added(w: Array, low: LowRank, magnitude: Array | None, layout: Layout) -> Array:
    """An array with a low-rank term, in its own shape and dtype."""
    values = layout.canonical(w).astype(jnp.float32) + low.product()
    if magnitude is not None:
        length = rows.lengths_of(lax.stop_gradient(values))
        values = values * rows.factors(length, magnitude)[..., None]
    return as_dtype(layout.original(values), w.dtype)


def _beside(leaf: Any, array: Array) -> Array:
    """An array on all devices that a leaf lies on."""
    at: Any = leaf.codes if isinstance(leaf, QTensor) else leaf
    return array if entries_of(at) is None else put(array, at.sharding.mesh, ())


@jax.tree_util.register_static
@dataclass(frozen=True)
class Scales:
    """What the codes of a weight are scaled by is trained; the codes stay as they are.

    Trained is a number δ for each floating group parameter p (scales, offsets, tables, real zero
    points), float32 and from zero: the weight has `p (1 + δ)`, rounded to the dtype of p, as
    `tune_scales` does it. So steps are relative, and a parameter that is zero stays zero. Whole
    zero points, and 8-bit scales (MX, NV), in which such steps are lost, stay as they are.

    Example:
        >>> Scales()
        Scales()
    """

    def trains(self, name: str) -> bool:
        return name not in (*_OF_LORA, "value")

    def refusal(self, leaf: Any, layout: Layout | None) -> str | None:
        del layout
        if not isinstance(leaf, QTensor):
            return "is not quantized and has no scales; pass adapters.Whole() to train all of it"
        if not any(map(_is_trained, leaf.params.values())):
            return (
                f"has no group parameters that can be trained in {leaf.grid}; pass LoRA(rank), or "
                "a grid with scales in 16 or 32 bits"
            )
        return None

    def begin(
        self, path: str, leaf: Any, layout: Layout | None, key: PRNGKeyArray | None
    ) -> tuple[Any, Trained]:
        del path, layout, key
        zeros = {
            n: jnp.zeros(p.shape, jnp.float32) for n, p in leaf.params.items() if _is_trained(p)
        }
        return leaf, {name: _beside(leaf, zero) for name, zero in zeros.items()}

    def joined(self, leaf: Any, trained: Trained, layout: Layout | None) -> Any:
        del layout
        params = dict(leaf.params)
        for name, delta in trained.items():
            moved = params[name].astype(jnp.float32) * (1 + delta.astype(jnp.float32))
            params[name] = as_dtype(moved, params[name].dtype)
        return replace(leaf, params=params)


def _is_trained(p: Array) -> bool:
    return jnp.issubdtype(p.dtype, jnp.floating) and p.dtype.itemsize > 1


@jax.tree_util.register_static
@dataclass(frozen=True)
class Whole:
    """All of a leaf that is not quantized is trained: a bias, a norm's scale, a head.

    Trained is the leaf itself in float32, `"value"`; the function gets it in its own dtype.

    Example:
        >>> Whole()
        Whole()
    """

    def trains(self, name: str) -> bool:
        return name == "value"

    def refusal(self, leaf: Any, layout: Layout | None) -> str | None:
        del layout
        if isinstance(leaf, QTensor):
            return "is quantized: its codes are not trained; pass LoRA(rank) or adapters.Scales()"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return f"holds {leaf.dtype}, which has no gradients; pass jq.keep"
        return None

    def begin(
        self, path: str, leaf: Any, layout: Layout | None, key: PRNGKeyArray | None
    ) -> tuple[Any, Trained]:
        del path, layout, key
        return leaf, {"value": jnp.asarray(leaf).astype(jnp.float32)}

    def joined(self, leaf: Any, trained: Trained, layout: Layout | None) -> Any:
        del layout
        return as_dtype(trained["value"], leaf.dtype)
