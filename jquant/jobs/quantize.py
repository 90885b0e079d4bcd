"""`quantize`: a plan, a function and data in, quantized parameters and a report out.

What is asked becomes one value that is checked before any work (`jobs/request.py`). Then the
function is taken stage by stage (`jobs/stages.py`), so that what comes later is calibrated on what
it will really see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtyping import PRNGKeyArray, PyTree

from jquant import deprecated
from jquant.calibration.evidence import Evidence
from jquant.calibration.saliency import Saliency
from jquant.calibration.stages import Sequential
from jquant.calibration.tokens import Given
from jquant.errors import WorkDirError
from jquant.jobs.fingerprint import fingerprint
from jquant.jobs.progress import OnProgress
from jquant.jobs.records import open_work_dir
from jquant.jobs.report import Report
from jquant.jobs.request import Request, Resources, aim_of
from jquant.jobs.stages import Job
from jquant.jobs.together import agree, check_agreed, is_of_all
from jquant.learning.objectives import Objective
from jquant.schemes.scheme import Plan
from jquant.trees.placement import transferring
from jquant.weights.arguments import replaced


@deprecated.keywords("quantize")
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
    sequential: Sequential = "weight",
    token_weights: Given = None,
    saliency: Saliency | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    budget: int | None = None,
    progress: OnProgress | None = None,
) -> tuple[PyTree, Report]:
    """The parameters with the weights of a plan quantized, and a report of each.

    Roundings that need to know the weights' inputs are calibrated on batches, or on given evidence.

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
            `objective(outputs, reference, *inputs)`: all of them together, on the outputs of the
            whole function, after the other weights of the plan have been quantized; batches are
            gone over again until the steps are done. `objectives.Reconstruction()`: those of each
            stage together.
        key: randomness, required when a rounding needs it; each weight's key is derived from its
            path, so that adding a weight changes no other.
        sequential: which weights are calibrated at a time, on inputs that already quantized weights
            have produced. "weight": those that do not depend on each other (q, k and v; gate and
            up), GPTQ's "true sequential". "block": all of a block, by the first numbered key of
            their paths (`layers/3`) or by the layer of a scanned stack. None: all in one pass, on
            what the original network produces.
        token_weights: what each token of the batches counts, so that padding is left out: a
            function `(*inputs) -> array` of a batch's inputs (`lambda tokens, mask: mask`), one
            array for each batch, or a `TokenWeights`; None: each counts 1. Arrays are bool, integer
            or float, not negative, of the leading axes of an input. `objectives.KL` and `Fisher`
            are weighed too; other objectives are refused beside it.
        saliency: what errors of outputs cost, token by token and weight by weight, as `jq.saliency`
            returned of these batches: for `rounding.Guided`. Stages use that of the network as it
            came.
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
        WorkDirError: the work directory cannot be written to, or is another job's, or processes do
            not share it.
        ProcessError: arrays are spread over processes, and these do not ask for the same job.

    Example:
        >>> import jax, jax.numpy as jnp, jquant as jq
        >>> params = {"up": jnp.linspace(-1.0, 1.0, 32).reshape(4, 8), "down": jnp.ones((8, 4))}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> x = jax.random.normal(jax.random.key(0), (16, 4))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_gptq()})
        >>> qparams, report = quantize(fn, params, plan, [x])
        >>> report.stages
        (('up',), ('down',))
    """
    sequential = deprecated.current("quantize.sequential", sequential)
    request = Request(
        fn, params, plan, dict(evidence or {}), key, aim_of(objective), sequential
    ).checked(batches, token_weights, saliency)
    return run(request, Resources(work_dir, budget, progress))


def run(request: Request, resources: Resources) -> tuple[PyTree, Report]:
    """The result of a request that is checked; see `quantize`."""
    shared, work = is_of_all(request), None
    if shared:
        check_agreed(request)
    walk = request.walk(resources.budget)
    if resources.work_dir is not None:
        if shared and request.learned:
            raise WorkDirError(
                "weights that are learned on the whole network keep no records on several "
                "processes; pass no work_dir, or no objective"
            )
        prints = fingerprint(request, walk)
        if shared:
            agree(prints)
        work = open_work_dir(resources.work_dir, prints, shared)
    job = Job(request, walk, work, resources.progress)
    job.run()
    return replaced(request.params, job.quantized), job.report()
