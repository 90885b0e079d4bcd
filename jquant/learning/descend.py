"""Learning the rounding of many weights at once, on batches: the loop around relaxations.

A `Network` runs the weights as they are now, whatever the rest of the parameters and the inputs
are; `learn` takes gradient steps on all of its weights together, until the schedule ends or the
loss is no longer finite. Every so often the weights are rounded, their loss is taken on the same
few batches, and the best is kept; the first candidate is nearest rounding. Two programs do all
work, one for the gradient and one for the step, with the state donated; whatever is sharded stays
so, as all is elementwise but for the network itself. The state between two looks can be written and
read, and the
order of the batches depends on the number of the step alone: what goes on gives the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jquant.axes.layout import Layout
from jquant.calibration.evidence import Evidence
from jquant.errors import ObjectiveError
from jquant.grids.base import Params, code_dtype
from jquant.grids.grouped import Grouped
from jquant.layerwise.weight import Rounder, stored
from jquant.learning.objectives import Objective
from jquant.learning.trace import Trace
from jquant.numerics.narrow import as_dtype
from jquant.rounding.base import Rounded
from jquant.rounding.descent import Descent
from jquant.rounding.elementwise import importance_of, second_moment
from jquant.rounding.relaxed import Relaxation, Target, Unit, Variables
from jquant.schemes.scheme import Scheme
from jquant.trees.paths import key_of
from jquant.weights.qtensor import QTensor

if TYPE_CHECKING:
    import optax

LOOKED_AT = 4  # batches on which candidates are compared (heuristic)


class Network(Protocol):
    """What is run: hashable, so that equal ones share their programs."""

    def __call__(self, weights: Sequence[Array], fixed: Any, inputs: Any) -> Any:
        """The outputs with these weights, each in its own shape and dtype."""
        ...


@dataclass(frozen=True)
class Task:
    """All that is static about a learning: the programs depend on nothing else."""

    network: Network
    relaxation: Relaxation
    objective: Objective
    layouts: tuple[Layout, ...]
    dtypes: tuple[Any, ...]


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
    best: list[tuple[Array, Params]]


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
        grid, groups = self.scheme.grid, self.scheme.groups
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
    rounded, trace = descend(
        task, targets, problem.fixed, problem.feed, names, keys=keys, record=record, told=told
    )
    learned = [
        stored(
            target.w, one, weight.layout, weight.w.dtype, Rounder.of(weight.scheme, weight.evidence)
        )
        for weight, target, one in zip(weights, targets, rounded, strict=True)
    ]
    return learned, trace


@jax.jit(static_argnames="grid")
def _fit(w: Array, grid: Grouped, moment: Array | None) -> Params:
    return grid.fit(w, importance_of(moment))


def descend(
    task: Task,
    targets: Sequence[Any],
    fixed: Any,
    feed: Feed,
    names: Sequence[str],
    *,
    keys: Sequence[PRNGKeyArray] | None = None,
    record: Record | None = None,
    told: Callable[[int], None] | None = None,
) -> tuple[list[Rounded], Trace]:
    """The loop; see `learn`. `targets` are what the relaxation of the task takes."""
    descent, programs, targets = task.relaxation.descent, _programs(task), list(targets)
    looked = range(min(LOOKED_AT, len(feed)))

    def loss_of(rounded: list[tuple[Array, Params]]) -> float:
        values = programs.values(rounded, targets)
        losses = [programs.loss(values, fixed, *feed[number]) for number in looked]
        return float(sum(losses)) / len(losses)

    nearest, step = programs.nearest(targets)
    trace = Trace(tuple(names), looks={0: loss_of(nearest)})
    if not math.isfinite(trace.looks[0]):
        raise ObjectiveError(
            f"the objective is {trace.looks[0]} with {', '.join(names[:3])} … rounded to nearest; "
            "look for outputs that are not finite, and pass an objective that is"
        )
    size = float(sum(target.w.size for target in targets))
    unit = Unit(jnp.asarray(trace.looks[0] or 1.0, jnp.float32), size, step)

    variables = programs.start(targets, None if keys is None else list(keys))
    _check_gradient(
        lambda batch: programs.gradient(variables, targets, fixed, *feed[batch], np.float32(0))[1],
        looked, names,
    )  # fmt: skip
    # Not compiled: moments made of zeros take the sharding of what they are like.
    state = State(variables, programs.optimizer.init(variables), nearest)
    if record is not None:
        found = record.restore(state)
        if found is not None:
            state, trace = found
    variables, inner, best = state
    pending: list[tuple[Any, Array]] = []
    for at in range(len(trace.loss), descent.steps):
        if trace.stopped:
            break
        progress = np.float32(at / descent.steps)
        value, gradient = None, None
        for number in range(at * descent.accumulate, (at + 1) * descent.accumulate):
            part, towards = programs.gradient(
                variables, targets, fixed, *feed[_order(number, len(feed))], progress
            )
            value = part if value is None else value + part
            gradient = towards if gradient is None else programs.add(gradient, towards)
        variables, inner, rounded = programs.update(
            variables, inner, gradient, targets, unit, progress
        )
        pending.append((value, rounded))
        if told is not None:
            jax.block_until_ready(rounded)
            told(at + 1)
        if at + 1 in descent.looks:
            trace.loss += [float(value) / descent.accumulate for value, _ in pending]
            trace.rounded += [float(share) for _, share in pending]
            pending = []
            now = programs.harden(variables, targets)
            trace.looks[at + 1] = loss = loss_of(now)
            if loss < trace.looks[trace.kept_at]:
                best, trace.kept_at = now, at + 1
            bad = next((k for k, x in enumerate(trace.loss) if not math.isfinite(x)), None)
            if bad is not None:
                trace.stopped = (
                    f"the loss was {trace.loss[bad]} at step {bad + 1}: try a smaller learning "
                    f"rate than {descent.learning_rate}"
                )
            if record is not None:
                record.keep(State(variables, inner, best), trace)
    share = jnp.asarray(trace.rounded[-1] if trace.rounded else math.nan, jnp.float32)
    info = {"kept_at": jnp.asarray(trace.kept_at, jnp.float32), "rounded": share}
    return [Rounded(codes, params, info) for codes, params in best], trace


def _order(number: int, count: int) -> int:
    """The batch that is the `number`-th to be used: every round in an order of its own."""
    around, at = divmod(number, count)
    return at if around == 0 else int(np.random.default_rng(around).permutation(count)[at])


def _check_gradient(
    gradient: Callable[[int], Any], batches: Iterable[int], names: Sequence[str]
) -> None:
    """Refuse weights that the objective does not see."""
    silent = list(names)
    for number in batches:
        found = gradient(number)
        # Any number but zero, NaN too: an extreme might forget it.
        moved = [any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(one)) for one in found]
        quiet = {name for name, seen in zip(names, moved, strict=True) if not seen}
        silent = [name for name in silent if name in quiet]
        if not silent:
            return
    said = ", ".join(map(repr, silent[:3])) + (" …" if len(silent) > 3 else "")
    raise ObjectiveError(
        f"the objective has no gradient with respect to {said}: the outputs do not depend on it on "
        "these batches; keep it, round it another way, or pass other batches"
    )


class _Programs(NamedTuple):
    optimizer: optax.GradientTransformation
    nearest: Callable[..., Any]
    start: Callable[..., Any]
    gradient: Callable[..., Any]
    add: Callable[..., Any]
    update: Callable[..., Any]
    harden: Callable[..., Any]
    values: Callable[..., Any]
    loss: Callable[..., Any]


@functools.lru_cache(maxsize=64)
def _programs(task: Task) -> _Programs:
    """The compiled programs of a task; lists run over its weights."""
    import optax

    relaxation, optimizer = task.relaxation, task.relaxation.descent.transformation()

    def original(values: Sequence[Array]) -> list[Array]:
        return [
            as_dtype(layout.original(value), dtype)
            for value, layout, dtype in zip(values, task.layouts, task.dtypes, strict=True)
        ]

    def loss(values: Any, fixed: Any, inputs: Any, wanted: Any, said: Any) -> Array:
        found = task.network(original(values), fixed, inputs)
        return task.objective(found, wanted, *said).astype(jnp.float32)

    def gradient(
        variables: Any, targets: Any, fixed: Any, inputs: Any, wanted: Any, said: Any, progress: Any
    ) -> Any:
        def at(variables: Any) -> Array:
            pairs = zip(variables, targets, strict=True)
            values = [relaxation.relax(v, target, progress).value for v, target in pairs]
            return loss(values, fixed, inputs, wanted, said)

        if relaxation.descent.remat:
            at = jax.checkpoint(at, policy=jax.checkpoint_policies.dots_saveable)
        return jax.value_and_grad(at)(variables)

    def update(
        variables: Any, inner: Any, gradient: Any, targets: Any, unit: Unit, progress: Any
    ) -> Any:
        many = relaxation.descent.accumulate
        towards = [
            relaxation.direction(jax.tree.map(lambda x: x / many, g), v, target, unit, progress)
            for g, v, target in zip(gradient, variables, targets, strict=True)
        ]
        updates, inner = optimizer.update(towards, inner, variables)
        moved: Any = optax.apply_updates(variables, updates)
        moved = [relaxation.project(v, target) for v, target in zip(moved, targets, strict=True)]
        sizes = np.array([target.w.size for target in targets])
        shares = jnp.stack([
            jnp.mean(relaxation.relax(v, target, 1.0).rounded)
            for v, target in zip(moved, targets, strict=True)
        ])  # fmt: skip
        return moved, inner, jnp.sum(shares * (sizes / sizes.sum()))

    def nearest(targets: Any) -> Any:
        found = [_narrow(target.nearest(), target.params, target) for target in targets]
        squares = [
            jnp.mean((target.decode(codes) - target.w) ** 2)
            for (codes, _), target in zip(found, targets, strict=True)
        ]
        step = 12 * jnp.mean(jnp.stack(squares))
        return found, jnp.where(step > 0, step, 1.0)

    def start(targets: Any, keys: Any) -> Any:
        given = keys or [None] * len(targets)
        return [relaxation.start(target, key) for target, key in zip(targets, given, strict=True)]

    def harden(variables: Any, targets: Any) -> Any:
        pairs = zip(variables, targets, strict=True)
        return [_narrow(*relaxation.harden(v, target), target) for v, target in pairs]

    def values(rounded: Any, targets: Any) -> Any:
        pairs = zip(rounded, targets, strict=True)
        return [target.decode(codes.astype(jnp.int32), params) for (codes, params), target in pairs]

    return _Programs(
        optimizer,
        jax.jit(nearest),
        jax.jit(start),
        jax.jit(gradient),
        jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0),
        jax.jit(update, donate_argnums=(0, 1)),
        jax.jit(harden),
        jax.jit(values),
        jax.jit(loss),
    )


def _narrow(codes: Array, params: Params, target: Target) -> tuple[Array, Params]:
    """Codes as they are stored: candidates wait beside all else that is of the weights' size."""
    return codes.astype(code_dtype(target.grid)), params
