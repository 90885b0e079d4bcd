"""What happened while weights were learned together, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Trace:
    """What happened while weights were learned together, as numbers.

    Attributes:
        names: the weights.
        loss: of every step, before it was made.
        rounded: the share of weights within 0.01 of a grid point, after every step.
        looks: step → loss with rounded weights; 0 is nearest rounding.
        kept_at: the step whose rounded weights are the result.
        stopped: why it ended before the last step, or nothing.
    """

    names: tuple[str, ...]
    loss: list[float] = field(default_factory=list)
    rounded: list[float] = field(default_factory=list)
    looks: dict[int, float] = field(default_factory=dict)
    kept_at: int = 0
    stopped: str = ""
