"""Which job it is: digests of all that a result depends on, to tell a job's folder from others.

The function and the objective are what they compute, as JAX traces it, and not what they are
called: two closures of one factory differ, a new name changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jquant.calibration.walk import Walk
from jquant.errors import WorkDirError
from jquant.jobs.records import digest, leaf_digest, version_of
from jquant.jobs.request import Alone, Request
from jquant.learning.objectives import Reconstruction
from jquant.programs.keys import jaxpr_key, text
from jquant.programs.walker import trace


def fingerprint(request: Request, walk: Walk) -> dict[str, str]:
    """All that the result depends on, item by item.

    Args:
        request: the job.
        walk: its stages.

    Raises:
        WorkDirError: the objective calls back into Python, where what it computes is out of sight.
    """
    plan, evidence = request.plan, request.evidence
    given = [leaf for path in evidence for leaf in jax.tree.leaves((path, evidence[path]))]
    device = jax.local_devices()[0]
    return {
        "sequential": str(request.sequential),
        "JAX": jax.__version__,
        "jaxlib": version_of("jaxlib"),
        "jquant": version_of("jquant-jax"),
        "device": f"{device.platform} {device.device_kind}",
        "the function": function_digest(request),
        "the plan": digest(
            f"{path} {scheme!r} {plan.weights[path].layout!r}" for path, scheme in plan.items()
        ),
        "the parameters": digest(
            item
            for path, leaf in request.leaves.arrays.items()
            for item in (path, *leaf_digest(leaf))
        ),
        "the data": digest(
            item
            for leaf in [*request.data.arrays(), *given]
            for item in leaf_digest(leaf if isinstance(leaf, jax.Array) else np.asarray(leaf))
        ),
        "the objective": digest_objective(request, walk),
        "the key": "none" if request.key is None else digest(leaf_digest(request.key)),
    }


def function_digest(request: Request) -> str:
    """The item of what the function computes."""
    return digest(_function(request))


def _function(request: Request) -> Iterator[str]:
    """What the function computes on each kind of batch."""
    for inputs in request.data.kinds():
        yield text(jaxpr_key(trace(request.fn, request.leaves.abstract, *inputs)[0]))


def digest_objective(request: Request, walk: Walk) -> str:
    """The item of what the job aims at: what the objective computes."""
    return "none" if isinstance(request.aim, Alone) else digest(_objective(request, walk))


def _objective(request: Request, walk: Walk) -> Iterator[str]:
    """What an objective computes on each kind of outputs that it is given."""
    aim = request.aim
    assert not isinstance(aim, Alone)
    objective = aim.objective
    if isinstance(aim, Reconstruction):
        yield f"of stages, on {aim.inputs} inputs"
    for outputs, inputs in _given(request, walk):
        # A new function for JAX: what an old one has been traced to may not be what it is now.
        closed, _ = trace(lambda *given: objective(*given), outputs, outputs, *inputs)
        if _calls_back(closed.jaxpr):
            raise WorkDirError(
                f"the objective {objective!r} calls back into Python (pure_callback or "
                "io_callback), so that nobody can tell whether a job that is taken up again has "
                "the same one; write it in JAX, or pass no work_dir"
            )
        yield text(jaxpr_key(closed))


def _given(request: Request, walk: Walk) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The outputs and inputs, abstract, that an objective is given: of stages, or of all."""
    if isinstance(request.aim, Reconstruction):
        for cut in walk.cuts.kinds.values():
            for segment in cut.reconstructions:
                yield [cut.flat.shapes[number] for number in segment.outputs], ()
        return
    for inputs in request.data.kinds():
        yield jax.eval_shape(request.fn, request.leaves.abstract, *inputs), inputs


def _calls_back(jaxpr: core.Jaxpr) -> bool:
    """Whether a result depends on a call of Python while the program runs."""
    for eqn in jaxpr.eqns:
        if "callback" in eqn.primitive.name and eqn.outvars:
            return True
        for value in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda v: isinstance(v, core.Jaxpr | core.ClosedJaxpr),
        ):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr) and _calls_back(inner):
                return True
    return False
