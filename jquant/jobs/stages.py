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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jquant.calibration.evidence import Evidence
from jquant.calibration.onepass import OnePass
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError, WeightError
from jquant.jobs.progress import Doing, Progress, Told
from jquant.jobs.records import Record, WorkDir
from jquant.jobs.report import WORSE, Report, WeightReport
from jquant.layerwise.checks import check_finite, not_used
from jquant.layerwise.standin import check_tokens, stand_in
from jquant.layerwise.weight import Outcome, key_of, quantize_weight
from jquant.learning.descend import Learned, is_learned, learn, relaxation_of
from jquant.learning.objectives import Objective
from jquant.learning.trace import Trace
from jquant.numerics.packed import joined
from jquant.programs.straight import Piece
from jquant.schemes.scheme import Plan, Scheme
from jquant.trees.lazy import Lazy, read, realize
from jquant.trees.placement import at_ease, sliced
from jquant.weights.qtensor import QTensor, dequantize_weight, placed, weight_bits


class Job:
    """The state of one call of `quantize`; see there."""

    def __init__(
        self,
        plan: Plan,
        arrays: Mapping[str, Any],
        given: Mapping[str, Evidence],
        key: PRNGKeyArray | None,
        walk: Walk | OnePass,
        work: WorkDir | None,
        progress: Told | None,
        objective: Objective | None = None,
    ):
        self.plan, self.arrays, self.given, self.key = plan, arrays, given, key
        self.walk, self.work, self.progress = walk, work, progress
        self.objective = objective  # of stages; None: every weight is rounded by itself
        self.traces: list[Trace] = []
        self.done: dict[Piece, QTensor] = {}
        self.outcomes: dict[Piece, Outcome] = {}
        self.seconds: dict[str, float] = {"reading": 0.0, "rounding": 0.0, "advancing": 0.0}
        self.evidence_bytes = 0
        self.at = 0  # the stage at work
        self.logs: list[float] = []  # of the weights' errors relative to nearest

    def run(self) -> None:
        """Take all stages, those that a record is there of without reading and rounding."""
        stages = self.walk.stages
        try:
            self.advance(None)
            for self.at in range(len(stages)):
                names = [str(piece) for piece in stages[self.at].pieces]
                found = None if self.work is None else self.work.finished(self.at, names)
                if found is None:
                    found = self.solve(self.at)
                    if self.work is not None:
                        found = self.work.finish(self.at, found)
                self.take(self.at, found)
                self.advance(self.at)
        except KeyboardInterrupt as stop:
            if self.work is not None:
                stop.add_note(
                    f"stopped in stage {self.at + 1} of {len(stages)}; the same call with "
                    f"work_dir={str(self.work.path)!r} goes on from there"
                )
            raise

    def solve(self, stage: int) -> Record:
        """Read the inputs of a stage's weights, and round them."""
        start, pieces = time.perf_counter(), self.walk.stages[stage].pieces
        evidence = self.walk.gather(stage, self.current, self.original, self.tell("reading"))
        distinct = {id(e.second_moment): e for e in evidence.values()}.values()
        held = sum(leaf.nbytes for e in distinct for leaf in jax.tree.leaves(e))
        self.evidence_bytes = max(self.evidence_bytes, held)
        self.seconds["reading"] += time.perf_counter() - start
        learned = self.objective is not None
        together = [p for p in pieces if learned and is_learned(self.plan[p.path])]
        alone = [p for p in pieces if p not in together]
        for piece in alone:  # before any of them is rounded
            if piece in evidence and piece.path not in self.given:
                check_tokens(str(piece), self.plan[piece.path], evidence[piece])
        told, found = self.tell("rounding", len(alone)), {}
        for number, piece in enumerate(alone, start=1):
            q, outcome = self.round(piece, evidence.pop(piece, None))
            found[str(piece)] = q, outcome
            self.seconds["rounding"] += outcome.seconds
            if told is not None:
                told(number)
        if together:
            self.done |= {piece: found[str(piece)][0] for piece in alone}
            found |= self.learn(stage, together, evidence)
        return found

    def round(self, piece: Piece, evidence: Evidence | None) -> tuple[QTensor, Outcome]:
        start = time.perf_counter()
        scheme, layout = self.plan[piece.path], self.plan.weights[piece.path].layout
        evidence, nearest, told = self.known(piece, evidence), False, ()
        if evidence is not None:
            why = self.walk.unpaired.get(piece, "")
            scheme, evidence, nearest, told = stand_in(str(piece), scheme, evidence, why)
        elif {"moment", "inputs"} & scheme.needs:
            raise EvidenceError(not_used(str(piece)))
        own = None
        if "key" in scheme.needs and self.key is not None:
            own = key_of(self.key, str(piece))
        w = self.original(piece)

        def rounded(w: Array, evidence: Evidence | None, key: PRNGKeyArray | None) -> Any:
            return quantize_weight(w, scheme, layout, evidence=evidence, key=key)

        q, info = at_ease(rounded, w, evidence, own)
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
        assert isinstance(self.walk, Walk) and self.objective is not None
        start, names = time.perf_counter(), [str(piece) for piece in pieces]
        weights = [
            Learned(
                str(piece), self.original(piece), self.plan[piece.path],
                self.plan.weights[piece.path].layout, self.known(piece, evidence.get(piece)),
            )
            for piece in pieces
        ]  # fmt: skip
        network, inputs, wanted = self.walk.reconstruction(
            stage, pieces, self.current, self.original
        )
        feed = [(given, goal, ()) for given, goal in zip(inputs, wanted, strict=True)]
        steps = relaxation_of(weights).descent.steps
        found, trace = learn(
            network, self.objective, weights, None, feed,
            key=self.key, told=self.tell("rounding", steps),
        )  # fmt: skip
        self.traces.append(trace)
        jax.block_until_ready([q.codes for q, _ in found])
        spent = time.perf_counter() - start
        self.seconds["rounding"] += spent
        return {
            name: (q, Outcome.of(info, weight.evidence, spent / len(names)))
            for name, weight, (q, info) in zip(names, weights, found, strict=True)
        }

    def known(self, piece: Piece, evidence: Evidence | None) -> Evidence | None:
        """What is known of a piece's inputs, given or just read, shaped as the piece is."""
        axes = sorted((_place(self.plan, piece.path, axis), at) for axis, at in piece.where)
        if piece.path in self.given:
            evidence = self.given[piece.path]
            for place, at in axes:
                evidence = jax.tree.map(partial(_layer, at=at, axis=place), evidence)
            return evidence
        for place, _ in axes:
            evidence = jax.tree.map(partial(jnp.expand_dims, axis=place), evidence)
        return evidence

    def take(self, stage: int, record: Record) -> None:
        """Put the stage's quantized weights in the place of the ones that were there."""
        for piece in self.walk.stages[stage].pieces:
            self.done[piece], outcome = record[str(piece)]
            self.outcomes[piece] = outcome
            if outcome.ratio > 0:
                self.logs.append(math.log(outcome.ratio))

    def advance(self, stage: int | None) -> None:
        start = time.perf_counter()
        told = None if stage is None else self.tell("advancing")
        self.walk.advance(stage, self.current, self.original, told)
        jax.block_until_ready(self.walk.alive)
        self.seconds["advancing"] += time.perf_counter() - start

    def original(self, piece: Piece) -> Array:
        """The piece as it came."""
        leaf = self.arrays[piece.path]
        array = jnp.asarray(read(leaf, piece.index(len(leaf.shape))))
        if piece.path in self.plan and not isinstance(leaf, jax.Array):
            check_finite(piece.path, array)
        return array

    def current(self, piece: Piece) -> Array:
        """The piece as it is by now."""
        q = self.done.get(piece)
        return self.original(piece) if q is None else _dequantize(self.present(piece, q))

    def present(self, piece: Piece, q: QTensor) -> QTensor:
        """A quantized piece, in memory and where the piece lay."""
        leaf = self.arrays[piece.path]
        return placed(realize(q), sliced(leaf, {axis for axis, _ in piece.where}))

    def tell(self, doing: Doing, total: int | None = None) -> Callable[[int], None] | None:
        """What to call with the number of batches (or weights) done."""
        stages, progress = self.walk.stages, self.progress
        if progress is None:
            return None
        at, of = self.at, self.walk.batch_count if total is None else total
        ratio = math.exp(sum(self.logs) / len(self.logs)) if self.logs else math.nan
        name = stages[at].name
        return lambda done: progress(Progress(at, len(stages), name, doing, done, of, ratio))

    def whole(self, path: str) -> QTensor:
        """The quantized weight, put together from its layers, innermost loop first."""
        parts = {piece.where: q for piece, q in self.done.items() if piece.path == path}
        while len(next(iter(parts))) > 0:
            place = _place(self.plan, path, next(iter(parts))[-1][0])
            rows: dict[Any, list[QTensor]] = {}
            for where in sorted(parts):
                rows.setdefault(where[:-1], []).append(parts[where])
            join = partial(_joined, axis=place)
            parts = {outer: jax.tree.map(join, *row) for outer, row in rows.items()}
        return parts[()]

    def report(self, quantized: Mapping[str, QTensor]) -> Report:
        stages, rows = self.walk.stages, {}
        nested, unmatched = self.walk.nested, self.walk.unmatched
        for path, scheme in self.plan.items():
            pieces = [piece for piece in self.done if piece.path == path]
            outcome = Outcome.sum([self.outcomes[piece] for piece in pieces])
            loop = next((nested[piece] for piece in pieces if piece in nested), None)
            notes = [self.plan.weights[path].note] if outcome.tokens is not None else []
            if loop is not None:
                notes.append(f"in a {loop}: calibrated in one pass with all in it")
            lost = next((unmatched[piece] for piece in pieces if piece in unmatched), None)
            if lost is not None:
                notes.append(f"all rows of its {lost} counted")
            note = "; ".join(filter(None, notes))
            rows[path] = row_of(path, scheme, quantized[path], outcome, note)
        kept = tuple(path for path in self.plan.weights if path not in self.plan)
        names = tuple(tuple(map(str, stage.pieces)) for stage in stages)
        return Report(
            rows, kept, names, self.seconds, self.evidence_bytes, peak_bytes(), tuple(self.traces)
        )


def row_of(path: str, scheme: Scheme, q: QTensor, outcome: Outcome, note: str) -> WeightReport:
    """The line of a report."""
    power, warned = outcome.power or 1.0, list(outcome.told)
    if outcome.ratio > WORSE:
        warned.append(f"its error is {outcome.ratio:.2f} times that of nearest rounding")
    said = [note] if note else []
    if outcome.kept_at is not None:
        share = "" if outcome.rounded is None else f", {outcome.rounded:.0%} rounded before"
        said.append(f"of step {outcome.kept_at}{share}")
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
        note="; ".join(said + warned),
        warnings=tuple(warned),
    )


_dequantize = jax.jit(dequantize_weight)


def _place(plan: Plan, path: str, axis: int) -> int:
    """The batch axis of the canonical view that a stacked axis of the leaf is."""
    ((role, place, _),) = plan.weights[path].layout.axes[axis]
    assert role == "batch", "a scan slices a weight along an axis of its stack"
    return place


def _layer(leaf: Array, at: int, axis: int) -> Array:
    return jax.lax.slice_in_dim(leaf, at, at + 1, axis=axis)


def _joined(*leaves: Any, axis: int) -> Any:
    """Arrays that are one layer each along `axis`, as one array; lazy if they are."""
    first = leaves[0]
    if not isinstance(first, Lazy):
        return at_ease(lambda *leaves: joined(leaves, axis), *leaves)
    shape = (*first.shape[:axis], len(leaves), *first.shape[axis + 1 :])
    said = f"concatenated along {axis}: {'; '.join(leaf.identity for leaf in leaves)}"

    def window(index: tuple[slice, ...]) -> Any:
        inner = (*index[:axis], slice(0, 1), *index[axis + 1 :])
        return np.concatenate([leaf[inner] for leaf in leaves[index[axis]]], axis)

    return Lazy(shape, first.dtype, window, said)


def peak_bytes() -> int:
    """The largest resident size of this process so far; kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
