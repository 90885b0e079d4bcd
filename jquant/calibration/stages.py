"""Cutting a function at its weights: which weights are calibrated together, and what runs between.

Every use of a planned weight is one *level* above the highest use that its input depends on: in a
transformer block q, k and v are one level, then the attention's output, then gate and up, then
down. A *stage* is a range of levels (`schedule.py`). Its weights are calibrated on inputs that the
quantized weights of all earlier stages have produced; then they are quantized, and the stage is run
on with them. Two things run per stage and batch, each every equation at most once:

* `gather`, from the values alive before the stage to the evidence of its weights;
* `advance`, from there to the values alive after it, with the stage's weights quantized.

With one level per stage nothing is run twice: a whole network costs one forward and its moments.
Values that take no more than arithmetic on the inputs (masks, positions) are not kept alive, but
made again where they are needed. What makes no value (prints, callbacks for their effect) is needed
by none: a walk leaves it out, unless a weight is used in it.

Where weights are to be compared (`calibration/comparison.py`), what that takes is kept alive too,
and cut out: a `Comparison` starts where the weight's stage starts, and so does the reconstruction
of a stage, which ends in all that its weights are compared on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jquant.axes.roles import Sighting
from jquant.calibration.comparison import Compared, Level, compared
from jquant.calibration.place import Place
from jquant.calibration.routing import Routing, routing
from jquant.calibration.running import Usage, find_uses
from jquant.calibration.schedule import Schedule, Span, levels_of, ranges_of, spans_of
from jquant.programs.straight import Flat, Piece, Step

Sequential = Literal["weight", "block"] | None  # what is one stage; None: everything


@dataclass(frozen=True)
class Stage:
    """Weights that are calibrated together, and the range of levels from first use to last."""

    pieces: tuple[Piece, ...]
    first: int
    last: int

    @property
    def name(self) -> str:
        names = [str(piece) for piece in self.pieces]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@dataclass(frozen=True)
class Segment:
    """Steps that run as one program: from `sources` to `outputs`, watching some of the sources."""

    steps: tuple[Step, ...]
    sources: tuple[int, ...]
    outputs: tuple[int, ...]
    watched: tuple[int, ...] = ()  # weights whose inputs are evidence
    fixed: tuple[int, ...] = ()  # sources that depend on no input
    roots: tuple[int, ...] = ()  # positions of the steps that use what is watched
    shared: tuple[int, ...] = ()  # positions of steps in which two networks choose alike


@dataclass(frozen=True)
class Comparison:
    """What it takes to see what a weight does: `varying` depends on the weight, `fixed` does not.

    `varying` ends in the values that are compared; `words` say what these are.
    """

    fixed: Segment
    varying: Segment
    words: str


@dataclass(frozen=True)
class Cut:
    """A flat function, its stages, and the segments that run them.

    `prologue` comes before all stages; `gathers[k]` and `advances[k]` belong to stage k, and
    `alive[k]` are the values kept until stage k is done that later ones need (0: the prologue).
    """

    flat: Flat
    stages: tuple[Stage, ...]
    prologue: Segment
    gathers: tuple[Segment, ...]
    advances: tuple[Segment, ...]
    alive: tuple[frozenset[int], ...]
    sightings: Mapping[Piece, Sequence[Sighting]] = field(default_factory=dict)  # piece → its uses
    nested: Mapping[Piece, str] = field(default_factory=dict)  # piece → the loop its use is in
    unpaired: Mapping[Piece, str] = field(default_factory=dict)  # piece → where its rows are chosen
    comparisons: Mapping[Piece, Comparison] = field(default_factory=dict)
    reconstructions: tuple[Segment, ...] = ()  # per stage, to what its weights are compared on
    places: Mapping[int, Place] = field(
        default_factory=dict
    )  # of all values, if tokens are weighed


def cut_at_weights(
    flat: Flat,
    planned: Callable[[str], bool],
    sequential: Sequential,
    level: Level | None = None,
    reconstruct: bool = False,
    drift: bool = False,
) -> Cut:
    """Cut a flat function at the uses of the planned weights.

    `level`: to compare the weights there; `reconstruct`: to run each stage to where it joins;
    `drift`: to see it beside the one with the weights it came with.
    """
    usage = find_uses(flat, planned)
    choices = routing(flat, usage.uses) if drift else Routing(frozenset(), {})
    levels = levels_of(flat.steps, usage)
    stages = _stages(flat, spans_of(usage.uses, levels), sequential)
    schedule = Schedule.of(flat, usage, levels, [(stage.first, stage.last) for stage in stages])
    cutter = _Cutter(schedule, frozenset(choices.shared))
    number = {piece: k for k, stage in enumerate(stages, start=1) for piece in stage.pieces}
    compare = {} if level is None else compared(flat, usage.uses, level)
    runs = {
        n: cutter.segment(range(number[flat.pieces[n]], schedule.count + 1), values)
        for n, (values, _) in compare.items()
    }
    ends = compared(flat, usage.uses, "residual") if reconstruct else {}
    reconstructions = cutter.reconstructions(stages if reconstruct else (), ends)
    read = [(number[flat.pieces[n]], run.sources) for n, run in runs.items()]
    read += [(k, run.sources) for k, run in enumerate(reconstructions, start=1)]
    alive = schedule.alive(schedule.dies(read))
    prologue, *advances = (cutter.advance(k, values) for k, values in enumerate(alive))
    return Cut(
        flat,
        stages,
        prologue,
        tuple(cutter.gather(k) for k in range(1, schedule.count + 1)),
        tuple(advances),
        alive,
        usage.sightings,
        usage.nested,
        _unpaired(flat, usage, choices.unpaired),
        {flat.pieces[n]: _split(run, n, compare[n].words) for n, run in runs.items()},
        reconstructions,
    )


def _stages(flat: Flat, spans: Mapping[int, Span], sequential: Sequential) -> tuple[Stage, ...]:
    """The weights that are calibrated together, in order."""
    ranges = ranges_of([*spans.values(), *_blocks(flat, spans, sequential)])
    return tuple(
        Stage(tuple(flat.pieces[n] for n, (at, _) in spans.items() if low <= at <= high), low, high)
        for low, high in ranges
    )


def _unpaired(flat: Flat, usage: Usage, lost: Mapping[int, str]) -> dict[Piece, str]:
    """The weights whose rows are chosen in a loop or branch, and in which."""
    return {
        flat.pieces[n]: lost[read]
        for at, numbers in usage.uses.items()
        for n in numbers
        for read in flat.steps[at].reads
        if read in lost
    }


def _blocks(flat: Flat, spans: Mapping[int, Span], sequential: Sequential) -> Iterable[Span]:
    """The levels of what makes one stage."""
    blocks: dict[Any, list[Span]] = {}
    for number, span in spans.items():
        piece = flat.pieces[number]
        block = {
            "weight": number,
            "block": flat.layers.get(piece, block_of(piece.path)),
            None: None,
        }[sequential]
        blocks.setdefault(block, []).append(span)
    return [(min(lo for lo, _ in some), max(hi for _, hi in some)) for some in blocks.values()]


def block_of(path: str) -> str:
    """The block a weight belongs to: its path up to the first numbered key, else its parent.

    Example:
        >>> block_of("decoder/layers/3/mlp/up/kernel"), block_of("params/Block_0/Dense_1/kernel")
        ('decoder/layers/3', 'params/Block_0')
        >>> block_of("head/kernel")
        'head'
    """
    keys = path.split("/")
    for at, key in enumerate(keys[:-1]):
        if any(character.isdigit() for character in key):
            return "/".join(keys[: at + 1])
    return "/".join(keys[:-1]) or path


@dataclass(frozen=True)
class _Cutter:
    """Cuts the segments of a schedule; `shared`: steps in which two networks choose alike."""

    schedule: Schedule
    shared: frozenset[int]

    def segment(
        self,
        stages: Collection[int],
        outputs: Sequence[int] = (),
        roots: Collection[int] = (),
        watched: Sequence[int] = (),
    ) -> Segment:
        """The steps of some stages that lead to these values and steps, and what they start from.

        `roots`: steps that use the weights that are `watched`.
        """
        kept = self.schedule.steps_to(stages, outputs, roots)
        steps = tuple(self.schedule.flat.steps[at] for at in kept)
        sources, never = _sources(steps), self.schedule.usage.fixed
        return Segment(
            steps,
            sources,
            tuple(outputs),
            tuple(watched),
            tuple(n for n in sources if n in never) if watched else (),
            tuple(k for k, at in enumerate(kept) if at in roots),
            tuple(k for k, at in enumerate(kept) if at in self.shared),
        )

    def gather(self, stage: int) -> Segment:
        """What a stage's weights are calibrated on."""
        uses, home = self.schedule.usage.uses, self.schedule.home
        roots = {at for at in uses if home[at] == stage}
        return self.segment([stage], (), roots, sorted({n for at in roots for n in uses[at]}))

    def advance(self, stage: int, alive: Iterable[int]) -> Segment:
        """From what is alive before a stage to what is after it."""
        made = [n for n in sorted(alive) if self.schedule.born[n] == stage]
        return self.segment([stage], made)

    def reconstructions(
        self, stages: Sequence[Stage], ends: Mapping[int, Compared]
    ) -> tuple[Segment, ...]:
        """Each stage up to what its weights are compared on."""
        pieces, last = self.schedule.flat.pieces, self.schedule.count
        segments = []
        for k, stage in enumerate(stages, start=1):
            own = [ends[n].outputs for n, piece in pieces.items() if piece in stage.pieces]
            outputs = tuple(dict.fromkeys(n for some in own for n in some))
            segments.append(self.segment(range(k, last + 1), outputs))
        return tuple(segments)


def _sources(steps: Sequence[Step]) -> tuple[int, ...]:
    """The values that steps read and none of them makes, in the order of the reading."""
    made = {n for step in steps for n in step.outs}
    return tuple(dict.fromkeys(n for step in steps for n in step.reads if n not in made))


def _split(whole: Segment, weight: int, words: str) -> Comparison:
    """A segment as two: the steps that do not depend on a weight, and those that do."""
    depend, varying = {weight}, []
    for step in whole.steps:
        if not depend.isdisjoint(step.reads):
            depend.update(step.outs)
            varying.append(step)
    fixed = tuple(step for step in whole.steps if depend.isdisjoint(step.outs))
    sources, made = _sources(varying), {n for step in fixed for n in step.outs}
    return Comparison(
        Segment(fixed, _sources(fixed), tuple(n for n in sources if n in made)),
        Segment(tuple(varying), sources, whole.outputs),
        words,
    )
