"""Roundings that look at one weight at a time: the nearest code.

Nearest rounding is the baseline of every other one, and what they fall back to. With evidence, the
diagonal of the second moment tells grids that can use it (`MSE`, learned codebooks) which inputs
matter; the codes themselves are nearest in any case. Static: the choice; arrays: the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jquant import deprecated
from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.errors import EvidenceError
from jquant.grids.base import Grid, code_dtype
from jquant.grids.grouped import Grouped
from jquant.rounding.base import Rounded


def second_moment(
    evidence: Evidence | Float[Array, "*batch in in"] | None,
) -> Float[Array, "*batch in in"] | None:
    """The second moment inside what a rounding was given as evidence."""
    return evidence.second_moment if isinstance(evidence, Evidence) else evidence


def moment_for(
    name: str,
    evidence: Evidence | Float[Array, "*batch in in"] | None,
    shape: tuple[int, ...] | None = None,
) -> Float[Array, "*batch in in"]:
    """The second moment that the rounding of this name needs, for weights of this shape.

    Raises:
        EvidenceError: there is none, or it is of another shape.
    """
    moment = second_moment(evidence)
    if moment is None:
        raise EvidenceError(f"{name} needs the second moment of the inputs: pass evidence=")
    if shape is not None and moment.shape != (*shape[:-2], shape[-1], shape[-1]):
        raise EvidenceError(
            f"{name} on weights {shape} needs a second moment of shape "
            f"{(*shape[:-2], shape[-1], shape[-1])}, got {moment.shape}"
        )
    return moment


def importance_of(
    moment: Float[Array, "*batch in in"] | None,
) -> Float[Array, "*batch 1 in"] | None:
    """How much an error in each column of a weight counts where a grid is fitted: `H_jj`."""
    return None if moment is None else jnp.diagonal(moment, axis1=-2, axis2=-1)[..., None, :]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Nearest:
    """The nearest code of every weight; needs nothing.

    Example:
        >>> from jquant.grids import Uniform
        >>> w = jnp.array([[0.0, 1.1, 2.0, 3.0]])
        >>> Nearest()(w, Uniform(2)).codes.tolist()
        [[0, 1, 2, 3]]
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @deprecated.keywords("a rounding")
    def __call__(
        self,
        w: Float[Array, "*batch out in"],
        grid: Grid,
        groups: Groups = Groups(),
        *,
        evidence: Evidence | Float[Array, "*batch in in"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Rounded:
        """Codes `[*batch, out, in]` in the grid's code dtype, parameters `[*batch, rows, n, …]`."""
        del key
        return _round(w, second_moment(evidence), grid, groups)


@partial(jax.jit, static_argnames=("grid", "groups"))
def _round(
    w: Float[Array, "*batch out in"],
    moment: Float[Array, "*batch in in"] | None,
    grid: Grid,
    groups: Groups,
) -> Rounded:
    w, grouped = w.astype(jnp.float32), Grouped(grid, groups)
    params = grouped.fit(w, importance_of(moment))
    return Rounded(grouped.nearest(w, params).astype(code_dtype(grid)), params, {})
