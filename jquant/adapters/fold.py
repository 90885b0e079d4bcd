"""Adapters made part of the weights again: as new codes, or as floats; and what that costs.

A low-rank term can stay beside the codes for ever: `merge` is exact. Where an engine takes only
codes, or only arrays, the sum is rounded once more. New codes are of the merged weight, so what was
trained is rounded as the weight itself is, and part of it is lost; the report says how much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from jquant.adapters.adapt import Frozen
from jquant.adapters.kinds import LoRA
from jquant.adapters.merge import merge
from jquant.calibration.evidence import Evidence
from jquant.errors import EvidenceError, ObjectiveError, PlanError, WeightError, near
from jquant.layerwise.weight import quantize_weight
from jquant.numerics import require
from jquant.schemes.scheme import Scheme
from jquant.trees.paths import key_of
from jquant.weights.arguments import by_path, replaced
from jquant.weights.leaves import is_finite
from jquant.weights.qtensor import QTensor, dequantize_weight, weight_bits


@dataclass(frozen=True)
class FoldedWeight:
    """What folding has done to one weight.

    Attributes:
        error: what is lost, relative: `|E|² / |W|²` of the merged weight W, or where the scheme was
            given evidence that of its outputs, `tr(E H Eᵀ) / tr(W H Wᵀ)`. 0: nothing is.
        bits_before, bits: stored bits per weight, of codes, group parameters and factors; of an
            array those of its dtype.
    """

    error: float
    bits_before: float
    bits: float


@dataclass(frozen=True)
class Folded(Mapping[str, FoldedWeight]):
    """Path → `FoldedWeight`, of every weight that had a low-rank term trained beside its codes.

    Attributes:
        loss_before, loss: what the given `loss` says of the merged tree and of the folded one; None
            without one.
    """

    weights: Mapping[str, FoldedWeight]
    loss_before: float | None = None
    loss: float | None = None

    def __getitem__(self, path: str) -> FoldedWeight:
        return self.weights[path]

    def __iter__(self) -> Any:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def fold(
    frozen: Frozen,
    trainable: Mapping[str, Mapping[str, Any]],
    plan: Mapping[str, Scheme] | Scheme | None = None,
    *,
    evidence: Mapping[str, Evidence] | None = None,
    key: PRNGKeyArray | None = None,
    loss: Callable[[PyTree], Any] | None = None,
) -> tuple[PyTree, Folded]:
    """The tree with trained low-rank terms folded into their weights, and what that costs.

    Trained scales and whole leaves are exact in any case: they are put where they belong.

    Args:
        frozen, trainable: as of `adapt`, trained.
        plan: how weights with a trained low-rank term are rounded anew: a `Scheme` for all of them,
            or path → `Scheme` (as of `jq.plan`); those it does not name become arrays. None: all
            of them become arrays, in the dtype of the weight.
        evidence: path → `Evidence` of the weights' inputs, for schemes that need it, as from
            `jq.capture(fn, jq.dequantize(jq.merge(frozen, trainable)), batches)`.
        key: randomness, for roundings that need it.
        loss: a function of the tree, whose value before and after is reported.

    Returns:
        the tree, and a `Folded`.

    Raises:
        TreeError: `trainable` does not fit `frozen`.
        PlanError: a scheme for what is no such weight, or a key is missing.
        EvidenceError: a scheme needs evidence that is not given.
        WeightError: a merged weight is NaN or infinite.
        ObjectiveError: the loss gives more than one number.
        ValueError: another argument is of another kind.

    Example:
        >>> import jax, jquant as jq
        >>> w = {"w": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)}
        >>> fn = lambda p, x: x @ p["w"]
        >>> weights = jq.find_weights(fn, w, jnp.ones((1, 8)))
        >>> plan = jq.plan(weights, {".*": jq.presets.int8_nearest()})
        >>> q, _ = jq.quantize(fn, w, plan)
        >>> frozen, trainable = jq.adapt(q, rank=1, key=jax.random.key(0))
        >>> tree, report = fold(frozen, trainable, plan)
        >>> tree["w"].compensation is None, report["w"].error < 1e-4
        (True, True)
    """
    _check_arguments(plan, evidence, key, loss)
    merged = merge(frozen, trainable)
    leaves = by_path(merged, "merged")
    terms = [
        path for path, adapters in frozen.choices
        if isinstance(leaves[path], QTensor) and any(isinstance(one, LoRA) for one in adapters)
    ]  # fmt: skip
    schemes = _schemes(plan, terms)
    _check(schemes, evidence or {}, key)
    _check_moments(evidence or {}, {path: leaves[path].codes.shape for path in schemes})
    folded: dict[str, Any] = {}
    rows: dict[str, FoldedWeight] = {}
    for path in terms:
        q, scheme = leaves[path], schemes.get(path)
        array = dequantize_weight(q)
        if not is_finite(array):
            raise WeightError(
                f"weight {path!r}: with what was trained it is NaN or infinite; take arrays of an "
                "earlier step, and a lower learning rate"
            )
        if scheme is None:
            folded[path], error, bits = array, 0.0, 8.0 * array.dtype.itemsize
        else:
            own = None if key is None else key_of(key, path)
            folded[path], info = quantize_weight(
                array, scheme, q.layout, evidence=(evidence or {}).get(path), key=own
            )
            power = float(jnp.sum(info["power"]))
            error = float(jnp.sum(info["error"])) / power if power > 0 else 0.0
            bits = weight_bits(folded[path])
        rows[path] = FoldedWeight(error, weight_bits(q), bits)
    tree = replaced(merged, folded)
    if loss is None:
        return tree, Folded(rows)
    return tree, Folded(rows, _number(loss(merged)), _number(loss(tree)))


def _number(value: Any) -> float:
    if jnp.shape(value) != ():
        raise ObjectiveError(
            f"fold: loss must give one number, got shape {jnp.shape(value)}; take its mean"
        )
    return float(value)


def _check_arguments(plan: Any, evidence: Any, key: Any, loss: Any) -> None:
    """Refuse arguments of another kind."""
    if plan is not None and not isinstance(plan, (Scheme, Mapping)):
        raise PlanError(
            "fold: plan must be a jq.Scheme, such as jq.presets.int4_nearest(), or path → jq.Scheme"
            f", got {plan!r:.100}"
        )
    rows = evidence.values() if isinstance(evidence, Mapping) else () if evidence is None else (0,)
    if not all(isinstance(row, Evidence) for row in rows):
        raise EvidenceError(
            "fold: evidence must be path → jq.Evidence, as from jq.capture(fn, "
            "jq.dequantize(jq.merge(frozen, trainable)), batches), got "
            f"{evidence!r:.100}"
        )
    if key is not None:
        require.key("fold: key", key)
    if loss is not None and not callable(loss):
        raise ValueError(f"fold: loss must be a function of the tree, got {loss!r:.100}")


def _schemes(plan: Mapping[str, Scheme] | Scheme | None, terms: list[str]) -> dict[str, Scheme]:
    """Path → scheme, of the weights that are to have new codes."""
    if plan is None:
        return {}
    if isinstance(plan, Scheme):
        return dict.fromkeys(terms, plan)
    for path, scheme in plan.items():
        if not isinstance(scheme, Scheme):
            raise PlanError(f"plan for {path!r}: expected a jq.Scheme, got {scheme!r}")
        if path not in terms:
            raise PlanError(
                f"plan names {path!r}, which has no trained low-rank term beside codes; near "
                f"paths: {near(path, terms)}"
            )
    return dict(plan)


def _check(
    schemes: Mapping[str, Scheme], evidence: Mapping[str, Evidence], key: PRNGKeyArray | None
) -> None:
    """Refuse schemes that are not told what they need."""
    for path, scheme in schemes.items():
        needs = scheme.needs - {"key", "drift"}
        if needs and path not in evidence:
            raise EvidenceError(
                f"weight {path!r}: {scheme.rounding} and the rest of its scheme need evidence of "
                "its inputs; pass evidence=jq.capture(fn, jq.dequantize(jq.merge(frozen, "
                "trainable)), batches), or a scheme with rounding.Nearest()"
            )
        if "drift" in scheme.needs and getattr(evidence.get(path), "drift", None) is None:
            raise EvidenceError(
                f"weight {path!r}: {scheme.rounding} corrects for inputs that have drifted, which "
                "what jq.capture returns says nothing of; pass a scheme without correction, or "
                "evidence with drift"
            )
        if "key" in scheme.needs and key is None:
            raise PlanError(
                f"weight {path!r}: {scheme.rounding} is random; pass key=jax.random.key(seed)"
            )


def _check_moments(evidence: Mapping[str, Evidence], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse evidence of other inputs than a weight has."""
    for path, (*batch, _, width) in shapes.items():
        expected = (*batch, width, width)
        if path in evidence and evidence[path].second_moment.shape != expected:
            raise EvidenceError(
                f"weight {path!r}: second moment must be {expected}, got "
                f"{evidence[path].second_moment.shape}"
            )
