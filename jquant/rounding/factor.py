"""The factor GPTQ feeds errors back with: `H + λI = Gᵀ D² G`, G unit lower triangular.

One Cholesky factorisation, of `H` with its columns reversed (`H = M Mᵀ`, M upper, `G = M D⁻¹`
transposed); the textbook's Cholesky, inverse and second Cholesky (GPTQ §3.3, step 3) are not
needed. Row j of `G` says how errors made in earlier columns move column j. Everything is in units
of the mean of H's diagonal over live inputs, so a sum and a mean over tokens give one answer.

Dead inputs (`H_jj = 0`) and padding are the same thing: a row and column of the identity, so
neither is moved by others nor moves them, and neither counts in the mean that damping refers to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer


class Factor(NamedTuple):
    """`G` and `D²` of the damped, scaled second moment, and how they came about."""

    gain: Float[Array, "n n"]  # strictly lower part of G; zero if the factorisation failed
    pivots: Float[Array, " n"]  # D²; zero for dead inputs and padding
    penalty: Float[Array, " n"]  # λ where a column counts, else zero: tr(E H Eᵀ) leaves it out
    unit: Float[Array, ""]  # mean diagonal of H over live inputs
    dead: Float[Array, ""]  # how many inputs have H_jj = 0
    damping: Float[Array, ""]  # λ / unit, as used in the end
    failed: Bool[Array, ""]


def factorise(
    moment: Float[Array, "in in"],
    source: Integer[Array, " n"],
    real: Bool[Array, " n"],
    damping: float,
    max_damping: float,
) -> Factor:
    """Factorise `moment` with column `source[j]` at place j; padding where not `real`.

    Damping rises tenfold, up to and including `max_damping`, until the factorisation succeeds.
    """
    diagonal = jnp.diagonal(moment)
    alive = (diagonal != 0).astype(jnp.float32)
    pair = jnp.stack([diagonal, alive])
    _, (trace, count) = jnp.matmul(pair, pair.T, precision=lax.Precision.HIGHEST)
    unit = trace / jnp.maximum(count, 1.0)
    unit = jnp.where(unit > 0, unit, 1.0)
    live = real & (diagonal[source] != 0)
    # Reversed, so that LAPACK's lower factor is our upper one.
    back, kept = source[::-1], live[::-1]
    scaled = jnp.where(kept[:, None] & kept[None], moment[back[:, None], back] / unit, 0.0)

    def attempt(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        level, _, _, _ = state
        lower = lax.linalg.cholesky(
            scaled + jnp.diag(jnp.where(kept, level, 1.0)), symmetrize_input=False
        )
        # A failure fills the factor with NaN.
        return level * 10.0, level, lower, jnp.isfinite(lower[-1, -1])

    def again(state: tuple[Array, Array, Array, Array]) -> Array:
        level, _, _, done = state
        # A hair of slack: ten times 0.1 is not 1 in float32.
        return ~done & (level <= max_damping * 1.001)

    level = jnp.float32(damping)
    start = (level, level, jnp.zeros_like(scaled), jnp.asarray(False))
    _, used, lower, done = lax.while_loop(again, attempt, start)
    upper = lower.T[::-1, ::-1]
    pivot = jnp.diagonal(upper)
    gain = jnp.where(done, jnp.tril(upper / pivot[:, None], -1), 0.0)
    return Factor(
        gain=gain,
        pivots=jnp.where(live & done, pivot**2, 0.0),
        penalty=jnp.where(live, used, 0.0),
        unit=unit,
        dead=len(diagonal) - count,
        damping=used,
        failed=~done,
    )
