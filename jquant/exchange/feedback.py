"""Error feedback: what a packet has lost is added to the next one.

The sender keeps `residual = (tree + residual) - decompress(packet)` and adds it in the next round,
so that over many rounds everything arrives, a little late. It makes a biased rounding right in the
long run (Seide et al. 2014 for one bit; Karimireddy et al. 2019 for any compression that
contracts). Rounding to the nearest of few levels does contract. Stochastic rounding is unbiased
without feedback, and at 2 bits it does not contract: its error may be as large as what is sent, and
then the residual grows. So feedback goes with `Nearest()`, and chance with many senders.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jquant.errors import TreeError
from jquant.exchange.packet import (
    Choice,
    Packet,
    floating_leaves,
    packed,
    singles,
    values_of,
)
from jquant.grids.base import Grid
from jquant.rounding.elementwise import Nearest
from jquant.rounding.stochastic import Stochastic
from jquant.schemes.rotation import Hadamard
from jquant.weights.arguments import by_path


def with_feedback(
    tree: PyTree,
    residual: PyTree | None,
    grid: Grid,
    key: PRNGKeyArray | None,
    *,
    group: int | None = None,
    rounding: Stochastic | Nearest = Nearest(),
    rotation: Hadamard | None = None,
) -> tuple[Packet, PyTree]:
    """The packet of `tree + residual`, and what that has lost: the residual of the next round.

    Args:
        tree: as for `compress`.
        residual: what the last call returned; None in the first round. Nothing else is kept, so it
            belongs in the sender's state beside those of its optimizer.
        grid, key, group, rotation: as for `compress`.
        rounding: `Nearest()` (default; key may be None), or `Stochastic()`, whose residual stays
            small only where the grid has levels enough: 4 bits and more.

    Returns:
        `(packet, residual)`: the residual is the tree with float32 arrays for floating leaves, and
        None for others.

    Raises:
        TreeError: the residual is not of this tree; else as `compress`.

    Example:
        >>> import jquant as jq
        >>> grid = jq.grids.Uniform(2, symmetric=True, convention="S3")  # -1, 0 and 1
        >>> update, residual, arrived = {"w": jnp.array([1.0, 0.3])}, None, jnp.zeros(2)
        >>> for _ in range(10):
        ...     packet, residual = jq.exchange.with_feedback(update, residual, grid, None)
        ...     arrived += jq.decompress(packet)["w"]
        >>> [round(float(x), 3) for x in arrived + residual["w"]]  # alone, 0.3 would never arrive
        [10.0, 3.0]
    """
    choice = Choice.of(grid, key, group, rounding, rotation)
    leaves = floating_leaves(tree)
    dtypes = {path: leaf.dtype for path, leaf in leaves.items()}
    sums = singles(leaves, choice, key)
    if residual is not None:
        lost = _residuals(tree, residual, leaves)
        sums = {path: leaf + lost[path] for path, leaf in sums.items()}
    packet = packed(tree, sums, dtypes, choice, key)
    values = values_of(packet)
    left = [sums[path] - values[path] if path in sums else None for path in by_path(tree)]
    return packet, jax.tree.unflatten(jax.tree.structure(tree), left)


def _residuals(tree: PyTree, residual: PyTree, leaves: dict[str, Array]) -> dict[str, Array]:
    """The residual of every floating leaf, checked."""
    advice = "pass what with_feedback returned for this tree, or None in the first round"
    try:
        parts = jax.tree.structure(tree).flatten_up_to(residual)
    except ValueError as error:
        raise TreeError(f"the residual is not of this tree ({error!s:.200}); {advice}") from None
    lost = {path: part for path, part in zip(by_path(tree), parts, strict=True) if path in leaves}
    for path, part in lost.items():
        shape = getattr(part, "shape", None)
        if shape != leaves[path].shape or part.dtype != jnp.float32:
            got = "None" if part is None else f"{getattr(part, 'dtype', type(part))} {shape}"
            raise TreeError(
                f"the residual at {path!r} is {got}, where the tree has {leaves[path].shape}; "
                f"{advice}"
            )
    return lost
