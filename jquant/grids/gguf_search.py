"""Which of the numbers a GGUF block can hold make the best grid for its weights.

Three things are looked for, each by the weighted error of nearest codes, and nothing is taken that
is not better than what was there before:

1. Of every group alone, a step and an offset: ranges that are narrower than the weights', each
   followed by the least squares of its codes (step and offset are linear where codes are fixed).
   Without an offset steps of both signs are tried, as there is one more code on one side.
2. Of every super-block, the float16 numbers that its groups share, near the largest group's.
3. With these, the integers of every group: those next to the best, scale and offset in turns, and
   then the float16 numbers again, by the least squares of all codes of the super-block.

Weights are `[*g, t, b]`: t groups that share float16 numbers, of b weights each. What is found of
a group is a pair of real numbers, a step and an offset `[*g, t]`; what a file holds is `Held`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jquant.grids.gguf_kinds import Kind
from jquant.grids.ranges import LEAST_SCALE, MSE
from jquant.numerics.powers import powered

_HALF = float(jnp.finfo(jnp.float16).max)
_LEAST = LEAST_SCALE["float16"]
# Heuristic: what the float16 scale of a super-block is tried at, relative to the one whose largest
# integer is the largest group's; more of them gain less than a hundredth of the error.
_UNITS = (1.0, 0.97, 0.94, 0.9, 1.04)
_ROUNDS = 2  # of step 3; a third gains less than a thousandth


class Affine(NamedTuple):
    """Steps and offsets of groups, float32 `[*g, t]`: `value = step * code - offset`."""

    step: Float[Array, "*g t"]
    offset: Float[Array, "*g t"]


class Held(NamedTuple):
    """What a super-block holds, all as float32: float16 numbers `[*g, 1]`, integers `[*g, t]`."""

    unit: Float[Array, "*g 1"]
    code: Float[Array, "*g t"]
    offset_unit: Float[Array, "*g 1"]
    offset_code: Float[Array, "*g t"]

    @property
    def affine(self) -> Affine:
        return Affine(self.unit * self.code, self.offset_unit * self.offset_code)


class Problem(NamedTuple):
    """Weights, what an error of each counts, and the type that is to hold them."""

    kind: Kind
    search: MSE
    w: Float[Array, "*g t b"]
    weight: Float[Array, "*g t b"]

    def codes(self, at: Affine) -> Float[Array, "*g t b"]:
        """The nearest codes."""
        step = jnp.where(at.step == 0, 1.0, at.step)
        return jnp.clip(
            jnp.round((self.w + at.offset[..., None]) / step[..., None]), *self.kind.codes
        )

    def loss(self, at: Affine) -> Float[Array, "*g t"]:
        """The weighted error of nearest codes; infinite where there is no number."""
        error = at.step[..., None] * self.codes(at) - at.offset[..., None] - self.w
        loss = jnp.sum(self.weight * powered(error, self.search.norm), -1)
        return jnp.where(jnp.isfinite(loss), loss, jnp.inf)

    def alone(self, start: Affine) -> Affine:
        """The best step and offset of every group, whatever the type can hold."""
        low = jnp.minimum(jnp.min(self.w, -1), 0.0 if self.kind.scale_codes else jnp.inf)
        high = jnp.maximum(jnp.max(self.w, -1), 0.0 if self.kind.scale_codes else -jnp.inf)
        top, steps = jnp.maximum(high, -low), 2.0**self.kind.bits - 1.0
        signs = (1.0,) if self.kind.has_offset else (1.0, -1.0)

        def try_one(i: Array, best: tuple[Array, Affine]) -> tuple[Array, Affine]:
            factor = 1.0 - jnp.asarray(i, jnp.float32) / self.search.resolution
            for sign in signs:
                if self.kind.has_offset:
                    at = Affine((high - low) * factor / steps, -low * factor)
                else:
                    at = Affine(sign * 2.0 * top * factor / steps, jnp.zeros_like(top))
                for one in (at, self.refit(at)):
                    best = better((self.loss(one), one), best)
            return best

        first = (self.loss(start), start)
        return lax.fori_loop(0, self.search.steps, try_one, first)[1]

    def refit(self, at: Affine) -> Affine:
        """The least squares of the codes at these; a group where there is none keeps its own."""
        code = self.codes(at)

        def total(x: Array) -> Array:
            return jnp.sum(self.weight * x, -1)

        first, second, cross = total(code), total(code * code), total(code * self.w)
        plain = _ratio(cross, second)
        if not self.kind.has_offset:
            return Affine(jnp.where(second > 0, plain, at.step), at.offset)
        one, sums = total(jnp.ones_like(self.w)), total(self.w)
        step = _ratio(one * cross - first * sums, one * second - first * first)
        offset = _ratio(step * first - sums, one)
        if self.kind.scale_codes:  # no file has negative ones
            step = jnp.where(offset < 0, plain, step)
            offset = jnp.maximum(offset, 0.0)
        fine = step > 0
        return Affine(jnp.where(fine, step, at.step), jnp.where(fine, offset, at.offset))

    def together(self, held: Held) -> Held:
        """The float16 numbers by the least squares of all codes of a super-block."""
        code, held_code = self.codes(held.affine), held.code[..., None]
        x, y = held_code * code, -held.offset_code[..., None] * jnp.ones_like(code)

        def total(a: Array) -> Array:
            return jnp.sum(self.weight * a, (-2, -1))[..., None]

        xx, xy, yy, xw, yw = (
            total(x * x),
            total(x * y),
            total(y * y),
            total(x * self.w),
            total(y * self.w),
        )
        alone = _ratio(xw, xx)
        if not self.kind.has_offset:
            return held._replace(unit=_half(alone))
        bottom = xx * yy - xy * xy
        both = bottom > 1e-6 * xx * yy
        unit = jnp.where(both, _ratio(yy * xw - xy * yw, bottom), alone)
        offset = jnp.where(both, _ratio(xx * yw - xy * xw, bottom), held.offset_unit)
        return held._replace(unit=_half(unit), offset_unit=_half(offset))


def better(one: tuple[Array, Any], other: tuple[Array, Any]) -> tuple[Array, Any]:
    """`one` where its loss is less, else `other`; losses `[…]`, all else `[…]` too."""
    first = one[0] < other[0]
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), one, other)


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def _half(x: Array) -> Array:
    """As a positive float16 number."""
    return jnp.clip(x, _LEAST, _HALF).astype(jnp.float16).astype(jnp.float32)


def best_pair(problem: Problem, start: Affine) -> Affine:
    """Of a type whose scales are float16 numbers, the best steps and offsets it can hold."""

    def stored(at: Affine) -> Affine:
        return jax.tree.map(lambda x: jnp.clip(x, -_HALF, _HALF).astype(jnp.float16), at)

    kept = jax.tree.map(lambda x: x.astype(jnp.float32), stored(problem.alone(start)))
    fine = jnp.abs(kept.step) >= _LEAST
    loss = jnp.where(fine, problem.loss(kept), jnp.inf)
    return better((loss, kept), (problem.loss(start), start))[1]


def best_levels(problem: Problem, start: Held) -> Held:
    """Of a type of two levels, the best numbers that super-blocks can hold."""
    kind = problem.kind
    assert kind.scale_codes is not None
    most = float(kind.scale_codes[1])
    ideal = problem.alone(start.affine)
    top = jnp.max(jnp.abs(ideal.step), -1, keepdims=True) / most
    offset_top = jnp.max(ideal.offset, -1, keepdims=True) / most

    def loss(held: Held) -> Array:
        """Of whole super-blocks, `[*g, 1]`."""
        return jnp.sum(problem.loss(held.affine), -1, keepdims=True)

    def integers(x: Array, unit: Array) -> Array:
        """Of steps: never zero, and of both signs where the type has both."""
        code = jnp.clip(jnp.round(x / unit), 0.0 if kind.has_offset else -most, most)
        return jnp.where(code == 0, 1.0, code)

    def improve(_: Array, now: tuple[Array, Held]) -> tuple[Array, Held]:
        held = _nudged(problem, now[1], "code", 1.0 if kind.has_offset else -most, most)
        if kind.has_offset:
            held = _nudged(problem, held, "offset_code", 0.0, most)
        refitted = problem.together(held)
        return better((loss(refitted), refitted), (loss(held), held))

    def try_one(i: Array, best: tuple[Array, Held]) -> tuple[Array, Held]:
        unit = _half(top * jnp.take(jnp.asarray(_UNITS, jnp.float32), i))
        offset_unit = _half(offset_top)
        offsets = jnp.clip(jnp.round(ideal.offset / offset_unit), 0.0, most)
        held = Held(unit, integers(ideal.step, unit), offset_unit, offsets)
        return better(lax.fori_loop(0, _ROUNDS, improve, (loss(held), held)), best)

    return lax.fori_loop(0, len(_UNITS), try_one, (loss(start), start))[1]


def _nudged(problem: Problem, held: Held, name: str, least: float, most: float) -> Held:
    """With each group's integer of this name one more or one less, where that is better."""

    def of(code: Array) -> tuple[Array, Array]:
        code = jnp.clip(jnp.where(code == 0, least, code), least, most)
        return problem.loss(held._replace(**{name: code}).affine), code

    now = getattr(held, name)
    best = problem.loss(held.affine), now
    for change in (-1.0, 1.0):
        best = better(of(now + change), best)
    return held._replace(**{name: best[1]})
