"""Which job it is: digests of all that a result depends on, to tell a job's folder from others.

The function and the objective are what they compute, as JAX traces it, and not what they are
called: two closures of one factory differ, a new name changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jaxtyping import PRNGKeyArray

from jquant.calibration.capture import kinds
from jquant.calibration.evidence import Evidence
from jquant.calibration.onepass import OnePass
from jquant.calibration.walk import Walk
from jquant.errors import WorkDirError
from jquant.jobs.records import digest, leaf_digest, version_of
from jquant.learning.objectives import Objective, Stagewise
from jquant.programs.keys import jaxpr_key, text
from jquant.programs.walker import trace
from jquant.schemes.scheme import Plan
from jquant.trees.lazy import abstract
from jquant.weights.arguments import inputs_of


def fingerprint(
    walk: Walk | OnePass,
    plan: Plan,
    arrays: Mapping[str, Any],
    given: Mapping[str, Evidence],
    key: PRNGKeyArray | None,
    granularity: str,
    objective: Objective | None,
) -> dict[str, str]:
    """All that the result depends on, item by item.

    Raises:
        WorkDirError: the objective calls back into Python, where what it computes is out of sight.
    """
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
        "the objective": "none" if objective is None else digest(_computed(objective, walk)),
        "the key": "none" if key is None else digest(leaf_digest(key)),
    }


def _computed(objective: Objective, walk: Walk | OnePass) -> Iterator[str]:
    """What an objective computes on each kind of outputs that it is given."""
    if isinstance(objective, Stagewise):
        yield f"of stages, on {objective.inputs} inputs"
    for outputs, inputs in _given(walk):
        # A new function for JAX: what an old one has been traced to may not be what it is now.
        closed, _ = trace(lambda *given: objective(*given), outputs, outputs, *inputs)
        if _calls_back(closed.jaxpr):
            raise WorkDirError(
                f"the objective {objective!r} calls back into Python (pure_callback or "
                "io_callback), so that nobody can tell whether a job that is taken up again has "
                "the same one; write it in JAX, or pass no work_dir"
            )
        yield text(jaxpr_key(closed))


def _given(walk: Walk | OnePass) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The outputs and inputs, abstract, that an objective is given: of stages, or of all."""
    if isinstance(walk, Walk):
        for cut in {id(cut): cut for cut in walk.cuts}.values():
            for segment in cut.reconstructions:
                yield [cut.flat.shapes[number] for number in segment.outputs], ()
        return
    seen = set()
    for number, batch in enumerate(walk.batches):
        inputs = inputs_of(batch, number)
        kind = jax.tree.structure(inputs), kinds(inputs)
        if kind not in seen:
            seen.add(kind)
            yield jax.eval_shape(walk.fn, abstract(walk.params), *inputs), inputs


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
