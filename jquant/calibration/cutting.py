"""A function cut for each kind of batch: flattened, its stacks taken apart if they can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax

from jquant.axes.agreement import settled
from jquant.axes.roles import Axes, Sighting
from jquant.calibration.comparison import Level
from jquant.calibration.crosswise import check_astray, used_otherwise
from jquant.calibration.data import in_words, kind_of, not_taken
from jquant.calibration.find import Weight
from jquant.calibration.follow import Follower
from jquant.calibration.place import Place
from jquant.calibration.running import Usage, find_uses
from jquant.calibration.segments import segment_key
from jquant.calibration.stages import Cut, Segment, Sequential, Stage, cut_at_weights
from jquant.calibration.tokens import Weights, follow_steps, input_places
from jquant.errors import EvidenceError, PlanError
from jquant.programs.straight import Flat, Piece, flatten
from jquant.weights.arguments import Inputs, shape_of
from jquant.weights.leaves import Leaves


@dataclass(frozen=True)
class Recording:
    """Which weights a walk stops at, and what it records there.

    Attributes:
        planned: path → axes along which layers are stacked.
        sequential: which of them are one stage. With None stacks stay whole and nothing is cut.
        given: those whose evidence is there already; with None their inputs are not recorded.
        drift: whether evidence says how far inputs are from the full-precision network's.
        spread: whether evidence says how inputs are spread.
        level: what `Walk.compare` compares weights on; None: they are not to be compared.
        reconstruct: whose values reconstructions of stages start from; None: there are none.
        axes: of weights that a plan has; those of others are what the first batch makes of them.
    """

    planned: Mapping[str, Collection[int]]
    sequential: Sequential = "weight"
    given: Collection[str] = ()
    drift: bool = False
    spread: bool = False
    level: Level | None = None
    reconstruct: Literal["quantized", "full"] | None = None
    axes: Mapping[str, Axes] = field(default_factory=dict)

    @staticmethod
    def at(weights: Mapping[str, Weight], **choices: Any) -> Recording:
        """Of these weights, as `find_weights` has them; `choices` are the other fields."""
        planned = {path: weight.stack_axes for path, weight in weights.items()}
        axes = {path: weight.axes for path, weight in weights.items()}
        return Recording(planned, axes=axes, **choices)

    @property
    def beside(self) -> bool:
        """Whether the full-precision network is walked beside the quantized one."""
        return self.drift or self.reconstruct is not None


@dataclass
class Cuts:
    """The cuts of a function, one for every kind of batch, made when the first of it comes.

    `axes` are those of the weights, and of layers that are stages of their own.
    """

    fn: Callable[..., Any]
    leaves: Leaves
    recording: Recording
    kinds: dict[Any, Cut] = field(default_factory=dict)
    first: Inputs | None = None
    axes: dict[Piece, Axes] = field(default_factory=dict)
    _keys: dict[int, Hashable] = field(default_factory=dict)

    def of(self, number: int, inputs: Inputs, weights: Weights | None) -> Cut:
        """The cut for a batch.

        Raises:
            EvidenceError: the batch differs from batch 0 in more than its length.
            WeightError, PlanError: a weight has parts that are used along axes of their own, or
                others than the plan was made for.
        """
        tokens = None if weights is None else weights.shape
        kind = kind_of(inputs), tokens
        if kind not in self.kinds:
            try:
                cut = cut_for(self.fn, self.leaves, inputs, tokens, self.recording)
            except Exception as error:  # whatever the function says: Flax has its own errors
                if self.first is None or isinstance(error, EvidenceError):
                    raise
                raise not_taken(number, inputs, self.first, error) from error
            self._agree(cut, number, inputs)
            if self.first is None:
                self.first = inputs
            elif cut.stages != next(iter(self.kinds.values())).stages:
                raise EvidenceError(
                    f"batch {number} ({in_words(inputs)}) takes another path through the "
                    f"function than batch 0 ({in_words(self.first)}): its weights are used in "
                    "another order; pass batches that differ in their length only"
                )
            self.kinds[kind] = cut
        return self.kinds[kind]

    def _agree(self, cut: Cut, number: int, inputs: Inputs) -> None:
        """Settle the axes of the weights of a first batch, and check the uses of those known."""
        for piece, seen in cut.sightings.items():
            shape = piece.shape(self.leaves.shapes[piece.path].shape)
            planned = self.recording.axes.get(piece.path)
            if planned is not None:
                layers = dict(piece.where)
                self.axes[piece] = tuple(
                    ((1, "out"),) if axis in layers else own for axis, own in enumerate(planned)
                )
            elif piece not in self.axes:
                self.axes[piece] = settled(seen, shape)
                check_astray(str(piece), seen, shape, self.axes[piece])
            otherwise = used_otherwise(str(piece), seen, shape, self.axes[piece])
            if otherwise and self.first is not None:
                raise EvidenceError(
                    f"batch {number} ({in_words(inputs)}) takes another path through the function "
                    f"than batch 0 ({in_words(self.first)}): {otherwise}; pass batches that differ "
                    "in their length only"
                )
            if otherwise:
                raise PlanError(
                    f"the plan was made for weight {piece.path!r} used along other axes: on these "
                    f"batches {otherwise}; make the plan from find_weights with this function and "
                    "inputs like these"
                )

    def key(self, cut: Cut, segment: Segment) -> Hashable:
        """What the segment of a cut has in common with equal ones: see `segment_key`."""
        if id(segment) not in self._keys:  # segments live as long as their cut, and that as self
            self._keys[id(segment)] = segment_key(segment, cut.flat.shapes)
        return self._keys[id(segment)]


def cut_for(
    fn: Callable[..., Any],
    leaves: Leaves,
    inputs: Inputs,
    tokens: Sequence[int] | None,
    recording: Recording,
) -> Cut:
    """Flatten and cut; a stack is taken as a whole unless every layer is used, and by itself.

    `tokens`: the shape of the token weights, which are followed through the function.
    """
    abstract, shapes = jax.tree.map(shape_of, inputs), leaves.shapes
    stacks = {} if recording.sequential is None else dict(recording.planned)
    while True:
        flat = flatten(fn, list(shapes.items()), leaves.structure, abstract, stacks)
        cut = _cut(flat, recording)
        layers: dict[str, list[Piece]] = {}
        for stage in cut.stages:
            for piece in stage.pieces:
                layers.setdefault(piece.path, []).append(piece)
        whole = {
            path
            for path, pieces in layers.items()
            if not _covers(shapes[path].shape, [piece.where for piece in pieces])
            or not _alike([cut.sightings.get(piece, ()) for piece in pieces])
        }
        if not whole:
            return cut if tokens is None else replace(cut, places=_places(flat, tokens))
        stacks = {path: () if path in whole else axes for path, axes in stacks.items()}


def _cut(flat: Flat, recording: Recording) -> Cut:
    if recording.sequential is None:
        return _one_stage(flat, recording)
    return cut_at_weights(
        flat, recording.planned.__contains__, recording.sequential, recording.level,
        recording.reconstruct is not None, recording.drift,
    )  # fmt: skip


def _one_stage(flat: Flat, recording: Recording) -> Cut:
    """All weights as one stage: nothing comes before it or after it, nothing is kept alive."""
    unknown = recording.planned.keys() - set(recording.given)
    usage = find_uses(flat, unknown.__contains__)
    stage = Stage(tuple(map(Piece, recording.planned)), 1, 1)
    empty, nothing = Segment((), (), ()), frozenset[int]()
    return Cut(
        flat, (stage,), empty, (_gather(flat, usage),), (empty,), (nothing, nothing),
        usage.sightings,
    )  # fmt: skip


def _gather(flat: Flat, usage: Usage) -> Segment:
    """The steps that lead to any use of a weight, from the parameters and the inputs."""
    needed, to_weights = set[int](), set[int]()
    for at in range(len(flat.steps))[::-1]:
        if at in usage.uses or not needed.isdisjoint(flat.steps[at].outs):
            to_weights.add(at)
            needed.update(flat.steps[at].reads)
    kept = sorted(to_weights)
    steps = tuple(flat.steps[at] for at in kept)
    made = {n for step in steps for n in step.outs}
    sources = tuple(dict.fromkeys(n for step in steps for n in step.reads if n not in made))
    return Segment(
        steps,
        sources,
        outputs=(),
        watched=tuple(sorted(set().union(*usage.uses.values()))),
        fixed=tuple(n for n in sources if n in usage.fixed),
        roots=tuple(k for k, at in enumerate(kept) if at in usage.uses),
    )


def _places(flat: Flat, tokens: Sequence[int]) -> dict[int, Place]:
    """Where the tokens are in every value."""
    places = {n: Place.blank(flat.shapes[n].shape) for n in (*flat.pieces, *flat.consts)}
    inputs = [flat.shapes[n] for n in flat.inputs]
    places.update(zip(flat.inputs, input_places(inputs, tokens), strict=True))
    return follow_steps(Follower(), flat.steps, places)


def _covers(shape: Sequence[int], layers: Sequence[tuple[tuple[int, int], ...]]) -> bool:
    """Whether these layers are all there are, along the same axes."""
    axes = tuple(axis for axis, _ in layers[0])
    same = all(tuple(axis for axis, _ in where) == axes for where in layers)
    return same and len(layers) == math.prod(shape[axis] for axis in axes)


def _alike(layers: Sequence[Sequence[Sighting]]) -> bool:
    """Whether all of these layers meet inputs, or none does."""
    return len({any(s.reading.kind != "lookup" for s in seen) for seen in layers}) == 1
