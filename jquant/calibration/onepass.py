"""No stages: every weight is calibrated on the function as it came, or on what is known already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jquant.calibration.canonical import jaxpr_key, text
from jquant.calibration.capture import capture, capture_step
from jquant.calibration.evidence import Evidence
from jquant.calibration.flat import Piece
from jquant.calibration.segments import Task
from jquant.calibration.stages import Stage
from jquant.interpreter import trace
from jquant.lazy import abstract


@dataclass(frozen=True)
class OnePass:
    """What `walk.Walk` is, without a walk.

    Args:
        paths: the planned weights.
        wanted: those whose inputs are to be read; without any there is a stage for every weight,
            and the function is not called.
        batches: what to read them from; its length is told if it has one.
        spread: whether evidence says how inputs are spread.
    """

    fn: Callable[..., Any]
    params: Any
    paths: Sequence[str]
    wanted: Sequence[str] = ()
    batches: Iterable[Any] = ()
    spread: bool = False

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

    def describe(self) -> Iterator[str]:
        """What the function computes, for a fingerprint."""
        if self.wanted:
            for batch in list(self.batches)[:1]:
                inputs = batch if isinstance(batch, tuple) else (batch,)
                yield text(jaxpr_key(trace(self.fn, abstract(self.params), *inputs)[0]))

    def data(self) -> Iterator[Any]:
        """All arrays of all batches."""
        for batch in self.batches:
            yield from jax.tree.leaves(batch)

    def tasks(self) -> Iterator[Task]:
        """The program that reads the evidence, for every shape of batch."""
        if not self.wanted:
            return
        step, shapes = (
            capture_step(self.fn, frozenset(self.wanted), self.spread),
            abstract(self.params),
        )
        kinds = Counter(
            (
                jax.tree.structure(b),
                tuple((x.shape, jnp.result_type(x)) for x in jax.tree.leaves(b)),
            )
            for b in (batch if isinstance(batch, tuple) else (batch,) for batch in self.batches)
        )
        for (structure, leaves), times in kinds.items():
            inputs = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
            total = jax.eval_shape(step, None, shapes, inputs)[0]
            yield Task("reading", 0, step, (total, shapes, inputs), times)

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
        found = capture(
            self.fn, self.params, self.batches,
            paths=self.wanted, spread=self.spread, progress=told,
        )  # fmt: skip
        return {Piece(path): evidence for path, evidence in found.items()}

    def advance(self, stage: int | None, current: Any, original: Any, told: Any = None) -> None:
        """Nothing is alive between weights that do not depend on each other."""
