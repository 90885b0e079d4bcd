"""One job: stage by stage, read the evidence of its weights, round them, run on with the rounded.

Memory is that of one stage. With a work directory every finished stage is kept as a record, and its
weights are read from there when they are needed; a job that was killed takes the records it finds
and goes on after them.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray

from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError, WeightError
from jquant.jobs.layers import evidence_as_layer, evidence_of_layer, places_of, put_together
from jquant.jobs.progress import Doing, OnProgress, Progress
from jquant.jobs.records import Record, WorkDir
from jquant.jobs.report import WORSE, Report, WeightReport
from jquant.jobs.request import Request, Whole
from jquant.jobs.spreading import over_rows
from jquant.layerwise.checks import not_used
from jquant.layerwise.outcome import Outcome
from jquant.layerwise.standin import check_tokens, stand_in
from jquant.layerwise.weight import quantize_weight
from jquant.learning.descend import Learned, Problem, descent_of, is_learned, learn
from jquant.learning.network import Setting, learn_whole
from jquant.learning.objectives import Objective, Reconstruction
from jquant.learning.trace import Trace
from jquant.programs.straight import Piece
from jquant.rounding.base import Rounding
from jquant.rounding.prepare import LastCall, prepared_for
from jquant.schemes.scheme import Scheme
from jquant.trees.lazy import Lazy, realize
from jquant.trees.paths import key_of
from jquant.trees.placement import at_ease, sliced
from jquant.weights.qtensor import QTensor, dequantize_weight, placed, weight_bits


class Job:
    """The state of one call of `quantize`: the one driver of all jobs.

    Args:
        request: what is asked, checked.
        walk: its stages.
        work: where finished stages are kept; None: nowhere.
        progress: whom to tell.

    Attributes:
        quantized: path → quantized weight, once the job has run.
    """

    def __init__(
        self, request: Request, walk: Walk, work: WorkDir | None, progress: OnProgress | None
    ) -> None:
        self.request, self.walk, self.work, self.progress = request, walk, work, progress
        self.plan, self.leaves = request.plan, request.leaves
        self.quantized: dict[str, QTensor] = {}
        self.rows: dict[str, WeightReport] = {}
        self.traces: list[Trace] = []
        self.done: dict[Piece, QTensor] = {}
        self.outcomes: dict[Piece, Outcome] = {}
        self.seconds: dict[str, float] = {"reading": 0.0, "rounding": 0.0, "advancing": 0.0}
        self.evidence_bytes = 0
        self.at = 0  # the stage at work
        self.logs: list[float] = []  # of the weights' errors relative to nearest
        self.prepare, self.as_layer = LastCall(_prepare), LastCall(evidence_as_layer)

    @property
    def stage_count(self) -> int:
        """The stages of the walk, and one for the weights that are learned after all of them."""
        return len(self.walk.stages) + bool(self.request.learned)

    def run(self) -> None:
        """Take all stages, those that a record is there of without reading and rounding."""
        try:
            self.advance(None)
            for at, stage in enumerate(self.walk.stages):
                self.at, names = at, [str(piece) for piece in stage.pieces]
                record = None if self.work is None else self.work.finished(at, names)
                if record is None:
                    record = self.solve(at)
                    if self.work is not None:
                        record = self.work.finish(at, record)
                self.take(at, record)
                self.advance(at)
            self.finish()
            if isinstance(self.request.aim, Whole):
                self.learn_whole(self.request.aim.objective)
        except KeyboardInterrupt as stop:
            if self.work is not None:
                stop.add_note(
                    f"stopped in stage {self.at + 1} of {self.stage_count}; the same call with "
                    f"work_dir={str(self.work.path)!r} goes on from there"
                )
            raise

    def solve(self, stage: int) -> Record:
        """Read the inputs of a stage's weights, and round them."""
        evidence = self.read(stage)
        together = isinstance(self.request.aim, Reconstruction)
        pieces: tuple[list[Piece], list[Piece]] = [], []
        for piece in self.walk.stages[stage].pieces:
            pieces[together and is_learned(self.plan[piece.path])].append(piece)
        alone, learned = pieces
        for piece in alone:  # before any of them is rounded
            if piece in evidence and piece.path not in self.request.evidence:
                check_tokens(str(piece), self.plan[piece.path], evidence[piece])
        told, record = self.told("rounding", len(alone)), {}
        for number, piece in enumerate(self.neighbours(alone, evidence), start=1):
            q, outcome = self.round(piece, evidence.pop(piece, None))
            record[str(piece)] = q, outcome
            self.seconds["rounding"] += outcome.seconds
            if told is not None:
                told(number)
        for remembered in (self.prepare, self.as_layer):
            remembered.forget()
        if learned:
            self.done |= {piece: record[str(piece)][0] for piece in alone}
            record |= self.learn(stage, learned, evidence)
        return record

    def read(self, stage: int) -> dict[Piece, Evidence]:
        """The evidence of a stage's weights, from all batches."""
        start = time.perf_counter()
        told = self.told("reading")
        evidence = self.walk.gather(stage, self.current, self.original, told)
        distinct = {id(e.second_moment): e for e in evidence.values()}.values()
        held = sum(leaf.nbytes for e in distinct for leaf in jax.tree.leaves(e))
        self.evidence_bytes = max(self.evidence_bytes, held)
        self.seconds["reading"] += time.perf_counter() - start
        return evidence

    def neighbours(
        self, pieces: Sequence[Piece], evidence: Mapping[Piece, Evidence]
    ) -> list[Piece]:
        """The pieces, those next to each other that a rounding prepares for as one."""
        order: dict[Any, list[Piece]] = {}
        for piece in pieces:
            scheme, seen = self.plan[piece.path], evidence.get(piece)
            moment = None if seen is None else id(seen.second_moment)
            order.setdefault((scheme.rounding, scheme.grouping, moment), []).append(piece)
        return [piece for alike in order.values() for piece in alike]

    def round(self, piece: Piece, evidence: Evidence | None) -> tuple[QTensor, Outcome]:
        start = time.perf_counter()
        scheme, layout = self.plan[piece.path], self.plan.weights[piece.path].layout
        evidence, nearest, told = self.evidence_of(piece, evidence), False, ()
        if evidence is not None:
            why = self.walk.unpaired.get(piece, "")
            scheme, evidence, nearest, told = stand_in(str(piece), scheme, evidence, why)
        elif {"moment", "inputs"} & scheme.needs:
            raise EvidenceError(not_used(str(piece)))
        key, own = self.request.key, None
        if "key" in scheme.needs and key is not None:
            own = key_of(key, str(piece))
        w = self.original(piece)
        spread = over_rows(w, scheme, layout)
        prepared = self.prepare(scheme.rounding, evidence, scheme.grouping)

        def rounded(w: Array, evidence: Any, key: PRNGKeyArray | None, prepared: Any) -> Any:
            return quantize_weight(w, scheme, layout, evidence=evidence, key=key, prepared=prepared)

        q, info = at_ease(rounded, spread, evidence, own, prepared)
        q = placed(q, w)
        jax.block_until_ready(info)
        outcome = Outcome.of(info, evidence, time.perf_counter() - start)
        if outcome.failed and not scheme.fallback:
            raise EvidenceError(
                f"weight {str(piece)!r}: its second moment could not be factorised at any damping "
                "up to the cap; pass more calibration tokens, a larger damping, or "
                "Scheme(..., fallback=True) to let nearest rounding stand in"
            )
        if scheme.compensation and not outcome.failed and not math.isfinite(outcome.error):
            raise WeightError(
                f"weight {str(piece)!r}: its error or its compensation is beyond float32; the "
                "weight or its inputs are too large to square, so leave the compensation out"
            )
        if outcome.failed:
            told = (*told, f"nearest rounding stands in: no factorisation of {piece}'s moment")
        failed = outcome.failed or nearest
        return q, dataclasses.replace(outcome, failed=failed, told=told)

    def learn(
        self, stage: int, pieces: Sequence[Piece], evidence: Mapping[Piece, Evidence]
    ) -> Record:
        """Round weights of a stage together, by what the stage makes of them."""
        assert isinstance(self.request.aim, Reconstruction)
        start = time.perf_counter()
        weights = [
            Learned(
                str(piece), self.original(piece), self.plan[piece.path],
                self.plan.weights[piece.path].layout, self.evidence_of(piece, evidence.get(piece)),
            )
            for piece in pieces
        ]  # fmt: skip
        network, inputs, targets = self.walk.reconstruction(
            stage, pieces, self.current, self.original
        )
        feed = [(given, target, ()) for given, target in zip(inputs, targets, strict=True)]
        told = self.told("rounding", descent_of(weight.scheme for weight in weights).steps)
        problem = Problem(network, self.request.aim, None, feed)
        learned, trace = learn(problem, weights, key=self.request.key, told=told)
        self.traces.append(trace)
        jax.block_until_ready([q.codes for q, _ in learned])
        spent = time.perf_counter() - start
        self.seconds["rounding"] += spent
        return {
            weight.name: (q, Outcome.of(info, weight.evidence, spent / len(weights)))
            for weight, (q, info) in zip(weights, learned, strict=True)
        }

    def learn_whole(self, objective: Objective) -> None:
        """The last stage of a job on the whole network: the weights that move together."""
        request, start, self.at = self.request, time.perf_counter(), len(self.walk.stages)
        plan = request.learned
        setting = Setting(request.fn, request.params, plan, dict(self.quantized), request.evidence)
        learned, trace = learn_whole(
            setting, request.data, objective, key=request.key, record=self.work,
            told=self.told("learning", descent_of(plan.values()).steps),
        )  # fmt: skip
        self.traces.append(trace)
        for path, (q, outcome) in learned.items():
            self.quantized[path] = q
            self.rows[path] = row_of(path, plan[path], q, outcome, "")
        self.seconds["learning"] = time.perf_counter() - start

    def evidence_of(self, piece: Piece, evidence: Evidence | None) -> Evidence | None:
        """The evidence of a piece's inputs, given or just read, shaped as the piece is."""
        given = self.request.evidence.get(piece.path)
        if given is not None:
            return evidence_of_layer(given, self.plan, piece)
        return self.as_layer(evidence, *places_of(self.plan, piece))

    def take(self, stage: int, record: Record) -> None:
        """Put the stage's quantized weights in the place of the ones that were there."""
        for piece in self.walk.stages[stage].pieces:
            self.done[piece], outcome = record[str(piece)]
            self.outcomes[piece] = outcome
            if outcome.ratio > 0:
                self.logs.append(math.log(outcome.ratio))

    def advance(self, stage: int | None) -> None:
        start = time.perf_counter()
        told = None if stage is None else self.told("advancing")
        self.walk.advance(stage, self.current, self.original, told)
        jax.block_until_ready(self.walk.alive)
        self.seconds["advancing"] += time.perf_counter() - start

    def original(self, piece: Piece) -> Array:
        """The piece as it came."""
        if piece.path in self.request.rounded:
            return self.leaves.read_weight(piece)
        return self.leaves.read(piece)

    def current(self, piece: Piece) -> Array:
        """The piece as it is by now."""
        q = self.done.get(piece)
        return self.original(piece) if q is None else _dequantize(self.present(piece, q))

    def present(self, piece: Piece, q: QTensor) -> QTensor:
        """A quantized piece, in memory and where the piece lay."""
        leaf = self.leaves.arrays[piece.path]
        return placed(realize(q), sliced(leaf, {axis for axis, _ in piece.where}))

    def told(self, doing: Doing, total: int | None = None) -> Callable[[int], None] | None:
        """What to call with the number of batches (or weights, or steps) done."""
        progress = self.progress
        if progress is None:
            return None
        at, of = self.at, self.walk.batch_count if total is None else total
        ratio, stages = math.nan, self.stage_count
        if self.logs and doing != "learning":
            ratio = math.exp(sum(self.logs) / len(self.logs))
        name = [*(stage.name for stage in self.walk.stages), self.together][at]
        return lambda done: progress(Progress(at, stages, name, doing, done, of, ratio))

    @property
    def together(self) -> str:
        """The stage of the weights that are learned after all others, in words."""
        return f"{len(self.request.learned)} weights together"

    def finish(self) -> None:
        """Put the weights of all stages together, and say of each how it went."""
        lazy = any(isinstance(leaf, Lazy) for leaf in self.leaves.arrays.values())
        notes = self.notes()
        for path, scheme in self.request.rounded.items():
            q = put_together(self.plan, path, self.done)
            if not lazy:
                q = placed(realize(q), self.leaves.arrays[path])
            pieces = [piece for piece in self.done if piece.path == path]
            outcome = Outcome.sum([self.outcomes[piece] for piece in pieces])
            calibrated = [self.plan.weights[path].note] if outcome.tokens is not None else []
            note = "; ".join(filter(None, [*calibrated, *notes.get(path, ())]))
            self.quantized[path] = q
            self.rows[path] = row_of(path, scheme, q, outcome, note)

    def notes(self) -> dict[str, list[str]]:
        """Path → what the walk has to say of a weight, once for all its layers."""
        notes: dict[str, list[str]] = {}
        for reasons, words in (
            (self.walk.nested, "in a {}: calibrated in one pass with all in it"),
            (self.walk.unmatched, "all rows of its {} counted"),
        ):
            first: dict[str, str] = {}
            for piece in (piece for piece in self.done if piece in reasons):
                first.setdefault(piece.path, reasons[piece])
            for path, reason in first.items():
                notes.setdefault(path, []).append(words.format(reason))
        return notes

    def report(self) -> Report:
        stages = tuple(tuple(map(str, stage.pieces)) for stage in self.walk.stages)
        learned = (tuple(self.request.learned),) if self.request.learned else ()
        return Report(
            {path: self.rows[path] for path in self.plan},
            tuple(path for path in self.plan.weights if path not in self.plan),
            (*stages, *learned),
            self.seconds,
            self.evidence_bytes,
            peak_bytes(),
            tuple(self.traces),
        )


def row_of(path: str, scheme: Scheme, q: QTensor, outcome: Outcome, note: str) -> WeightReport:
    """The line of a report."""
    power, warnings = outcome.power or 1.0, list(outcome.told)
    if outcome.ratio > WORSE:
        warnings.append(f"its error is {outcome.ratio:.2f} times that of nearest rounding")
    notes = [note] if note else []
    if outcome.kept_at is not None:
        share = "" if outcome.rounded is None else f", {outcome.rounded:.0%} rounded before"
        notes.append(f"of step {outcome.kept_at}{share}")
    return WeightReport(
        path=path,
        shape=q.shape,
        scheme=scheme,
        bits_per_weight=weight_bits(q),
        error=max(outcome.error, 0.0) / power,
        nearest_error=max(outcome.nearest_error, 0.0) / power,
        tokens=outcome.tokens,
        damping=outcome.damping,
        dead=outcome.dead,
        fallback=outcome.failed,
        seconds=outcome.seconds,
        note="; ".join(notes + warnings),
        warnings=tuple(warnings),
    )


_dequantize = jax.jit(dequantize_weight)


def _prepare(rounding: Rounding, evidence: Evidence | None, groups: Groups) -> Any:
    """What a rounding makes of evidence, on automatic axes."""
    return at_ease(lambda seen: prepared_for(rounding, seen, groups), evidence)


def peak_bytes() -> int:
    """The largest resident size of this process so far; kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
