"""What is refused before any work: a plan, a weight or evidence that cannot give what is asked.

Every message names the path, what was got, and what to pass instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jquant.calibration.difference import uncompared
from jquant.calibration.evidence import Evidence
from jquant.calibration.find import Weight
from jquant.calibration.tokens import Given, chosen, refuse
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError, PlanError, WeightError, near
from jquant.layerwise.standin import check_tokens
from jquant.schemes.scheme import Plan, Scheme, check_inputs
from jquant.weights.qtensor import QTensor


def check_weights(plan: Mapping[str, Scheme], arrays: Mapping[str, Any]) -> None:
    if not isinstance(plan, Plan):
        raise PlanError(
            f"expected what jq.plan returns, got {type(plan).__name__}; call jq.plan first"
        )
    flags: dict[str, Array] = {}
    for path in plan:
        leaf = arrays.get(path)
        if leaf is None:
            raise PlanError(
                f"plan names {path!r}, which params do not have; near: {near(path, arrays)}"
            )
        if tuple(leaf.shape) != plan.weights[path].shape:
            raise PlanError(
                f"plan was made for {path!r} of shape {plan.weights[path].shape}, got "
                f"{tuple(leaf.shape)}; make the plan from find_weights on these params"
            )
        if isinstance(leaf, QTensor):
            raise WeightError(
                f"weight {path!r} is quantized already; quantize the parameters it was made from, "
                "or dequantize(qparams), or keep it"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise WeightError(f"weight {path!r} must be a float array, got {leaf.dtype}; keep it")
        if leaf.ndim < 2:
            raise WeightError(f"weight {path!r} has {leaf.ndim} axes, needs at least 2; keep it")
        _check_rank(path, plan[path], plan.weights[path])
        _check_uses(path, plan[path], plan.weights[path])
        if isinstance(leaf, jax.Array):  # what lies in a file is checked when it is read
            flags[path] = _finite(leaf)
    for path, flag in flags.items():
        _refuse_unless(path, flag)


def _check_rank(path: str, scheme: Scheme, weight: Weight) -> None:
    layout, choice = weight.layout, scheme.compensation
    sides = layout.size("out"), layout.size("in")
    if choice is not None and choice.rank > min(sides):
        raise PlanError(
            f"weight {path!r} is a matrix of {sides[0]} outputs and {sides[1]} inputs, so its "
            f"compensation can have a rank of at most {min(sides)}, got {choice}"
        )


def _check_uses(path: str, scheme: Scheme, weight: Weight) -> None:
    """Refuse quantized inputs that a use of the weight cannot have as asked."""
    choice = scheme.activations
    if choice is None:
        return
    for use in weight.uses:
        if use.kind == "lookup":
            continue
        if choice.path == "integer" and (use.kind != "dot" or not use.counted):
            said = use.kind if use.counted else f"{use.kind} over its axes {use.in_axes}"
            raise PlanError(
                f"weight {path!r} enters a {said}, which has no product of integers; pass "
                "Activations(path='auto')"
            )
        if choice.granularity == "static" and not use.counted:
            raise PlanError(
                f"weight {path!r} is contracted over its axes {weight.in_axes} and elsewhere over "
                f"{use.in_axes}, and has one static range of inputs; pass "
                "Activations(granularity='token')"
            )


def check_finite(path: str, array: Array) -> None:
    """Refuse a weight that was read from a file just now."""
    _refuse_unless(path, _finite(array))


def _refuse_unless(path: str, finite: Array) -> None:
    if not finite:
        raise WeightError(
            f"weight {path!r} holds NaN or infinite values; repair it, or keep it (jq.keep)"
        )


@jax.jit
def _finite(leaf: Array) -> Array:
    return jnp.all(jnp.isfinite(leaf))


def check_needs(
    plan: Plan,
    evidence: Mapping[str, Evidence],
    key: PRNGKeyArray | None,
    *,
    batches: bool,
    staged: bool,
) -> None:
    """Refuse a plan whose roundings and compensations need what is not there."""
    for path, scheme in plan.items():
        needs, name = scheme.needs, type(scheme.rounding).__name__
        instead = "use rounding.Nearest() or keep it"
        if "moment" not in scheme.rounding.needs:
            name, instead = "LoRC(metric='evidence')", "pass LoRC(metric='plain') or keep it"
        if "key" in needs and key is None:
            random = type(scheme.rounding).__name__
            raise PlanError(f"weight {path!r}: {random} is random; pass key=jax.random.key(seed)")
        if "moment" in needs and path not in evidence:
            if not plan.weights[path].has_inputs:
                raise EvidenceError(
                    f"weight {path!r} is only looked up, so it has no second moment, which {name} "
                    f"needs; {instead}"
                )
            if not batches:
                raise EvidenceError(
                    f"weight {path!r}: {name} needs the second moment of its inputs; pass "
                    "calibration batches, or evidence={path: Evidence(...)}"
                )
        if scheme.activations is not None and "inputs" in needs:
            if path in evidence:
                check_inputs(path, scheme.activations, evidence[path])
            elif not batches or not plan.weights[path].has_inputs:
                check_inputs(path, scheme.activations, None)
        drift = path in evidence and evidence[path].drift is not None
        if "drift" in needs and not drift and not (staged and path not in evidence):
            raise EvidenceError(
                f"weight {path!r}: {name}'s correction needs the drift of its inputs, which is "
                "known where weights are quantized stage by stage: pass granularity='weight' or "
                "'block' and no evidence for it, or Evidence(..., drift=)"
            )


def check_matched(walk: Walk, given: Given, paths: Collection[str] | None = None) -> None:
    """Refuse weights whose rows' tokens are not known, unless they are to be counted.

    `paths`: those whose evidence will be used.
    """
    said = chosen(given)
    if said is not None and said.unmatched == "raise":
        found = walk.unmatched.items()
        refuse([(str(piece), why) for piece, why in found if paths is None or piece.path in paths])


def check_compared(walk: Walk, given: Given) -> None:
    """Refuse weights compared on values whose tokens are not known, unless they are to be counted.

    Raises:
        EvidenceError: names the weight, and what lost the tokens.
    """
    said = chosen(given)
    if said is not None and said.unmatched == "raise":
        found = {} if walk.weights is None else uncompared(walk.cuts, walk.weights)
        refuse([(str(piece), why) for piece, why in found.items()])


def check_evidence(plan: Plan, evidence: Mapping[str, Evidence]) -> None:
    for path, scheme in plan.items():
        if path not in evidence:
            continue
        found, weight = evidence[path], plan.weights[path]
        moment = found.second_moment
        shape = jax.eval_shape(
            weight.layout.canonical, jax.ShapeDtypeStruct(weight.shape, weight.dtype)
        ).shape
        if moment.shape != (*shape[:-2], shape[-1], shape[-1]):
            raise EvidenceError(
                f"weight {path!r}: second moment must be {(*shape[:-2], shape[-1], shape[-1])}, "
                f"got {moment.shape}"
            )
        fine, skew = _sound(found)
        for name, is_fine in fine.items():
            if not is_fine:
                raise EvidenceError(
                    f"weight {path!r}: its {name.replace('_', ' ')} holds NaN or infinite values; "
                    "capture it again from finite inputs"
                )
        if skew > 1e-3:
            raise EvidenceError(
                f"weight {path!r}: its second moment is not symmetric (off by {skew:.1e} of its "
                "largest entry); pass the sum of x xᵀ over tokens"
            )
        check_tokens(path, scheme, found)


def not_used(name: str) -> str:
    """What to say of a weight that no batch has shown a use of."""
    return (
        f"weight {name!r} is not used by the function on these batches; make the plan from "
        "find_weights on inputs like them, or keep it"
    )


@jax.jit
def _sound(evidence: Evidence) -> tuple[dict[str, Array], Array]:
    """Which parts of evidence are finite, and how far the moment is from symmetric."""
    moment = evidence.second_moment
    parts = {part.name: getattr(evidence, part.name) for part in dataclasses.fields(evidence)}
    fine = {
        name: jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(part)]))
        for name, part in parts.items()
        if part is not None
    }
    skew = jnp.max(jnp.abs(moment - jnp.swapaxes(moment, -1, -2)))
    return fine, skew / jnp.maximum(jnp.max(jnp.abs(moment)), 1e-30)
