"""Step and zero point of a group searched together, as far apart from its extremes as pays.

`MSE` makes a range narrower and leaves its zero point where it was. Here the two are free of each
other: for each of some steps, from an eighth of the range's own to half above it, zero points are
tried between the one that covers the range and the one that centers the mean; then steps and
zero points around the best, twice as fine each round. What may be tried is the convention's to say:
codes (A1, A2), any whole number (A3), any number at all (A4), none (S1 ...), steps of both signs
(S4). All are compared by `Σ importance * |error| ** norm` under nearest rounding, and a group whose
best is no better than its range as it is keeps that.

With a zero point between codes and norm 2 this is NeUQI's problem (Lin, Hu and Wan 2025). There the
zero point is exact at last: with the step held, the loss is a parabola in it between the points
where a weight changes its code. All such points within a code of the best are sorted, and the least
of all parabolas is taken (`best_zero`).

Nothing is laid out over candidates: they are gone through in a loop, whose memory is that of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jquant.grids.base import Grid, GridParams, nearest
from jquant.numerics import require
from jquant.numerics.powers import powered

# Heuristic. With more steps, more of them around the best, and more zero points, losses of normal
# and Student's t weights were lower by less than a hundredth.
_WIDEST, _NARROWEST = 1.5, 0.125
_FINE = 12
_ROUNDS = 2
_AT_ONCE = 2**18  # weights whose turns are sorted together


@jax.tree_util.register_static
@dataclass(frozen=True)
class Joint:
    """Range and zero point of a group are searched together, and may exceed the weights' range.

    For `Uniform`, of any convention: zero points are codes by default (`"A1"`), or between codes
    with `"A4"`, which is NeUQI's search. Best by the sum of `importance * |error| ** norm` under
    nearest rounding, and never worse than `MinMax` in that measure.

    Args:
        norm: at least 1; 2 (default) is what nearest rounding leaves, a larger one clips less.
        steps: how many steps are tried at first. Default: heuristic.
        zeros: how many zero points with each; of zero points between codes twice as many. Default:
            heuristic.

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> from jquant.grids import Uniform
        >>> w = jnp.array([[-1.0, -0.9, -1.1, 0.1, 0.9, 1.0, 1.1, 1.9]])
        >>> between = Uniform(2, convention="A4", range=Joint()).fit(w)
        >>> round(float(between["scale"][0]), 1), round(float(between["zero"][0]), 1)
        (1.0, 1.0)

    References:
        Lin, Hu and Wan, NeUQI: Near-Optimal Uniform Quantization Parameter Initialization for
        Low-Bit LLMs, 2025, https://arxiv.org/abs/2505.17595
    """

    norm: float = 2.0
    steps: int = 24
    zeros: int = 6

    def __post_init__(self) -> None:
        require.integer("Joint.steps", self.steps, 2, 4096)
        require.integer("Joint.zeros", self.zeros, 1, 4096)
        if not 1 <= self.norm < float("inf"):
            raise ValueError(f"Joint.norm must be a number of at least 1, got {self.norm!r}")

    @property
    def papers(self) -> tuple[str, ...]:
        return ("lin2025neuqi",)


class Space(NamedTuple):
    """What may be searched in groups `[*g]`, in units of the step of their range.

    Attributes:
        step: of the range as it is, above zero.
        middle: of the range.
        codes: the smallest and the largest.
        zeros: which zero points there are: the codes, all whole numbers, all numbers, or one.
        fixed: that one.
        signs: of steps.
    """

    step: Float[Array, "*g"]
    middle: Float[Array, "*g"]
    codes: tuple[int, int]
    zeros: Literal["code", "any", "real", "none"]
    fixed: float
    signs: tuple[float, ...]

    def allowed(self, zero: Float[Array, "*g"]) -> Float[Array, "*g"]:
        """The zero point nearest to these that there is."""
        if self.zeros == "none":
            return jnp.full_like(zero, self.fixed)
        if self.zeros == "real":
            return zero
        zero = jnp.round(zero)
        return jnp.clip(zero, *self.codes) if self.zeros == "code" else zero


class _Best(NamedTuple):
    """The best so far of every group; steps and zero points in units, see `Space`."""

    loss: Float[Array, "*g"]
    step: Float[Array, "*g"]
    zero: Float[Array, "*g"]


def best_pair(
    search: Joint,
    w: Float[Array, "*g b"],
    importance: Float[Array, "*#g #b"] | None,
    space: Space,
) -> tuple[Float[Array, "*g"], Float[Array, "*g"]]:
    """The step and zero point of each group that `search` finds best, float32, not yet as stored.

    Args:
        search: the choice.
        w: float32 groups of weights.
        importance: weighs the errors; None for all alike.
        space: what there is to try.
    """
    x = w / space.step[..., None]
    weight = _shares(importance, x)
    mean = jnp.sum(weight * x, axis=-1)
    first, last = space.codes

    def tried(best: _Best, step: Array, zero: Array) -> _Best:
        zero = space.allowed(zero)
        code = jnp.clip(jnp.round(x / step[..., None] + zero[..., None]), first, last)
        error = x - step[..., None] * (code - zero[..., None])
        now = _Best(jnp.sum(weight * powered(error, search.norm), axis=-1), step, zero)
        return jax.tree.map(lambda a, b: jnp.where(now.loss < best.loss, a, b), now, best)

    many = {"none": 1, "real": 2 * search.zeros}.get(space.zeros, search.zeros)
    ratio = (_NARROWEST / _WIDEST) ** (1 / (search.steps - 1))

    def coarse(i: Array, best: _Best) -> _Best:
        step, at = jnp.float32(_WIDEST) * jnp.float32(ratio) ** (i // many), i % many
        covers, centers = ((first + last) / 2 - x / step for x in (space.middle, mean))
        low, high = jnp.minimum(covers, centers) - 1.0, jnp.maximum(covers, centers) + 1.0
        zero = low + (high - low) * (at + jnp.float32(0.5)) / many
        for sign in space.signs:
            best = tried(best, jnp.full_like(zero, sign) * step, zero)
        return best

    one = jnp.ones_like(space.step)
    best = _Best(jnp.full_like(one, jnp.inf), one, space.allowed(jnp.zeros_like(one)))
    best = lax.fori_loop(0, search.steps * many, coarse, best)
    beside = 1 if space.zeros == "none" else 3
    for finer in range(_ROUNDS):
        start, reach = best, ratio ** (0.25**finer)
        apart = jnp.float32(0.25 / 3**finer if space.zeros == "real" else 1.0)

        def fine(i: Array, best: _Best, start=start, reach=reach, apart=apart) -> _Best:
            power = 2 * (i // beside + jnp.float32(0.5)) / _FINE - 1
            zero = start.zero + (i % beside - beside // 2) * apart
            return tried(best, start.step * jnp.float32(reach) ** power, zero)

        best = lax.fori_loop(0, _FINE * beside, fine, start)
    zero = best.zero
    if space.zeros == "real" and search.norm == 2:
        zero = best_zero(x / best.step[..., None], weight, zero, space.codes)
    return best.step * space.step, zero


def best_zero(
    x: Float[Array, "*g b"],
    weight: Float[Array, "*#g #b"],
    zero: Float[Array, "*g"],
    codes: tuple[int, int],
) -> Float[Array, "*g"]:
    """Of all zero points within a code of `zero`, the one with the least squared error.

    Args:
        x: weights divided by the step of their group, float32.
        weight: of the errors, with a sum of one in each group.
        zero: where to look.
        codes: the smallest and the largest.
    """
    shape, size = zero.shape, x.shape[-1]
    groups = (x.reshape(-1, size), jnp.broadcast_to(weight, x.shape).reshape(-1, size))
    one = partial(_best_zero, codes=codes)
    many = max(_AT_ONCE // max(size, 1), 1)
    return lax.map(lambda group: one(*group), (*groups, zero.ravel()), batch_size=many).reshape(
        shape
    )


def _best_zero(
    x: Float[Array, " b"],
    weight: Float[Array, " b"],
    zero: Float[Array, ""],
    codes: tuple[int, int],
) -> Float[Array, ""]:
    """Of one group, see `best_zero`."""
    # From one code below upwards by t, at most 2: a weight's code rises by one at `turn`, and again
    # at `turn + 1`. Between turns the loss is t² + 2 slope t + level.
    position = x + (zero - 1.0)
    below = jnp.ceil(position - 0.5)  # the code before the first turn, were there no end to codes
    code = jnp.concatenate([below, below + 1.0])
    position, weight = jnp.concatenate([position] * 2), jnp.concatenate([weight] * 2)
    inside = (code >= codes[0]) & (code < codes[1])
    turn = jnp.where(inside, code + 0.5 - position, 2.0)
    fall = jnp.where(inside, weight, 0.0)
    turn, fall, rise = lax.sort((turn, fall, fall * (1.0 - 2.0 * (position - code))), num_keys=1)
    error = (position - jnp.clip(code, *codes))[: x.shape[0]]
    parts = weight[: x.shape[0]] * error
    none, two = jnp.zeros(1, jnp.float32), jnp.full(1, 2.0, jnp.float32)
    slope = jnp.sum(parts) - jnp.concatenate([none, jnp.cumsum(fall)])
    level = jnp.sum(parts * error) + jnp.concatenate([none, jnp.cumsum(rise)])
    at = jnp.clip(-slope, jnp.concatenate([none, turn]), jnp.concatenate([turn, two]))
    return zero - 1.0 + at[jnp.argmin((at + 2.0 * slope) * at + level)]


def better(
    search: Joint,
    grid: Grid,
    w: Float[Array, "*g b"],
    importance: Float[Array, "*#g #b"] | None,
    pairs: tuple[GridParams, GridParams],
) -> GridParams:
    """The first of two parameters of each group where its loss is less, else the second."""
    # Errors count in units of the group's largest weight, so that their powers stay numbers.
    unit = jnp.max(jnp.abs(w), axis=-1, keepdims=True, initial=0.0)
    weight = _shares(importance, w)

    def loss(params: GridParams) -> Float[Array, "*g"]:
        error = (w - grid.decode(nearest(grid, w, params), params)) / jnp.where(unit > 0, unit, 1.0)
        return jnp.sum(weight * powered(error, search.norm), axis=-1)

    first = loss(pairs[0]) < loss(pairs[1])
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), *pairs)


def _shares(
    importance: Float[Array, "*#g #b"] | None, like: Float[Array, "*g b"]
) -> Float[Array, "*#g #b"]:
    """What an error of each weight counts, with a sum of one; all alike where none counts."""
    share = jnp.ones(like.shape[-1:], jnp.float32)
    if importance is not None:
        share = jnp.broadcast_to(
            importance.astype(jnp.float32), (*importance.shape[:-1], like.shape[-1])
        )
        top = jnp.max(share, axis=-1, keepdims=True, initial=0.0)
        share = jnp.where(top > 0, share / jnp.where(top > 0, top, 1.0), 1.0)
    return share / jnp.sum(share, axis=-1, keepdims=True)
