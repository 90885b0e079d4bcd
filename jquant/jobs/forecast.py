"""What a job will take on a mesh of devices that are not there: arithmetic on shapes, nothing run.

Batches are spread over the mesh axis `data`, weights by their outputs over `model`, and rows of a
weight over both while they are rounded (`spreading.py`). Second moments, and what is made of them,
lie on every device as a whole. What compilers add or save is not in it; times are those of rates
that are stated, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import PyTree

from jquant.calibration.evidence import Evidence
from jquant.calibration.segments import Task
from jquant.calibration.stages import Sequential
from jquant.calibration.walk import Walk
from jquant.errors import PlanError, extra
from jquant.jobs.request import Request
from jquant.layerwise.weight import stored_bytes
from jquant.programs.straight import Piece

if TYPE_CHECKING:
    from rich.table import Table

_AXES = ("data", "model")


@dataclass(frozen=True)
class Rates:
    """What devices do in a second; the defaults are heuristic, of the order of an H100's.

    Attributes:
        forward: floating point operations of a device in forwards and second moments.
        solving: the same in rounding, which is float32 and in part sequential.
        link: bytes that a device sends to others.
        devices_per_host: how many share a host's memory.
    """

    forward: float = 3e14
    solving: float = 2e13
    link: float = 5e10
    devices_per_host: int = 8


@dataclass(frozen=True)
class Forecast:
    """What a job takes on a mesh.

    Attributes:
        mesh: axis → devices along it.
        stages: the weights that are calibrated together, in order.
        device_bytes: of one device at the largest stage, by what takes them.
        host_bytes: of one host beside its devices, by what takes them.
        flops: of one device, by "forwards", "factors" (each device makes all) and "rounding".
        sent_bytes: that one device sends, by "moments", "activations" and "codes".
        hours: by the items of the two above.
    """

    mesh: Mapping[str, int]
    stages: tuple[tuple[str, ...], ...]
    device_bytes: Mapping[str, float]
    host_bytes: Mapping[str, float]
    flops: Mapping[str, float]
    sent_bytes: Mapping[str, float]
    hours: Mapping[str, float]

    def check(self, limit: float) -> None:
        """Refuse what does not fit into `limit` bytes of a device.

        Raises:
            PlanError: names the largest term.
        """
        total = sum(self.device_bytes.values())
        if total > limit:
            name, size = max(self.device_bytes.items(), key=lambda item: item[1])
            raise PlanError(
                f"the job needs {total / 1e9:.3g} GB of each device and has {limit / 1e9:.3g}: the "
                f"largest part is {name} ({size / 1e9:.3g} GB); take fewer or shorter batches for "
                "activations, sequential='weight' for second moments, or more devices along "
                "'model' for weights"
            )

    def table(self) -> Table:
        """A table for `rich.print`."""
        with extra("cli"):
            from rich.table import Table

        def parts(values: Mapping[str, float], unit: float) -> str:
            each = ", ".join(f"{name} {value / unit:.3g}" for name, value in values.items())
            return f"{sum(values.values()) / unit:.3g} ({each})"

        axes = " × ".join(f"{name} {size}" for name, size in self.mesh.items())
        table = Table(title=f"on paper, {axes}", show_header=False)
        weights = sum(map(len, self.stages))
        table.add_row("stages", f"{len(self.stages)}, {weights} weights or layers of them")
        table.add_row("GB of a device", parts(self.device_bytes, 1e9))
        table.add_row("GB of a host", parts(self.host_bytes, 1e9))
        table.add_row("PFLOP of a device", parts(self.flops, 1e15))
        table.add_row("GB a device sends", parts(self.sent_bytes, 1e9))
        table.add_row("hours", parts(self.hours, 1.0))
        return table


def extended(
    small: Forecast, larger: Sequence[tuple[Forecast, int]], stages: tuple[tuple[str, ...], ...]
) -> Forecast:
    """The forecast of a network that is a smaller one with parts of it more often.

    Args:
        small: of the smaller network.
        larger: of that with one part once more; and how often it comes besides.
        stages: of the whole.
    """

    def sums(name: str) -> dict[str, float]:
        own = getattr(small, name)
        return {
            key: value + sum(times * (getattr(one, name)[key] - value) for one, times in larger)
            for key, value in own.items()
        }

    added = "device_bytes", "host_bytes", "flops", "sent_bytes", "hours"
    return replace(small, stages=stages, **{name: sums(name) for name in added})


def forecast(
    fn: Callable[..., Any],
    params: PyTree,
    plan: Any,
    batches: Iterable[Any] | None = None,
    *,
    mesh: Mapping[str, int],
    sequential: Sequential = "weight",
    rates: Rates = Rates(),  # noqa: B008
) -> Forecast:
    """What `quantize` takes on a mesh, from shapes alone: see `Forecast`.

    Args:
        fn, params, plan, batches, sequential: as for `quantize`; leaves of `params` may be lazy and
            are not read.
        mesh: devices along `data`, over which the first axis of batches is spread, and `model`.
        rates: of one device.

    Raises:
        PlanError: a mesh of other axes, or that does not divide the batches.
        what `quantize` raises before any work.

    Example:
        >>> import jax.numpy as jnp, jquant as jq
        >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
        >>> x = jnp.ones((16, 8))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_gptq()})
        >>> costs = forecast(fn, params, plan, [x], mesh={"data": 2, "model": 4})
        >>> costs.device_bytes["weights of a stage"] == 2 * 4 * 8 * 4 / 4
        True
    """
    if not set(mesh) <= set(_AXES) or any(size < 1 for size in mesh.values()):
        raise PlanError(f"a mesh has the axes data and model, of 1 or more devices; got {mesh}")
    request = Request(fn, params, plan, sequential=sequential).checked(batches)
    full = {name: mesh.get(name, 1) for name in _AXES}
    for number, batch in enumerate(request.data.batches):
        first = jax.tree.leaves(batch)[0].shape
        if not first or first[0] % full["data"]:
            raise PlanError(
                f"batch {number} of shape {first} is not divided by data={full['data']}; pass "
                "batches of a multiple of it"
            )
    return _Sums(request, request.walk(None), full, rates).forecast()


@dataclass(frozen=True)
class _Moment:
    """The second moments of a weight's inputs.

    Attributes:
        width: inputs.
        count: matrices, of experts or layers.
        bytes: of all that is as large: the sums themselves, and drift or guided sums beside them.
    """

    width: int
    count: int
    bytes: int

    @staticmethod
    def of(seen: Evidence) -> _Moment:
        *batch, width, _ = seen.second_moment.shape
        square = [x.shape for x in jax.tree.leaves(seen) if x.shape[-2:] == (width, width)]
        return _Moment(width, math.prod(batch), 4 * sum(map(math.prod, square)))

    @property
    def matrix_bytes(self) -> int:
        return 4 * self.width**2 * self.count


@dataclass
class _Sums:
    """The arithmetic of one job."""

    request: Request
    walk: Walk
    mesh: dict[str, int]
    rates: Rates

    @cached_property
    def tasks(self) -> list[Task]:
        """The programs of the walk, of which each is traced for its shapes."""
        return list(self.walk.tasks())

    def forecast(self) -> Forecast:
        data, model = self.mesh["data"], self.mesh["model"]
        moments = self.moments()
        device = max(
            (self.at(stage, moments.get(stage, [])) for stage in range(len(self.walk.stages))),
            key=lambda terms: sum(terms.values()),
            default={},
        )
        pieces = [piece for stage in self.walk.stages for piece in stage.pieces]
        stored = sum(map(self.stored, pieces))
        largest = max((self.weights(stage) for stage in range(len(self.walk.stages))), default=0)
        here = min(1.0, self.rates.devices_per_host / model)
        flops = {
            "forwards": self.forwards() / (data * model),
            "factors": sum(
                4 / 3 * moment.width**3 * moment.count
                for stage, sizes in moments.items()
                if any(map(self.informed, self.walk.stages[stage].pieces))
                for moment in sizes
            ),
            "rounding": sum(map(self.solving, pieces)) / (data * model),
        }
        sent = self.sent(moments, pieces)
        hours = {
            "forwards": flops["forwards"] / self.rates.forward,
            "factors": flops["factors"] / self.rates.solving,
            "rounding": flops["rounding"] / self.rates.solving,
            "sending": sum(sent.values()) / self.rates.link,
        }
        return Forecast(
            self.mesh,
            tuple(tuple(map(str, stage.pieces)) for stage in self.walk.stages),
            device | {"quantized weights": stored / model},
            {"weights that are read": largest * here, "codes to write": float(stored)},
            flops,
            sent,
            {name: seconds / 3600 for name, seconds in hours.items()},
        )

    def at(self, stage: int, moments: list[_Moment]) -> dict[str, float]:
        """Bytes of a device while a stage is read and rounded."""
        data, model = self.mesh["data"], self.mesh["model"]
        alive = self.walk.alive_bytes(stage) + self.walk.alive_bytes(stage + 1)
        return {
            # all of a stage; of one the factor, and what the factorisation works in
            "second moments": float(sum(m.bytes for m in moments))
            + 2 * max((m.matrix_bytes for m in moments), default=0),
            "weights of a stage": 2.0 * self.weights(stage) / model,
            "activations between stages": alive / data,
            "activations at work": self.working(stage) / (data * model),
        }

    def weights(self, stage: int) -> int:
        return sum(
            math.prod(self.shape(piece)) * self.request.plan.weights[piece.path].dtype.itemsize
            for piece in self.walk.stages[stage].pieces
        )

    def shape(self, piece: Piece) -> tuple[int, ...]:
        window, weight = dict(piece.where), self.request.plan.weights[piece.path]
        return tuple(1 if axis in window else n for axis, n in enumerate(weight.shape))

    def stored(self, piece: Piece) -> int:
        weight = self.request.plan.weights[piece.path]
        return stored_bytes(self.shape(piece), self.request.plan[piece.path], weight.layout)

    def solving(self, piece: Piece) -> float:
        """Floating point operations of rounding: of rows that are compensated, n² each."""
        weight = self.request.plan.weights[piece.path]
        like = jax.ShapeDtypeStruct(self.shape(piece), weight.dtype)
        *batch, rows, width = jax.eval_shape(weight.layout.canonical, like).shape
        return math.prod(batch) * rows * width * (width if self.informed(piece) else 20.0)

    def informed(self, piece: Piece) -> bool:
        """Whether a weight is rounded by its inputs' second moment."""
        return "moment" in self.request.plan[piece.path].needs

    def moments(self) -> dict[int, list[_Moment]]:
        """Stage → the distinct second moments."""
        sizes: dict[int, list[_Moment]] = {}
        for task in self.tasks:
            if task.doing == "reading" and task.stage not in sizes:
                sizes[task.stage] = list(map(_Moment.of, task.operands[0].values))
        return sizes

    def forwards(self) -> float:
        """Of all programs on all batches, as XLA counts them before it optimizes."""
        counted: dict[Any, float] = {}
        total = 0.0
        for task in self.tasks:
            shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(task.operands))
            if (task.run, shapes) not in counted:
                analysis = task.run.lower(*task.operands).cost_analysis() or {}
                counted[task.run, shapes] = max(analysis.get("flops", 0.0), 0.0)
            total += counted[task.run, shapes] * task.times
        return total

    def working(self, stage: int) -> float:
        """The two largest values that a stage makes of a batch; compilers need no more at a time
        where they fuse what is elementwise."""
        most = 0.0
        for cut in self.walk.cuts.kinds.values():
            made = [
                math.prod(cut.flat.shapes[n].shape) * cut.flat.shapes[n].dtype.itemsize
                for step in (*cut.advances[stage].steps, *cut.gathers[stage].steps)
                for n in step.outs
            ]
            most = max(most, float(sum(sorted(made)[-2:])))
        return most

    def sent(self, moments: Mapping[int, list[_Moment]], pieces: list[Piece]) -> Any:
        data, model = self.mesh["data"], self.mesh["model"]
        batches = self.request.data.batches
        around = 2 * (data - 1) / data * len(batches)  # an all-reduce for each batch
        tokens = sum(_tokens(jax.tree.leaves(batch)[0]) for batch in batches)
        read = [moment for stage in moments.values() for moment in stage]
        numbers = sum(math.prod(self.shape(piece)) for piece in pieces)
        # Twice: evidence is read of a stage's inputs, and then it is run.
        gathered = 2 * sum(4 * m.width * m.count for m in read) * tokens / data
        return {
            "moments": around * sum(m.bytes for m in read),
            "activations": gathered * (model - 1) / model,
            "codes": numbers / model * (data - 1) / data,
        }


def _tokens(array: Any) -> int:
    """The tokens of a batch: its elements where it is of integers, else all but its features."""
    return math.prod(array.shape if array.dtype.kind in "iu" else array.shape[:-1])
