"""What a job will take, before it is begun: stages, arithmetic, memory, disk, time.

Nothing is guessed that can be asked: every distinct program of the job is compiled, which tells the
memory it needs beside its operands, and run once on made-up numbers, which tells its time on this
machine; so is the rounding of every distinct shape of weight. Equal stages share programs, so that
takes seconds where the job takes hours. Weights themselves are not read.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from jquant import deprecated
from jquant.axes.layout import Layout
from jquant.calibration.evidence import Evidence
from jquant.calibration.saliency import Saliency
from jquant.calibration.segments import Task
from jquant.calibration.stages import Sequential
from jquant.calibration.tokens import Given
from jquant.errors import extra
from jquant.jobs.request import Request
from jquant.jobs.stages import peak_bytes
from jquant.layerwise.weight import quantize_weight, stored_bits
from jquant.programs.straight import Piece
from jquant.schemes.scheme import Plan
from jquant.trees.placement import transferring

if TYPE_CHECKING:
    from rich.table import Table

_DOINGS = "compiling", "reading", "rounding", "advancing"
_WIDEST = 2048  # a wider weight is rounded as a part of that size, and its time scaled


@dataclass(frozen=True)
class Estimate:
    """What `quantize` with the same arguments will take.

    Attributes:
        stages: the weights that will be calibrated together, in order.
        flops: arithmetic of forwards and second moments; of loops, one turn is counted.
        evidence_bytes: the most that evidence takes at a time.
        alive_bytes: the most that activations take between stages.
        weight_bytes: the most that the weights of a stage take.
        peak_bytes: the largest resident size of the process; device memory is not in it.
        result_bytes: the quantized weights in a file.
        seconds: by "compiling", "reading", "rounding", "advancing".
    """

    stages: tuple[tuple[str, ...], ...]
    flops: float
    evidence_bytes: int
    alive_bytes: int
    weight_bytes: int
    peak_bytes: int
    result_bytes: int
    seconds: Mapping[str, float]

    def table(self) -> Table:
        """A table for `rich.print`."""
        with extra("cli"):
            from rich.table import Table

        def size(count: float) -> str:
            return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

        weights = sum(map(len, self.stages))
        table = Table(title="before it is begun", show_header=False)
        table.add_row("stages", f"{len(self.stages)}, {weights} weights or layers of them")
        table.add_row("arithmetic", f"{self.flops / 1e12:.2f} TFLOP in forwards and moments")
        table.add_row("evidence", f"{size(self.evidence_bytes)} at a time")
        table.add_row("activations", f"{size(self.alive_bytes)} between stages")
        table.add_row("weights", f"{size(self.weight_bytes)} at a time")
        table.add_row("peak memory", size(self.peak_bytes))
        table.add_row("disk", f"{size(self.result_bytes)} for the quantized weights")
        parts = ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items())
        table.add_row("time", f"about {sum(self.seconds.values()):.0f} s ({parts})")
        return table


@dataclass
class _Cost:
    """Of one compiled program: bytes beside its operands and its results, seconds, flops."""

    extra: int
    seconds: float
    flops: float


@deprecated.keywords("quantize")
@transferring
def estimate(
    fn: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    evidence: Mapping[str, Evidence] | None = None,
    key: PRNGKeyArray | None = None,
    sequential: Sequential = "weight",
    token_weights: Given = None,
    saliency: Saliency | None = None,
    budget: int | None = None,
) -> Estimate:
    """What `quantize` will take with these arguments: see `Estimate`, and `quantize` for them.

    Raises:
        what `quantize` raises before any work.

    Example:
        >>> import jquant as jq
        >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
        >>> x = jnp.ones((16, 8))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_gptq()})
        >>> estimate(fn, params, plan, [x]).evidence_bytes == 4 * (8 * 8 + 2 * 8 + 1)
        True
    """
    sequential = deprecated.current("quantize.sequential", sequential)
    request = Request(fn, params, plan, dict(evidence or {}), key, sequential=sequential)
    request = request.checked(batches, token_weights, saliency)
    walk = request.walk(budget)
    start, costs = time.perf_counter(), _Costs()
    for task in walk.tasks():
        costs.run(task)
    for stage, named in enumerate(walk.stages):
        for piece in named.pieces:
            costs.round(request, stage, piece)
    costs.seconds["compiling"] = max(time.perf_counter() - start - 2 * costs.measured, 0.0)
    weights = [
        sum(math.prod(_shape(p, plan)) * plan.weights[p.path].dtype.itemsize for p in stage.pieces)
        for stage in walk.stages
    ]
    # Batches are dispatched ahead of their execution, so what a stage reads and what it leaves
    # are there together.
    peaks = [
        walk.alive_bytes(at)
        + walk.alive_bytes(at + 1)
        + costs.evidence.get(at, 0)
        + 2 * weights[at]
        + max(costs.extra.get((doing, at), 0) for doing in costs.seconds)
        for at in range(len(weights))
    ]
    return Estimate(
        stages=tuple(tuple(map(str, stage.pieces)) for stage in walk.stages),
        flops=costs.flops,
        evidence_bytes=max(costs.evidence.values(), default=0),
        alive_bytes=max((walk.alive_bytes(at) for at in range(len(weights))), default=0),
        weight_bytes=max(weights, default=0),
        peak_bytes=_resident() + max(peaks, default=0) + costs.stored,
        result_bytes=costs.stored,
        seconds=costs.seconds,
    )


@dataclass
class _Costs:
    """What a job takes, added up; equal programs and equal weights are measured once.

    Attributes:
        seconds: by what is done.
        extra: (what is done, stage) → the most bytes beside the operands.
        evidence: stage → bytes of evidence.
        flops: of all programs.
        stored: bytes of the quantized weights in a file.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_DOINGS, 0.0))
    extra: dict[tuple[str, int], int] = field(default_factory=dict)
    evidence: dict[int, int] = field(default_factory=dict)
    flops: float = 0.0
    stored: int = 0
    _programs: dict[Any, _Cost] = field(default_factory=dict)
    _weights: dict[Any, tuple[_Cost, int]] = field(default_factory=dict)

    @property
    def measured(self) -> float:
        """Seconds that the measured programs have run, once each."""
        rounded = [cost for cost, _ in self._weights.values()]
        return sum(cost.seconds for cost in [*self._programs.values(), *rounded])

    def run(self, task: Task) -> None:
        """Add a program that the walk runs."""
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(task.operands))
        cost = self._programs.get((task.run, shapes))
        if cost is None:
            cost = self._programs[task.run, shapes] = _cost(task.run, task.operands)
        self._add(task.doing, task.stage, cost, task.times)
        self.flops += cost.flops * task.times
        if task.doing == "reading":
            self.evidence[task.stage] = _bytes(task.operands[0])

    def round(self, request: Request, stage: int, piece: Piece) -> None:
        """Add the rounding of a weight, or of a layer of it."""
        plan, path = request.plan, piece.path
        shape = _shape(piece, plan)
        read = path in request.unknown and bool(request.data.batches)
        informed = read or (plan.weights[path].has_inputs and path in request.evidence)
        kind = plan[path], shape, plan.weights[path].layout, informed
        if kind not in self._weights:
            cost = _rounding(piece, plan, shape, informed)
            self._weights[kind] = cost, _stored(piece, plan, shape)
        cost, size = self._weights[kind]
        self._add("rounding", stage, cost, 1)
        self.stored += size

    def _add(self, doing: str, stage: int, cost: _Cost, times: int) -> None:
        self.seconds[doing] += cost.seconds * times
        place = doing, stage
        self.extra[place] = max(self.extra.get(place, 0), cost.extra)


def _cost(run: Any, operands: tuple[Any, ...]) -> _Cost:
    """Compile a program and run it, on ones."""
    compiled = run.lower(*operands).compile()
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis() or {}
    extra = 0 if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    for _ in range(2):  # the second one counts
        made = jax.block_until_ready(jax.tree.map(_ones, operands))
        start = time.perf_counter()
        jax.block_until_ready(compiled(*made))
        seconds = time.perf_counter() - start
    return _Cost(extra, seconds, max(analysis.get("flops", 0.0), 0.0))


def _ones(x: Any) -> jax.Array:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.ones(x.shape, x.dtype, device=getattr(x, "sharding", None))


def _shape(piece: Piece, plan: Plan) -> tuple[int, ...]:
    """The shape of a piece: one layer of a stack keeps its axis."""
    window = dict(piece.where)
    return tuple(
        1 if axis in window else n for axis, n in enumerate(plan.weights[piece.path].shape)
    )


def _rounding(piece: Piece, plan: Plan, shape: tuple[int, ...], informed: bool) -> _Cost:
    """Rounding one weight of this shape, or if it is wide a part of it."""
    scheme, weight = plan[piece.path], plan.weights[piece.path]
    like = jax.ShapeDtypeStruct(shape, weight.dtype)
    *batch, rows, width = jax.eval_shape(weight.layout.canonical, like).shape
    small_rows, small = min(rows, _WIDEST), min(width, _WIDEST)
    layout = Layout.of((*batch, small_rows, small), batch_axes=range(len(batch)),
                       in_axes=(len(batch) + 1,))  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (*batch, 2 * small, small), jnp.float32)
    evidence = Evidence.of(x, spread="spread" in scheme.needs) if informed else None
    if evidence is not None and "drift" in scheme.needs:
        evidence = dataclasses.replace(evidence, drift=jnp.zeros_like(evidence.second_moment))
    if evidence is not None and "guided" in scheme.needs:
        evidence = evidence.guided_by([evidence])
    w = jax.random.normal(jax.random.key(1), (*batch, small_rows, small), jnp.float32)
    w = w.astype(weight.dtype)

    def run(w: jax.Array, evidence: Evidence | None) -> Any:
        return quantize_weight(w, scheme, layout, evidence=evidence, key=jax.random.key(2))

    compiled = jax.jit(run).lower(w, evidence).compile()
    memory = compiled.memory_analysis()
    extra = 0 if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    jax.block_until_ready(compiled(w, evidence))
    start = time.perf_counter()
    jax.block_until_ready(compiled(w, evidence))
    grown = (rows / small_rows) * (width / small) ** 2
    return _Cost(int(extra * grown), (time.perf_counter() - start) * grown, 0.0)


def _stored(piece: Piece, plan: Plan, shape: tuple[int, ...]) -> int:
    """Bytes of the quantized piece in a file."""
    bits = stored_bits(shape, plan[piece.path], plan.weights[piece.path].layout)
    return math.ceil(bits * math.prod(shape) / 8)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _resident() -> int:
    """The resident size of this process now; its largest so far where the system tells no other."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")
