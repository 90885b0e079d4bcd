"""What is refused before any work: a plan, a weight or evidence that cannot give what is asked.

Every message names the path, what was got, and what to pass instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jquant.calibration.crosswise import check_multiplied as check_parts
from jquant.calibration.data import Data
from jquant.calibration.difference import uncompared
from jquant.calibration.evidence import Evidence
from jquant.calibration.find import Use, Weight
from jquant.calibration.saliency import Saliency
from jquant.calibration.tokens import refuse
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError, PlanError, WeightError, near
from jquant.layerwise.standin import check_tokens
from jquant.rounding.base import label_of
from jquant.schemes.scheme import Plan, Scheme, check_inputs
from jquant.weights.activations import Activations
from jquant.weights.leaves import is_finite, refuse_unless
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
        _check_transforms(path, plan[path], plan.weights[path])
        _check_uses(path, plan[path], plan.weights[path])
        if isinstance(leaf, jax.Array):  # what lies in a file is checked when it is read
            flags[path] = is_finite(leaf)
    for path, flag in flags.items():
        refuse_unless(path, flag)


def _check_rank(path: str, scheme: Scheme, weight: Weight) -> None:
    layout, choice = weight.layout, scheme.compensation
    sides = layout.size("out"), layout.size("in")
    if choice is not None and choice.rank > min(sides):
        raise PlanError(
            f"weight {path!r} is a matrix of {sides[0]} outputs and {sides[1]} inputs, so its "
            f"compensation can have a rank of at most {min(sides)}, got {choice}"
        )


def _check_transforms(path: str, scheme: Scheme, weight: Weight) -> None:
    """Refuse transforms that cannot be taken off a weight of these sides."""
    choice = scheme.activations
    static = choice is not None and choice.granularity == "static"
    if not (scheme.transforms or static):
        return
    sides = weight.layout.size("out"), weight.layout.size("in")
    w = jax.ShapeDtypeStruct(sides, jnp.float32)
    evidence = jax.eval_shape(lambda x: Evidence.of(x, full=x, spread=True), w)
    for transform in scheme.transforms:
        try:
            _, w, evidence = jax.eval_shape(transform.apart, w, evidence)
        except PlanError as error:
            raise PlanError(f"weight {path!r}: {error}") from error
    if static and evidence.abs_max is None:
        raise PlanError(
            f"weight {path!r}: the static ranges of its inputs after {scheme.transforms} are not "
            "known; pass Activations(granularity='token'), or no transforms"
        )


def _check_uses(path: str, scheme: Scheme, weight: Weight) -> None:
    """Refuse quantized inputs that a use of the weight cannot have as asked."""
    choice = scheme.activations
    if choice is None:
        return
    for use in weight.uses:
        if use.kind == "lookup":
            continue
        if choice.compute == "integer" and (use.kind != "dot" or not use.counted):
            product = use.kind if use.counted else f"{use.kind} over its axes {use.in_axes}"
            raise PlanError(
                f"weight {path!r} enters a {product}, which has no product of integers; pass "
                "Activations(compute='auto')"
            )
        _check_together(path, choice, use)
        if choice.granularity == "static" and not use.counted:
            raise PlanError(
                f"weight {path!r} is contracted over its axes {weight.in_axes} and elsewhere over "
                f"{use.in_axes}, and has one static range of inputs; pass "
                "Activations(granularity='token')"
            )


def _check_together(path: str, choice: Activations, use: Use) -> None:
    """Refuse what inputs cannot have that meet several matrices of a weight at once."""
    if use.together and (choice.granularity == "static" or choice.compute == "integer"):
        raise PlanError(
            f"weight {path!r}: one input meets several of its matrices at once, which have a range "
            "of inputs each and no common product of integers; pass "
            "Activations(granularity='token', compute='auto')"
        )


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
        needs, given, weight = scheme.needs, evidence.get(path), plan.weights[path]
        if "key" in needs and key is None:
            random = label_of(scheme.rounding)
            raise PlanError(f"weight {path!r}: {random} is random; pass key=jax.random.key(seed)")
        if "moment" in needs and given is None:
            _check_readable(weight, scheme, batches)
        read = given is None and batches and weight.has_inputs
        if scheme.activations is not None and "inputs" in needs and not read:
            check_inputs(path, scheme.activations, given)
        drift = staged if given is None else given.drift is not None
        if "drift" in needs and not drift:
            raise EvidenceError(
                f"weight {path!r}: {_asking(scheme)[0]}'s correction needs the drift of its "
                "inputs, which is known where weights are quantized stage by stage: pass "
                "sequential='weight' or 'block' and no evidence for it, or Evidence(..., drift=)"
            )


def check_guided(plan: Plan, evidence: Mapping[str, Evidence], offered: bool) -> None:
    """Refuse roundings by saliency without it, and saliency (`offered`) that no rounding uses."""
    guided = [path for path, scheme in plan.items() if "guided" in scheme.needs]
    for path in guided:
        given = evidence.get(path)
        if not offered if given is None else given.guided is None:
            raise EvidenceError(
                f"weight {path!r}: {label_of(plan[path].rounding)} needs to know what errors of "
                "its outputs cost; pass batches and saliency=jq.saliency(...) of them, or evidence "
                "of jq.capture(..., saliency=)"
            )
    if offered and not guided:
        raise PlanError(
            "saliency is passed, and no rounding of the plan uses it; pass "
            "Scheme(..., rounding=rounding.Guided(GPTQ())) or no saliency"
        )


def check_salient(walk: Walk, saliency: Saliency | None, paths: Collection[str]) -> None:
    """Refuse saliency that does not know weights, or layers, whose inputs it is to weigh."""
    for stage in walk.stages:
        for piece in stage.pieces:
            if saliency is not None and piece.path in paths:
                saliency.check_named(piece.path, str(piece))
    if saliency is not None and saliency.kinds is None:  # given by hand, of whatever shape
        walk.check_saliency()


def _check_readable(weight: Weight, scheme: Scheme, batches: bool) -> None:
    """Refuse a weight whose second moment is needed and cannot be read from batches."""
    name, instead = _asking(scheme)
    if not weight.has_inputs:
        raise EvidenceError(
            f"weight {weight.path!r} is only looked up, so it has no second moment, which {name} "
            f"needs; {instead}"
        )
    if not batches:
        raise EvidenceError(
            f"weight {weight.path!r}: {name} needs the second moment of its inputs; pass "
            "calibration batches, or evidence={path: Evidence(...)}"
        )


def _asking(scheme: Scheme) -> tuple[str, str]:
    """Which part of a scheme asks for evidence, and what to pass where there is none."""
    if "moment" in scheme.rounding.needs:
        return label_of(scheme.rounding), "use rounding.Nearest() or keep it"
    return "LoRC(metric='hessian')", "pass LoRC(metric='frobenius') or keep it"


def check_reached(walk: Walk, paths: Iterable[str]) -> None:
    """Refuse weights that no batch uses."""
    reached = {piece.path for stage in walk.stages for piece in stage.pieces}
    for path in paths:
        if path not in reached:
            raise EvidenceError(not_used(path))


def check_multiplied(walk: Walk, plan: Plan, paths: Collection[str]) -> None:
    """Refuse weights of which parts are only looked up where evidence of all is needed.

    `paths`: those whose evidence is to be read.
    """
    for run in {id(run.cut): run for run in walk.runs}.values():
        for piece, seen in run.cut.sightings.items():
            scheme = plan.get(piece.path)
            if scheme is None or piece.path not in paths or scheme.fallback:
                continue
            if scheme.needs & {"moment", "inputs"}:
                check_parts(str(piece), seen, piece.shape(plan.weights[piece.path].shape))


def check_matched(walk: Walk, data: Data, paths: Collection[str]) -> None:
    """Refuse weights whose rows' tokens are not known, unless they are to be counted.

    `paths`: those whose evidence will be used.
    """
    if data.strict:
        reasons = walk.unmatched.items()
        refuse([(str(piece), why) for piece, why in reasons if piece.path in paths])


def check_compared(walk: Walk, data: Data) -> None:
    """Refuse weights compared on values whose tokens are not known, unless they are to be counted.

    Raises:
        EvidenceError: names the weight, and what lost the tokens.
    """
    if data.strict:
        cuts = [run.cut for run in walk.runs]
        reasons = uncompared(cuts, data.weights or ())
        refuse([(str(piece), why) for piece, why in reasons.items()])


def check_evidence(plan: Plan, evidence: Mapping[str, Evidence]) -> None:
    for path, scheme in plan.items():
        if path not in evidence:
            continue
        given, weight = evidence[path], plan.weights[path]
        moment = given.second_moment
        shape = jax.eval_shape(
            weight.layout.canonical, jax.ShapeDtypeStruct(weight.shape, weight.dtype)
        ).shape
        if moment.shape != (*shape[:-2], shape[-1], shape[-1]):
            raise EvidenceError(
                f"weight {path!r}: second moment must be {(*shape[:-2], shape[-1], shape[-1])}, "
                f"got {moment.shape}"
            )
        if given.guided is not None:
            groups = (*shape[:-2], given.groups, shape[-1], shape[-1])
            if given.guided.second_moment.shape != groups:
                raise EvidenceError(
                    f"weight {path!r}: its guided second moment must be {groups}, got "
                    f"{given.guided.second_moment.shape}"
                )
        fine, skew = _sound(given)
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
        check_tokens(path, scheme, given)


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
