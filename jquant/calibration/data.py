"""Calibration batches as they are used: tuples of inputs, with the weights of their tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np

from jquant.calibration.saliency import Saliency
from jquant.calibration.tokens import Given, Weights, check_any, chosen, weighed
from jquant.errors import EvidenceError
from jquant.weights.arguments import Inputs, shape_of, value_of


@dataclass(frozen=True, eq=False)
class Data:
    """Batches that can be gone over again.

    Attributes:
        batches: the inputs of each.
        weights: of the tokens of each, of one dtype; None where no tokens are weighed.
        unmatched: see `TokenWeights`.
        saliency: what tokens count for each weight by itself; None: the same.
    """

    batches: tuple[Inputs, ...] = ()
    weights: tuple[Weights, ...] | None = None
    unmatched: Literal["raise", "count"] = "raise"
    saliency: Saliency | None = None

    @staticmethod
    def of(batches: Iterable[Any], token_weights: Given = None, most: int | None = None) -> Data:
        """The batches that a public function is given.

        Args:
            batches: as for `capture`.
            token_weights: as for `capture`.
            most: how many batches are taken; None: all.

        Raises:
            TreeError: a batch holds what is no array or number.
            EvidenceError: no batches; or token weights that are no weights, not as many as
                batches, or all 0.
        """
        pairs = list(itertools.islice(weighed(batches, token_weights), most))
        if not pairs:
            raise EvidenceError("got no batches; pass at least one array or tuple of inputs")
        inputs = tuple(batch for batch, _ in pairs)
        arrays = [weights for _, weights in pairs if weights is not None]
        choice = chosen(token_weights)
        if choice is None or not arrays:
            return Data(inputs)
        check_any(arrays)
        if any(array.dtype != np.bool_ for array in arrays):
            arrays = [array.astype(np.float32) for array in arrays]
        return Data(inputs, tuple(arrays), choice.unmatched)

    @property
    def strict(self) -> bool:
        """Whether the token of every row must be known."""
        return self.weights is not None and self.unmatched == "raise"

    def pairs(self) -> Iterator[tuple[Inputs, Weights | None]]:
        """For every batch its inputs, and the weights of its tokens or None."""
        yield from zip(self.batches, self.weights or itertools.repeat(None), strict=False)

    def guided(self, saliency: Saliency) -> Data:
        """The same with what tokens count for each weight.

        Raises:
            EvidenceError: it is of other batches.
        """
        saliency.check(list(map(in_words, self.batches)))
        return replace(self, saliency=saliency)

    def arrays(self) -> Iterator[Any]:
        """All arrays of all batches, then all weights, then all saliency."""
        for inputs in self.batches:
            yield from map(value_of, jax.tree.leaves(inputs))
        yield from self.weights or ()
        yield from () if self.saliency is None else self.saliency.arrays()

    def kinds(self) -> Iterator[Inputs]:
        """One batch of every kind: structure, shapes and dtypes."""
        met = set()
        for inputs in self.batches:
            kind = kind_of(inputs)
            if kind not in met:
                met.add(kind)
                yield inputs


def kind_of(inputs: Any) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """What batches that share programs have in common."""
    return jax.tree.structure(inputs), tuple(map(shape_of, jax.tree.leaves(inputs)))


def in_words(inputs: Any) -> str:
    """The shapes and dtypes of a batch: `int32[4, 512]`."""
    return ", ".join(f"{kind.dtype}{list(kind.shape)}" for kind in kind_of(inputs)[1])


def not_taken(number: int, inputs: Any, first: Any, error: Exception) -> EvidenceError:
    """The error for a batch that the function refuses, though it took the first one."""
    message = (str(error).splitlines() or [type(error).__name__])[0]
    return EvidenceError(
        f"batch {number} has {in_words(inputs)}, where batch 0 has {in_words(first)}, and the "
        f"function does not take it: {message:.200}"
    )
