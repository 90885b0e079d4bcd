"""When each step of a flat function runs, and how long each value is kept.

Every use of a planned weight is one *level* above the highest use that its input depends on, and a
stage is a range of levels. From that follow two tables: the stage of every step, and of every value
the stage that makes it and the last one that reads it. Stage 0 is what comes before all weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jquant.calibration.running import Usage, Uses
from jquant.programs.primitives import having
from jquant.programs.straight import Flat, Step

Span = tuple[int, int]  # the first and the last level


def levels_of(steps: Sequence[Step], usage: Usage) -> list[int]:
    """The level of every step and of what it makes; parameters and inputs have level 0.

    Steps that are deferred, and what is made of them up to a use, have the level of the first step
    that reads them.
    """
    levels: list[int] = []
    made: dict[int, int] = {}
    waiting: set[int] = set()  # values of deferred steps
    for at, step in enumerate(steps):
        use = at in usage.uses
        levels.append(max((made.get(n, 0) for n in step.reads), default=0) + use)
        made.update(dict.fromkeys(step.outs, levels[at]))
        if at in usage.deferred or not (use or waiting.isdisjoint(step.reads)):
            waiting.update(step.outs)
    read: dict[int, int] = {}  # value → the lowest level of a step that reads it
    for at in range(len(steps))[::-1] if waiting else ():
        if not waiting.isdisjoint(steps[at].outs):
            levels[at] = min((read[n] for n in steps[at].outs if n in read), default=levels[at])
        read.update((n, min(read.get(n, levels[at]), levels[at])) for n in steps[at].reads)
    return levels


def spans_of(uses: Uses, levels: Sequence[int]) -> dict[int, Span]:
    """For each weight the levels of its first and last use, in the order of the first."""
    spans: dict[int, Span] = {}
    for at, numbers in uses.items():
        for n in numbers:
            low, high = spans.get(n, (levels[at], levels[at]))
            spans[n] = min(low, levels[at]), max(high, levels[at])
    return dict(sorted(spans.items(), key=lambda item: item[1][0]))


def ranges_of(spans: Iterable[Span]) -> list[Span]:
    """The finest ranges of levels that cut through none of the spans."""
    ranges: list[Span] = []
    for low, high in sorted(spans):
        if ranges and low <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], high)
        else:
            ranges.append((low, high))
    return ranges


@dataclass(frozen=True)
class Schedule:
    """The stages in which a flat function runs.

    Attributes:
        flat: the function.
        usage: what it does with its weights.
        home: the stage of every step.
        count: the number of the last stage.
    """

    flat: Flat
    usage: Usage
    home: tuple[int, ...]
    count: int

    @staticmethod
    def of(flat: Flat, usage: Usage, levels: Sequence[int], ranges: Sequence[Span]) -> Schedule:
        """Stage k runs the levels of `ranges[k - 1]`, stage 0 level 0, the last the rest."""
        stage_of = {0: 0}
        for k, (first, last) in enumerate(ranges, start=1):
            stage_of.update(dict.fromkeys(range(first, last + 1), k))
        home = tuple(stage_of.get(level, len(ranges)) for level in levels)
        return Schedule(flat, usage, home, len(ranges))

    @cached_property
    def born(self) -> dict[int, int]:
        """Value → the stage that makes it."""
        pairs = zip(self.home, self.flat.steps, strict=True)
        return {n: stage for stage, step in pairs for n in step.outs}

    @cached_property
    def maker(self) -> dict[int, int]:
        """Value → the position of the step that makes it."""
        return {n: at for at, step in enumerate(self.flat.steps) for n in step.outs}

    @cached_property
    def light(self) -> frozenset[int]:
        """Values to be made again from parameters and inputs, whenever they are needed.

        Cheap ones; and what depends on no input, since a weight that it goes into is followed only
        where all of that is seen, and changes when the weight does.
        """
        flat, usage = self.flat, self.usage
        light = {*flat.pieces, *flat.inputs, *flat.consts}
        for at, step in enumerate(flat.steps):
            cheap = step.eqn.primitive.name not in having("heavy")
            again = (cheap or usage.fixed.issuperset(step.outs)) and not step.eqn.effects
            if again and at not in usage.uses and light.issuperset(step.reads):
                light.update(step.outs)
        return frozenset(light)

    def steps_to(
        self, stages: Collection[int], values: Iterable[int], roots: Collection[int]
    ) -> list[int]:
        """Positions of the steps of some stages that lead to these values and steps.

        Steps that make light values are of every stage. What takes no part is not looked at: of a
        deep network that is nearly all.
        """
        steps, positions = self.flat.steps, set(roots)
        asked = [*values, *(n for at in positions for n in steps[at].reads)]
        while asked:
            at = self.maker.get(asked.pop())
            if at is None or at in positions:
                continue
            if self.home[at] in stages or self.light.issuperset(steps[at].outs):
                positions.add(at)
                asked += steps[at].reads
        return sorted(positions)

    def dies(self, ends: Iterable[tuple[int, Iterable[int]]]) -> dict[int, int]:
        """Value → the last stage that reads it on the way to a use of a weight.

        Args:
            ends: values that are read besides, each by a stage.
        """
        last: dict[int, int] = {}
        for stage, values in ends:
            last.update((n, max(last.get(n, 0), stage)) for n in values)
        for at in self._needed(last):
            for n in self.flat.steps[at].reads:
                last[n] = max(last.get(n, 0), self.home[at])
        return last

    def _needed(self, values: Iterable[int]) -> set[int]:
        """Positions of the steps that lead to a use of a weight, to be done too, or to values."""
        values, steps = set(values), self.flat.steps
        positions: set[int] = set()
        for at in range(len(steps))[::-1]:
            if at in self.usage.uses or not values.isdisjoint(steps[at].outs):
                positions.add(at)
                values.update(steps[at].reads)
        return positions

    def alive(self, dies: Mapping[int, int]) -> tuple[frozenset[int], ...]:
        """For each stage, the values that are kept until it is done: later ones read them."""
        kept: list[set[int]] = [set() for _ in range(self.count + 1)]
        for n, stage in self.born.items():
            for now in range(stage, dies.get(n, 0)) if n not in self.light else ():
                kept[now].add(n)
        return tuple(map(frozenset, kept))
