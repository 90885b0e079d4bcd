"""Targets that know the inputs already carry errors: QEP and GPTAQ, as corrections of the weight.

When a layer is rounded, those before it have been: its inputs are `x_q`, not the `x_full` of the
network that is to be matched. The second moments of both say how far they drifted apart:
`H = Σ x_q x_qᵀ` and `Δ = Σ (x_full - x_q) x_qᵀ`. Up to a constant, with a ridge of λ at W,

    ‖W X_full - Q X_q‖² + λ‖W - Q‖² = tr((V - Q) (H + λI) (V - Q)ᵀ),     V = W + W Δ (H + λI)⁻¹

so that GPTQ of the target V, with the H at hand, is GPTQ of this objective: no rounding need know.
*QEP* moves the target by a part of that, since Δ is an estimate. *GPTAQ* lets the residual of each
weight, `w_j (x_full - x_q)_j`, be made up by the columns after it only, those still to be rounded
when j is: row j of `Δ (H + λI)⁻¹` becomes `Δ_j,>j ((H + λI)_>j,>j)⁻¹`. With `H + λI = Gᵀ D² G` both
are one formula but for a triangle, in which GPTAQ's matrix P is what W is multiplied by:

    V = W + strength · W mask(Δ G⁻¹) D⁻² G⁻ᵀ,     mask: all of it (QEP), strictly upper (GPTAQ)

The published update of GPTAQ adds `w'_j P_j` with the weight `w'_j` as compensated so far (its
code, beyond a block, with the rounded `q_j`) where the residual is that of the original `w_j`,
which is what stands here. Theirs would be `V = W (I - P)⁻¹` swept with `(I - S)⁻¹ (G - I)` in place
of `G - I`, where `S = (strength · mask(Δ G⁻¹) D⁻²)ᵀ`: the same to first order in Δ, and no better
when measured (second layer of two, 2 to 4 bits: errors on other data within 0.6 % of each other at
strengths ¼ and ½, and up to 3 % larger at 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jquant.rounding.arrangement import Arrangement
from jquant.rounding.factor import Factor

Correction = Literal["gptaq", "qep"]
STRENGTH: Mapping[str, float] = MappingProxyType({"gptaq": 0.25, "qep": 0.5})


def corrected(
    w: Float[Array, "out in"],
    drift: Float[Array, "in in"],
    place: Arrangement,
    factor: Factor,
    method: Correction,
    strength: float,
) -> Float[Array, "out in"]:
    """The target `V`; `w` itself where `drift` or `strength` is 0, or the factorisation failed.

    Args:
        w: the weight.
        drift: `Δ`, rows: full less quantized, columns: quantized.
        place: where columns go.
        factor: of the second moment, by place.
        method: which triangle of `Δ G⁻¹` counts.
        strength: the part of the correction to make.
    """
    live = factor.pivots > 0
    lower = factor.gain + jnp.eye(len(place.source), dtype=jnp.float32)
    # A dead input has nothing to correct with, but what it no longer carries others make up for:
    # its row stays.
    moved = drift[place.source[:, None], place.source[None]] / factor.unit
    placed = jnp.where(place.real[:, None] & live[None], moved, 0.0)
    gained = lax.linalg.triangular_solve(lower, placed, lower=True, unit_diagonal=True)
    if method == "gptaq":
        gained = jnp.triu(gained, 1)
    part = jnp.where(live, strength / jnp.where(live, factor.pivots, 1.0), 0.0)
    gained = gained * part[None]
    pull = jnp.matmul(jnp.take(w, place.source, axis=1), gained, precision=lax.Precision.HIGHEST)
    shift = lax.linalg.triangular_solve(
        lower, pull, lower=True, transpose_a=True, unit_diagonal=True
    )
    return w + jnp.take(shift, place.home, axis=1)
