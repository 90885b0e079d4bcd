"""The compiled programs of a learning: a gradient, a step, a look; lists run over its weights.

One program computes the gradient on a batch and one takes the step, with the state donated;
whatever is sharded stays so, as all is elementwise but for the network itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jquant.axes.layout import Layout
from jquant.grids.base import code_dtype
from jquant.learning.objectives import Objective
from jquant.numerics.narrow import as_dtype
from jquant.rounding.relaxed import Relaxation, Unit
from jquant.rounding.steps import Steps


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


class Programs(NamedTuple):
    """What is run, compiled; see `programs_of`."""

    nearest: Callable[..., Any]
    start: Callable[..., Any]
    gradient: Callable[..., Any]
    add: Callable[..., Any]
    update: Callable[..., Any]
    harden: Callable[..., Any]
    values: Callable[..., Any]
    loss: Callable[..., Any]


@functools.lru_cache(maxsize=64)
def programs_of(task: Task) -> Programs:
    """The compiled programs of a task; lists run over its weights."""
    descent = task.relaxation.descent
    steps = Steps(task.relaxation, descent.remat)

    def loss(values: Any, fixed: Any, inputs: Any, reference: Any, more: Any) -> Array:
        weights = [
            as_dtype(layout.original(value), dtype)
            for value, layout, dtype in zip(values, task.layouts, task.dtypes, strict=True)
        ]
        outputs = task.network(weights, fixed, inputs)
        return task.objective(outputs, reference, *more).astype(jnp.float32)

    def gradient(variables: Any, targets: Any, fixed: Any, batch: Any, progress: Any) -> Any:
        return steps.gradient(
            lambda values: loss(values, fixed, *batch), variables, targets, progress
        )

    def update(gradient: Any, moving: Any, targets: Any, unit: Unit, progress: Any) -> Any:
        mean = jax.tree.map(lambda x: x / descent.accumulate, gradient)
        moving = steps.follow(mean, moving, targets, unit, progress)
        shares = jnp.stack([jnp.mean(one) for one in steps.rounded(moving.variables, targets)])
        sizes = jnp.asarray([target.w.size for target in targets], shares.dtype)
        return moving, jnp.sum(shares * (sizes / jnp.sum(sizes)))

    def nearest(targets: Any) -> Any:
        codes = [_narrow(target.nearest(), target) for target in targets]
        squares = [
            jnp.mean((target.decode(one) - target.w) ** 2)
            for one, target in zip(codes, targets, strict=True)
        ]
        square = 12 * jnp.mean(jnp.stack(squares))
        rounded = [(one, target.params) for one, target in zip(codes, targets, strict=True)]
        return rounded, jnp.where(square > 0, square, 1.0)

    def harden(variables: Any, targets: Any) -> Any:
        rounded = zip(steps.harden(variables, targets), targets, strict=True)
        return [(_narrow(codes, target), params) for (codes, params), target in rounded]

    def values(rounded: Any, targets: Any) -> Any:
        pairs = zip(rounded, targets, strict=True)
        return [target.decode(codes.astype(jnp.int32), params) for (codes, params), target in pairs]

    return Programs(
        jax.jit(nearest),
        jax.jit(steps.start),
        jax.jit(gradient),
        jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0),
        jax.jit(update, donate_argnums=1),
        jax.jit(harden),
        jax.jit(values),
        jax.jit(loss),
    )


def _narrow(codes: Array, target: Any) -> Array:
    """Codes as they are stored: candidates wait beside all else that is of the weights' size."""
    return codes.astype(code_dtype(target.grid))
