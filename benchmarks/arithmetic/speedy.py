"""A real atmosphere in low precision: SPEEDY's physics at T31, as the package `jcm` has it in JAX.

`jcm` (Python ≥ 3.11, JAX 0.10) is a climate model that knows nothing of formats: spectral dynamics
of `dinosaur`, 96 × 48 points, 8 levels, half-hour steps, the orography and sea temperatures of
SPEEDY. `jq.emulate` runs a day of it with every operation rounded, at any number of bits by one
compiled program. Compared are, per grid point, six-hour means over some days: precipitation,
temperature of the lowest layer and eastward wind half-way up. Runs in double precision from the
weather of other days give the band. In its own environment:

    pip install -e '.[speedy]'
    python -m benchmarks.arithmetic.run speedy

A run lasts as many days as processor time allows, some forty: long enough that a start is
forgotten, so that runs are judged by their distance to double ones from other starts. The paper's
are ten years each.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jquant as jq

KEY = jax.random.key(0)
BITS = (23, 16, 12, 10, 8)
ROUNDINGS = ("nearest", "stochastic")
SIX_HOURS = 6 * 3600  # seconds; precipitation comes in kg/m²/s, and a kg/m² is a mm
MIDDLE, LOWEST = 4, 7  # levels, at 0.51 and 0.95 of the surface's pressure
Run = list["Records"]  # a day each


class Records(NamedTuple):
    """Means of six hours over every grid point."""

    precipitation: Float[Array, "times longitudes latitudes"]
    temperature: Float[Array, "times longitudes latitudes"]
    wind: Float[Array, "times longitudes latitudes"]


UNITS = {"precipitation": "mm/6 h", "temperature": "K", "wind": "m/s"}


def model() -> tuple[Any, Any]:
    """The model and what drives it; imported when asked for, as it is not installed for tests."""
    from jcm.forcing import ForcingData  # pyright: ignore[reportMissingImports]
    from jcm.model import Model  # pyright: ignore[reportMissingImports]
    from jcm.physics.speedy import speedy_coords  # pyright: ignore[reportMissingImports]
    from jcm.terrain import TerrainData  # pyright: ignore[reportMissingImports]

    folder = resources.files("jcm.data.bc.t30.clim")
    coords = speedy_coords.get_speedy_coords()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of xarray's defaults to come
        terrain = TerrainData.from_file(str(folder / "terrain.nc"), coords)
        forcing = ForcingData.from_file(str(folder / "forcing.nc"), coords)
    return Model(coords=coords, terrain=terrain, start_time="2000-01-01"), forcing


def day_of(model: Any) -> Callable[[Any, Any], tuple[Any, Records]]:
    """A day of the model as a function: `(state, forcing)` → `(state, records)`."""

    def day(start: Any, forcing: Any) -> tuple[Any, Records]:
        end, said = model.run_from_state_with_carry(
            start.dynamics,
            forcing,
            save_interval=0.25,
            total_time=1.0,
            output_averages=True,
            initial_physics_state=start.physics,
            initial_time=start.time,
            initial_step=start.step,
        )
        air = said.dynamics
        rain = said.physics["surface_exchange"].precipitation
        return end, Records(rain, air.temperature[:, LOWEST], air.u_wind[:, MIDDLE])

    return day


def settled(tree: Any) -> Any:
    """With types that are not weak, so that a state from any run is the same kind of input."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tree)


def starts(model: Any, day: Any, forcing: Any, spin_up: int, members: int, apart: int) -> list[Any]:
    """Weathers of the same date: states of one run some days apart, all with the first's clock."""
    model.bootstrap_state()
    state, found = settled(model.run_state), []
    for k in range(spin_up + apart * (members - 1) + 1):
        if k >= spin_up and (k - spin_up) % apart == 0:
            clock = found[0] if found else state
            found.append(state.replace(time=clock.time, step=clock.step))
        state = settled(day(state, forcing)[0])
        if k % 10 == 0:
            print(f"speedy: spinning up, day {k}", flush=True)
    return found


def climate(run: Run, lead: int) -> Records:
    """What is compared: all after the first days, in units of `UNITS`."""
    found = Records(*(np.concatenate(parts) for parts in zip(*run[lead:], strict=True)))
    return found._replace(precipitation=SIX_HOURS * found.precipitation)


@jax.jit
def _w1(one: Array, two: Array, area: Array) -> Array:
    columns = (a.reshape(len(a), -1) for a in (one, two))
    far = jax.vmap(jq.distances.wasserstein, (1, 1))(*columns)
    return jnp.average(far.reshape(one.shape[1:]), weights=jnp.broadcast_to(area, one.shape[1:]))


def w1(one: Records, two: Records, area: np.ndarray) -> dict[str, float]:
    return {name: float(_w1(getattr(one, name), getattr(two, name), area)) for name in UNITS}


def means(run: Records, area: np.ndarray) -> dict[str, float]:
    wide = np.broadcast_to(area, run.wind.shape[1:])
    return {name: float(np.average(getattr(run, name).mean(0), weights=wide)) for name in UNITS}


def compared(
    double: list[Run], low: dict[tuple[int, str], Run], area: np.ndarray, lead: int
) -> dict[str, Any]:
    """Each low-precision run against the double ones that did not start where it did."""
    full = [climate(run, lead) for run in double]
    pairs = [w1(one, two, area) for one, two in itertools.combinations(full, 2)]

    def far(found: Records) -> dict[str, float]:
        each = [w1(found, other, area) for other in full[1:]]
        return {name: float(np.mean([one[name] for one in each])) for name in UNITS}

    rows: dict[str, Any] = {}
    for (bits, rounding), run in low.items():
        if len(run) < len(double[0]):  # it blew up on its way
            rows.setdefault(str(bits), {})[rounding] = {"days": len(run)}
            continue
        found = climate(run, lead)
        rows.setdefault(str(bits), {})[rounding] = {
            "w1": far(found),
            "same_start": w1(found, full[0], area),
            "mean": means(found, area),
        }
    return {
        "days": len(double[0]) - lead,
        "lead": lead,
        "units": UNITS,
        "band": {name: sorted(pair[name] for pair in pairs) for name in UNITS},
        "double": {"w1": far(full[0]), "means": [means(run, area) for run in full]},
        "rows": rows,
    }


def run(
    minutes: float = 50,
    *,
    spin_up: int = 40,
    members: int = 4,
    apart: int = 5,
    lead: int = 2,
    partly: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """All numbers of bits and roundings side by side, a day at a time, for so many minutes.

    Minutes are of processor time, compiling included; all runs are equally long. Each starts where
    the first double run did. `partly` gets what has been found so far, now and then.
    """
    begun = time.process_time()
    atmosphere, forcing = model()
    forcing, day = settled(forcing), day_of(atmosphere)
    area = np.cos(np.asarray(atmosphere.coords.horizontal.latitudes))
    plain = jax.jit(day)
    beginnings = starts(atmosphere, plain, forcing, spin_up, members, apart)
    double: list[Run] = [[] for _ in beginnings]
    states: list[Any] = list(beginnings)
    low: dict[tuple[int, str], Run] = {(b, r): [] for b in BITS for r in ROUNDINGS}
    at = dict.fromkeys(low, beginnings[0])
    seconds: dict[str, list[float]] = {name: [] for name in ("double", *ROUNDINGS)}

    def advance(program: Any, state: Any, name: str) -> tuple[Any, Records]:
        since = time.process_time()
        state, records = jax.block_until_ready(program(state))
        seconds[name].append(time.process_time() - since)
        return settled(state), Records(*(np.asarray(r, np.float32) for r in records))

    def result() -> dict[str, Any]:
        found = compared(double, low, area, lead)
        return found | {"seconds_per_day": {n: float(np.median(s)) for n, s in seconds.items()}}

    days = 0
    while time.process_time() - begun < 60 * minutes or days <= lead:
        for k, state in enumerate(states):
            states[k], records = advance(lambda s: plain(s, forcing), state, "double")
            double[k].append(records)
        for (bits, rounding), done in low.items():
            if len(done) < days:
                continue  # it blew up
            emulated = jq.emulate(day, jnp.int32(bits), rounding)
            keys = (jax.random.fold_in(KEY, days),) if rounding == "stochastic" else ()
            at[bits, rounding], records = advance(
                lambda s, run=emulated, keys=keys: run(*keys, s, forcing),
                at[bits, rounding],
                rounding,
            )
            if all(np.isfinite(r).all() for r in records):
                done.append(records)
            print(f"speedy: day {days}, {bits} {rounding}", *map(np.mean, records), flush=True)
        days += 1
        if days > lead:
            partly(result())
    return result()
