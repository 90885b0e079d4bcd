"""How far a job is: one value, told after every batch and every weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jquant.calibration.segments import Doing

_SHARE = {
    "reading": (0.0, 0.4),
    "rounding": (0.4, 0.4),
    "advancing": (0.8, 0.2),
    "learning": (0.0, 1.0),
}  # rough, of a stage


@dataclass(frozen=True)
class Progress:
    """What a job is doing, and how much of it is done.

    Attributes:
        stage, stages: the stage at work, from 0, and how many there are.
        name: the stage's weights, in words.
        doing: "reading" inputs, "rounding" weights, "advancing" past the stage with them, or
            "learning" on the whole network.
        done, total: batches read or advanced, weights rounded, or steps made, of how many.
        ratio: error so far relative to nearest rounding (geometric mean over weights); NaN before
            the first weight.
    """

    stage: int
    stages: int
    name: str
    doing: Doing
    done: int
    total: int
    ratio: float = math.nan

    @property
    def fraction(self) -> float:
        """The share of the stages that is done, from 0 to 1.

        Example:
            >>> Progress(1, 4, "w", "advancing", 2, 2).fraction
            0.5
        """
        start, length = _SHARE[self.doing]
        return (self.stage + start + length * self.done / max(self.total, 1)) / self.stages


OnProgress = Callable[[Progress], None]
