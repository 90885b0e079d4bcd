"""The job as asked: one value that holds all a result depends on, checked before any work.

What changes no bit of the result, where it is kept and who is told, stands beside it (`Resources`).
Every question is decided here once: what learned roundings descend (`Aim`), whether batches are
read at all, what is recorded of them, and where the function is cut.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jaxtyping import PRNGKeyArray, PyTree

from jquant.calibration.cutting import Recording
from jquant.calibration.data import Data
from jquant.calibration.evidence import Evidence
from jquant.calibration.saliency import Saliency
from jquant.calibration.stages import Sequential
from jquant.calibration.tokens import Given
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError, PlanError
from jquant.jobs.progress import OnProgress
from jquant.layerwise.checks import (
    check_evidence,
    check_guided,
    check_matched,
    check_multiplied,
    check_needs,
    check_reached,
    check_salient,
    check_weights,
)
from jquant.learning.checks import check_logits, check_objective, check_weighable
from jquant.learning.descend import descent_of, is_learned
from jquant.learning.objectives import Objective, Reconstruction
from jquant.schemes.scheme import Plan
from jquant.trees.lazy import realize
from jquant.weights.arguments import by_path
from jquant.weights.leaves import Leaves


@dataclass(frozen=True)
class Alone:
    """Every weight is rounded by itself, for the squared error of its own outputs."""


@dataclass(frozen=True)
class Whole:
    """Learned weights move together, after all others, by the outputs of the whole function."""

    objective: Objective


Aim = Alone | Reconstruction | Whole


def aim_of(objective: Objective | None) -> Aim:
    """What a job with this `objective=` aims at."""
    if objective is None:
        return Alone()
    return objective if isinstance(objective, Reconstruction) else Whole(objective)


class Resources(NamedTuple):
    """What changes no bit of the result.

    Attributes:
        work_dir: where finished stages are kept; None: nowhere.
        budget: bytes of activations kept on the device between stages; None: no limit.
        progress: whom to tell.
    """

    work_dir: str | os.PathLike[str] | None = None
    budget: int | None = None
    progress: OnProgress | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """All that the result of a job depends on; see `quantize` for the fields.

    `data` is empty where no batches are read.
    """

    fn: Callable[..., Any]
    params: PyTree
    plan: Plan
    evidence: Mapping[str, Evidence] = dataclasses.field(default_factory=dict)
    key: PRNGKeyArray | None = None
    aim: Aim = Alone()  # noqa: RUF009
    sequential: Sequential = "weight"
    data: Data = Data()  # noqa: RUF009

    def checked(
        self,
        batches: Iterable[Any] | None,
        token_weights: Given = None,
        saliency: Saliency | None = None,
    ) -> Request:
        """The request with its batches, all of it checked.

        Raises:
            what `quantize` raises before any work.
        """
        offered = batches is not None
        self._check_choices(offered, token_weights is not None)
        request, whole = self, isinstance(self.aim, Whole)
        if whole:  # every step runs all of the network
            request = dataclasses.replace(self, params=realize(self.params))
        request._check_plan(offered, saliency is not None)
        if batches is None or not request.reads:
            return request
        most = None
        if whole:
            descent = descent_of(request.learned.values())
            most = descent.steps * descent.accumulate
        data = Data.of(batches, token_weights, most)
        data = data if saliency is None else data.guided(saliency)
        if isinstance(self.aim, Whole):
            check_logits(self.fn, request.params, self.aim.objective, data)
        return dataclasses.replace(request, data=data)

    def _check_choices(self, batches: bool, weighed: bool) -> None:
        """Refuse stages that there are not, and an objective that these batches cannot serve."""
        if not isinstance(self.aim, Alone):
            objective = self.aim.objective if isinstance(self.aim, Whole) else self.aim
            check_objective(self.plan, objective, self.evidence, self.key)
            if not batches:
                raise EvidenceError(
                    "an objective is descended on batches; pass calibration batches"
                )
            if weighed:
                check_weighable(objective)
        if isinstance(self.aim, Reconstruction) and self.sequential is None:
            raise PlanError(
                "objectives.Reconstruction() needs stages: pass sequential='weight' or 'block', or "
                "descend its objective on the whole network"
            )
        if self.sequential not in ("weight", "block", None):
            raise PlanError(
                f"sequential must be 'weight', 'block' or None, got {self.sequential!r}"
            )

    def _check_plan(self, batches: bool, guided: bool) -> None:
        """Refuse weights, roundings and evidence that do not go together."""
        check_weights(self.plan, by_path(self.params))
        staged = batches and self.sequential is not None
        check_needs(self.rounded, self.evidence, self.key, batches=batches, staged=staged)
        check_guided(self.rounded, self.evidence, guided and batches)
        check_evidence(self.plan, self.evidence)

    @property
    def reads(self) -> bool:
        """Whether batches are gone over, for evidence or for an objective."""
        return bool(self.unknown) or not isinstance(self.aim, Alone)

    @cached_property
    def leaves(self) -> Leaves:
        """The parameters by path."""
        return Leaves.of(self.params)

    @cached_property
    def learned(self) -> Plan:
        """The weights that move together, over all stages; none unless the aim is `Whole`."""
        return self._part(lambda path: self._is_together(path))

    @cached_property
    def rounded(self) -> Plan:
        """The weights that are rounded stage by stage."""
        return self._part(lambda path: not self._is_together(path))

    def _is_together(self, path: str) -> bool:
        return isinstance(self.aim, Whole) and is_learned(self.plan[path])

    def _part(self, chosen: Callable[[str], bool]) -> Plan:
        return Plan({path: s for path, s in self.plan.items() if chosen(path)}, self.plan.weights)

    @cached_property
    def unknown(self) -> tuple[str, ...]:
        """The weights that stages round and whose inputs are to be read from batches."""
        weights = self.plan.weights
        return tuple(p for p in self.rounded if weights[p].has_inputs and p not in self.evidence)

    @cached_property
    def guided(self) -> tuple[str, ...]:
        """The weights whose inputs are to be weighed by saliency."""
        return tuple(path for path in self.unknown if "guided" in self.rounded[path].needs)

    @cached_property
    def recording(self) -> Recording:
        """Where the function is cut, and what is recorded there."""
        needs = frozenset[str]().union(*(scheme.needs for scheme in self.rounded.values()))
        return Recording.at(
            {path: self.plan.weights[path] for path in self.rounded},
            sequential=self.sequential,
            given=self.rounded.keys() - set(self.unknown),
            drift="drift" in needs and self.sequential is not None,
            spread="spread" in needs,
            reconstruct=self.aim.inputs if isinstance(self.aim, Reconstruction) else None,
        )

    def walk(self, budget: int | None) -> Walk:
        """The stages of the weights that are rounded stage by stage.

        Raises:
            EvidenceError: the batches do not reach a weight, or not all tokens are known.
        """
        if not self.data.batches or not (self.unknown or isinstance(self.aim, Reconstruction)):
            return Walk.without_data(self.fn, self.leaves, self.rounded)
        walk = Walk.start(self.fn, self.leaves, self.data, self.recording, budget)
        check_reached(walk, self.rounded)
        check_multiplied(walk, self.rounded, self.unknown)
        check_matched(walk, self.data, self.unknown)
        check_salient(walk, self.data.saliency, self.guided)
        return walk
