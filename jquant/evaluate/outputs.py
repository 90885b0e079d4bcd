"""How far the outputs of any function have moved: their relative squared error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jquant.inference import apply
from jquant.trees.lazy import realize
from jquant.weights.arguments import inputs_of


def output_error(
    fn: Callable[..., Any],
    params: Any,
    qparams: Any,
    batches: Iterable[Any],
    *,
    progress: Callable[[int], None] | None = None,
) -> float:
    """The squared error of a function's outputs, relative to the outputs' own squares.

    `sum |fn(params, x) - fn(qparams, x)|^2 / sum |fn(params, x)|^2` over all floats in the outputs.
    It suits functions whose outputs are no logits of tokens; for those there is `compare`.

    Args:
        fn: `fn(params, *inputs)`; outputs are any pytree with floats.
        params, qparams: the two sets of parameters; either may hold quantized weights and lazy
            leaves, which are read.
        batches: each a tuple of inputs, or the only input.
        progress: called with the number of batches done.

    Returns:
        0 for outputs that are the same, 1 where the error is as large as the outputs.

    Raises:
        ValueError: no batches, or outputs without floats, that are not finite, or that are all 0.

    Example:
        >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 1))
        >>> round(output_error(lambda params, x: x @ params, w, 0.9 * w, [x]), 6)
        0.01
    """
    run, params, qparams = apply(fn), realize(params), realize(qparams)
    error, size = 0.0, 0.0
    for done, batch in enumerate(batches, 1):
        inputs = inputs_of(batch, done - 1)
        parts = _squares(run(params, *inputs), run(qparams, *inputs))
        error, size = error + float(parts[0]), size + float(parts[1])
        if progress is not None:
            progress(done)
    if not np.isfinite([error, size]).all() or size == 0:
        raise ValueError(
            f"the outputs' squares are {size:g}, their error's {error:g}; pass batches whose "
            "outputs hold finite floats that are not all 0 (an iterator is used up once)"
        )
    return error / size


@jax.jit
def _squares(full: Any, quantized: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sums of squares of the error, and of the full outputs, float32."""
    pairs = [
        (one.astype(jnp.float32), other.astype(jnp.float32))
        for one, other in zip(jax.tree.leaves(full), jax.tree.leaves(quantized), strict=True)
        if jnp.issubdtype(one.dtype, jnp.floating)
    ]
    zero = jnp.zeros((), jnp.float32)
    error = sum((jnp.sum(jnp.square(one - other)) for one, other in pairs), zero)
    return error, sum((jnp.sum(jnp.square(one)) for one, _ in pairs), zero)
