"""`quantize`: a plan, a function and data in, quantized parameters and a report out.

All that can be checked is checked before any work. Then the function is taken stage by stage (see
`job.py`), so that what comes later is calibrated on what it will really see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jquant.calibration.evidence import Evidence
from jquant.calibration.onepass import OnePass
from jquant.calibration.stages import Granularity
from jquant.calibration.walk import Walk
from jquant.calibration.weights import path_of
from jquant.checks import check_evidence, check_needs, check_weights, not_used
from jquant.errors import EvidenceError, PlanError
from jquant.job import Job
from jquant.lazy import Lazy, realize
from jquant.progress import Told
from jquant.report import Report
from jquant.scheme import Plan
from jquant.work import digest, leaf_digest, open_work_dir, version_of


def quantize(
    fn: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    evidence: Mapping[str, Evidence] | None = None,
    key: PRNGKeyArray | None = None,
    granularity: Granularity = "weight",
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
        batches: calibration batches, each one array or a tuple of `fn`'s inputs.
        evidence: path → `Evidence` (as from `capture`), for the weights it names instead of
            batches.
        key: randomness, required when a rounding needs it; each weight's key is derived from its
            path, so that adding a weight changes no other.
        granularity: which weights are calibrated together, on inputs that already quantized weights
            have produced. "weight": those that do not depend on each other (q, k and v; gate and
            up), GPTQ's "true sequential". "block": all of a block, by the first numbered key of
            their paths (`layers/3`) or by the layer of a scanned stack. "all": all, in one pass.
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
        PlanError, WeightError, EvidenceError: see the messages; raised before any work, except for
            inputs that turn out not finite, and for a factorisation that fails where the scheme
            allows no fallback.
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
    if work_dir is not None and batches is not None:
        batches = list(batches)  # what is in them is part of the fingerprint
    walk, arrays = prepare(
        fn, params, plan, batches,
        evidence=evidence, key=key, granularity=granularity, budget=budget,
    )  # fmt: skip
    given = dict(evidence or {})
    work = None
    if work_dir is not None:
        said = _fingerprint(walk, plan, arrays, given, key, granularity)
        work = open_work_dir(work_dir, said)
    job = Job(plan, arrays, given, key, walk, work, progress)
    job.run()
    lazy = any(isinstance(leaf, Lazy) for leaf in arrays.values())
    quantized = {path: job.whole(path) for path in plan}
    result = [quantized.get(path, leaf) for path, leaf in arrays.items()]
    tree = jax.tree.unflatten(jax.tree.structure(params), result)
    return tree if lazy else realize(tree), job.report(quantized)


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
) -> tuple[Walk | OnePass, dict[str, Any]]:
    """All that `quantize` does before any work: the checks, the stages, the leaves by path."""
    if granularity not in ("weight", "block", "all"):
        raise PlanError(f"granularity must be 'weight', 'block' or 'all', got {granularity!r}")
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    arrays = {path_of(keys): leaf for keys, leaf in leaves}
    given = dict(evidence or {})
    check_weights(plan, arrays)
    staged = batches is not None and granularity != "all"
    check_needs(plan, given, key, batches=batches is not None, staged=staged)
    check_evidence(plan, given)
    wanted = [path for path in plan if plan.weights[path].has_inputs and path not in given]
    walk: Walk | OnePass
    if batches is None or not wanted:
        walk = OnePass(fn, params, list(plan))
    elif granularity == "all":
        walk = OnePass(fn, params, list(plan), wanted, batches)
    else:
        stacks = {path: plan.weights[path].stack_axes for path in plan}
        walk = Walk.start(
            fn, list(arrays.items()), structure, stacks, batches, granularity,
            budget=budget, twin=any("drift" in scheme.needs for scheme in plan.values()),
        )  # fmt: skip
        _check_reached(plan, walk)
    return walk, arrays


def _check_reached(plan: Plan, walk: Walk) -> None:
    reached = {piece.path for stage in walk.stages for piece in stage.pieces}
    for path in plan:
        if path not in reached:
            raise EvidenceError(not_used(path))


def _fingerprint(
    walk: Walk | OnePass,
    plan: Plan,
    arrays: Mapping[str, Any],
    given: Mapping[str, Evidence],
    key: PRNGKeyArray | None,
    granularity: str,
) -> dict[str, str]:
    """All that the result depends on, item by item."""
    known = [leaf for path in given for leaf in jax.tree.leaves((path, given[path]))]
    device = jax.local_devices()[0]
    return {
        "granularity": granularity,
        "JAX": jax.__version__,
        "jaxlib": version_of("jaxlib"),
        "jquant": version_of("jquant-jax"),
        "device": f"{device.platform} {device.device_kind}",
        "the function": digest(walk.describe()),
        "the plan": digest(
            f"{path} {scheme!r} {plan.weights[path].layout!r}" for path, scheme in plan.items()
        ),
        "the parameters": digest(
            item for path, leaf in arrays.items() for item in (path, *leaf_digest(leaf))
        ),
        "the data": digest(
            item
            for leaf in [*walk.data(), *known]
            for item in leaf_digest(leaf if isinstance(leaf, jax.Array) else np.asarray(leaf))
        ),
        "the key": "none" if key is None else digest(leaf_digest(key)),
    }
