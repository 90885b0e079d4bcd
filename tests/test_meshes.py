"""What a job computes and sends on a mesh, counted in compiled programs, and that its codes stay.

XLA_FLAGS=--xla_force_host_platform_device_count=8 ./run tests -m "" tests/test_meshes.py
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant.axes.layout import Layout
from jquant.calibration.evidence import Evidence
from jquant.jobs.spreading import over_rows
from jquant.layerwise.weight import quantize_weight

many = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, see above")


def mesh_of(*shape: int) -> Any:
    count = int(np.prod(shape))
    return jax.make_mesh(
        shape, ("d", "m")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[:count],
    )  # fmt: skip


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W, X = normal(0, 256, 128), normal(1, 512, 128)
LAYOUT = Layout.of((256, 128), in_axes=(1,))


@many
@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P()], ids=["rows", "inputs", "everywhere"])
def test_each_device_rounds_its_share_of_rows(spec: P) -> None:
    """Arithmetic of a device is at most 1.1/n of one device's; XLA counts no factorisation here."""
    scheme, flops = jq.presets.int4_gptq(32), {}
    codes = {}
    for count in (1, 8):
        mesh = mesh_of(count)
        w = over_rows(jax.device_put(W, NamedSharding(mesh, spec)), scheme, LAYOUT)
        evidence = jax.device_put(Evidence.of(jnp.asarray(X)), NamedSharding(mesh, P()))
        run = functools.partial(quantize_weight, scheme=scheme, layout=LAYOUT)
        program = jax.jit(lambda w, e, run=run: run(w, evidence=e)).lower(w, evidence).compile()
        flops[count] = (program.cost_analysis() or {})["flops"]
        codes[count] = np.asarray(program(w, evidence)[0].codes.astype(jnp.int8))
        assert "all-gather" not in (program.as_text() or "")
    assert flops[8] <= 1.1 / 8 * flops[1]
    np.testing.assert_array_equal(codes[8], codes[1])


@many
def test_rows_are_spread_as_far_as_devices_divide_them() -> None:
    scheme, mesh = jq.presets.int4_gptq(), mesh_of(2, 4)

    def spec(shape: tuple[int, ...], given: P, layout: Layout, scheme: jq.Scheme = scheme) -> P:
        w = jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, given))
        spread: Any = over_rows(w, scheme, layout).sharding
        return spread.spec

    rows, columns = Layout.of((16, 8), in_axes=(1,)), Layout.of((8, 16), in_axes=(0,))
    assert spec((16, 8), P(None, "m"), rows) == P(("d", "m"), None)
    assert spec((8, 16), P("m", "d"), columns) == P(None, ("d", "m"))
    assert spec((6, 8), P("d", "m"), Layout.of((6, 8), in_axes=(1,))) == P("d", None)
    experts = Layout.of((4, 8, 8), in_axes=(2,), batch_axes=(0,))
    assert spec((4, 8, 8), P("m", None, "d"), experts) == P("m", "d", None)
    outer = jq.Scheme(jq.grids.Uniform(4), jq.Groups("out", 4))
    assert spec((16, 8), P(None, "m"), rows, outer) == P(None, "m")
    assert over_rows(jnp.zeros((4, 4)), scheme, rows).shape == (4, 4)  # on no mesh
