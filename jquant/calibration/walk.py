"""A network walked stage by stage over calibration batches, with values kept between the stages.

A `Walk` holds for every batch its cut function and the values that are alive, and offers the two
motions of a stage: `gather` its weights' evidence, `advance` past it with the weights as they are
by then. It knows nothing about quantizing: whoever walks says what a piece of the parameters is
worth at the moment (`current`). Memory is that of one stage's weights, their evidence, and the
values alive per batch; nothing grows with depth.

All weights at once are a walk of one stage (`capture` takes its batches one by one). Without data
there are no batches: then every weight is a stage, in which nothing is read and nothing is run.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jquant.calibration import segments
from jquant.calibration.cutting import Cuts, Recording
from jquant.calibration.data import Data
from jquant.calibration.difference import count, squares
from jquant.calibration.evidence import Evidence
from jquant.calibration.saliency import Misfit, Uses
from jquant.calibration.segments import StageFunction, Task
from jquant.calibration.stages import Comparison, Cut, Segment, Stage
from jquant.calibration.store import Store
from jquant.calibration.tally import Tally
from jquant.calibration.tokens import Weights
from jquant.programs.straight import Piece
from jquant.weights.arguments import value_of
from jquant.weights.leaves import Leaves

Current = Callable[[Piece], Array]  # the array that a piece of the parameters is at the moment
OnProgress = Callable[[int], None]  # called with the number of batches done
_NOTHING: Mapping[int, Any] = {}


@dataclass(frozen=True, eq=False)
class Run:
    """A batch on its way through the network.

    Attributes:
        cut: the function, cut for batches of this kind.
        inputs: the leaves of its inputs, by the number of the value.
        weights: of its tokens.
        alive: the values kept for later stages: in the network with quantized weights, and in the
            one without.
        saliency: of weights and layers by name, if any.
    """

    cut: Cut
    inputs: Mapping[int, Any]
    weights: Weights | None
    alive: tuple[dict[int, Any], dict[int, Any]]
    saliency: Mapping[str, Uses] | None = None

    @staticmethod
    def of(
        cut: Cut,
        inputs: Any,
        weights: Weights | None,
        saliency: Mapping[str, Uses] | None = None,
    ) -> Run:
        leaves = map(value_of, jax.tree.leaves(inputs))
        held = dict(zip(cut.flat.inputs, leaves, strict=True))
        return Run(cut, held, weights, ({}, {}), saliency)

    @property
    def weighed(self) -> tuple[Weights, ...]:
        """The weights of the tokens as the last operands of a program: one, or none."""
        return () if self.weights is None else (self.weights,)

    def counted(self, segment: Segment, full: Any) -> tuple[Any, ...]:
        """The last operands of a program that reads evidence: `full`, and what rows count."""
        if self.saliency is None:
            return full, *self.weighed
        pieces = self.cut.flat.pieces
        own = [list(self.saliency.get(str(pieces[n]), ())) for n in segment.watched]
        return full, self.weights, own

    def operands(
        self,
        segment: Segment,
        side: int,
        read: Current,
        made: Mapping[int, Any] = _NOTHING,
    ) -> list[Any]:
        """The values that a segment starts from.

        Args:
            segment: of this cut.
            side: the network: 0 with quantized weights, 1 without.
            read: gives the pieces of the parameters.
            made: values that are neither alive nor made in the segment.
        """
        held = ChainMap(self.alive[side], made, self.inputs, self.cut.flat.consts)  # type: ignore[arg-type]
        pieces = self.cut.flat.pieces
        return [read(pieces[n]) if n in pieces else held[n] for n in segment.sources]


@dataclass
class Walk:
    """A walk over the stages of a function; see `start`.

    Attributes:
        cuts: the cut function for every kind of batch.
        runs: the batches; each is gone over in every motion.
        stages: the weights that are calibrated together, in order.
        stores: of the values alive, a network each.
    """

    cuts: Cuts
    runs: Iterable[Run]
    stages: tuple[Stage, ...] = ()
    stores: tuple[Store, ...] = ()

    @staticmethod
    def start(
        fn: Callable[..., Any],
        leaves: Leaves,
        data: Data,
        recording: Recording,
        budget: int | None = None,
    ) -> Walk:
        """Cut the function for all batches; nothing is computed yet.

        Args:
            fn: any JAX function `fn(params, *inputs)`.
            leaves: its parameters; a leaf needs a shape and a dtype only.
            data: the batches.
            recording: where the walk stops, and what it records.
            budget: bytes of values kept on the device between stages; None: no limit.

        Raises:
            EvidenceError: batches that differ in more than their length.
        """
        cuts = Cuts(fn, leaves, recording)
        given = itertools.repeat(None) if data.saliency is None else data.saliency.batches
        runs = [
            Run.of(cuts.of(number, inputs, weights), inputs, weights, own)
            for number, ((inputs, weights), own) in enumerate(
                zip(data.pairs(), given, strict=False)
            )
        ]
        sides = range(2 if recording.beside else 1)
        stores = tuple(Store(budget, [run.alive[side] for run in runs]) for side in sides)
        return Walk(cuts, runs, runs[0].cut.stages, stores)

    @staticmethod
    def without_data(fn: Callable[..., Any], leaves: Leaves, paths: Iterable[str]) -> Walk:
        """A walk over no batches, with a stage for every weight; the function is not called."""
        stages = tuple(Stage((Piece(path),), k, k) for k, path in enumerate(paths, start=1))
        return Walk(Cuts(fn, leaves, Recording({})), (), stages)

    @property
    def recording(self) -> Recording:
        return self.cuts.recording

    @property
    def batch_count(self) -> int:
        return sum(1 for _ in self.runs)

    @property
    def alive(self) -> list[dict[int, Any]]:
        """The values kept for later stages in the network with quantized weights, per batch."""
        return [run.alive[0] for run in self.runs]

    @property
    def nested(self) -> Mapping[Piece, str]:
        """Weights that are used inside a loop or branch, and which it is."""
        return next((cut.nested for cut in self.cuts.kinds.values()), {})

    @property
    def unpaired(self) -> Mapping[Piece, str]:
        """Weights whose inputs cannot be paired with the full network's, and why."""
        reasons = {piece: f"inside a {name}" for piece, name in self.nested.items()}
        for cut in self.cuts.kinds.values():
            reasons |= {p: f"behind a {n} that moves tokens" for p, n in cut.unpaired.items()}
        return reasons

    @property
    def unmatched(self) -> dict[Piece, str]:
        """Weights used where the tokens of the rows are not known → why."""
        reasons: dict[Piece, str] = {}
        for run in {id(run.cut): run for run in self.runs}.values():
            for piece, why in unmatched(self.cuts, run).items():
                reasons.setdefault(piece, why)
        return reasons

    def tasks(self) -> Iterator[Task]:
        """Every program of the walk with the shapes it runs on."""
        times = Counter(id(run.cut) for run in self.runs)
        for run in {id(run.cut): run for run in self.runs}.values():
            cut, many = run.cut, times[id(run.cut)]
            shapes = cut.flat.shapes
            for stage, segment in enumerate(cut.gathers):
                program = _reads(self.cuts, cut, segment)
                operands = [shapes[n] for n in segment.sources]
                rest = run.counted(segment, operands if self.recording.drift else None)
                total = jax.eval_shape(program, None, operands, *rest)[0]
                yield Task("reading", stage, program, (total, operands, *rest), many)
            for stage, segment in enumerate((cut.prologue, *cut.advances)):
                if segment.outputs:
                    operands = [shapes[n] for n in segment.sources]
                    key, at = self.cuts.key(cut, segment), max(stage - 1, 0)
                    # What comes before all stages is told as part of the first.
                    if segment.shared:
                        program = segments.advance_both(segment, key)
                        yield Task("advancing", at, program, (operands, operands), many)
                    else:
                        program, sides = segments.advance(segment, key), len(self.stores)
                        yield Task("advancing", at, program, (operands,), many * sides)

    def check_saliency(self) -> None:
        """Refuse saliency of other shapes than the rows that it is to weigh.

        Raises:
            EvidenceError: names the weight, and both shapes.
        """
        for number, run in enumerate(self.runs):
            for segment in run.cut.gathers:
                shapes = run.cut.flat.shapes
                operands = [shapes[n] for n in segment.sources]
                names = [str(run.cut.flat.pieces[n]) for n in segment.watched]
                try:
                    program = _reads(self.cuts, run.cut, segment)
                    jax.eval_shape(program, None, operands, *run.counted(segment, None))
                except Misfit as error:
                    raise error.of(names[int(error.name)], number) from error

    def alive_bytes(self, stage: int) -> int:
        """Bytes that are kept of all batches while a stage is read and rounded."""
        held = sum(
            _bytes(run.cut.flat.shapes[n]) for run in self.runs for n in run.cut.alive[stage]
        )
        return held * len(self.stores)

    def gather(
        self, stage: int, current: Current, original: Current, told: OnProgress | None = None
    ) -> dict[Piece, Evidence]:
        """The evidence of a stage's weights, by piece, over all batches.

        Raises:
            EvidenceError: an input is NaN, infinite or too large; names weight, batch and stage.
        """
        tally, drift = Tally(), self.recording.drift
        # Weights of this stage are still what they were in either network.
        read = functools.cache(current)
        for number, run in enumerate(self.runs):
            segment, pieces = run.cut.gathers[stage], run.cut.flat.pieces
            operands = run.operands(segment, 0, read)
            full = run.operands(segment, 1, read) if drift else None
            names = [pieces[n] for n in segment.watched]
            rest = run.counted(segment, full)
            tally.add(names, _reads(self.cuts, run.cut, segment), operands, *rest)
            if told is not None:
                tally.wait()
                told(number + 1)
        staged = self.recording.sequential is not None
        where = f", at stage {stage + 1} of {len(self.stages)}, the first that saw it"
        evidence = tally.evidence(self.cuts.axes, where if staged else "")
        lost = self.unpaired.keys() & evidence
        return evidence | {piece: evidence[piece].with_drift(lambda _: None) for piece in lost}

    def comparison(self, piece: Piece) -> Comparison:
        """What `compare` compares a weight on, on batches like the first."""
        return next(iter(self.cuts.kinds.values())).comparisons[piece]

    def compare(
        self, piece: Piece, candidates: Sequence[Array], current: Current
    ) -> tuple[list[float], float]:
        """How far candidates for a weight move what the weight is compared on.

        What the weight's stage starts from must be alive. The other weights are `current`, and so
        is the one that the candidates are measured against.

        Returns:
            for each candidate the sum of squared differences over all batches, and the number of
            values that were compared, both by the weights of their tokens. Each batch is summed in
            float32, batches in float64.
        """
        sums, total = np.zeros(len(candidates)), 0.0
        read = functools.cache(current)
        for run in self.runs:
            one = run.cut.comparisons[piece]
            made = dict(zip(one.fixed.outputs, self._outputs(run, one.fixed, 0, read), strict=True))
            before = self._outputs(run, one.varying, 0, read, made)
            outputs, weights = one.varying.outputs, run.weighed
            places = tuple(run.cut.places[n] for n in outputs) if weights else ()
            total += count([x.shape for x in before], places, *weights)
            for k, candidate in enumerate(candidates):

                def other(asked: Piece, candidate: Array = candidate) -> Array:
                    return candidate if asked == piece else read(asked)

                after = self._outputs(run, one.varying, 0, other, made)
                sums[k] += float(squares(after, before, places, *weights))
        return sums.tolist(), total

    def reconstruction(
        self, stage: int, learned: Sequence[Piece], current: Current, original: Current
    ) -> tuple[StageFunction, list[Any], list[list[Array]]]:
        """A stage as a function of some of its weights, up to where it joins the rest.

        Returns:
            the function, per batch what it takes besides those weights, and per batch what the
            network with the weights it came with has in the place of its outputs.
        """
        programs: dict[Any, Any] = {}
        inputs, targets = [], []
        side = 1 if self.recording.reconstruct == "full" else 0
        now, before = functools.cache(current), functools.cache(original)
        for run in self.runs:
            segment, pieces = run.cut.reconstructions[stage], run.cut.flat.pieces
            places = {pieces[n]: k for k, n in enumerate(segment.sources) if n in pieces}
            program = segments.advance(segment, self.cuts.key(run.cut, segment))
            targets.append(self._outputs(run, segment, 1, before))
            operands = run.operands(segment, side, now)
            for piece in learned:
                operands[places[piece]] = None
            shapes = tuple(x.shape for x in operands if x is not None)
            programs[shapes] = program, tuple(places[piece] for piece in learned)
            inputs.append(operands)
        return StageFunction(tuple(programs.items())), inputs, targets

    def advance(
        self, stage: int | None, current: Current, original: Current, told: OnProgress | None = None
    ) -> None:
        """Run a stage (None: what comes before all stages) with the weights as they are now."""
        readers = [functools.cache(read) for read in (current, original)[: len(self.stores)]]
        for number, run in enumerate(self.runs):
            segment = run.cut.prologue if stage is None else run.cut.advances[stage]
            results: Sequence[list[Array]] = [[] for _ in readers]
            if segment.outputs:
                key = self.cuts.key(run.cut, segment)
                operands = [run.operands(segment, k, read) for k, read in enumerate(readers)]
                if segment.shared:
                    results = segments.advance_both(segment, key)(*operands)
                else:
                    results = [segments.advance(segment, key)(each) for each in operands]
            for store, made in zip(self.stores, results, strict=True):
                store.keep(number, run.cut.alive[0 if stage is None else stage + 1])
                for value, array in zip(segment.outputs, made, strict=True):
                    store.put(number, value, array)
            if told is not None:
                jax.block_until_ready(results)
                told(number + 1)

    def _outputs(
        self, run: Run, segment: Segment, side: int, read: Current,
        made: Mapping[int, Array] = _NOTHING,
    ) -> list[Array]:  # fmt: skip
        """A segment's outputs; see `Run.operands`."""
        if not segment.outputs:
            return []
        program = segments.advance(segment, self.cuts.key(run.cut, segment))
        return program(run.operands(segment, side, read, made))


def unmatched(cuts: Cuts, run: Run) -> dict[Piece, str]:
    """Weights that a batch uses where the tokens of the rows are not known → why."""
    reasons: dict[Piece, str] = {}
    for segment in run.cut.gathers if run.weighed else ():
        operands = [run.cut.flat.shapes[n] for n in segment.sources]
        program = _reads(cuts, run.cut, segment)
        seen = jax.eval_shape(program, None, operands, None, *run.weighed)[0]
        for name, why in seen.unmatched:
            reasons.setdefault(run.cut.flat.pieces[segment.watched[int(name)]], why)
    return reasons


def _reads(cuts: Cuts, cut: Cut, segment: Segment) -> segments.Gather:
    """The program that reads the evidence of a segment's weights."""
    places = tuple(cut.places[n] for n in segment.sources) if cut.places else None
    return segments.gather(segment, cuts.key(cut, segment), cuts.recording.spread, places)


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape) * shape.dtype.itemsize
