"""Learning the rounding of many weights at once, on batches: the loop around relaxations.

A `Network` runs the weights as they are now, whatever the rest of the parameters and the inputs
are; `learn` takes gradient steps on all of its weights together, until the schedule ends or the
loss is no longer finite. Every so often the weights are rounded, their loss is taken on the same
few batches, and the best is kept; the first candidate is nearest rounding. The state between two
looks can be written and read, and the order of the batches depends on the number of the step alone:
what goes on gives the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jquant.axes.layout import Layout
from jquant.calibration.evidence import Evidence
from jquant.errors import ObjectiveError
from jquant.grids.base import GridParams
from jquant.grids.grouped import Grouped
from jquant.layerwise.weight import Rounder, stored
from jquant.learning.objectives import Objective
from jquant.learning.programs import Network, Programs, Task, programs_of
from jquant.learning.trace import Trace
from jquant.rounding.base import Rounded
from jquant.rounding.descent import Descent
from jquant.rounding.elementwise import importance_of, second_moment
from jquant.rounding.relaxed import Relaxation, Target, Unit, Variables
from jquant.rounding.steps import Moving
from jquant.schemes.scheme import Scheme
from jquant.trees.paths import key_of
from jquant.weights.qtensor import QTensor

LOOKED_AT = 4  # batches on which candidates are compared (heuristic)


class Feed(Protocol):
    """Batches by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> tuple[Any, Any, tuple[Any, ...]]:
        """What the network takes, the outputs that are wanted, what the objective takes."""
        ...


class State(NamedTuple):
    """What a learning goes on from."""

    variables: list[Variables]
    optimizer: Any
    best: list[tuple[Array, GridParams]]


class Record(Protocol):
    """Where the state waits, should the process end."""

    def restore(self, like: State) -> tuple[State, Trace] | None: ...

    def keep(self, state: State, trace: Trace) -> None: ...


class Learned(NamedTuple):
    """A weight that is to be learned, and what to do with it."""

    name: str
    w: Array
    scheme: Scheme
    layout: Layout
    evidence: Evidence | None

    @property
    def target(self) -> Target:
        grid, groups = self.scheme.grid, self.scheme.grouping
        w = self.layout.canonical(self.w).astype(jnp.float32)
        params = _fit(w, Grouped(grid, groups), second_moment(self.evidence))
        return Target(w, params, grid, groups)


def is_learned(scheme: Scheme) -> bool:
    """Whether the rounding of a scheme can be learned on an objective."""
    return isinstance(scheme.rounding, Relaxation)


def relaxation_of(schemes: Iterable[Scheme]) -> Relaxation:
    """The rounding that all these schemes have."""
    relaxation = next(iter(schemes)).rounding
    assert isinstance(relaxation, Relaxation)
    return relaxation


def descent_of(schemes: Iterable[Scheme]) -> Descent:
    """The schedule that all these schemes have."""
    return relaxation_of(schemes).descent


@dataclass(frozen=True, eq=False)
class Problem:
    """What is descended.

    Attributes:
        network: what is run.
        objective: of its outputs.
        fixed: the rest of what the network takes, the same for all batches.
        feed: batches, gone over again and again, in another order each time.
    """

    network: Network
    objective: Objective
    fixed: Any
    feed: Feed


def learn(
    problem: Problem,
    weights: Sequence[Learned],
    *,
    key: PRNGKeyArray | None = None,
    record: Record | None = None,
    told: Callable[[int], None] | None = None,
) -> tuple[list[tuple[QTensor, dict[str, Array]]], Trace]:
    """Learn the rounding of these weights together.

    Args:
        problem: what is descended.
        weights: of one rounding.
        key: randomness.
        record: where to keep the state at every look.
        told: called with the number of steps done.

    Returns:
        for each weight what `quantize_weight` returns, with `kept_at` and `rounded` in the numbers;
        and the trace.

    Raises:
        ObjectiveError: the loss at nearest rounding is not finite, or a weight has no gradient.
    """
    names, targets = [weight.name for weight in weights], [weight.target for weight in weights]
    keys = None if key is None else [key_of(key, name) for name in names]
    task = Task(
        problem.network, relaxation_of(weight.scheme for weight in weights), problem.objective,
        tuple(weight.layout for weight in weights),
        tuple(jnp.dtype(weight.w.dtype) for weight in weights),
    )  # fmt: skip
    subjects = Subjects(names, targets, keys)
    rounded, trace = descend(task, subjects, problem.fixed, problem.feed, Watch(record, told))
    learned = [
        stored(
            target.w, one, weight.layout, weight.w.dtype, Rounder.of(weight.scheme, weight.evidence)
        )
        for weight, target, one in zip(weights, targets, rounded, strict=True)
    ]
    return learned, trace


@jax.jit(static_argnames="grid")
def _fit(w: Array, grid: Grouped, moment: Array | None) -> GridParams:
    return grid.fit(w, importance_of(moment))


class Subjects(NamedTuple):
    """The weights that are learned together."""

    names: Sequence[str]
    targets: Sequence[Any]  # what the relaxation of the task takes
    keys: Sequence[PRNGKeyArray] | None = None


class Watch(NamedTuple):
    """Who follows a learning: where its state waits, and who is told of every step."""

    record: Record | None = None
    told: Callable[[int], None] | None = None


def descend(
    task: Task, subjects: Subjects, fixed: Any, feed: Feed, watch: Watch = Watch()
) -> tuple[list[Rounded], Trace]:
    """The loop over steps and looks; see `learn`."""
    course = _Course(task, subjects, fixed, feed, programs_of(task))
    state, trace, unit = course.start()
    if watch.record is not None:
        state, trace = watch.record.restore(state) or (state, trace)
    for end in task.relaxation.descent.looks:
        if end <= len(trace.loss) or trace.stopped:
            continue
        steps: list[tuple[Array, Array]] = []
        for at in range(len(trace.loss), end):
            state, loss, share = course.step(state, at, unit)
            steps.append((loss, share))
            if watch.told is not None:
                jax.block_until_ready(share)
                watch.told(at + 1)
        state, trace = course.look(state, trace, steps)
        if watch.record is not None:
            watch.record.keep(state, trace)
    share = jnp.asarray(trace.rounded[-1] if trace.rounded else math.nan, jnp.float32)
    info = {"kept_at": jnp.asarray(trace.kept_at, jnp.float32), "rounded": share}
    return [Rounded(codes, params, info) for codes, params in state.best], trace


class _Course(NamedTuple):
    """What stays the same from the first step to the last."""

    task: Task
    subjects: Subjects
    fixed: Any
    feed: Feed
    programs: Programs

    def start(self) -> tuple[State, Trace, Unit]:
        """The state at nearest rounding, and what losses are measured in.

        Raises:
            ObjectiveError: the loss there is not finite, or a weight has no gradient.
        """
        names, targets, keys = self.subjects.names, list(self.subjects.targets), self.subjects.keys
        nearest, square = self.programs.nearest(targets)
        loss = self.loss(nearest)
        if not math.isfinite(loss):
            raise ObjectiveError(
                f"the objective is {loss} with {', '.join(names[:3])} … rounded to nearest; "
                "look for outputs that are not finite, and pass an objective that is"
            )
        size = float(sum(target.w.size for target in targets))
        unit = Unit(jnp.asarray(loss or 1.0, jnp.float32), size, square)
        variables = self.programs.start(targets, None if keys is None else list(keys))
        gradients = (self.gradient(variables, batch, np.float32(0))[1] for batch in self.looked)
        _check_gradients(gradients, names)
        # Not compiled: moments made of zeros take the sharding of what they are like.
        optimizer = self.task.relaxation.descent.transformation().init(variables)
        return State(variables, optimizer, nearest), Trace(tuple(names), looks={0: loss}), unit

    @property
    def looked(self) -> range:
        """The batches on which candidates are compared."""
        return range(min(LOOKED_AT, len(self.feed)))

    def loss(self, rounded: list[tuple[Array, GridParams]]) -> float:
        """The mean loss of rounded weights over these."""
        values = self.programs.values(rounded, list(self.subjects.targets))
        losses = [self.programs.loss(values, self.fixed, *self.feed[n]) for n in self.looked]
        return float(sum(losses)) / len(losses)

    def gradient(
        self, variables: list[Variables], batch: int, progress: np.float32
    ) -> tuple[Array, list[Variables]]:
        """The loss on a batch, and its gradient."""
        targets = list(self.subjects.targets)
        return self.programs.gradient(variables, targets, self.fixed, self.feed[batch], progress)

    def step(self, state: State, at: int, unit: Unit) -> tuple[State, Array, Array]:
        """The state after a step, the loss before it summed over its batches, and the share of
        weights that are rounded after it."""
        descent, number = self.task.relaxation.descent, len(self.feed)
        progress = np.float32(at / descent.steps)
        used = range(at * descent.accumulate, (at + 1) * descent.accumulate)
        loss, gradient = functools.reduce(
            lambda sums, more: (sums[0] + more[0], self.programs.add(sums[1], more[1])),
            (self.gradient(state.variables, _order(n, number), progress) for n in used),
        )
        moving, share = self.programs.update(
            gradient, Moving(state.variables, state.optimizer), list(self.subjects.targets), unit,
            progress,
        )  # fmt: skip
        return State(moving.variables, moving.optimizer, state.best), loss, share

    def look(
        self, state: State, trace: Trace, steps: list[tuple[Array, Array]]
    ) -> tuple[State, Trace]:
        """The state with the better of its weights as they are now and the best, after steps."""
        descent, at = self.task.relaxation.descent, len(trace.loss) + len(steps)
        losses = [float(loss) / descent.accumulate for loss, _ in steps]
        candidate = self.programs.harden(state.variables, list(self.subjects.targets))
        trace = dataclasses.replace(
            trace,
            loss=trace.loss + losses,
            rounded=trace.rounded + [float(share) for _, share in steps],
            looks={**trace.looks, at: self.loss(candidate)},
        )
        if trace.looks[at] < trace.looks[trace.kept_at]:
            state, trace = state._replace(best=candidate), dataclasses.replace(trace, kept_at=at)
        bad = next((k for k, loss in enumerate(trace.loss) if not math.isfinite(loss)), None)
        if bad is not None:
            why = (
                f"the loss was {trace.loss[bad]} at step {bad + 1}: try a smaller learning rate "
                f"than {descent.learning_rate}"
            )
            trace = dataclasses.replace(trace, stopped=why)
        return state, trace


def _order(number: int, count: int) -> int:
    """The batch that is the `number`-th to be used: every round in an order of its own."""
    around, at = divmod(number, count)
    return at if around == 0 else int(np.random.default_rng(around).permutation(count)[at])


def _check_gradients(gradients: Iterable[Sequence[Variables]], names: Sequence[str]) -> None:
    """Refuse weights that the objective does not see; as many gradients are asked for as needed."""
    silent = list(names)
    for gradient in gradients:
        # Any number but zero, NaN too: an extreme might forget it.
        moved = [any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(one)) for one in gradient]
        quiet = {name for name, seen in zip(names, moved, strict=True) if not seen}
        silent = [name for name in silent if name in quiet]
        if not silent:
            return
    them = ", ".join(map(repr, silent[:3])) + (" …" if len(silent) > 3 else "")
    raise ObjectiveError(
        f"the objective has no gradient with respect to {them}: the outputs do not depend on it on "
        "these batches; keep it, round it another way, or pass other batches"
    )
