"""Running segments: one compiled program for all that are equal, whatever block they are of.

Two segments are one program when their steps are the same computations on operands of the same
shapes, wired in the same way: the key numbers values as they come, so names, paths and the depth of
a layer are not in it. Parameters, constants and indices of layers are operands. Programs are kept
over calls, so quantizing a second network of the same blocks compiles nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, UInt8

from jquant.calibration.find import Sightings, sightings
from jquant.calibration.observe import Observer
from jquant.calibration.place import Place
from jquant.calibration.running import evaluate, read
from jquant.calibration.saliency import Turns
from jquant.calibration.stages import Segment
from jquant.calibration.tagged import Tagged, array_of, constant
from jquant.calibration.tally import accumulate
from jquant.calibration.tokens import Tokens, follow_steps
from jquant.programs.keys import equation_key, literal_key
from jquant.programs.straight import Atom
from jquant.programs.walker import Walker, bind

Doing = Literal["reading", "rounding", "advancing", "learning"]


class Task(NamedTuple):
    """A compiled program that a job runs, for whoever wants to know what it takes."""

    doing: Doing
    stage: int
    run: Callable[..., Any]
    operands: tuple[Any, ...]  # shapes
    times: int


_PROGRAMS: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
_MOST = 512  # programs kept; the oldest go first


def segment_key(segment: Segment, shapes: Mapping[int, jax.ShapeDtypeStruct]) -> Hashable:
    """What two equal segments have in common."""
    numbers = {n: k for k, n in enumerate(segment.sources)}

    def name(atoms: Sequence[Atom]) -> tuple[Hashable, ...]:
        return tuple(
            numbers.setdefault(a, len(numbers)) if isinstance(a, int) else literal_key(a.val)
            for a in atoms
        )

    sources = [shapes[n] for n in segment.sources]
    head = tuple((x.shape, str(x.dtype), str(x.sharding)) for x in sources)
    body = tuple((equation_key(s.eqn), name(s.ins), name(s.outs)) for s in segment.steps)
    ends = name(segment.outputs), name(segment.watched), name(segment.fixed)
    return head, body, ends, segment.roots, segment.shared


def advance(segment: Segment, key: Hashable) -> Callable[[list[Array]], list[Array]]:
    """The compiled program: values of the sources to values of the outputs."""
    steps, sources, outputs = segment.steps, segment.sources, segment.outputs

    def run(operands: list[Array]) -> list[Array]:
        values = dict(zip(sources, operands, strict=True))
        for step in steps:
            results = bind(step.eqn, [read(values, atom) for atom in step.ins])
            values.update(zip(step.outs, results, strict=True))
        return [values[n] for n in outputs]

    return _program(("advance", key), lambda: jax.jit(run))


def advance_both(
    segment: Segment, key: Hashable
) -> Callable[[list[Array], list[Array]], tuple[list[Array], list[Array]]]:
    """The same for the values of the quantized and of the full network, which choose alike."""

    def run(operands: list[Array], full: list[Array]) -> tuple[list[Array], list[Array]]:
        _, seen = watch(Observer(), segment, full)
        _, values = watch(Observer(), segment, operands, seen)
        outputs = segment.outputs
        return [array_of(values[n]) for n in outputs], [array_of(seen[n]) for n in outputs]

    return _program(("advance both", key), lambda: jax.jit(run))


@dataclass(frozen=True)
class StageFunction:
    """A stage as a function of some of its weights; equal for equal stages.

    `runs`: for the shapes of all other operands, the compiled program, and which operands the
    weights are.
    """

    runs: tuple[tuple[Any, tuple[Callable[..., list[Array]], tuple[int, ...]]], ...]

    def __call__(
        self, weights: Sequence[Array], fixed: None, inputs: Sequence[Array | None]
    ) -> list[Array]:
        del fixed
        operands: list[Any] = list(inputs)
        shapes = tuple(x.shape for x in inputs if x is not None)
        run, places = next(program for kind, program in self.runs if kind == shapes)
        for place, weight in zip(places, weights, strict=True):
            operands[place] = weight
        return run(operands)


Gather = Callable[..., tuple[Sightings, UInt8[Array, " values"]]]


def gather(
    segment: Segment,
    key: Hashable,
    spread: bool = False,
    places: tuple[Place, ...] | None = None,
) -> Gather:
    """The compiled program: sums so far and values of the sources to sums, and what is wrong with
    them (`accumulate`).

    `places`: where the tokens are in the sources, if tokens are weighed; their weights are an
    operand then. The last one is, for each of the watched, what rows count at each use of it.

    The weights are called by their place among the watched, `"0"`, `"1"`, …. Where the sources'
    values in the full-precision network are given too, the evidence holds the drift between them;
    with `spread`, how inputs are spread.
    """

    def run(
        total: Sightings | None,
        operands: list[Array],
        full: list[Array] | None,
        weights: Array | None = None,
        saliency: Sequence[Sequence[Array]] | None = None,
    ) -> Any:
        rows = seen = tokens = None
        turns = {str(k): own for k, own in enumerate(saliency or ()) if own}
        if weights is not None and places is not None:
            start = dict(zip(segment.sources, places, strict=True))
            tokens = Tokens.of(weights, lambda to: follow_steps(to, segment.steps, start))
        if full is not None:
            observer = Observer(keep=True, saliency=Turns(turns), roots=segment.roots)
            _, seen = watch(observer, segment, full)
            rows = observer.rows
        observer = Observer(
            full=rows, spread=spread, tokens=tokens, saliency=Turns(turns), roots=segment.roots
        )
        walker, _ = watch(observer, segment, operands, seen)
        held = dict(zip(segment.sources, operands, strict=True))
        shapes = [(str(k), tuple(held[n].shape)) for k, n in enumerate(segment.watched)]
        return accumulate(total, sightings(walker, observer, shapes))

    return _program(("gather", key, spread, places), lambda: jax.jit(run, donate_argnums=0))


def watch(
    observer: Observer,
    segment: Segment,
    operands: list[Array],
    seen: Mapping[int, Any] | None = None,
) -> tuple[Walker, dict[int, Any]]:
    """Run a segment, beside the values `seen` in the full network; all values it has."""
    names = {n: str(k) for k, n in enumerate(segment.watched)}
    fixed = set(segment.fixed)
    values: dict[int, Any] = {
        n: Tagged.of(names[n], x) if n in names else Tagged(x) if n in fixed else x
        for n, x in zip(segment.sources, operands, strict=True)
    }
    walker = Walker(observer, constant=constant)
    evaluate(walker, segment.steps, values, seen, segment.shared)
    observer.leave([values[n] for n in segment.outputs], walker)
    return walker, values


def _program(key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    if key not in _PROGRAMS:
        _PROGRAMS[key] = make()
        while len(_PROGRAMS) > _MOST:
            _PROGRAMS.popitem(last=False)
    _PROGRAMS.move_to_end(key)
    return _PROGRAMS[key]
