"""Wind-driven shallow water over a ridge: a model of many operations, in a channel.

    u_t = q V - B_x + F / h - c |u| u / h - ν ∇⁴u        q = (f + v_x - u_y) / h
    v_t = -q U - B_y - c |u| v / h - ν ∇⁴v               B = g η + (u² + v²) / 2
    η_t = -U_x - V_y,   U = h u,  V = h v,  h = H + η - ridge

on Arakawa's C-grid, periodic in x, walls without slip in y, in the vector-invariant form that
conserves potential enstrophy (Sadourny 1975), by the classical Runge-Kutta scheme. Settings are
those of ShallowWaters.jl's ridge in a channel, on a coarser grid; the ridge's profile is ours.
Differences are never divided by a distance: Δt / Δ is multiplied once.

Arrays: η and u `[ny, nx]` (cell centres, their western faces), v `[ny - 1, nx]` (inner northern
faces).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

NX, NY, LX, LY = 64, 32, 2000e3, 1000e3
DELTA = LX / NX
G, DEPTH, RIDGE, WIDTH = 10.0, 500.0, 50.0, 300e3
DT = float(np.floor(0.9 * DELTA / np.sqrt(G * DEPTH)))
WIND, DENSITY, DRAG = 0.12, 1000.0, 1e-5
VISCOSITY = 500.0 * DELTA / 30e3  # times Δ²: of the biharmonic operator
F0, BETA = 2 * 7.2921e-5 * np.sin(np.pi / 4), 2 * 7.2921e-5 * np.cos(np.pi / 4) / 6.371e6
STEPS_PER_DAY = round(86400 / DT)


class Flow(NamedTuple):
    """Velocities in m/s, surface in m."""

    u: Float[Array, "ny nx"]
    v: Float[Array, "ny-1 nx"]
    eta: Float[Array, "ny nx"]


def _y(faces: bool) -> np.ndarray:
    at = np.arange(NY + 1) if faces else np.arange(NY) + 0.5
    return at[:, None] * DELTA


# Constants of the program: what has the unit of a time is multiplied by the step beforehand.
CORIOLIS = (F0 + BETA * (_y(True) - LY / 2)) * DT
FORCING = WIND * np.cos(np.pi * (_y(False) / LY - 0.5)) ** 2 / DENSITY * DT
GROUND = RIDGE * np.exp(-(((np.arange(NX) + 0.5) * DELTA - LX / 2) ** 2) / (2 * (WIDTH / 4) ** 2))
RATIO = DT / DELTA


def rest() -> Flow:
    dtype = jnp.zeros(()).dtype
    return Flow(*(jnp.zeros((n, NX), dtype) for n in (NY, NY - 1, NY)))


def _east(a: Array) -> Array:
    return jnp.roll(a, -1, 1)


def _west(a: Array) -> Array:
    return jnp.roll(a, 1, 1)


def _walls(a: Array, factor: float) -> Array:
    """With a row beyond each wall: `factor` times the nearest one."""
    return jnp.concatenate([factor * a[:1], a, factor * a[-1:]])


def _laplacian(a: Array, factor: float) -> Array:
    wide = _walls(a, factor)
    return wide[2:] + wide[:-2] + _east(a) + _west(a) - 4 * a


def increments(flow: Flow) -> Flow:
    """What a step of forward Euler adds: tendencies times Δt."""
    u, v, eta = flow
    kind = u.dtype
    f, wind, ground = (jnp.asarray(a, kind) for a in (CORIOLIS, FORCING, GROUND[None]))
    h = eta + (DEPTH - ground)
    h_u, h_v = (h + _west(h)) / 2, (h[1:] + h[:-1]) / 2
    flux_u = h_u * u
    flux_v = jnp.pad(h_v * v, ((1, 1), (0, 0)))  # none through walls
    v_all = jnp.pad(v, ((1, 1), (0, 0)))

    slip = _walls(u, -1.0)
    vorticity = RATIO * ((v_all - _west(v_all)) - (slip[1:] - slip[:-1]))
    h_corner = _walls(h_u, 1.0)
    q = (f + vorticity) / ((h_corner[1:] + h_corner[:-1]) / 2)
    square_u, square_v = u * u, v_all * v_all
    bernoulli = G * eta + ((square_u + _east(square_u)) + (square_v[1:] + square_v[:-1])) / 4

    across = flux_v + _west(flux_v)
    du = (q[1:] + q[:-1]) / 2 * ((across[1:] + across[:-1]) / 4)
    along = flux_u + _east(flux_u)
    dv = -((q + _east(q)) / 2)[1:-1] * ((along[1:] + along[:-1]) / 4)
    du = du - RATIO * (bernoulli - _west(bernoulli))
    dv = dv - RATIO * (bernoulli[1:] - bernoulli[:-1])

    speed = jnp.sqrt((square_u + _east(square_u)) / 2 + (square_v[1:] + square_v[:-1]) / 2)
    brake = DRAG * DT * speed / h
    du = du + wind / h_u - (brake + _west(brake)) / 2 * u
    dv = dv - (brake[1:] + brake[:-1]) / 2 * v

    smooth = VISCOSITY * RATIO / DELTA
    du = du - smooth * _laplacian(_laplacian(u, -1.0), -1.0)
    dv = dv - smooth * _laplacian(_laplacian(v, 0.0), 0.0)
    deta = -RATIO * ((_east(flux_u) - flux_u) + (flux_v[1:] - flux_v[:-1]))
    return Flow(du, dv, deta)


def _add(flow: Flow, factor: float, change: Flow) -> Flow:
    return Flow(*(a + factor * b for a, b in zip(flow, change, strict=True)))


def step(flow: Flow) -> Flow:
    one = increments(flow)
    two = increments(_add(flow, 0.5, one))
    three = increments(_add(flow, 0.5, two))
    four = increments(_add(flow, 1.0, three))
    middle = _add(two, 1.0, three)
    return _add(flow, 1 / 6, _add(_add(one, 2.0, middle), 1.0, four))


def integrate(flow: Flow, records: int, every: int = STEPS_PER_DAY) -> Flow:
    """The flow after every so many steps, along a first axis; the default is a day."""

    def record(flow: Flow, _: None) -> tuple[Flow, Flow]:
        flow = lax.fori_loop(0, every, lambda _, flow: step(flow), flow)
        return flow, flow

    return lax.scan(record, flow, None, length=records)[1]
