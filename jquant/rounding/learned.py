"""A weight learned alone, on the second moment of its inputs: steps cost the same for any data.

    loss(W) = tr((W - W₀) H (W - W₀)ᵀ) / (tokens * out)

is the mean squared error of the weight's outputs, and its gradient takes one product with H,
however many tokens H was summed over. All steps are one compiled loop, with layers or experts side
by side. Every so often the weight is rounded and its loss taken; the best is returned, and nearest
rounding is the first candidate, so the result is never worse than it on this objective.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jquant import deprecated
from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.grids.base import Grid, GridParams, code_dtype
from jquant.grids.grouped import Grouped
from jquant.rounding.base import Rounded, mapped
from jquant.rounding.elementwise import importance_of, moment_for, second_moment
from jquant.rounding.relaxed import Relaxation, Target, Unit
from jquant.rounding.steps import Moving, Steps


class LearnedRounding(Relaxation, Protocol):
    """A relaxation that says what it needs; `__call__ = learn_alone` makes it a rounding."""

    @property
    def needs(self) -> frozenset[str]:
        """A subset of `{"moment", "key"}`."""
        ...


@deprecated.keywords("a rounding")
def learn_alone(
    self: LearnedRounding,
    w: Float[Array, "*batch out in"],
    grid: Grid,
    groups: Groups = Groups(),
    *,
    evidence: Evidence | Float[Array, "*batch in in"] | None = None,
    key: PRNGKeyArray | None = None,
) -> Rounded:
    """Round `w` on the squared error of its outputs; where no moment is needed, on its own.

    Returns:
        Codes and parameters, and in `info`, float32 `[*batch]`: `kept_at`, the step after which
        the codes were taken (0: nearest rounding), `rounded`, the share of weights within 0.01
        of a grid point at the end, and `diverged`, 1 if the loss was not finite at the end.

    Raises:
        EvidenceError: no evidence, or of another shape.
    """
    data_free, moment, count = "moment" not in self.needs, second_moment(evidence), None
    if moment is not None or not data_free:
        moment = moment_for(type(self).__name__, evidence, w.shape)
    if not data_free:
        count = jnp.ones(w.shape[:-2], jnp.float32)
        count = evidence.count if isinstance(evidence, Evidence) else count
    return _learn(self, w, moment, count, key, Grouped(grid, groups))


class _Best(NamedTuple):
    codes: Array
    params: GridParams
    loss: Array
    step: Array


@partial(jax.jit, static_argnames=("relaxation", "grid"))
def _learn(
    relaxation: Relaxation,
    w: Float[Array, "*batch out in"],
    moment: Float[Array, "*batch in in"] | None,
    count: Float[Array, "*batch"] | None,  # None: the loss is that of the weight
    key: PRNGKeyArray | None,
    grid: Grouped,
) -> Rounded:
    batch = w.shape[:-2]
    w, moment, count = jax.tree.map(lambda x: x.astype(jnp.float32), (w, moment, count))
    target = Target(w, grid.fit(w, importance_of(moment)), grid.grid, grid.groups)
    seen = None if moment is None or count is None else (moment, count)
    keys = None if key is None else jax.random.split(key, batch)
    best, info = mapped(partial(_one, relaxation), batch)(target, seen, keys)
    return Rounded(best.codes.astype(code_dtype(grid)), best.params, info)


def _one(
    relaxation: Relaxation,
    target: Target,
    seen: tuple[Float[Array, "in in"], Float[Array, ""]] | None,
    key: PRNGKeyArray | None,
) -> tuple[_Best, dict[str, Array]]:
    """One weight `[out, in]`."""
    descent, steps, w, targets = relaxation.descent, Steps(relaxation), target.w, [target]

    def loss(weights: list[Array], precision: Any = None) -> Float[Array, ""]:
        moved = weights[0] - w
        if seen is None:
            return jnp.mean(moved**2)
        moment, tokens = seen
        carried = jnp.matmul(moved, moment, precision=precision)
        return jnp.sum(carried * moved) / (jnp.maximum(tokens, 1.0) * w.shape[0])

    def candidate(codes: Integer[Array, "out in"], params: GridParams, at: Array) -> _Best:
        value = loss([target.decode(codes, params)], lax.Precision.HIGHEST)
        return _Best(codes, params, value, at)

    first = candidate(target.nearest(), target.params, jnp.zeros((), jnp.int32))
    square = 12 * jnp.mean((target.decode(first.codes) - w) ** 2)
    unit = Unit(_positive(first.loss), float(math.prod(w.shape)), _positive(square))

    def step(at: Array, state: tuple[Moving, Array]) -> tuple[Moving, Array]:
        moving, progress = state[0], at / descent.steps
        value, gradient = steps.gradient(loss, moving.variables, targets, progress)
        return steps.follow(gradient, moving, targets, unit, progress), value

    def look(
        carried: tuple[tuple[Moving, Array], _Best], between: tuple[Array, Array]
    ) -> tuple[tuple[tuple[Moving, Array], _Best], None]:
        state, best = carried
        state = lax.fori_loop(*between, step, state)
        ((codes, params),) = steps.harden(state[0].variables, targets)
        now = candidate(codes, params, between[1])
        better = now.loss < best.loss
        return (state, jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)), None

    variables = steps.start(targets, [key])
    looks = jnp.asarray((0, *descent.looks), jnp.int32)
    state = Moving(variables, descent.transformation().init(variables)), first.loss
    ((moving, last), best), _ = lax.scan(look, (state, first), (looks[:-1], looks[1:]))
    info = {
        "kept_at": best.step.astype(jnp.float32),
        "rounded": steps.rounded(moving.variables, targets)[0],
        "diverged": 1.0 - jnp.isfinite(last).astype(jnp.float32),
    }
    return best, info


def _positive(loss: Float[Array, ""]) -> Float[Array, ""]:
    """The loss, or 1 where there is nothing to lose."""
    return jnp.where(loss > 0, loss, 1.0)
