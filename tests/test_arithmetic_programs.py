"""The programs of the climate study: their equations, and what rounding does to them, in short."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.arithmetic.distances import wasserstein

pytest.importorskip("benchmarks.arithmetic")  # not part of the source distribution
from benchmarks.arithmetic import heat, lorenz, shallow_water, speedy, tables  # noqa: E402

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def column(months: int):
    return lambda: heat.integrate(heat.start(), months)


def test_the_column_is_forward_euler() -> None:
    wanted = np.full(61, 273.15)
    wanted[0] = 280
    xi = 1800 * 7e-7
    for _ in range(5):
        old = wanted.copy()
        for m in range(1, 60):
            wanted[m] = old[m] + xi * (old[m + 1] - 2 * old[m] + old[m - 1])
        wanted[60] = old[60] + xi * (-old[60] + old[59])
    np.testing.assert_allclose(heat.integrate(heat.start(), 1, 5)[0], wanted, rtol=1e-15)


def test_to_nearest_the_column_stands_still_and_at_random_it_warms() -> None:
    full = np.asarray(jax.jit(column(12))())[-1]
    near = np.asarray(jq.emulate(column(12), 10)())[-1]
    random = np.asarray(jq.emulate(column(12), 10, "stochastic")(KEY))[-1]
    assert (near[3:] == 273.25).all()  # the number of the format next to 273.15

    def rmse(a):
        return np.sqrt(np.mean((a - full) ** 2))

    assert rmse(random) < 0.5 * rmse(near)
    fine = np.asarray(jq.emulate(column(12), 23, "stochastic")(KEY))[-1]
    assert rmse(fine) < 0.01


def test_lorenz_is_its_equations() -> None:
    s = np.array([[1.0, 2.0, 3.0], [-4.0, 0.5, 20.0]])
    x, y, z = s.T
    wanted = np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], 1)
    np.testing.assert_allclose(np.stack(lorenz.lorenz63(tuple(jnp.asarray(s.T))), 1), wanted)
    ring = np.random.default_rng(0).normal(size=(1, 40))
    wanted = [(ring[0, (k + 1) % 40] - ring[0, k - 2]) * ring[0, k - 1] for k in range(40)]
    wanted = np.array(wanted) - ring[0] + 8
    np.testing.assert_allclose(lorenz.lorenz96((jnp.asarray(ring),))[0][0], wanted, rtol=1e-12)


def test_a_step_is_of_fourth_order() -> None:
    s = lorenz.start(KEY, 4)

    def end(dt):
        steps = round(0.2 / dt)
        return np.stack(lorenz.integrate(lorenz.lorenz63, s, steps, steps, dt))

    fine = end(0.2 / 640)
    errors = [np.abs(end(0.2 / n) - fine).max() for n in (20, 40)]
    assert 12 < errors[0] / errors[1] < 20


def test_few_states_to_nearest_and_many_at_random() -> None:
    def states():
        start = lorenz.start(KEY, 16)
        records = jnp.stack(lorenz.integrate(lorenz.lorenz63, start, 12_000, 5), -1)
        return records[1200:].reshape(-1, 3)

    near = np.asarray(jq.emulate(states, 7)())
    random = np.asarray(jq.emulate(states, 7, "stochastic")(KEY))
    distinct = [len(np.unique(cloud, axis=0)) / len(cloud) for cloud in (near, random)]
    assert distinct[0] < 0.3 and distinct[1] > 0.9


def total(flow: shallow_water.Flow) -> float:
    return float(jnp.sum(flow.eta))


def test_water_at_rest_stays_and_mass_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shallow_water, "FORCING", 0 * shallow_water.FORCING)
    still = shallow_water.integrate(shallow_water.rest(), 1, 10)
    assert all((np.asarray(leaf) == 0).all() for leaf in still)
    bump = shallow_water.rest()
    bump = bump._replace(eta=bump.eta.at[16, 32].set(1.0))
    later = jax.tree.map(lambda a: a[-1], shallow_water.integrate(bump, 1, 200))
    assert abs(total(later) - 1) < 1e-9
    assert 1e-4 < float(jnp.abs(later.eta).max()) < 0.2  # waves have carried it away


@pytest.mark.optimized
def test_the_wind_makes_a_flow_that_rounding_changes_little() -> None:
    def water():
        return shallow_water.integrate(shallow_water.rest(), 3, shallow_water.STEPS_PER_DAY)

    full, near = jax.jit(water)(), jq.emulate(water, 10)()
    random = jq.emulate(water, 10, "stochastic")(KEY)
    assert 0.05 < float(jnp.abs(full.u[-1]).max()) < 2
    assert abs(total(jax.tree.map(lambda a: a[-1], full))) < 1e-6
    spread = float(jnp.std(full.u[-1]))
    for low in (near, random):
        off = float(wasserstein(low.u[-1].reshape(-1), full.u[-1].reshape(-1)))
        assert 0 < off < 0.3 * spread


def test_an_atmosphere_is_as_far_as_it_is_shifted() -> None:
    random = np.random.default_rng(0)

    def run(days: int) -> list[speedy.Records]:
        return [speedy.Records(*random.normal(size=(3, 4, 6, 5))) for _ in range(days)]

    double = [run(5), run(5)]
    shifted = [
        day._replace(temperature=day.temperature + 2, wind=day.wind - 3) for day in double[0]
    ]
    shifted[0] = shifted[0]._replace(wind=np.full((4, 6, 5), 1e9))  # before the lead is over
    low = {(10, "nearest"): shifted, (10, "stochastic"): shifted[:3]}
    found = speedy.compared(double, low, np.array([0.1, 0.5, 1.0, 0.5, 0.1]), lead=1)
    assert found["days"] == 4
    near = found["rows"]["10"]["nearest"]
    assert near["same_start"] == pytest.approx({"precipitation": 0, "temperature": 2, "wind": 3})
    means = found["double"]["means"][0]
    assert near["mean"]["temperature"] == pytest.approx(means["temperature"] + 2)
    assert found["rows"]["10"]["stochastic"] == {"days": 3}
    assert found["band"]["wind"] == [pytest.approx(found["double"]["w1"]["wind"])]

    head, rows = tables.atmosphere(found)
    assert head[:2] == [
        "SPEEDY (jcm), 4 days: W1 per point to double, other starts",
        "precipitation (mm/6 h), nearest",
    ]
    ten, _, full = rows
    assert ten[1] == full[1] and float(ten[5]) > float(full[5]) + 1  # its rain is double's
    assert ten[2::2] == ["blew up"] * 3
    assert [row[0] for row in rows] == ["10", "band", "double"]
