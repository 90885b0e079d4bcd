"""Many devices on the command line: a mesh to quantize on, or one that is only on paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import numpy as np
from cyclopts import Parameter
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jquant.app.console import Narrator
from jquant.app.paper import costs_of
from jquant.app.sources import Model
from jquant.io import place
from jquant.jobs.estimate import estimate
from jquant.jobs.forecast import Rates
from jquant.schemes.scheme import Plan


@Parameter(name="*")
@dataclass(frozen=True)
class Devices:
    """What a command line says about devices: its options."""

    mesh: Annotated[
        str | None,
        Parameter(
            help="data=2,model=4: batches over `data`, weights over `model`, on as many devices. "
            "With --dry-run on paper: devices need not be there, and of a Hugging Face folder "
            "config.json is enough."
        ),
    ] = None
    memory_per_device: Annotated[
        float | None, Parameter(help="GB; a --dry-run with --mesh that needs more is refused.")
    ] = None
    rates: Annotated[
        str | None,
        Parameter(
            help="forward=3e14,solving=2e13,link=5e10: what a device does in a second, for the "
            "hours of a --dry-run with --mesh (FLOP, FLOP, bytes). Defaults: as here, heuristic."
        ),
    ] = None

    @property
    def axes(self) -> dict[str, int]:
        """Mesh axis → devices; ValueError if it is not written so."""
        parts = [re.fullmatch(r"(data|model)=(\d+)", p) for p in (self.mesh or "").split(",")]
        axes = {part[1]: int(part[2]) for part in parts if part}
        if len(axes) < len(parts) or not all(axes.values()):
            raise ValueError(f"--mesh is written data=2,model=4; got {self.mesh}")
        return {"data": 1, "model": 1, **axes}

    @property
    def batch(self) -> int:
        """Examples of a batch that is made up: one for each device along `data`."""
        return self.axes["data"]

    @property
    def speeds(self) -> Rates:
        """The rates; ValueError if they are not written so."""
        given = {}
        for part in (self.rates or "").split(",") if self.rates else []:
            name, _, value = part.partition("=")
            try:
                given[name] = float(value)
            except ValueError:
                given[name] = 0.0
        if not set(given) <= {"forward", "solving", "link"} or any(v <= 0 for v in given.values()):
            raise ValueError(f"--rates is written forward=3e14,link=5e10; got {self.rates}")
        return replace(Rates(), **given)


def need_devices(devices: Devices, dry_run: bool) -> None:
    """ValueError: the options make no sense together, or so many devices are not there."""
    if devices.mesh is None or not dry_run:
        for name, value in (("memory-per-device", devices.memory_per_device),
                            ("rates", devices.rates)):  # fmt: skip
            if value is not None:
                raise ValueError(f"--{name} is for a --dry-run with --mesh")
    if devices.mesh is None:
        return
    axes, speeds = devices.axes, devices.speeds
    count = axes["data"] * axes["model"]
    assert speeds.link > 0
    if not dry_run and count > jax.device_count():
        raise ValueError(
            f"--mesh {devices.mesh} asks for {count} devices, JAX has {jax.device_count()}; on the "
            f"CPU XLA_FLAGS=--xla_force_host_platform_device_count={count} pretends there are more"
        )


def on_mesh(model: Model, batches: Sequence[Any], devices: Devices) -> tuple[Model, Sequence[Any]]:
    """The model and its batches where a mesh has them; as they are without one.

    Raises:
        ValueError: the mesh does not divide a batch.
    """
    if devices.mesh is None:
        return model, batches
    axes = devices.axes
    count = axes["data"] * axes["model"]
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:count],
    )  # fmt: skip

    def lying(path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Matrices over `model` by their last axis that it divides; all else everywhere."""
        spread = [k for k, size in enumerate(shape) if size % axes["model"] == 0]
        marks: list[Any] = [None] * len(shape)
        if len(shape) > 1 and spread:
            marks[spread[-1]] = "model"
        return NamedSharding(mesh, PartitionSpec(*marks))

    def batched(x: Any) -> jax.Array:
        if not np.shape(x) or len(x) % axes["data"]:
            raise ValueError(
                f"a batch of shape {np.shape(x)} is not divided by data={axes['data']}; pass "
                f"--samples that is a multiple of it, or a smaller --mesh"
            )
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    params = place(model.params, lying, lazy=True)
    return replace(model, params=params), jax.tree.map(batched, list(batches))


def show_costs(
    model: Model, plan: Plan, batches: Any, how: dict[str, Any], devices: Devices, to: Narrator
) -> None:
    """What the job will take: measured here, or on paper for a mesh.

    Raises:
        PlanError: it does not fit into the memory that was given.
    """
    if devices.mesh is None:
        to.say("compiling and timing every program of the job")
        to.show(estimate(model.fn, model.params, plan, batches, **how).table())
        return
    costs = costs_of(
        model, plan, batches, mesh=devices.axes, rates=devices.speeds, sequential=how["sequential"]
    )
    to.show(costs.table())
    if devices.memory_per_device is not None:
        costs.check(devices.memory_per_device * 1e9)
