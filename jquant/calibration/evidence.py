"""What is known about a weight's inputs: sums over tokens, mergeable, accumulated in float32.

`Evidence` is a commutative monoid: `Evidence.of(x)` of some rows, `merge` of two, zeros as the
neutral element; a mesh adds it up with `psum`. The second moment is the *sum* of `x xᵀ`, so that
bfloat16 inputs need no rescaling before the product and stay exact (PERFORMANCE §4.3); divide by
`count` when a mean is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jquant.calibration.spread import Spread
from jquant.numerics.extremes import largest


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Evidence:
    """Sums over the tokens that a weight has seen; `second_moment` and `count` are always there.

    Attributes:
        second_moment: sum of `x xᵀ`, `[*batch, in, in]`.
        count: number of tokens, `[*batch]`, float32 (exact up to 16.7 million).
        total: sum of `x`, `[*batch, in]`, or None.
        abs_max: largest `|x|` per input channel, `[*batch, in]`, or None.
        drift: sum of `(x_full - x) xᵀ`, `[*batch, in, in]`, where `x_full` is what the unquantized
            network would see in place of `x`; not symmetric. None where there is no such pair, as
            in a pass of one network. `second_moment + drift` is the sum of `x_full xᵀ`.
        spread: histograms of the inputs, or None.
        guided: the same sums weighed by what errors of the outputs cost (`jq.saliency`), with an
            axis behind the batch axes for groups of output rows: `[*batch, groups, in, in]` for the
            second moment. It has neither `total` nor `abs_max` nor `spread`. None: not known.
    """

    second_moment: Float[Array, "*batch in in"]
    count: Float[Array, "*batch"]
    total: Float[Array, "*batch in"] | None = None
    abs_max: Float[Array, "*batch in"] | None = None
    drift: Float[Array, "*batch in in"] | None = None
    spread: Spread | None = None
    guided: Evidence | None = None

    @property
    def groups(self) -> int:
        """Into how many groups of output rows `guided` is split; 0 where there is none."""
        return 0 if self.guided is None else self.guided.count.shape[-1]

    def of_group(self, number: int) -> Evidence:
        """What there is of one group of output rows, evidence without a `guided` of its own.

        Example:
            >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
            >>> one, two = Evidence.of(x), Evidence.of(x, weights=jnp.array([0.5, 2.0]))
            >>> evidence = one.guided_by([one, two])
            >>> float(evidence.of_group(1).count), evidence.guided.second_moment.shape
            (2.5, (2, 2, 2))
        """
        assert self.guided is not None
        axis = self.count.ndim
        return jax.tree.map(lambda leaf: jnp.take(leaf, number, axis), self.guided)

    def guided_by(self, groups: Sequence[Evidence]) -> Evidence:
        """The same with sums that are weighed for each group of output rows."""
        bare = [replace(e, total=None, abs_max=None, spread=None, guided=None) for e in groups]
        axis = self.count.ndim
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *bare)
        return replace(self, guided=stacked)

    def with_drift(self, drift: Callable[[Evidence], Array | None]) -> Evidence:
        """The same with another drift, of the evidence and of what is guided in it."""
        guided = None if self.guided is None else self.guided.with_drift(drift)
        return replace(self, drift=drift(self), guided=guided)

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
            _both(jnp.add, self.drift, other.drift),
            _both(Spread.merge, self.spread, other.spread),
            _both(Evidence.merge, self.guided, other.guided),
        )

    @staticmethod
    def of(
        x: Float[Array, "*batch tokens in"],
        count: Float[Array, "*batch"] | None = None,
        *,
        full: Float[Array, "*batch tokens in"] | None = None,
        spread: bool = False,
        weights: Weights | None = None,
    ) -> Evidence:
        """The evidence of rows of inputs; `count` where not every row is a token.

        bfloat16 and float16 rows are multiplied as they are, with float32 sums; float32 rows in
        full float32 precision on every backend. With `full`, the rows of the unquantized network
        for the same tokens, the evidence holds their drift; with `spread`, histograms of the rows.

        With `weights` every sum is weighted, and rows of weight 0 are left out, also of the maxima
        and the spread and whatever is in them: bool, or float32 and not negative, broadcast to
        `[*batch, tokens]`.

        Raises:
            ValueError: `full` is not of the shape of `x`.

        Example:
            >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
            >>> Evidence.of(x).second_moment.tolist()
            [[10.0, 14.0], [14.0, 20.0]]
            >>> Evidence.of(x, full=x.at[0, 0].set(2.0)).drift.tolist()
            [[1.0, 2.0], [0.0, 0.0]]
            >>> Evidence.of(x, weights=jnp.array([True, False])).second_moment.tolist()
            [[1.0, 2.0], [2.0, 4.0]]
        """
        if weights is not None:
            weights = jnp.broadcast_to(weights, x.shape[:-1])
            x, full = kept(x, weights), None if full is None else kept(full, weights)
        if count is None and weights is not None:
            count = jnp.sum(weights, axis=-1, dtype=jnp.float32)
        elif count is None:
            count = jnp.full(x.shape[:-2], x.shape[-2], jnp.float32)
        magnitude = largest(jnp.abs(x), axis=-2, initial=0).astype(jnp.float32)
        histogram = Spread.of(x) if spread else None
        root, half = half_weighed(x, weights)
        total = jnp.sum(half if root is None else half * root, axis=-2, dtype=jnp.float32)
        if full is not None:
            full = half_weighed(full, weights)[1]
        drift = None if full is None else _drift(half, full)
        return Evidence(_gram(half), count, total, magnitude, drift, histogram)

    @staticmethod
    def grouped(
        x: Float[Array, "tokens in"],
        sizes: Int32[Array, " groups"],
        *,
        full: Float[Array, "tokens in"] | None = None,
        spread: bool = False,
        weights: Weights | None = None,
    ) -> Evidence:
        """The evidence of each group of rows, `[groups]`; groups are runs of the given sizes.

        Rows past the last group are left out. The other arguments are those of `of`.

        Example:
            >>> x = jnp.array([[1.0], [2.0], [3.0], [9.0]])
            >>> evidence = Evidence.grouped(x, jnp.array([1, 2]), full=x + 1.0)
            >>> evidence.second_moment[:, 0, 0].tolist(), evidence.drift[:, 0, 0].tolist()
            ([1.0, 13.0], [1.0, 5.0])
        """
        groups = sizes.shape[0]
        ends = jnp.cumsum(sizes, dtype=sizes.dtype)
        group = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=sizes.dtype), side="right")
        count = sizes.astype(jnp.float32)
        if weights is not None:
            x, full = kept(x, weights), None if full is None else kept(full, weights)
            count = jax.ops.segment_sum(weights.astype(jnp.float32), group, groups)
        root, half = half_weighed(x, weights)

        def products(left: Array, right: Array) -> Array:
            return lax.ragged_dot_general(
                left, right, sizes,
                lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ()),
                precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
            )  # fmt: skip

        wide = half.astype(jnp.float32)
        drift = None
        if full is not None:
            drift = products(half_weighed(full, weights)[1].astype(jnp.float32) - wide, wide)
        plain = x.astype(jnp.float32)
        return Evidence(
            products(half, half),
            count,
            jax.ops.segment_sum(wide if root is None else wide * root, group, groups),
            jnp.maximum(jax.ops.segment_max(jnp.abs(plain), group, groups), 0),
            drift=drift,
            spread=Spread.grouped(plain, group, groups) if spread else None,
        )


Weights = Bool[Array, "*batch tokens"] | Float[Array, "*batch tokens"]


def kept(x: Float[Array, "*batch tokens in"], weights: Weights) -> Float[Array, "*batch tokens in"]:
    """Rows without those that have no weight: these are zero, whatever was in them."""
    real = weights if weights.dtype == jnp.bool_ else weights > 0
    return jnp.where(real[..., None], x, jnp.zeros((), x.dtype))


def half_weighed(
    x: Float[Array, "*batch tokens in"], weights: Weights | None
) -> tuple[Float[Array, "*batch tokens 1"] | None, Float[Array, "*batch tokens in"]]:
    """The roots of weights that are not all 0 or 1, and rows times these: half of `w x xᵀ` each.

    A product of two such halves is symmetric.
    """
    if weights is None or weights.dtype == jnp.bool_:
        return None, x
    root = jnp.sqrt(weights)[..., None]
    return root, x.astype(jnp.float32) * root


def _both(join: Callable[[Any, Any], Any], one: Any, two: Any) -> Any:
    return None if one is None or two is None else join(one, two)


def _drift(
    x: Float[Array, "*batch tokens in"], full: Float[Array, "*batch tokens in"]
) -> Float[Array, "*batch in in"]:
    """`Σ (full - x) xᵀ`, of float32 differences and in full float32 precision.

    The difference of two sums, `Σ full xᵀ - Σ x xᵀ`, would do without widening bfloat16 rows, but
    it leaves the rounding of sums of squares in what may be a thousandth of them, and is not zero
    for equal rows. Differences of rows lose nothing: those of neighbours are exact.
    """
    if full.shape != x.shape:
        raise ValueError(f"full must have the shape of x, {x.shape}, got {full.shape}")
    x, full = x.astype(jnp.float32), full.astype(jnp.float32)
    return jnp.matmul(jnp.swapaxes(full - x, -1, -2), x, precision=lax.Precision.HIGHEST)


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
