"""One job on several processes: what they must agree on, and who writes.

Processes that ask for different things would wait for each other forever, or each round by
evidence that is not its own. So they compare digests of what they ask before any array depends on
it. Only jobs with an array that is spread over processes are jobs of all of them: what each process
does with arrays of its own is its own affair.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jquant.errors import ProcessError
from jquant.jobs.fingerprint import function_digest
from jquant.jobs.records import digest, leaf_digest
from jquant.jobs.request import Request
from jquant.trees.processes import differing, from_all, is_spread, joined
from jquant.weights.arguments import shape_of


def is_of_all(request: Request) -> bool:
    """Whether a job is one of all processes: an array of it is spread over them."""
    if jax.process_count() == 1:
        return False
    return is_spread((list(request.leaves.arrays.values()), list(request.data.arrays())))


def check_agreed(request: Request) -> None:
    """Refuse a job that is not the same on all processes.

    Raises:
        ProcessError: names what differs, and where.
    """
    weights = request.plan.weights
    shapes = [[shape_of(x) for x in jax.tree.leaves(batch)] for batch in request.data.batches]
    key = request.key
    agree(
        {
            "the number of batches": str(len(shapes)),
            "the shapes of batches": str(shapes),
            "the plan": digest(
                f"{path} {scheme!r} {weights[path].layout!r}"
                for path, scheme in request.plan.items()
            ),
            "the key": "none" if key is None else digest(leaf_digest(key)),
            "sequential": str(request.sequential),
            "the weights with evidence": str(sorted(request.evidence)),
            "the function": function_digest(request),
        }
    )


def agree(items: Mapping[str, str]) -> None:
    """Raise unless all processes pass the same; all must get here.

    Raises:
        ProcessError: an item differs.
    """
    for name, value in items.items():
        others = differing(from_all(value))
        if others:
            raise ProcessError(
                f"{name} on process {joined(others)} is not that of process 0; all processes of a "
                "job must ask for the same: one plan, one key, as many batches of the same shapes "
                "(of arrays over all processes, jax.make_array_from_process_local_data)"
            )
