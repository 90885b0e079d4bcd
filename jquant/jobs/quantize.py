"""`quantize`: a plan, a function and data in, quantized parameters and a report out.

All that can be checked is checked before any work. Then the function is taken stage by stage (see
`jobs/stages.py`), so that what comes later is calibrated on what it will really see.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PRNGKeyArray, PyTree

from jquant.calibration.evidence import Evidence
from jquant.calibration.onepass import OnePass
from jquant.calibration.stages import Granularity
from jquant.calibration.tokens import Given, again, all_weighed, listed, separated, weighed
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError, PlanError
from jquant.jobs.fingerprint import fingerprint
from jquant.jobs.progress import Progress, Told
from jquant.jobs.records import open_work_dir
from jquant.jobs.report import Report
from jquant.jobs.stages import Job, peak_bytes, row_of
from jquant.layerwise.checks import (
    check_evidence,
    check_matched,
    check_needs,
    check_weights,
    not_used,
)
from jquant.learning.checks import check_logits, check_objective
from jquant.learning.descend import is_learned
from jquant.learning.network import learn_whole
from jquant.learning.objectives import Objective, Stagewise
from jquant.schemes.scheme import Plan
from jquant.trees.lazy import Lazy, realize
from jquant.trees.placement import transferring
from jquant.weights.arguments import by_path, replaced
from jquant.weights.qtensor import placed


@transferring
def quantize(
    fn: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    evidence: Mapping[str, Evidence] | None = None,
    objective: Objective | None = None,
    key: PRNGKeyArray | None = None,
    granularity: Granularity = "weight",
    token_weights: Given = None,
    work_dir: str | os.PathLike[str] | None = None,
    budget: int | None = None,
    progress: Told | None = None,
) -> tuple[PyTree, Report]:
    """Quantize the weights of a plan, calibrated on batches or on given evidence.

    Args:
        fn: any JAX function `fn(params, *inputs)`; not called when no evidence is to be read.
        params: its parameters. Leaves may be `Lazy` (or memory maps): each is read when its stage
            comes, and forgotten.
        plan: what `plan` returned.
        batches: calibration batches, as for `capture`.
        evidence: path → `Evidence` (as from `capture`), for the weights it names instead of
            batches.
        objective: what learned roundings (`DiscQuant`, `NUPES`, …) descend. None: each weight its
            own, the squared error of its outputs, from its evidence. `objectives.KL()` or any
            `objective(found, wanted, *inputs)`: all of them together, on the outputs of the whole
            function, after the other weights of the plan have been quantized; batches are gone over
            again until the steps are done. `objectives.Stagewise()`: those of each stage together.
        key: randomness, required when a rounding needs it; each weight's key is derived from its
            path, so that adding a weight changes no other.
        granularity: which weights are calibrated together, on inputs that already quantized weights
            have produced. "weight": those that do not depend on each other (q, k and v; gate and
            up), GPTQ's "true sequential". "block": all of a block, by the first numbered key of
            their paths (`layers/3`) or by the layer of a scanned stack. "all": all, in one pass.
        token_weights: what each token of the batches counts, so that padding is left out: a
            function `(*inputs) -> array` of a batch's inputs (`lambda tokens, mask: mask`), one
            array for each batch, or a `TokenWeights`; None: each counts 1. Arrays are bool, integer
            or float, not negative, of the leading axes of an input. `objectives.KL` and `Fisher`
            are weighed too; other objectives are refused beside it.
        work_dir: a folder to keep finished stages in. The same call with the same folder goes on
            after the last of them, with bit-identical results.
        budget: bytes of activations kept on the device between stages; what exceeds it waits on the
            host. None: no limit.
        progress: called with a `Progress` after every batch and every weight.

    Returns:
        the parameters with a `QTensor` in place of each planned weight, and the report. With lazy
        parameters, kept leaves stay lazy; with a work directory too, so are the quantized ones:
        `save` writes them one by one, `realize` reads them all.

    Raises:
        TreeError: params or a batch hold what is no array or number, or two leaves have one path.
        PlanError, WeightError, EvidenceError: see the messages; raised before any work, except for
            inputs that turn out not finite, and, where the scheme allows no fallback, for a weight
            (or one of its experts or layers) that no token reaches and a factorisation that fails.
        ObjectiveError: an objective is not finite, or a weight that is to be learned does not move
            it.
        WorkDirError: the work directory cannot be written to, or is another job's.

    Example:
        >>> import jax.numpy as jnp, jquant as jq
        >>> params = {"up": jnp.linspace(-1.0, 1.0, 32).reshape(4, 8), "down": jnp.ones((8, 4))}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> x = jax.random.normal(jax.random.key(0), (16, 4))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_gptq()})
        >>> qparams, report = quantize(fn, params, plan, [x])
        >>> report.stages
        (('up',), ('down',))
    """
    if objective is not None:
        check_objective(
            plan, objective, evidence or {}, key,
            batches=batches is not None, granularity=granularity, weighed=token_weights is not None,
        )  # fmt: skip
    if objective is not None and not isinstance(objective, Stagewise):
        return _whole(
            fn, params, plan, batches or (), objective, evidence=dict(evidence or {}), key=key,
            granularity=granularity, token_weights=token_weights, work_dir=work_dir, budget=budget,
            progress=progress,
        )  # fmt: skip
    if work_dir is not None and batches is not None:
        batches = list(batches)  # what is in them is part of the fingerprint
        token_weights = listed(token_weights)
    walk, arrays = prepare(
        fn, params, plan, batches,
        evidence=evidence, key=key, granularity=granularity, budget=budget, objective=objective,
        token_weights=token_weights,
    )  # fmt: skip
    given = dict(evidence or {})
    work = None
    if work_dir is not None:
        said = fingerprint(walk, plan, arrays, given, key, granularity, objective)
        work = open_work_dir(work_dir, said)
    job = Job(plan, arrays, given, key, walk, work, progress, objective)
    job.run()
    lazy = any(isinstance(leaf, Lazy) for leaf in arrays.values())
    quantized = {path: job.whole(path) for path in plan}
    if not lazy:
        quantized = {path: placed(realize(q), arrays[path]) for path, q in quantized.items()}
    return replaced(params, quantized), job.report(quantized)


def _whole(
    fn: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any],
    objective: Objective,
    *,
    evidence: dict[str, Evidence],
    key: PRNGKeyArray | None,
    granularity: Granularity,
    token_weights: Given,
    work_dir: str | os.PathLike[str] | None,
    budget: int | None,
    progress: Told | None,
) -> tuple[PyTree, Report]:
    """The learned weights of a plan on the whole network, after the others, stage by stage."""
    learned = Plan({path: s for path, s in plan.items() if is_learned(s)}, plan.weights)
    others = Plan({path: s for path, s in plan.items() if not is_learned(s)}, plan.weights)
    descent = next(iter(learned.values())).rounding.descent  # type: ignore[attr-defined]
    pairs = itertools.islice(weighed(batches, token_weights), descent.steps * descent.accumulate)
    batches, weights = separated(pairs)
    given = None if weights is None else again(token_weights, weights)
    if not batches:
        raise EvidenceError("got no batches; pass at least one array or tuple of inputs")
    params = realize(params)
    arrays = by_path(params)
    check_weights(learned, arrays)
    check_evidence(learned, evidence)
    check_logits(fn, params, objective, batches, weights)
    before, record = None, None
    if work_dir is not None:
        before = Path(work_dir, "others")
        walk = OnePass(fn, params, list(plan), list(plan), batches, token_weights=given)
        said = fingerprint(walk, plan, arrays, evidence, key, granularity, objective)
        record = open_work_dir(Path(work_dir, "learned"), said)
    qparams, report = params, Report({})
    if others:
        qparams, report = quantize(
            fn, params, others, batches, evidence=evidence, key=key, granularity=granularity,
            token_weights=given, work_dir=before, budget=budget, progress=progress,
        )  # fmt: skip
        qparams = realize(qparams)
    start = time.perf_counter()
    name = f"{len(learned)} weights together"

    def told(done: int) -> None:
        if progress is not None:
            progress(Progress(0, 1, name, "learning", done, descent.steps))

    leaves = by_path(qparams)
    found, trace = learn_whole(
        fn, params, leaves, learned, batches, objective,
        token_weights=weights, evidence=evidence, key=key, record=record,
        told=None if progress is None else told,
    )  # fmt: skip
    rows = dict(report) | {
        path: row_of(path, learned[path], q, outcome, "") for path, (q, outcome) in found.items()
    }
    whole = Report(
        {path: rows[path] for path in plan},
        tuple(path for path in plan.weights if path not in plan),
        (*report.stages, tuple(learned)),
        dict(report.seconds) | {"learning": time.perf_counter() - start},
        report.evidence_bytes,
        peak_bytes(),
        (trace,),
    )
    return replaced(qparams, {path: q for path, (q, _) in found.items()}), whole


def prepare(
    fn: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any] | None,
    *,
    evidence: Mapping[str, Evidence] | None,
    key: PRNGKeyArray | None,
    granularity: Granularity,
    budget: int | None,
    objective: Objective | None = None,
    token_weights: Given = None,
) -> tuple[Walk | OnePass, dict[str, Any]]:
    """All that `quantize` does before any work: the checks, the stages, the leaves by path."""
    if granularity not in ("weight", "block", "all"):
        raise PlanError(f"granularity must be 'weight', 'block' or 'all', got {granularity!r}")
    arrays, structure = by_path(params), jax.tree.structure(params)
    given = dict(evidence or {})
    check_weights(plan, arrays)
    staged = batches is not None and granularity != "all"
    check_needs(plan, given, key, batches=batches is not None, staged=staged)
    check_evidence(plan, given)
    wanted = [path for path in plan if plan.weights[path].has_inputs and path not in given]
    spread = any("spread" in scheme.needs for scheme in plan.values())
    walk: Walk | OnePass
    if batches is None or not wanted:
        walk = OnePass(fn, params, list(plan))
    elif granularity == "all":
        walk = OnePass(fn, params, list(plan), wanted, batches, spread, token_weights)
    else:
        batches, weights = all_weighed(batches, token_weights)
        stacks = {path: plan.weights[path].stack_axes for path in plan}
        walk = Walk.start(
            fn, list(arrays.items()), structure, stacks, batches, granularity,
            budget=budget, drift=any("drift" in scheme.needs for scheme in plan.values()),
            reconstruct=objective is not None, spread=spread, weights=weights,
        )  # fmt: skip
        walk.teacher = isinstance(objective, Stagewise) and objective.inputs == "full"
        _check_reached(plan, walk)
        check_matched(walk, token_weights, wanted)
    return walk, arrays


def _check_reached(plan: Plan, walk: Walk) -> None:
    reached = {piece.path for stage in walk.stages for piece in stage.pieces}
    for path in plan:
        if path not in reached:
            raise EvidenceError(not_used(path))
