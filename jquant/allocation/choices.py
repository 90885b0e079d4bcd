"""What was chosen for every weight, and why, as data: what `adadim` reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jquant.calibration.comparison import Level
from jquant.errors import extra

if TYPE_CHECKING:
    from rich.table import Table

Axis = Literal["in", "out"]


@dataclass(frozen=True)
class Choice:
    """Why the groups of a weight run along an axis.

    Attributes:
        axis: "in" or "out".
        losses: mean squared error of what was compared, with groups along in and along out; of a
            stack the sum over its layers. None: not compared, the axis is the planned one.
        compared: on what it was compared, in words; or why it was not.
        layers: layers of a stack, 1 for any other weight.
        layers_out: how many of them alone would choose "out".
    """

    axis: Axis
    losses: tuple[float, float] | None
    compared: str
    layers: int = 1
    layers_out: int = 0

    @property
    def ratio(self) -> float:
        """The loss along out relative to that along in; NaN where there are none."""
        if self.losses is None:
            return math.nan
        inward, outward = self.losses
        return outward / inward if inward > 0 else 1.0 if outward == 0 else math.inf

    @property
    def why(self) -> str:
        """The reason in words."""
        if self.losses is None:
            return self.compared
        inward, outward = self.losses
        if inward == outward:
            return "a tie"
        best, other = min(self.losses), max(self.losses)
        words = f"{1 - best / other:.1%} less error"
        if self.layers > 1:
            words += f", one axis for {self.layers} layers: {self.layers_out} would choose out"
        return words


@dataclass(frozen=True)
class Choices(Mapping[str, Choice]):
    """Path → `Choice` for every weight of the plan."""

    weights: Mapping[str, Choice]
    level: Level

    def __getitem__(self, path: str) -> Choice:
        return self.weights[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def table(self) -> Table:
        """A table for `rich.print`: a row per weight and a line of totals."""
        with extra("cli"):
            from rich.table import Table

        outward = sum(choice.axis == "out" for choice in self.values())
        left = sum(choice.losses is None for choice in self.values())
        caption = f"{outward} of {len(self)} weights along the output axis, {left} left as planned"
        table = Table(title="axes of groups", caption=caption)
        table.add_column("weight", overflow="fold")
        for name in ("axis", "loss in", "loss out", "out / in", "compared on", "why"):
            numeric = name.startswith(("loss", "out"))
            table.add_column(name, justify="right" if numeric else "left")
        for path, choice in self.items():
            losses = ("–", "–", "–")
            if choice.losses is not None:
                losses = (*(f"{loss:.3e}" for loss in choice.losses), f"{choice.ratio:.3f}")
            on = "–" if choice.losses is None else choice.compared
            table.add_row(path, choice.axis, *losses, on, choice.why)
        return table

    def to_json(self) -> dict[str, object]:
        """Plain numbers and strings, for `json.dump`."""
        rows = {path: {**vars(choice), "why": choice.why} for path, choice in self.items()}
        return {"level": self.level, "weights": rows}
