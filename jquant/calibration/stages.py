"""Cutting a function at its weights: which weights are calibrated together, and what runs between.

Every use of a planned weight is one *level* above the highest use that its input depends on: in a
transformer block q, k and v are one level, then the attention's output, then gate and up, then
down. A *stage* is a range of levels. Its weights are calibrated on inputs that the quantized
weights of all earlier stages have produced; then they are quantized, and the stage is run on with
them. Two things run per stage and batch, each every equation at most once:

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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jquant.calibration.comparison import Level, compared
from jquant.calibration.place import Place
from jquant.calibration.routing import Routing, routing
from jquant.calibration.running import Found, Uses, find_uses
from jquant.programs.primitives import having
from jquant.programs.straight import Flat, Piece, Step

Granularity = Literal["weight", "block", "all"]


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
    granularity: Granularity,
    level: Level | None = None,
    reconstruct: bool = False,
    drift: bool = False,
) -> Cut:
    """Cut a flat function at the uses of the planned weights.

    `level`: to compare the weights there; `reconstruct`: to run each stage to where it joins;
    `drift`: to see it beside the one with the weights it came with.
    """
    found = find_uses(flat, planned)
    uses = found.uses
    choices = routing(flat, uses) if drift else Routing(frozenset(), {})
    levels = _levels(flat.steps, uses)
    spans = _spans(uses, levels)
    stages = tuple(
        Stage(
            tuple(flat.pieces[n] for n, span in spans.items() if low <= span[0] <= high), low, high
        )
        for low, high in _ranges([*spans.values(), *_blocks(flat, spans, granularity)])
    )
    return _Cutter(flat, stages, found, levels, level, reconstruct, choices).cut()


def _needed(steps: Sequence[Step], uses: Uses, values: Iterable[int]) -> set[int]:
    """Positions of the steps that lead to a use of a weight, to be done too, or to these values."""
    values = set(values)
    kept: set[int] = set()
    for at in range(len(steps))[::-1]:
        if at in uses or not values.isdisjoint(steps[at].outs):
            kept.add(at)
            values.update(steps[at].reads)
    return kept


def _light(flat: Flat, found: Found) -> set[int]:
    """Values to be made again from parameters and inputs, whenever they are needed.

    Cheap ones; and what depends on no input, since a weight that it goes into is followed only
    where all of that is seen, and changes when the weight does.
    """
    light = {*flat.pieces, *flat.inputs, *flat.consts}
    for at, step in enumerate(flat.steps):
        cheap = step.eqn.primitive.name not in having("heavy") or found.fixed.issuperset(step.outs)
        again = cheap and not step.eqn.effects and at not in found.uses
        if again and light.issuperset(step.reads):
            light.update(step.outs)
    return light


def _levels(steps: Sequence[Step], uses: Uses) -> list[int]:
    """The level of every step and of what it makes; parameters and inputs have level 0."""
    levels: list[int] = []
    made: dict[int, int] = {}
    for at, step in enumerate(steps):
        levels.append(max((made.get(n, 0) for n in step.reads), default=0) + (at in uses))
        made.update(dict.fromkeys(step.outs, levels[at]))
    return levels


Span = tuple[int, int]


def _spans(uses: Uses, levels: Sequence[int]) -> dict[int, Span]:
    """For each weight the levels of its first and last use, in the order of the first."""
    spans: dict[int, Span] = {}
    for at, numbers in uses.items():
        for n in numbers:
            low, high = spans.get(n, (levels[at], levels[at]))
            spans[n] = min(low, levels[at]), max(high, levels[at])
    return dict(sorted(spans.items(), key=lambda item: item[1][0]))


def _blocks(flat: Flat, spans: Mapping[int, Span], granularity: Granularity) -> Iterable[Span]:
    """The levels that the granularity wants together."""
    blocks: dict[Any, list[Span]] = {}
    for number, span in spans.items():
        piece = flat.pieces[number]
        block = {
            "weight": number,
            "block": flat.layers.get(piece, block_of(piece.path)),
            "all": None,
        }[granularity]
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


def _ranges(spans: Iterable[Span]) -> list[Span]:
    """The finest ranges of levels that cut through none of the spans."""
    ranges: list[Span] = []
    for low, high in sorted(spans):
        if ranges and low <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], high)
        else:
            ranges.append((low, high))
    return ranges


class _Cutter:
    """Distributes a flat function's steps over the segments of its stages."""

    def __init__(
        self,
        flat: Flat,
        stages: tuple[Stage, ...],
        found: Found,
        levels: Sequence[int],
        level: Level | None,
        reconstruct: bool,
        choices: Routing,
    ):
        self.flat, self.stages, self.found, self.choices = flat, stages, found, choices
        self.uses = uses = found.uses
        self.light = _light(flat, found)
        stage_of = {0: 0}  # the prologue is number 0
        for k, stage in enumerate(stages, start=1):
            stage_of.update(dict.fromkeys(range(stage.first, stage.last + 1), k))
        self.home = [stage_of.get(level, len(stages)) for level in levels]
        self.made = {n: k for k, step in zip(self.home, flat.steps, strict=True) for n in step.outs}
        self.until: dict[int, int] = {}  # the last stage that reads a value
        self.comparisons: dict[Piece, Comparison] = {}
        for n, (outputs, words) in ({} if level is None else compared(flat, uses, level)).items():
            k = next(k for k, s in enumerate(stages, start=1) if flat.pieces[n] in s.pieces)
            whole = self._segment(k, outputs=outputs, last=len(stages))
            self.until.update((n, max(self.until.get(n, 0), k)) for n in whole.sources)
            self.comparisons[flat.pieces[n]] = _split(whole, n, words)
        self.reconstructions: list[Segment] = []
        ends = compared(flat, uses, "residual") if reconstruct else {}
        for k, stage in enumerate(stages, start=1) if reconstruct else ():
            own = [ends[n].outputs for n, piece in flat.pieces.items() if piece in stage.pieces]
            outputs = tuple(dict.fromkeys(n for some in own for n in some))
            whole = self._segment(k, outputs=outputs, last=len(stages))
            self.until.update((n, max(self.until.get(n, 0), k)) for n in whole.sources)
            self.reconstructions.append(whole)
        for at in _needed(flat.steps, uses, self.until):
            for n in flat.steps[at].reads:
                self.until[n] = max(self.until.get(n, 0), self.home[at])

    def cut(self) -> Cut:
        alive = tuple(
            frozenset(
                n for n, k in self.made.items()
                if n not in self.light and k <= now < self.until.get(n, 0)
            )
            for now in range(len(self.stages) + 1)
        )  # fmt: skip
        advances = [
            self._segment(k, outputs=[n for n in sorted(alive[k]) if self.made[n] == k])
            for k in range(len(self.stages) + 1)
        ]
        gathers = []
        for k in range(1, len(self.stages) + 1):
            roots = {at for at in self.uses if self.home[at] == k}
            watched = {n for at in roots for n in self.uses[at]}
            gathers.append(self._segment(k, roots=roots, watched=sorted(watched)))
        lost = self.choices.unpaired
        unpaired = {
            self.flat.pieces[n]: lost[read]
            for at, numbers in self.uses.items() for n in numbers
            for read in self.flat.steps[at].reads if read in lost
        }  # fmt: skip
        return Cut(
            self.flat, self.stages, advances[0], tuple(gathers), tuple(advances[1:]), alive,
            self.found.nested, unpaired, self.comparisons, tuple(self.reconstructions),
        )  # fmt: skip

    def _segment(
        self,
        stage: int,
        *,
        outputs: Sequence[int] = (),
        roots: Iterable[int] = (),
        watched: Sequence[int] = (),
        last: int | None = None,
    ) -> Segment:
        """The steps of a stage that lead to these values and steps, and what they start from.

        With `last`, those of all stages up to that one.
        """
        steps, roots, last = self.flat.steps, set(roots), stage if last is None else last
        wanted, kept = set(outputs), []
        for at in range(len(steps))[::-1]:
            asked = not wanted.isdisjoint(steps[at].outs)
            here = stage <= self.home[at] <= last or self.light.issuperset(steps[at].outs)
            if at in roots or (asked and here):
                kept.append(at)
                wanted.update(steps[at].reads)
        kept.reverse()
        chosen = tuple(steps[at] for at in kept)
        sources = _sources(chosen)
        fixed = tuple(n for n in sources if n in self.found.fixed) if watched else ()
        using = tuple(k for k, at in enumerate(kept) if at in roots)
        shared = tuple(k for k, at in enumerate(kept) if at in self.choices.shared)
        return Segment(chosen, sources, tuple(outputs), tuple(watched), fixed, using, shared)


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
