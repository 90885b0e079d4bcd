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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jquant.axes.groups import Blocks
from jquant.calibration.evidence import Evidence
from jquant.grids.base import Grid, Params, code_dtype
from jquant.grids.grouped import Grouped
from jquant.rounding.base import Rounded
from jquant.rounding.elementwise import importance_of, moment_for, second_moment
from jquant.rounding.relaxed import Relaxation, Target, Unit, Variables


class Learned:
    """What makes a relaxation a rounding: called with a weight, it descends the loss above.

    A rounding whose `needs` have no `"moment"` descends it with the identity for H.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"moment"})

    def __call__(
        self,
        w: Float[Array, "*batch out in"],
        grid: Grid,
        blocks: Blocks = Blocks(),
        *,
        evidence: Evidence | Float[Array, "*batch in in"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Rounded:
        """Round `w` on the squared error of its outputs.

        Returns:
            Codes and parameters, and in `info`, float32 `[*batch]`: `kept_at`, the step after which
            the codes were taken (0: nearest rounding), `rounded`, the share of weights within 0.01
            of a grid point at the end, and `diverged`, 1 if the loss was not finite at the end.

        Raises:
            EvidenceError: no evidence, or of another shape.
        """
        assert isinstance(self, Relaxation)
        data_free, moment = "moment" not in self.needs, second_moment(evidence)
        if moment is not None or not data_free:
            moment = moment_for(type(self).__name__, evidence, w.shape)
        one = jnp.ones(w.shape[:-2], jnp.float32)
        count = evidence.count if isinstance(evidence, Evidence) else one
        return _learn(self, w, moment, count, key, grid, blocks, data_free)


class _Best(NamedTuple):
    codes: Array
    params: Params
    loss: Array
    step: Array


@partial(jax.jit, static_argnames=("relaxation", "grid", "blocks", "data_free"))
def _learn(
    relaxation: Relaxation,
    w: Float[Array, "*batch out in"],
    moment: Float[Array, "*batch in in"] | None,
    count: Float[Array, "*batch"],
    key: PRNGKeyArray | None,
    grid: Grid,
    blocks: Blocks,
    data_free: bool,
) -> Rounded:
    batch = w.shape[:-2]
    w = w.astype(jnp.float32)
    params = Grouped(grid, blocks).fit(w, importance_of(moment))
    target = Target(w, params, grid, blocks)
    seen = None if moment is None or data_free else (moment, count)
    keys = None if key is None else jax.random.split(key, batch)
    run = partial(_one, relaxation)
    for _ in batch:
        run = jax.vmap(run)
    best, info = run(target, seen, keys)
    return Rounded(best.codes.astype(code_dtype(grid)), best.params, info)


def _one(
    relaxation: Relaxation,
    target: Target,
    seen: tuple[Float[Array, "in in"], Float[Array, ""]] | None,
    key: PRNGKeyArray | None,
) -> tuple[_Best, dict[str, Array]]:
    """One weight `[out, in]`."""
    import optax

    descent, w = relaxation.descent, target.w

    def loss(value: Float[Array, "out in"], precision: Any = None) -> Float[Array, ""]:
        moved = value - w
        if seen is None:
            return jnp.mean(moved**2)
        moment, tokens = seen
        carried = jnp.matmul(moved, moment, precision=precision)
        return jnp.sum(carried * moved) / (jnp.maximum(tokens, 1.0) * w.shape[0])

    def of_codes(codes: Integer[Array, "out in"], params: Params) -> Float[Array, ""]:
        return loss(target.decode(codes, params), lax.Precision.HIGHEST)

    nearest = target.nearest()
    first = _Best(
        nearest, target.params, of_codes(nearest, target.params), jnp.zeros((), jnp.int32)
    )
    step = 12 * jnp.mean((target.decode(nearest) - w) ** 2)
    unit = Unit(_positive(first.loss), float(math.prod(w.shape)), _positive(step))
    optimizer = descent.transformation()

    def move(at: Array, state: tuple[Variables, Any, Array]) -> tuple[Variables, Any, Array]:
        variables, inner, _ = state
        progress = at / descent.steps
        value, gradient = jax.value_and_grad(
            lambda v: loss(relaxation.relax(v, target, progress).value)
        )(variables)
        towards = relaxation.direction(gradient, variables, target, unit, progress)
        updates, inner = optimizer.update(towards, inner, variables)
        moved: Any = optax.apply_updates(variables, updates)
        return relaxation.project(moved, target), inner, value

    def look(
        carried: tuple[Any, _Best], between: tuple[Array, Array]
    ) -> tuple[tuple[Any, _Best], None]:
        state, best = carried
        state = lax.fori_loop(*between, move, state)
        codes, params = relaxation.harden(state[0], target)
        now = _Best(codes, params, of_codes(codes, params), between[1])
        better = now.loss < best.loss
        return (state, jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)), None

    variables = relaxation.start(target, key)
    looks = jnp.asarray((0, *descent.looks), jnp.int32)
    state = variables, optimizer.init(variables), first.loss
    (state, best), _ = lax.scan(look, (state, first), (looks[:-1], looks[1:]))
    info = {
        "kept_at": best.step.astype(jnp.float32),
        "rounded": relaxation.relax(state[0], target, 1.0).rounded,
        "diverged": 1.0 - jnp.isfinite(state[2]).astype(jnp.float32),
    }
    return best, info


def _positive(loss: Float[Array, ""]) -> Float[Array, ""]:
    """The loss, or 1 where there is nothing to lose."""
    return jnp.where(loss > 0, loss, 1.0)
