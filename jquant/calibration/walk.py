"""A network walked stage by stage over calibration batches, with values kept between the stages.

`Walk` cuts the function once per shape of batch, holds for every batch the values that are alive,
and offers the two motions of a stage: `gather` its weights' evidence, `advance` past it with the
weights as they are by then. It knows nothing about quantizing: whoever walks says what a piece of
the parameters is worth at the moment (`current`). Memory is that of one stage's weights, their
evidence, and the values alive per batch; nothing grows with depth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jquant.calibration import segments
from jquant.calibration.capture import Tally, in_words, kinds, not_taken
from jquant.calibration.comparison import Level
from jquant.calibration.cutting import cut_for
from jquant.calibration.difference import count, squares
from jquant.calibration.evidence import Evidence
from jquant.calibration.segments import Reconstruction, Task, segment_key
from jquant.calibration.stages import Cut, Granularity, Segment, Stage
from jquant.calibration.store import Store
from jquant.calibration.tokens import Weights
from jquant.errors import EvidenceError
from jquant.programs.keys import const_key, equation_key, literal_key, text
from jquant.programs.straight import Piece
from jquant.weights.arguments import inputs_of, shape_of, value_of

Current = Callable[[Piece], Array]  # the array that a piece of the parameters is at the moment
Told = Callable[[int], None]  # called with the number of batches done


@dataclass
class Walk:
    """A walk over the stages of a function; see `start`.

    Attributes:
        batches: the leaves of every batch's inputs.
        cuts: the cut function for every batch; batches of one shape share it.
        quantized, full: the values alive in the network with quantized weights, and in the one
            without if it is walked beside.
        drift, spread: whether evidence says how far the two are apart, and how inputs are spread.
        teacher: whether reconstructions start from what the one without has.
        weights: what the tokens of every batch count; None: each counts 1.
    """

    batches: list[list[Any]]
    cuts: list[Cut]
    quantized: Store
    full: Store | None
    drift: bool = False
    spread: bool = False
    teacher: bool = False
    weights: Sequence[Weights] | None = None
    _keys: dict[int, Any] = field(default_factory=dict)

    @staticmethod
    def start(
        fn: Callable[..., Any],
        leaves: Sequence[tuple[str, Any]],
        structure: Any,
        planned: Mapping[str, Collection[int]],
        batches: Iterable[Any],
        granularity: Granularity,
        *,
        budget: int | None = None,
        drift: bool = False,
        spread: bool = False,
        level: Level | None = None,
        reconstruct: bool = False,
        weights: Sequence[Weights] | None = None,
    ) -> Walk:
        """Cut `fn` and check that all batches go through it in the same way; nothing is run.

        Args:
            fn: any JAX function `fn(params, *inputs)`.
            leaves: its parameters, `(path, leaf)`; a leaf needs a shape and a dtype only.
            structure: the tree they are the leaves of.
            planned: the weights to be quantized: path → axes along which layers are stacked.
            batches: see `inputs_of`.
            granularity: what a stage is.
            budget: bytes of values kept on the device between stages; None: no limit.
            drift, spread: what evidence says besides; see the attributes.
            level: what `compare` compares weights on; None: they are not to be compared.
            weights: of the tokens of every batch.
            reconstruct: also walk the network with the weights it came with, for stages to aim at.

        Raises:
            EvidenceError: no batches, or batches that differ in more than their length.
        """
        shapes = [(path, shape_of(x)) for path, x in leaves]
        flats: dict[Any, Cut] = {}
        cuts: list[Cut] = []
        inputs: list[list[Any]] = []
        for number, batch in enumerate(batches):
            given = inputs_of(batch, number)
            tokens = None if weights is None else weights[number].shape
            kind = jax.tree.structure(given), kinds(given), tokens
            if kind not in flats:
                try:
                    flats[kind] = cut_for(
                        fn, shapes, structure, given, planned, granularity, level, reconstruct,
                        drift, tokens,
                    )  # fmt: skip
                except Exception as error:  # whatever the function says: Flax has its own errors
                    if not cuts or isinstance(error, EvidenceError):
                        raise
                    raise not_taken(number, given, inputs[0], error) from error
                if cuts and flats[kind].stages != cuts[0].stages:
                    raise EvidenceError(
                        f"batch {number} ({in_words(given)}) takes another path through the "
                        f"function than batch 0 ({in_words(inputs[0])}): its weights are used in "
                        "another order; pass batches that differ in their length only"
                    )
            cuts.append(flats[kind])
            inputs.append([value_of(leaf) for leaf in jax.tree.leaves(given)])
        if not cuts:
            raise EvidenceError("got no batches; pass at least one array or tuple of inputs")

        stores = [Store(budget, [{} for _ in cuts]) for _ in range(2)]
        beside = stores[1] if drift or reconstruct else None
        return Walk(inputs, cuts, stores[0], beside, drift, spread, weights=weights)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.cuts[0].stages

    @property
    def batch_count(self) -> int:
        return len(self.batches)

    @property
    def alive(self) -> list[dict[int, Any]]:
        """The values kept for later stages, per batch."""
        return self.quantized.values

    @property
    def nested(self) -> Mapping[Piece, str]:
        """Weights that are used inside a loop or branch, and which it is."""
        return self.cuts[0].nested

    @property
    def unpaired(self) -> Mapping[Piece, str]:
        """Weights whose inputs cannot be paired with the full network's, and why."""
        found = {piece: f"inside a {name}" for piece, name in self.nested.items()}
        for cut in self.cuts:
            found |= {p: f"behind a {n} that moves tokens" for p, n in cut.unpaired.items()}
        return found

    @property
    def unmatched(self) -> dict[Piece, str]:
        """Weights used where the tokens of the rows are not known → why."""
        found: dict[Piece, str] = {}
        pairs = zip(self.cuts, self.weights or (), strict=False)
        for cut, weights in {id(cut): (cut, weights) for cut, weights in pairs}.values():
            for segment in cut.gathers:
                operands = [cut.flat.shapes[n] for n in segment.sources]
                seen = jax.eval_shape(self._reads(cut, segment), None, operands, None, weights)[0]
                for name, why in seen.unmatched:
                    found.setdefault(cut.flat.pieces[segment.sources[int(name)]], why)
        return found

    def describe(self) -> Iterator[str]:
        """What the function computes, for a fingerprint."""
        for cut in {id(cut): cut for cut in self.cuts}.values():
            flat = cut.flat
            for step in flat.steps:
                ins = [a if isinstance(a, int) else literal_key(a.val) for a in step.ins]
                yield text((equation_key(step.eqn), tuple(ins), step.outs))
            for number, const in flat.consts.items():
                yield text((number, const_key(const)))
            for number, piece in flat.pieces.items():  # which layer, where an index is not a step
                yield text((number, piece))

    def data(self) -> Iterator[Any]:
        """All arrays of all batches."""
        for leaves in self.batches:
            yield from leaves
        yield from self.weights or ()

    def tasks(self) -> Iterator[Task]:
        """Every program of the walk with the shapes it runs on."""
        kinds = {id(one): one for one in self.cuts}
        times = Counter(map(id, self.cuts))
        numbers = {id(one): number for number, one in enumerate(self.cuts)}
        beside = 1 if self.full is None else 2
        for kind, one in kinds.items():
            for stage, segment in enumerate(one.gathers):
                run = self._reads(one, segment)
                operands = [one.flat.shapes[n] for n in segment.sources]
                rest = (operands if self.drift else None, *self._weighed(numbers[kind]))
                total = jax.eval_shape(run, None, operands, *rest)[0]
                yield Task("reading", stage, run, (total, operands, *rest), times[kind])
            for stage, segment in enumerate((one.prologue, *one.advances)):
                if segment.outputs:
                    operands = [one.flat.shapes[n] for n in segment.sources]
                    key, at = self._key(one, segment), max(stage - 1, 0)
                    # What comes before all stages is told as part of the first.
                    if segment.shared:
                        run = segments.advance_both(segment, key)
                        yield Task("advancing", at, run, (operands, operands), times[kind])
                    else:
                        run = segments.advance(segment, key)
                        yield Task("advancing", at, run, (operands,), times[kind] * beside)

    def alive_bytes(self, stage: int) -> int:
        """Bytes that are kept of all batches while a stage is read and rounded."""
        held = sum(_bytes(one.flat.shapes[n]) for one in self.cuts for n in one.alive[stage])
        return held * (1 if self.full is None else 2)

    def gather(
        self, stage: int, current: Current, original: Current, told: Told | None = None
    ) -> dict[Piece, Evidence]:
        """The evidence of a stage's weights, by piece, over all batches.

        Raises:
            EvidenceError: an input is NaN, infinite or too large; names weight, batch and stage.
        """
        tally, names = Tally(), {}
        arrays: dict[Piece, Array] = {}
        for batch, cut in enumerate(self.cuts):
            segment = cut.gathers[stage]
            run = self._reads(cut, segment)
            operands = self._operands(batch, segment, self.quantized, arrays, current)
            full = None
            if self.drift:  # weights of this stage are still what they were
                assert self.full is not None
                full = self._operands(batch, segment, self.full, arrays, original)
            tally.add(run, operands, full, *self._weighed(batch))
            pieces = cut.flat.pieces
            names = {str(k): pieces[n] for k, n in enumerate(segment.sources) if n in pieces}
            if told is not None:
                tally.wait()
                told(batch + 1)
        found = tally.evidence(
            lambda name: str(names[name]),
            f", at stage {stage + 1} of {len(self.stages)}, the first that saw it",
        )
        known = {names[name]: evidence for name, evidence in found.items()}
        lost = {piece: replace(known[piece], drift=None) for piece in self.unpaired.keys() & known}
        return known | lost

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
        arrays: dict[Piece, Array] = {}
        original = current(piece)
        for batch, cut in enumerate(self.cuts):
            one = cut.comparisons[piece]
            arrays[piece] = original
            held = self._run(batch, one.fixed, self.quantized, arrays, current)
            made = dict(zip(one.fixed.outputs, held, strict=True))
            wanted = self._run(batch, one.varying, self.quantized, arrays, current, made)
            weights = self._weighed(batch)
            places = tuple(cut.places[n] for n in one.varying.outputs) if weights else ()
            total += count([x.shape for x in wanted], places, *weights)
            for k, candidate in enumerate(candidates):
                arrays[piece] = candidate
                found = self._run(batch, one.varying, self.quantized, arrays, current, made)
                sums[k] += float(squares(found, wanted, places, *weights))
        return sums.tolist(), total

    def reconstruction(
        self, stage: int, learned: Sequence[Piece], current: Current, original: Current
    ) -> tuple[Reconstruction, list[Any], list[list[Array]]]:
        """A stage as a function of some of its weights, up to where it joins the rest.

        Returns:
            the function, per batch what it takes besides those weights, and per batch what the
            network with the weights it came with has in the place of its outputs.
        """
        assert self.full is not None
        runs: dict[Any, Any] = {}
        inputs, wanted = [], []
        now, before = {}, {}
        for batch, cut in enumerate(self.cuts):
            segment, pieces = cut.reconstructions[stage], cut.flat.pieces
            places = {pieces[n]: k for k, n in enumerate(segment.sources) if n in pieces}
            run = segments.advance(segment, self._key(cut, segment))
            wanted.append(self._run(batch, segment, self.full, before, original))
            store = self.full if self.teacher else self.quantized
            operands = self._operands(batch, segment, store, now, current)
            for piece in learned:
                operands[places[piece]] = None
            shapes = tuple(x.shape for x in operands if x is not None)
            runs[shapes] = run, tuple(places[piece] for piece in learned)
            inputs.append(operands)
        return Reconstruction(tuple(runs.items())), inputs, wanted

    def advance(
        self, stage: int | None, current: Current, original: Current, told: Told | None = None
    ) -> None:
        """Run a stage (None: what comes before all stages) with the weights as they are now."""
        sides = [(self.quantized, current)]
        sides += [] if self.full is None else [(self.full, original)]
        arrays: list[dict[Piece, Array]] = [{} for _ in sides]
        for batch, cut in enumerate(self.cuts):
            segment = cut.prologue if stage is None else cut.advances[stage]
            results: Sequence[list[Array]] = [[] for _ in sides]
            if segment.outputs:
                key, both = self._key(cut, segment), zip(sides, arrays, strict=True)
                operands = [self._operands(batch, segment, s, a, v) for (s, v), a in both]
                if segment.shared:
                    results = segments.advance_both(segment, key)(*operands)
                else:
                    results = [segments.advance(segment, key)(each) for each in operands]
            for (store, _), found in zip(sides, results, strict=True):
                store.keep(batch, cut.alive[0 if stage is None else stage + 1])
                for number, result in zip(segment.outputs, found, strict=True):
                    store.put(batch, number, result)
            if told is not None:
                jax.block_until_ready(results)
                told(batch + 1)

    def _run(
        self,
        batch: int,
        segment: Segment,
        store: Store,
        arrays: dict[Piece, Array],
        value: Current,
        made: Mapping[int, Array] | None = None,
    ) -> list[Array]:
        """A segment's outputs; `made` are values that are neither alive nor made in it."""
        if not segment.outputs:
            return []
        run = segments.advance(segment, self._key(self.cuts[batch], segment))
        return run(self._operands(batch, segment, store, arrays, value, made))

    def _key(self, cut: Cut, segment: Segment) -> Any:
        if id(segment) not in self._keys:  # segments live as long as their cut, and that as self
            self._keys[id(segment)] = segment_key(segment, cut.flat.shapes)
        return self._keys[id(segment)]

    def _reads(self, cut: Cut, segment: Segment) -> segments.Gather:
        places = None if self.weights is None else tuple(cut.places[n] for n in segment.sources)
        return segments.gather(segment, self._key(cut, segment), self.spread, places)

    def _weighed(self, batch: int) -> tuple[Weights, ...]:
        return () if self.weights is None else (self.weights[batch],)

    def _operands(
        self,
        batch: int,
        segment: Segment,
        store: Store,
        arrays: dict[Piece, Array],
        value: Current,
        made: Mapping[int, Array] | None = None,
    ) -> list[Any]:
        flat = self.cuts[batch].flat
        inputs = dict(zip(flat.inputs, self.batches[batch], strict=True))
        alive = store.values[batch]

        def operand(number: int) -> Any:
            piece = flat.pieces.get(number)
            if piece is not None:
                if piece not in arrays:
                    arrays[piece] = value(piece)
                return arrays[piece]
            held = (alive, made or {}, inputs, flat.consts)
            return next(values[number] for values in held if number in values)

        return [operand(number) for number in segment.sources]


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape) * shape.dtype.itemsize
