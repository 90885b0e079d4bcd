"""What an error in a weight's outputs costs, token by token: `Saliency`, and where it is used.

The squared error of a weight's outputs counts all tokens alike. The loss does not: to second order
an error of output i at token t costs the square of `∂ℓ/∂y_ti`, on the average. So each row of a
weight's inputs is weighed by the mean of these squares over a group of output rows, and the moments
of the groups take the place of the one moment (Kim et al. 2025, GuidedQuant). `backward.py` makes
the squares; whoever has other weights for tokens gives them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jquant.calibration.tokens import weights_of
from jquant.errors import EvidenceError, near

Uses = tuple[np.ndarray, ...]  # for each product of a weight, in the order of the function


@dataclass(frozen=True, eq=False)
class Saliency:
    """What tokens count for each weight by itself, and for groups of its output rows.

    Args:
        batches: for each batch, the name of a weight (a layer of a stack: `layers/q/kernel[3]`) →
            an array `[*batch, tokens, groups]` of numbers from 0 on, the rows in the order in which
            the weight's product takes them; a tuple of arrays for a weight that several products
            use. Only relations between the tokens of one weight and group matter.
        kinds: the shapes of the batches in words, to refuse others; None: not told.

    Raises:
        EvidenceError: an array is none, holds negative numbers, NaN or infinity; all of a weight's
            are 0; groups differ; names weight and batch.

    Example:
        >>> saliency = Saliency(({"w": np.array([[1.0], [2.0]])},))
        >>> saliency.groups, saliency.nbytes, list(saliency.names)
        (1, 8, ['w'])
    """

    batches: Sequence[Mapping[str, Any]]
    kinds: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        batches = tuple(
            {name: _checked(name, number, given) for name, given in batch.items()}
            for number, batch in enumerate(self.batches)
        )
        if not batches or not batches[0]:
            raise EvidenceError("a saliency of no batches, or of no weights, weighs nothing")
        object.__setattr__(self, "batches", batches)
        for number, batch in enumerate(batches):
            if batch.keys() != batches[0].keys():
                name = sorted(batch.keys() ^ batches[0].keys())[0]
                raise EvidenceError(
                    f"saliency of {name!r} is in some batches, not in all: {number}"
                )
        for name in batches[0]:
            arrays = [array for batch in batches for array in batch[name]]
            if {array.shape[-1] for array in arrays} != {self.groups}:
                sizes = sorted({array.shape[-1] for array in arrays} | {self.groups})
                raise EvidenceError(
                    f"saliency of {name!r}: the last axis of all arrays is that of the groups, got "
                    f"{sizes} groups"
                )
            if not any(array.any() for array in arrays):
                raise EvidenceError(
                    f"saliency of {name!r} is 0 for all tokens of all {len(batches)} batches, so "
                    "nothing would be calibrated; leave the weight out, or pass another objective"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the weights, or of layers of stacked ones."""
        return tuple(self.batches[0])

    @property
    def groups(self) -> int:
        """How many groups of output rows there are."""
        return next(iter(self.batches[0].values()))[0].shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: 4 for each token, weight and group, on the host."""
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> Iterator[np.ndarray]:
        """All arrays, batch by batch."""
        for batch in self.batches:
            for uses in batch.values():
                yield from uses

    def check(self, kinds: Sequence[str]) -> None:
        """Refuse it beside other batches than those that it was made of, of these shapes.

        Raises:
            EvidenceError: there are not as many, or they are of other shapes; names the first.
        """
        for number, kind in enumerate(kinds):
            self.of_batch(number, kind)
        if len(kinds) != len(self.batches):
            raise EvidenceError(
                f"saliency is of {len(self.batches)} batches, got {len(kinds)}; pass the batches "
                "that it was made of, in their order"
            )

    def of_batch(self, number: int, kind: str) -> Mapping[str, Uses]:
        """The arrays of a batch of these shapes.

        Raises:
            EvidenceError: there are not as many, or it is of other shapes.
        """
        own = number < len(self.batches) and (self.kinds is None or self.kinds[number] == kind)
        if not own:
            made = (
                f"of {len(self.batches)} batches" if self.kinds is None else ", ".join(self.kinds)
            )
            raise EvidenceError(
                f"batch {number} ({kind}) is none that this saliency ({made}) was made of; pass "
                "the same batches, in their order"
            )
        return self.batches[number]

    def check_named(self, path: str, name: str) -> None:
        """Refuse a weight, or a layer of one, that it does not know.

        Raises:
            EvidenceError: names the weight, and what to do.
        """
        if name in self.names:
            return
        if any(other.startswith(f"{path}[") for other in self.names):
            raise EvidenceError(
                f"saliency of {path!r} is of its layers, one by one, and here they are taken "
                "together; pass it to quantize(..., sequential='weight') or 'block'"
            )
        raise EvidenceError(
            f"saliency does not know weight {name!r}; near: {near(name, self.names)}. Make it of "
            "this function with paths= that hold the weight"
        )


def edges_of(rows: int, groups: int) -> list[int]:
    """Where groups of output rows begin and end; as even as can be.

    Example:
        >>> edges_of(10, 4)
        [0, 2, 5, 7, 10]
    """
    return [rows * g // groups for g in range(groups + 1)]


def _checked(name: str, number: int, given: Any) -> Uses:
    """The arrays of a weight, float32."""
    arrays = []
    for array in map(np.asarray, given if isinstance(given, tuple | list) else (given,)):
        where = f"saliency of {name!r} in batch {number}"
        if array.dtype.kind not in "fiub" or array.ndim < 2:
            raise EvidenceError(
                f"{where} must be numbers [*batch, tokens, groups], got "
                f"{array.dtype}{list(array.shape)}"
            )
        arrays.append(weights_of(array, f"{where}: weights"))
    if not arrays:
        raise EvidenceError(f"saliency of {name!r} in batch {number} has no arrays")
    return tuple(arrays)


class Misfit(Exception):
    """Saliency of another shape than a weight's rows; the weight goes by `name` in the program."""

    def __init__(self, name: str, words: str):
        super().__init__(name, words)
        self.name, self.words = name, words

    def of(self, path: str, batch: int) -> EvidenceError:
        """The error for a user."""
        return EvidenceError(
            f"saliency of {path!r}, batch {batch}: {self.words}; make it with jq.saliency of this "
            "function and these batches"
        )


class Turns:
    """Saliency as a program takes it: each use of a weight gets the next array of its name."""

    def __init__(self, given: Mapping[str, Sequence[Array]]):
        self._left = {name: list(arrays) for name, arrays in given.items()}

    def take(self, name: str, rows: Sequence[int]) -> Float[Array, "*batch tokens groups"] | None:
        """The saliency of the rows `[*batch, tokens]` of the next use of a weight; None: unknown.

        Raises:
            Misfit: there is none left for this use, or it is of another shape.
        """
        if name not in self._left:
            return None
        if not self._left[name]:
            raise Misfit(name, "the function uses it more often than there are arrays")
        array = self._left[name].pop(0)
        if array.shape[:-1] != tuple(rows):
            shape = ", ".join(map(str, rows))
            raise Misfit(name, f"got {list(array.shape)} for rows [{shape}, groups]")
        return array
