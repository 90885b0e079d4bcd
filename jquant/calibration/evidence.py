"""What is known about a weight's inputs: sums over tokens, mergeable, accumulated in float32.

`Evidence` is a commutative monoid: `Evidence.of(x)` of some rows, `merge` of two, zeros as the
neutral element; a mesh adds it up with `psum`. The second moment is the *sum* of `x xᵀ`, so that
bfloat16 inputs need no rescaling before the product and stay exact (PERFORMANCE §4.3); divide by
`count` when a mean is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Evidence:
    """Sums over the tokens a weight has seen. Whoever makes one by hand may leave out the last two.

    Attributes:
        second_moment: sum of `x xᵀ`, `[*batch, in, in]`.
        count: number of tokens, `[*batch]`, float32 (exact up to 16.7 million).
        total: sum of `x`, `[*batch, in]`, or None.
        abs_max: largest `|x|` per input channel, `[*batch, in]`, or None.
    """

    second_moment: Float[Array, "*batch in in"]
    count: Float[Array, "*batch"]
    total: Float[Array, "*batch in"] | None = None
    abs_max: Float[Array, "*batch in"] | None = None

    @property
    def mean(self) -> Float[Array, "*batch in"]:
        """Mean input per channel, `[*batch, in]`. ValueError where `total` was left out."""
        if self.total is None:
            raise ValueError("this evidence has no total, so no mean; pass Evidence(..., total=)")
        return self.total / jnp.maximum(self.count, 1)[..., None]

    def merge(self, other: Evidence) -> Evidence:
        """The evidence of both sets of tokens together."""
        return Evidence(
            self.second_moment + other.second_moment,
            self.count + other.count,
            _both(jnp.add, self.total, other.total),
            _both(jnp.maximum, self.abs_max, other.abs_max),
        )

    @staticmethod
    def of(
        x: Float[Array, "*batch tokens in"], count: Float[Array, "*batch"] | None = None
    ) -> Evidence:
        """The evidence of rows of inputs; `count` where not every row is a token.

        bfloat16 and float16 rows are multiplied as they are, with float32 sums; float32 rows in
        full float32 precision on every backend.

        Example:
            >>> Evidence.of(jnp.array([[1.0, 2.0], [3.0, 4.0]])).second_moment.tolist()
            [[10.0, 14.0], [14.0, 20.0]]
        """
        if count is None:
            count = jnp.full(x.shape[:-2], x.shape[-2], jnp.float32)
        magnitude = jnp.max(jnp.abs(x), axis=-2, initial=0).astype(jnp.float32)
        return Evidence(_gram(x), count, jnp.sum(x, axis=-2, dtype=jnp.float32), magnitude)


def _both(join: Callable[..., Array], one: Array | None, two: Array | None) -> Array | None:
    return None if one is None or two is None else join(one, two)


def _gram(x: Float[Array, "*batch tokens in"]) -> Float[Array, "*batch in in"]:
    """`Σ x xᵀ` in float32: exact products of half-precision inputs, full precision of float32."""
    batch, tokens = tuple(range(x.ndim - 2)), x.ndim - 2

    def plain(x: Array) -> Array:
        return lax.dot_general(
            x, x, (((tokens,), (tokens,)), (batch, batch)),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    def wide(x: Array) -> Array:
        # XLA:CPU reaches the matrix units only where the contracted axis is minor in memory, and
        # folds a mere transpose back into the product. Zero tokens at the end prevent that, and are
        # nothing to the sum (3 to 5 times faster than `plain` from a few hundred tokens on).
        t = jnp.pad(x.T, ((0, 0), (0, 64)))
        return lax.dot_general(t, t, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    if x.dtype == jnp.bfloat16 and not batch:
        return lax.platform_dependent(x, cpu=wide, default=plain)
    return plain(x)
