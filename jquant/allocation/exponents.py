"""One exponent for all power grids of a network, as PowerQuant has it.

The exponent `a` of `Power` sets how much finer steps are near zero. It can be fitted to each weight
or group (`Power(bits)`); here it is fitted to many weights together, by the least sum over weights
of the norm of the error, `Σ ‖W - Q_a(W)‖` (PowerQuant, Yvinec et al. 2023). PowerQuant looks for it
with Nelder and Mead's simplex; one number needs only golden sections (`grids/exponents.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.grids.exponents import Loss, best_exponent, losses, summed
from jquant.grids.power import Power
from jquant.numerics.extremes import largest


def power_exponent(
    groups: Any,
    bits: int,
    importance: Any = None,
    *,
    domain: Literal["values", "codes"] = "values",
) -> Float[Array, ""]:
    """One exponent of a power grid for many weights: the least sum of the norms of their errors.

    Pass it on as `Power(bits, float(exponent))`. Pure; may be part of a jitted function.

    Args:
        groups: a pytree of weights in groups, `[*g, b]` each, a group along the last axis.
        bits: 2 to 8.
        importance: a pytree like `groups` of what to weigh the squared errors by, or None.
        domain: as in `Power`.

    Returns:
        Scalar float32, from 0.2 to 1.2.

    Raises:
        ValueError: no weights, or `bits` or `domain` out of their set.

    Example:
        >>> w = [jax.random.normal(jax.random.key(i), (64, 1024)) for i in range(2)]
        >>> print(f"{float(power_exponent(w, 4)):.1f}")
        0.7

    References:
        Yvinec et al., PowerQuant: Automorphism Search for Non-Uniform Quantization, ICLR 2023,
        https://arxiv.org/abs/2301.09858
    """
    grid, weights = Power(bits, domain=domain), jax.tree.leaves(groups)
    if not weights:
        raise ValueError("power_exponent needs at least one weight, got an empty tree")
    importances = [None] * len(weights) if importance is None else jax.tree.leaves(importance)
    return _of_all(grid, weights, importances)


@partial(jax.jit, static_argnames="grid")
def _of_all(grid: Power, weights: list[Array], importances: list[Array | None]) -> Float[Array, ""]:
    """The search, of weights `[*g, b]` and what to weigh their errors by."""
    weights = [w.astype(jnp.float32) for w in weights]
    units = [Power(grid.bits, 1.0).fit(w)["scale"] for w in weights]
    top = largest(jnp.stack([largest(unit) for unit in units]))
    each = [
        [summed(loss, (unit / top) ** 2) for loss in losses(grid, w / unit[..., None], weight)]
        for w, unit, weight in zip(weights, units, importances, strict=True)
    ]

    def norms(parts: tuple[Loss, ...]) -> Loss:
        return lambda a: jnp.sum(jnp.stack([jnp.sqrt(part(a)) for part in parts]))

    proxy, error = (norms(parts) for parts in zip(*each, strict=True))
    return best_exponent(proxy, error).astype(jnp.float32)
