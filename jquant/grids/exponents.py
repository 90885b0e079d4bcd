"""The exponent of a power grid, found from the weights alone: a proxy, then the true error.

For fine grids of exponent a the squared error is near `m² / 12 K² · E[(|w| / m) ** (2 - 2a)] / a²`.
It does not depend on the bits, and as its logarithm is convex in a it has one minimum up to a = 1;
golden sections find it. At few bits the true error is another and may have bumps, so golden
sections of that, near the proxy's best, decide, and `a = 1` (a uniform grid) if it is no worse.
All is elementwise over groups, or over sums of groups that share an exponent, and takes a fixed
number of steps.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jquant.grids.base import Grid, nearest

# Exponents that are searched: those of heavy tails to a little beyond uniform, as NUPES bounds them
# (heuristic).
SEARCHED = (0.2, 1.2)
# Golden sections, and how far from the proxy's best the error is searched (heuristic): the last
# section is 0.4 * 0.618**9 = 0.005 wide.
STEPS, REACH = 9, 0.2

Loss = Callable[[Float[Array, "*#g"]], Float[Array, "*#g"]]


def power(x: Float[Array, "*n"], exponent: Array | float) -> Float[Array, "*n"]:
    """`x ** exponent` for x >= 0, with derivatives that are finite everywhere: those at 0 are 0."""
    positive = x > 0
    if isinstance(exponent, jax.Array):  # `[*#g, 1]`, and one for all has fewer axes
        exponent = lax.expand_dims(exponent, range(x.ndim - exponent.ndim))
    return jnp.where(positive, jnp.exp(exponent * jnp.log(jnp.where(positive, x, 1.0))), 0.0)


def losses(
    grid: Grid, u: Float[Array, "*g b"], importance: Float[Array, "*#g #b"] | None
) -> tuple[Loss, Loss]:
    """The proxy and the squared error as functions of an exponent, of groups whose m is 1."""
    weight = jnp.float32(1.0) if importance is None else importance.astype(jnp.float32)

    def proxy(a: Float[Array, "*#g"]) -> Float[Array, "*g"]:
        return jnp.sum(weight * power(jnp.abs(u), 2.0 - 2.0 * a[..., None]), axis=-1) / a**2

    def error(a: Float[Array, "*#g"]) -> Float[Array, "*g"]:
        params = {"scale": jnp.ones(u.shape[:-1], jnp.float32), "exponent": a.astype(jnp.float16)}
        miss = u - grid.decode(nearest(grid, u, params), params)
        return jnp.sum(weight * miss**2, axis=-1)

    return proxy, error


def summed(loss: Loss, share: Float[Array, "*g"], axes: tuple[int, ...] | None = None) -> Loss:
    """A loss of groups as one of all groups along `axes` (kept, of size one) or of all (a scalar).

    `share` says how much of the sum a unit of each group's loss is.
    """
    return lambda a: jnp.sum(share * loss(a), axis=axes, keepdims=axes is not None)


def golden(loss: Loss, low: Array, high: Array) -> tuple[Array, Array]:
    """The best point that golden sections of `[low, high]` come by, elementwise, and its loss."""
    ratio = (5**0.5 - 1) / 2

    def step(_: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, a, b, at_a, at_b = state
        left = at_a < at_b
        low, high = jnp.where(left, low, a), jnp.where(left, b, high)
        new = jnp.where(left, high - ratio * (high - low), low + ratio * (high - low))
        at_new = loss(new)
        return (
            low, high,
            jnp.where(left, new, b), jnp.where(left, a, new),
            jnp.where(left, at_new, at_b), jnp.where(left, at_a, at_new),
        )  # fmt: skip

    a, b = high - ratio * (high - low), low + ratio * (high - low)
    _, _, a, b, at_a, at_b = lax.fori_loop(0, STEPS, step, (low, high, a, b, loss(a), loss(b)))
    return jnp.where(at_a < at_b, a, b), jnp.minimum(at_a, at_b)


def best_exponent(proxy: Loss, error: Loss) -> Float[Array, "*#g"]:
    """The exponent of least error near the proxy's best, or 1 if that is no worse; float16."""
    uniform = error(jnp.float32(1.0))
    low, one, high = (jnp.full_like(uniform, a) for a in (SEARCHED[0], 1.0, SEARCHED[1]))
    start, _ = golden(proxy, low, one)
    best, least = golden(error, jnp.maximum(start - REACH, low), jnp.minimum(start + REACH, high))
    return jnp.where(least < uniform, best, one).astype(jnp.float16)
