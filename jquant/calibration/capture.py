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
from jaxtyping import Array, PyTree, UInt8

from jquant.axes.roles import Reading, decisive
from jquant.calibration.assemble import assemble
from jquant.calibration.evidence import Evidence
from jquant.calibration.find import Sightings, observe
from jquant.calibration.tokens import Given, check_any, chosen, refuse, weighed
from jquant.errors import EvidenceError
from jquant.trees.lazy import realize
from jquant.trees.placement import transferring
from jquant.weights.arguments import by_path, shape_of


@transferring
def capture(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    paths: Collection[str] | None = None,
    spread: bool = False,
    token_weights: Given = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Evidence]:
    """Second moments, counts, means and maxima of the inputs of every weight of `fn`.

    Args:
        fn: any JAX function `fn(params, *inputs)`.
        params: its parameters; lazy ones are read, all of them.
        batches: an iterable; each batch is a tuple of `fn`'s inputs, or the only one: an array, a
            number, or any pytree of them (a NamedTuple too). Batches of one shape share a compiled
            program.
        paths: the weights to watch; all of them when None.
        spread: also histograms of the inputs, for static ranges of `Activations`.
        token_weights: what each token counts: a function `(*inputs) -> array` of a batch's inputs,
            one array for each batch, or a `TokenWeights`; None: each counts 1. Arrays are bool,
            integer or float, not negative, of the leading axes of an input: `[batch, time]`.
        progress: called after each batch with the number of batches done.

    Returns:
        path → `Evidence` with `[*batch, in, in]` second moments: sums over the tokens of all
        batches, float32. Stacked layers and experts keep their batch axes. Weights that are only
        looked up (embeddings) have none. Weights with a common input hold the very same arrays.
        Every row of an input is a token, but for all-zero slots of experts. With token weights all
        sums are weighted, the count too, and tokens of weight 0 are left out, whatever is in them.

    Raises:
        TreeError: params or a batch hold what is no array or number, or two leaves have one path.
        UnsupportedPrimitiveError: a watched weight cannot be followed; names path and primitive.
        EvidenceError: no batches, or an input that is NaN, infinite, or too large to be squared;
            names path and batch. Token weights that are no weights, or a weight used on rows whose
            tokens are not known.

    Example:
        >>> fn = lambda p, x: x @ p["w"]
        >>> evidence = capture(fn, {"w": jnp.ones((2, 3))}, [jnp.eye(2), jnp.eye(2)])
        >>> evidence["w"].second_moment.tolist(), float(evidence["w"].count)
        ([[2.0, 0.0], [0.0, 2.0]], 4.0)
        >>> fn = lambda p, x, mask: x @ p["w"]
        >>> padded = jnp.ones((1, 3, 2)), jnp.array([[1, 1, 0]])
        >>> of = lambda x, mask: mask
        >>> float(capture(fn, {"w": jnp.ones((2, 3))}, [padded], token_weights=of)["w"].count)
        2.0
    """
    watched = None if paths is None else frozenset(paths)
    return read(
        fn, params, batches, watched, spread=spread, token_weights=token_weights, progress=progress
    )[0]


def read(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    paths: frozenset[str] | None,
    *,
    spread: bool,
    token_weights: Given,
    progress: Callable[[int], None] | None,
) -> tuple[dict[str, Evidence], dict[str, str]]:
    """What `capture` returns, and the weights whose rows' tokens are not known → why."""
    by_path(params)  # refuses what is no tree of arrays
    token_weights = chosen(token_weights)
    step = capture_step(fn, paths, spread, token_weights and token_weights.unmatched)
    params = realize(params)
    tally, first, seen = Tally(), None, []
    for number, (inputs, weights) in enumerate(weighed(batches, token_weights)):
        first = inputs if first is None else first
        seen += [] if weights is None else [np.any(weights, keepdims=True)]
        try:
            tally.add(step, params, inputs, weights)
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
    check_any(seen)
    assert tally.total is not None
    return tally.evidence(), dict(tally.total.unmatched)


class Tally:
    """Sightings added up over batches, and what is wrong with those of each batch (`_FLAWS`)."""

    def __init__(self) -> None:
        self.total: Sightings | None = None
        self.flaws: list[UInt8[Array, " values"]] = []

    def add(self, run: Callable[..., Any], *operands: Any) -> None:
        """Add a batch: `run(total, *operands)` gives what `accumulate` does.

        Raises:
            EvidenceError: the batch shows other uses than the ones before.
        """
        if self.total is None:
            shapes = jax.eval_shape(run, None, *operands)[0]
            self.total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        try:
            self.total, flaws = run(self.total, *operands)
        except UsesDiffer as error:
            raise EvidenceError(
                f"batch {len(self.flaws)} takes another path through the function than batch 0: "
                "its weights are used differently; pass batches that take the same path, or "
                "capture them apart and merge"
            ) from error
        self.flaws.append(flaws)

    def wait(self) -> None:
        """Until the last batch is done, where it would otherwise be queued only."""
        jax.block_until_ready(self.flaws[-1])

    def evidence(
        self, name: Callable[[str], str] = lambda path: path, where: str = ""
    ) -> dict[str, Evidence]:
        """The evidence of whole weights by path; `name` and `where` serve the error's message.

        Raises:
            EvidenceError: an input was not finite, or too large for its moment; names weight, batch
                and `where`.
        """
        assert self.total is not None, "no batch was added"
        table = np.asarray(jnp.stack(self.flaws))  # [batches, values]
        for path, _, position in self.total.keys:
            column = table[:, position]
            if column.any():
                batch = int(np.argmax(column > 0))
                said, remedy = _FLAWS[int(column[batch])]
                raise EvidenceError(
                    f"the input of weight {name(path)!r} is {said}, first in batch {batch}{where}; "
                    f"{remedy}"
                )
        return _file(self.total)


def not_taken(number: int, inputs: Any, first: Any, error: Exception) -> EvidenceError:
    """The error for a batch that the function refuses, though it took the first one."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return EvidenceError(
        f"batch {number} has {in_words(inputs)}, where batch 0 has {in_words(first)}, and the "
        f"function does not take it: {said:.200}"
    )


def kinds(inputs: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape and dtype of every array."""
    return tuple(map(shape_of, jax.tree.leaves(inputs)))


def in_words(inputs: Any) -> str:
    """The same in words: `int32[4, 512]`."""
    return ", ".join(f"{kind.dtype}{list(kind.shape)}" for kind in kinds(inputs))


# What may be wrong with an input, and what to do about it.
_FLAWS = {
    1: (
        "finite, but so large that its second moment is beyond float32",
        "scale the function's inputs or the weights before it so that sums of squares over tokens "
        "stay below 3e38 (values up to 1e16 always do), or keep the weight (jq.keep)",
    ),
    2: ("NaN or infinite", "check that batch, or run the function in a wider dtype"),
}


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
    fn: Callable[..., Any],
    paths: frozenset[str] | None,
    spread: bool = False,
    unmatched: str | None = None,
) -> Callable[..., Any]:
    """The compiled program: sums so far, and a batch, to sums and what is wrong with them."""

    def wanted(path: str) -> bool:
        return paths is None or path in paths

    def step(
        total: Sightings | None, params: PyTree, inputs: tuple[Any, ...], weights: Any = None
    ) -> Any:
        found = observe(fn, wanted, params, inputs, spread, weights)
        if unmatched != "count":
            refuse(found.unmatched)
        return accumulate(total, found)

    return jax.jit(step, donate_argnums=0)


def accumulate(
    total: Sightings | None, new: Sightings
) -> tuple[Sightings, UInt8[Array, " values"]]:
    """Both together, and for each value of `new` what is wrong with it: 0 nothing, see `_FLAWS`.

    Raises:
        UsesDiffer: they are not sightings of the same uses.
    """
    single = new.values
    if total is not None:
        if (total.keys, len(total.values)) != (new.keys, len(new.values)):
            raise UsesDiffer
        values = [old.merge(more) for old, more in zip(total.values, new.values, strict=True)]
        new = replace(new, values=values)
    flaws = [_flaw(one, all_) for one, all_ in zip(single, new.values, strict=True)]
    return new, jnp.stack(flaws) if flaws else jnp.zeros(0, jnp.uint8)


def _flaw(batch: Evidence, total: Evidence) -> UInt8[Array, ""]:
    """What is wrong with the inputs of a batch, or with the sums that they are added to."""
    assert batch.abs_max is not None
    # Whatever is too large shows in its own sum of squares.
    sums = [jnp.diagonal(total.second_moment, axis1=-2, axis2=-1), total.drift]
    fine = [jnp.all(jnp.isfinite(leaf)) for leaf in sums if leaf is not None]
    flaw = jnp.where(jnp.all(jnp.stack(fine)), 0, 1)
    return jnp.where(jnp.all(jnp.isfinite(batch.abs_max)), flaw, 2).astype(jnp.uint8)


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
