"""Lorenz's attractors: where rounding to nearest makes a strange attractor a short cycle.

    1963    x' = 10 (y - x)    y' = x (28 - z) - y    z' = x y - 8/3 z
    1996    x_k' = (x_{k+1} - x_{k-2}) x_{k-1} - x_k + 8,    40 of them in a ring

by the classical Runge-Kutta scheme. With few bits there are few states, a deterministic orbit comes
back to one of its own and repeats from there; at random it does not. Steps and ensembles are ours,
not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

State = tuple[Float[Array, "*members"], ...]  # the variables, one array each; 1996 one for all
BETA = np.float64(8) / 3


def lorenz63(s: State) -> State:
    x, y, z = s
    beta = BETA.astype(x.dtype)
    return 10 * (y - x), x * (28 - z) - y, x * y - beta * z


def lorenz96(s: State) -> State:
    """Arrays `[members, 40]`."""
    after, before, two = (jnp.roll(s[0], k, 1) for k in (-1, 1, 2))
    return ((after - two) * before - s[0] + 8,)


def _add(s: State, factor: float, change: State) -> State:
    return tuple(a + factor * b for a, b in zip(s, change, strict=True))


def step(tendency: Callable[[State], State], s: State, dt: float) -> State:
    """One Runge-Kutta step of the time units' length `dt`."""
    one = tendency(s)
    two = tendency(_add(s, dt / 2, one))
    three = tendency(_add(s, dt / 2, two))
    four = tendency(_add(s, dt, three))
    total = tuple(a + 2 * b + 2 * c + d for a, b, c, d in zip(one, two, three, four, strict=True))
    return _add(s, dt / 6, total)


def start(key: Array, members: int) -> State:
    """Members near one point of 1963, which chaos pulls apart."""
    x, y, z = jax.random.normal(key, (3, members), jnp.zeros(()).dtype)
    return 1 + x, 1 + y, 25 + z


def start96(key: Array, members: int) -> State:
    return (8 + jax.random.normal(key, (members, 40), jnp.zeros(()).dtype),)


def integrate(
    tendency: Callable[[State], State], s: State, steps: int, every: int, dt: float = 0.01
) -> State:
    """The states after every so many steps, along a first axis."""

    def record(s: State, _: None) -> tuple[State, State]:
        s = lax.fori_loop(0, every, lambda _, s: step(tendency, s, dt), s)
        return s, s

    return lax.scan(record, s, None, length=steps // every)[1]
