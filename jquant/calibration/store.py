"""What is kept of every batch between the stages of a walk: on the device, or on the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array


@dataclass
class Store:
    """Values alive, per batch: on the device while they fit `budget` bytes, then on the host."""

    budget: int | None
    values: list[dict[int, Any]]
    held: int = 0

    def put(self, batch: int, number: int, value: Array) -> None:
        if self.budget is not None and self.held + value.nbytes > self.budget:
            self.values[batch][number] = np.asarray(value)
        else:
            self.values[batch][number] = value
            self.held += value.nbytes

    def keep(self, batch: int, alive: Iterable[int]) -> None:
        """Forget all but these."""
        for number in set(self.values[batch]) - set(alive):
            value = self.values[batch].pop(number)
            if isinstance(value, jax.Array):
                self.held -= value.nbytes
