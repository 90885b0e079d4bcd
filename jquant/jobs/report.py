"""What quantizing did to every weight, as data: what is less than asked stands here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jquant.errors import extra
from jquant.learning.trace import Trace
from jquant.rounding.base import label_of
from jquant.schemes.scheme import Scheme

if TYPE_CHECKING:
    from rich.table import Table

WORSE = 1.05  # times the error of nearest rounding: more is a warning (heuristic)


@dataclass(frozen=True)
class WeightReport:
    """One weight.

    Attributes:
        path, shape, scheme: which weight, and what was asked.
        bits_per_weight: stored bits, group parameters and low-rank factors counted.
        error: relative squared error of the outputs `tr(E H Eᵀ) / tr(W H Wᵀ)` where evidence is
            known, else of the weights, `|E|² / |W|²`. A compensation is part of the weight.
        nearest_error: the same for nearest rounding on the grid fitted to the original weight,
            without compensation.
        tokens: inputs seen, the fewest over batch axes (experts, layers); None without evidence.
        damping: relative damping used, the largest over batch axes; None where there is none.
        dead: inputs that were always zero, summed over batch axes.
        fallback: whether nearest rounding stands in (anywhere): a factorisation failed, or no token
            reached the weight, or one of its experts or layers. Where no token reached any of it,
            errors are those of the weights.
        seconds: wall-clock time of the rounding, compilation included.
        note: what is to be known about its calibration, warnings included, or nothing.
        warnings: what is less than asked: nearest rounding stands in, a correction (QEP, GPTAQ) was
            not made as the drift of its inputs is not known, or the error is more than 1.05 times
            that of nearest rounding. A correction aims at another weight than the one the error is
            measured from, so there the last is a hint; anywhere else it is a loss.
    """

    path: str
    shape: tuple[int, ...]
    scheme: Scheme
    bits_per_weight: float
    error: float
    nearest_error: float
    tokens: int | None
    damping: float | None
    dead: int
    fallback: bool
    seconds: float
    note: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Error relative to nearest rounding; 1 where both are exact."""
        return self.error / self.nearest_error if self.nearest_error > 0 else 1.0

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Report(Mapping[str, WeightReport]):
    """Path → `WeightReport` for every quantized weight, and the paths that were kept.

    Attributes:
        kept: weights the plan left alone.
        stages: the weights that were calibrated together, in order; layers of a stack as `path[3]`.
        seconds: what reading inputs, rounding, and advancing took, by that name.
        evidence_bytes: the most that evidence took at a time.
        peak_bytes: the largest resident size of the process so far; 0 where the system does not
            tell.
        traces: of what this call has learned on an objective; one for each stage, or one for all.
    """

    weights: Mapping[str, WeightReport]
    kept: tuple[str, ...] = ()
    stages: tuple[tuple[str, ...], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    evidence_bytes: int = 0
    peak_bytes: int = 0
    traces: tuple[Trace, ...] = ()

    def __getitem__(self, path: str) -> WeightReport:
        return self.weights[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def bits_per_weight(self) -> float:
        """Mean over all quantized weights; NaN when there are none."""
        total = sum(row.size for row in self.values())
        return (
            sum(row.bits_per_weight * row.size for row in self.values()) / total
            if total
            else math.nan
        )

    @property
    def ratio(self) -> float:
        """Geometric mean over weights of the error relative to nearest rounding."""
        logs = [math.log(row.ratio) for row in self.values() if row.ratio > 0]
        return math.exp(sum(logs) / len(logs)) if logs else 1.0

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Weights where nearest rounding stands in."""
        return tuple(path for path, row in self.items() if row.fallback)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each thing that is less than asked, with the weight's path."""
        return tuple(
            f"weight {path!r}: {line}" for path, row in self.items() for line in row.warnings
        )

    def table(self) -> Table:
        """A table for `rich.print`: a row per weight and a line of totals."""
        with extra("cli"):
            from rich.table import Table

        table = Table(title="quantized weights", caption=self._caption())
        table.add_column("weight", overflow="fold")
        for name in (
            "shape",
            "scheme",
            "bits/weight",
            "error",
            "vs nearest",
            "tokens",
            "damping",
            "notes",
        ):
            table.add_column(name, justify="left" if name in ("scheme", "notes") else "right")
        for path, row in self.items():
            notes = [f"{row.dead} dead inputs"] if row.dead else []
            notes += [row.note] if row.note else []
            table.add_row(
                path,
                "×".join(map(str, row.shape)),
                describe(row.scheme),
                f"{row.bits_per_weight:.2f}",
                f"{row.error:.2e}",
                f"{row.ratio:.3f}",
                "–" if row.tokens is None else str(row.tokens),
                "–" if row.damping is None else f"{row.damping:.2g}",
                ", ".join(notes),
            )
        return table

    def _caption(self) -> str:
        return (
            f"{len(self)} weights, {self.bits_per_weight:.3f} bits per weight, error "
            f"{self.ratio:.3f} of nearest (geometric mean), {len(self.kept)} kept, "
            f"{sum(self.seconds.values()):.1f} s"
        )

    def to_json(self) -> dict[str, object]:
        """Plain numbers and strings, for `json.dump`."""
        rows = {}
        for path, row in self.items():
            rows[path] = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
            rows[path] |= {"scheme": repr(row.scheme), "shape": list(row.shape), "ratio": row.ratio}
        return {
            "weights": rows,
            "kept": list(self.kept),
            "stages": [list(stage) for stage in self.stages],
            "seconds": dict(self.seconds),
            "bits_per_weight": self.bits_per_weight,
            "evidence_bytes": self.evidence_bytes,
            "peak_bytes": self.peak_bytes,
            "traces": [dataclasses.asdict(trace) for trace in self.traces],
        }


def describe(scheme: Scheme) -> str:
    """A scheme in a few words: `Uniform 4b, in 64, GPTQ`."""
    groups = scheme.grouping
    size = "all" if groups.size is None else groups.size
    parts = "".join(f", {part.label}" for part in scheme.parts)
    return (
        f"{type(scheme.grid).__name__} {scheme.grid.bits}b, {groups.axis} {size}, "
        f"{label_of(scheme.rounding)}{parts}"
    )
