"""The example of neighbourhood dictionaries runs, on a generated graph."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.nat import main


@pytest.fixture
def example():
    with jax.numpy_dtype_promotion("standard"):  # as users have it, and optax takes it
        yield main


def test_a_node_remembers_whom_it_met(example):
    size = example.Size(slots=4, width=4)
    keeper, p = example.Keeper(8), example.initial(size, jax.random.key(0))
    cache = example.empty(6, size.slots, size.width, keeper)
    events = (jnp.array([0]), jnp.array([5]), jnp.array([60.0]))
    cache = example.remember(p, cache, events, jax.random.key(1), keeper)
    place = int(example.slot(jnp.array(5), 4))
    assert cache.near_ids[0].tolist() == [5 if i == place else -1 for i in range(4)]
    assert (cache.near_ids[jnp.array([1, 2, 3, 4])] == -1).all()
    assert cache.near.codes.dtype == jnp.int8 and cache.last.tolist() == [60, 0, 0, 0, 0, 60]
    assert (jnp.abs(keeper.read(cache.own)).sum(-1) > 0).tolist() == [True, *[False] * 4, True]


def test_a_score_of_happenings_is_the_area(example):
    yes, no = np.array([0.9, 0.5, 0.2]), np.array([0.5, 0.1])
    assert example.auc(yes, no) == pytest.approx((1 + 1 + 0.5 + 1 + 0 + 1) / 6)


@pytest.mark.slow
def test_it_runs(example):
    rows = example.main(["--small"])["rows"]
    assert rows["4 bits"]["cache_bytes"] < rows["float32"]["cache_bytes"] / 3
    assert all(0 <= row["auc"] <= 1 for row in rows.values())


def test_what_is_recorded_is_what_the_page_says():
    folder = Path(main.__file__).parent
    rows = json.loads((folder / "results.json").read_text("utf-8"))["rows"]
    page = (folder / "README.md").read_text("utf-8")
    assert set(rows) == set(main.KEEPERS)
    for name, row in rows.items():
        figures = f"{row['auc']:.3f} | {row['auc_new']:.3f} | {row['bits_per_number']:.0f}"
        assert f"| {name} | {figures} | {row['cache_bytes'] / 1e6:.2f} |" in page
    full, four = rows["float32"], rows["4 bits, stochastic"]
    assert full["auc"] > full["auc_met_before"] + 0.08 and full["auc"] - four["auc"] < 0.001
    assert four["cache_bytes"] < full["cache_bytes"] / 6
