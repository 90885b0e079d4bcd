"""What the report needs to know of a quantized weight, as plain numbers that can wait in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Array

from jquant.calibration.evidence import Evidence


@dataclass(frozen=True)
class Outcome:
    """What became of a weight, or of one layer of a stacked one; errors are not yet relative."""

    error: float
    nearest_error: float
    power: float
    tokens: int | None
    damping: float | None
    dead: int
    failed: bool
    seconds: float
    kept_at: int | None = None  # of a learned one, the step its codes are of
    rounded: float | None = None  # the share of weights that needed no rounding at the end
    told: tuple[str, ...] = ()  # what was less than asked

    @staticmethod
    def of(info: Mapping[str, Array], evidence: Evidence | None, seconds: float) -> Outcome:
        """The outcome that `quantize_weight`'s numbers tell."""
        numbers = {name: np.asarray(value) for name, value in info.items()}
        return Outcome(
            error=float(numbers["error"].sum()),
            nearest_error=float(numbers["nearest_error"].sum()),
            power=float(numbers["power"].sum()),
            tokens=None if evidence is None else int(np.asarray(evidence.count).min()),
            damping=float(numbers["damping"].max()) if "damping" in numbers else None,
            dead=int(numbers["dead"].sum()) if "dead" in numbers else 0,
            failed=bool(np.any(numbers.get("failed", 0))),
            seconds=seconds,
            kept_at=int(numbers["kept_at"].min()) if "kept_at" in numbers else None,
            rounded=float(numbers["rounded"].mean()) if "rounded" in numbers else None,
        )

    @staticmethod
    def sum(parts: Sequence[Outcome]) -> Outcome:
        """The outcome of a weight from those of its layers."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            values = [value for value in values if value is not None]
            return _JOINS[name](values) if values else None

        return Outcome(**{name: joined(name) for name in _JOINS})

    @property
    def ratio(self) -> float:
        """Error relative to nearest rounding; 1 where both are exact."""
        return self.error / self.nearest_error if self.nearest_error > 0 else 1.0


# How a number of the whole comes from those of its layers that have it.
_JOINS: Mapping[str, Callable[[list[Any]], Any]] = MappingProxyType(
    {
        "error": sum,
        "nearest_error": sum,
        "power": sum,
        "tokens": min,
        "damping": max,
        "dead": sum,
        "failed": any,
        "seconds": sum,
        "kept_at": min,
        "rounded": lambda shares: sum(shares) / len(shares),
        "told": lambda lines: tuple(dict.fromkeys(sum(lines, ()))),
    }
)
