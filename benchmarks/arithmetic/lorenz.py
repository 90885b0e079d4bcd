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

State = Float[Array, "members variables"]
BETA = np.float64(8) / 3


def lorenz63(s: State) -> State:
    x, y, z = s[:, 0], s[:, 1], s[:, 2]
    beta = BETA.astype(s.dtype)
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - beta * z], 1)


def lorenz96(s: State) -> State:
    after, before, two = (jnp.roll(s, k, 1) for k in (-1, 1, 2))
    return (after - two) * before - s + 8


def step(tendency: Callable[[State], State], s: State, dt: float) -> State:
    """One Runge-Kutta step of the time units' length `dt`."""
    one = tendency(s)
    two = tendency(s + dt / 2 * one)
    three = tendency(s + dt / 2 * two)
    four = tendency(s + dt * three)
    return s + dt / 6 * (one + 2 * two + 2 * three + four)


def start(key: Array, members: int, variables: int = 3) -> State:
    """Members near one point, which chaos pulls apart."""
    place = jnp.array([1.0, 1.0, 25.0]) if variables == 3 else jnp.full(variables, 8.0)
    return place + jax.random.normal(key, (members, variables), place.dtype)


def integrate(
    tendency: Callable[[State], State], s: State, steps: int, every: int, dt: float = 0.01
) -> Float[Array, "records members variables"]:
    """The states after every so many steps."""

    def record(s: State, _: None) -> tuple[State, State]:
        s = lax.fori_loop(0, every, lambda _, s: step(tendency, s, dt), s)
        return s, s

    return lax.scan(record, s, None, length=steps // every)[1]
