"""Evidence for every weight, read while the function runs on calibration batches.

One compiled program runs the function and adds each batch to the sums; nothing returns to the host
between batches. Weights that share an input (q, k and v; gate and up) share one second moment, in
the program and in the result. Memory is the sum over distinct inputs of `4·in²` bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from jquant.calibration.evidence import Evidence
from jquant.calibration.reading import Reading, assemble, decisive
from jquant.calibration.weights import Sightings, observe
from jquant.errors import EvidenceError
from jquant.lazy import realize


def capture(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    paths: Collection[str] | None = None,
    spread: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Evidence]:
    """Second moments, counts, means and maxima of the inputs of every weight of `fn`.

    Args:
        fn: any JAX function `fn(params, *inputs)`.
        params: its parameters; lazy ones are read, all of them.
        batches: an iterable; each batch is one array, or a tuple of `fn`'s inputs. Batches of one
            shape share a compiled program.
        paths: the weights to watch; all of them when None.
        spread: also histograms of the inputs, for static ranges of `Activations`.
        progress: called after each batch with the number of batches done.

    Returns:
        path → `Evidence` with `[*batch, in, in]` second moments: sums over the tokens of all
        batches, float32. Stacked layers and experts keep their batch axes. Weights that are only
        looked up (embeddings) have none. Weights with a common input hold the very same arrays.
        Every row of an input is a token: where a function pads, zero the padded rows (they then add
        nothing to the moments, though to the count); all-zero slots of experts are not counted.

    Raises:
        UnsupportedPrimitiveError: a watched weight cannot be followed; names path and primitive.
        EvidenceError: no batches, or an input that is NaN or infinite; names path and batch.

    Example:
        >>> fn = lambda p, x: x @ p["w"]
        >>> evidence = capture(fn, {"w": jnp.ones((2, 3))}, [jnp.eye(2), jnp.eye(2)])
        >>> evidence["w"].second_moment.tolist(), float(evidence["w"].count)
        ([[2.0, 0.0], [0.0, 2.0]], 4.0)
    """
    step = capture_step(fn, None if paths is None else frozenset(paths), spread)
    params = realize(params)
    tally, first = Tally(), None
    for number, batch in enumerate(batches):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        first = inputs if first is None else first
        try:
            tally.add(step, params, inputs)
        except EvidenceError:
            raise
        except Exception as error:  # whatever the function says: Flax has its own errors
            if number == 0:
                raise
            raise not_taken(number, inputs, first, error) from error
        if progress is not None:
            tally.wait()
            progress(number + 1)
    if first is None:
        raise EvidenceError("capture got no batches; pass at least one array or tuple of inputs")
    return tally.evidence()


class Tally:
    """Sightings added up over batches, and which batches were finite."""

    def __init__(self) -> None:
        self.total: Sightings | None = None
        self.finite: list[Bool[Array, " values"]] = []

    def add(self, run: Callable[..., Any], *operands: Any) -> None:
        """Add a batch: `run(total, *operands)` gives the new total and which values are finite.

        Raises:
            EvidenceError: the batch shows other uses than the ones before.
        """
        if self.total is None:
            shapes = jax.eval_shape(run, None, *operands)[0]
            self.total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        try:
            self.total, finite = run(self.total, *operands)
        except UsesDiffer as error:
            raise EvidenceError(
                f"batch {len(self.finite)} takes another path through the function than batch 0: "
                "its weights are used differently; pass batches that take the same path, or "
                "capture them apart and merge"
            ) from error
        self.finite.append(finite)

    def wait(self) -> None:
        """Until the last batch is done, where it would otherwise be queued only."""
        jax.block_until_ready(self.finite[-1])

    def evidence(
        self, name: Callable[[str], str] = lambda path: path, where: str = ""
    ) -> dict[str, Evidence]:
        """The evidence of whole weights by path; `name` and `where` serve the error's message.

        Raises:
            EvidenceError: an input was not finite; names weight, batch and `where`.
        """
        assert self.total is not None, "no batch was added"
        table = np.asarray(jnp.stack(self.finite))  # [batches, values]
        for path, _, position in self.total.keys:
            if not table[:, position].all():
                batch = int(np.argmin(table[:, position]))
                raise EvidenceError(
                    f"the input of weight {name(path)!r} is NaN or infinite, first in batch "
                    f"{batch}{where}; check that batch, or run the function in a wider dtype"
                )
        return _file(self.total)


def not_taken(number: int, inputs: Any, first: Any, error: Exception) -> EvidenceError:
    """The error for a batch that the function refuses, though it took the first one."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return EvidenceError(
        f"batch {number} has {in_words(inputs)}, where batch 0 has {in_words(first)}, and the "
        f"function does not take it: {said:.200}"
    )


def kinds(inputs: Any) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Shape and dtype of every array."""
    return tuple((np.shape(x), str(jnp.result_type(x))) for x in jax.tree.leaves(inputs))


def in_words(inputs: Any) -> str:
    """The same in words: `int32[4, 512]`."""
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in kinds(inputs))


class UsesDiffer(Exception):
    """Two batches show different weights or readings."""


def _cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.lru_cache`, passing by arguments that cannot be hashed."""
    kept = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            hash(args)
        except TypeError:
            return function(*args)
        return kept(*args)

    return call


@_cached
def capture_step(
    fn: Callable[..., Any], paths: frozenset[str] | None, spread: bool = False
) -> Callable[..., Any]:
    """The compiled program: sums so far, and a batch, to sums and whether they are finite."""

    def wanted(path: str) -> bool:
        return paths is None or path in paths

    def step(total: Sightings | None, params: PyTree, inputs: tuple[Any, ...]) -> Any:
        return accumulate(total, observe(fn, wanted, params, inputs, spread))

    return jax.jit(step, donate_argnums=0)


def accumulate(total: Sightings | None, new: Sightings) -> tuple[Sightings, Bool[Array, " values"]]:
    """Both together, and for each value of `new` whether it is finite.

    Raises:
        UsesDiffer: they are not sightings of the same uses.
    """
    # An input channel that is not finite shows in its own sum of squares.
    power = [jnp.diagonal(value.second_moment, axis1=-2, axis2=-1) for value in new.values]
    finite = [jnp.all(jnp.isfinite(channel)) for channel in power]
    if total is not None:
        if (total.keys, len(total.values)) != (new.keys, len(new.values)):
            raise UsesDiffer
        values = [old.merge(more) for old, more in zip(total.values, new.values, strict=True)]
        new = replace(new, values=values)
    return new, jnp.stack(finite) if finite else jnp.ones(0, bool)


def _file(total: Sightings) -> dict[str, Evidence]:
    """The evidence of whole weights, by path; weights with a common input keep sharing arrays."""
    found: dict[str, list[tuple[Reading, Evidence]]] = {}
    for path, reading, position in total.keys:
        found.setdefault(path, []).append((reading, total.values[position]))
    shapes = dict(total.shapes)
    evidence: dict[str, Evidence] = {}
    for path, sightings in found.items():
        axes = decisive([use for use in total.uses if use.path == path]).axes(shapes[path])
        same = [s for s in sightings if s[0].axes(shapes[path]) == axes]
        evidence[path] = assemble(same, shapes[path])
    return evidence
