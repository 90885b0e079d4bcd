"""Evidence for every weight, read while the function runs on calibration batches.

It is a walk of one stage: a compiled program runs what leads to the weights and adds each batch to
the sums; nothing returns to the host between batches. Weights that share an input (q, k and v; gate
and up) share one second moment, in the program and in the result. Memory is the sum over distinct
inputs of `4·in²` bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jquant.calibration.cutting import Cuts, Recording
from jquant.calibration.data import in_words
from jquant.calibration.evidence import Evidence
from jquant.calibration.saliency import Saliency
from jquant.calibration.tokens import Given, check_any, chosen, refuse, weighed
from jquant.calibration.walk import Run, Walk, unmatched
from jquant.errors import EvidenceError
from jquant.trees.placement import transferring
from jquant.weights.leaves import Leaves


@transferring
def capture(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    paths: Collection[str] | None = None,
    spread: bool = False,
    token_weights: Given = None,
    saliency: Saliency | None = None,
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
        saliency: what `jq.saliency` returned of these batches: evidence of the weights it names is
            `guided` too. None: not.
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
            tokens are not known. Saliency of other batches, or of layers that are one stack here.

    Example:
        >>> import jax.numpy as jnp
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
    leaves = Leaves.of(params)
    watched = [path for path in leaves.arrays if paths is None or path in paths]
    cuts = Cuts(fn, leaves, Recording(dict.fromkeys(watched, ()), None, spread=spread))
    if saliency is not None:
        for path in watched:
            if path not in saliency.names and any(n.startswith(f"{path}[") for n in saliency.names):
                saliency.check_named(path, path)
    walk = Walk(cuts, _runs(cuts, batches, token_weights, saliency))
    evidence = walk.gather(0, leaves.read, leaves.read, progress)
    if cuts.first is None:
        raise EvidenceError("capture got no batches; pass at least one array or tuple of inputs")
    return {piece.path: one for piece, one in evidence.items()}


def _runs(
    cuts: Cuts, batches: Iterable[Any], token_weights: Given, saliency: Saliency | None
) -> Iterator[Run]:
    """One batch after the other, none kept; tokens that are not known are refused as they come."""
    choice, seen, shapes = chosen(token_weights), [], []
    for number, (inputs, weights) in enumerate(weighed(batches, choice)):
        kinds, own = len(cuts.kinds), None
        if saliency is not None:
            shapes.append(in_words(inputs))
            own = saliency.of_batch(number, shapes[-1])
        run = Run.of(cuts.of(number, inputs, weights), inputs, weights, own)
        if choice is not None and choice.unmatched == "raise" and len(cuts.kinds) > kinds:
            refuse([(str(piece), why) for piece, why in unmatched(cuts, run).items()])
        seen += [] if weights is None else [np.any(weights, keepdims=True)]
        yield run
    check_any(seen)
    if saliency is not None:
        saliency.check(shapes)
