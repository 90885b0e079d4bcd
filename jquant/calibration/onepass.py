"""No stages: every weight is calibrated on the function as it came, or on what is known already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jquant.calibration.capture import capture_step, kinds, read
from jquant.calibration.evidence import Evidence
from jquant.calibration.segments import Task
from jquant.calibration.stages import Stage
from jquant.calibration.tokens import Given, chosen, weighed
from jquant.programs.keys import jaxpr_key, text
from jquant.programs.straight import Piece
from jquant.programs.walker import trace
from jquant.trees.lazy import abstract
from jquant.weights.arguments import inputs_of, shape_of, value_of


@dataclass(frozen=True)
class OnePass:
    """What `walk.Walk` is, without a walk.

    Args:
        paths: the planned weights.
        wanted: those whose inputs are to be read; without any there is a stage for every weight,
            and the function is not called.
        batches: what to read them from; its length is told if it has one.
        spread: whether evidence says how inputs are spread.
        token_weights: what each token counts; see `capture`.

    Attributes:
        unmatched: once it has been read, the weights with rows whose tokens are not known → why.
    """

    fn: Callable[..., Any]
    params: Any
    paths: Sequence[str]
    wanted: Sequence[str] = ()
    batches: Iterable[Any] = ()
    spread: bool = False
    token_weights: Given = None
    unmatched: dict[Piece, str] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[Stage, ...]:
        if self.wanted:
            return (Stage(tuple(map(Piece, self.paths)), 1, 1),)
        return tuple(Stage((Piece(path),), k, k) for k, path in enumerate(self.paths, start=1))

    @property
    def batch_count(self) -> int:
        return len(self.batches) if hasattr(self.batches, "__len__") else 0  # type: ignore[arg-type]

    @property
    def alive(self) -> tuple[()]:
        """Nothing is kept between stages."""
        return ()

    @property
    def nested(self) -> dict[Piece, str]:
        """Nothing to tell of single weights: all of them are calibrated in one pass."""
        return {}

    @property
    def unpaired(self) -> dict[Piece, str]:
        """Nothing to tell either: no drift is read."""
        return {}

    def describe(self) -> Iterator[str]:
        """What the function computes, for a fingerprint."""
        if self.wanted:
            for batch in list(self.batches)[:1]:
                closed, _ = trace(self.fn, abstract(self.params), *inputs_of(batch, 0))
                yield text(jaxpr_key(closed))

    def data(self) -> Iterator[Any]:
        """All arrays of all batches."""
        for inputs, weights in weighed(self.batches, self.token_weights):
            yield from map(value_of, jax.tree.leaves(inputs))
            if weights is not None:
                yield weights

    def tasks(self) -> Iterator[Task]:
        """The program that reads the evidence, for every shape of batch."""
        if not self.wanted:
            return
        given = chosen(self.token_weights)
        step = capture_step(self.fn, frozenset(self.wanted), self.spread, given and given.unmatched)
        shapes = jax.tree.map(shape_of, self.params)
        times_of = Counter(
            (jax.tree.structure(pair), kinds(pair)) for pair in weighed(self.batches, given)
        )
        for (structure, leaves), times in times_of.items():
            pair = jax.tree.unflatten(structure, leaves)
            total = jax.eval_shape(step, None, shapes, *pair)[0]
            yield Task("reading", 0, step, (total, shapes, *pair), times)

    def alive_bytes(self, stage: int) -> int:
        """Nothing is kept between stages."""
        del stage
        return 0

    def gather(
        self, stage: int, current: Any, original: Any, told: Callable[[int], None] | None = None
    ) -> dict[Piece, Evidence]:
        """The evidence of all wanted weights."""
        del stage, current, original
        if not self.wanted:
            return {}
        found, unmatched = read(
            self.fn, self.params, self.batches, frozenset(self.wanted),
            spread=self.spread, token_weights=self.token_weights, progress=told,
        )  # fmt: skip
        self.unmatched.update((Piece(path), why) for path, why in unmatched.items())
        return {Piece(path): evidence for path, evidence in found.items()}

    def advance(self, stage: int | None, current: Any, original: Any, told: Any = None) -> None:
        """Nothing is alive between weights that do not depend on each other."""
