"""How a weight's inputs are spread: extremes, and a histogram that any range can be read from.

Bins are those of a float32's sign, exponent and four bits of mantissa: 16 per octave from 2^-40 to
2^40, for both signs, so that no range has to be known beforehand and histograms of batches can be
added. `Spread` is part of `Evidence` where static ranges of inputs are asked for, and a commutative
monoid as that is: zeros are neutral, as every range holds zero. Rows that are zero throughout
(slots of experts that hold no token) are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from jquant.grids.base import GridParams
from jquant.grids.ranges import MinMax
from jquant.numerics.extremes import largest, least
from jquant.weights.activations import Activations, Percentile, even

_DROP = 19  # bits of a float32's mantissa below a bin's
_FIRST, _LAST = (127 - 40) << 4, (127 + 40) << 4
_HALF = _LAST - _FIRST
BINS = 2 * _HALF
_POINTS = 8  # of each bin, at which errors are measured


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spread:
    """Where inputs lie, over all channels.

    Attributes:
        low, high: the least and the largest, `[*batch]`; zero is always between them.
        counts: how many lie in each bin, `[*batch, BINS]`, float32; bins increase.
    """

    low: Float[Array, "*batch"]
    high: Float[Array, "*batch"]
    counts: Float[Array, "*batch bins"]

    def merge(self, other: Spread) -> Spread:
        """The spread of both sets of tokens together."""
        return Spread(
            jnp.minimum(self.low, other.low),
            jnp.maximum(self.high, other.high),
            self.counts + other.counts,
        )

    @staticmethod
    def of(x: Float[Array, "*batch tokens in"]) -> Spread:
        """The spread of rows of inputs.

        Example:
            >>> spread = Spread.of(jnp.array([[1.0, -2.0], [0.5, 3.0]]))
            >>> float(spread.low), float(spread.high), float(spread.counts.sum())
            (-2.0, 3.0, 4.0)
        """
        *batch, tokens, width = x.shape
        rows = x.reshape(-1, width)
        many = rows.shape[0] // tokens if tokens else 0
        groups = int(np.prod(batch))
        numbers = jnp.arange(groups, dtype=jnp.int32)
        which = jnp.repeat(numbers, tokens, total_repeat_length=many * tokens)
        spread = Spread.grouped(rows, which, groups)
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), spread)

    @staticmethod
    def grouped(
        rows: Float[Array, "tokens in"], group: Int32[Array, " tokens"], groups: int
    ) -> Spread:
        """The spread of each of some groups of rows; those of other groups are left out."""
        rows = rows.astype(jnp.float32)
        group = jnp.where(jnp.any(rows != 0, axis=-1), group, groups).astype(jnp.int32)
        place = jnp.where(group < groups, group * BINS, groups * BINS)[:, None] + _bin(rows)
        counts = jnp.zeros(groups * BINS, jnp.int32).at[place].add(1, mode="drop")
        low = jax.ops.segment_min(least(rows, -1, initial=0.0), group, groups)
        high = jax.ops.segment_max(largest(rows, -1, initial=0.0), group, groups)
        return Spread(
            jnp.minimum(low, 0.0),
            jnp.maximum(high, 0.0),
            counts.reshape(groups, BINS).astype(jnp.float32),
        )

    def params(self, choice: Activations) -> GridParams:
        """The parameters of the inputs' grid for the range that `choice` asks for, `[*batch]`."""
        if isinstance(choice.range, MinMax):
            return choice.fit(self.low, self.high)
        if isinstance(choice.range, Percentile):
            return choice.fit(*self._within(choice.range.percent / 100, even(choice.grid)))
        edges = np.asarray(_edges(), np.float64)
        steps = (np.arange(_POINTS) + 0.5) / _POINTS
        points = (edges[:-1, None] + np.diff(edges)[:, None] * steps).reshape(-1)
        shape = (*self.counts.shape[:-1], points.size)
        points = jnp.broadcast_to(jnp.asarray(points, jnp.float32), shape)
        points = jnp.clip(points, self.low[..., None], self.high[..., None])
        # The extremes themselves, which the search starts from, as often as not at all.
        points = jnp.concatenate([points, self.low[..., None], self.high[..., None]], axis=-1)
        often = jnp.pad(
            jnp.repeat(self.counts, _POINTS, axis=-1), [(0, 0)] * len(shape[:-1]) + [(0, 2)]
        )
        search = replace(choice.grid, range=choice.range)  # type: ignore[type-var]
        return search.fit(points, often)

    def _within(
        self, share: float, symmetric: bool
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """The range that holds a share of the inputs, never wider than their own."""
        edges = jnp.asarray(_edges(), jnp.float32)
        if symmetric:
            both = self.counts[..., _HALF:] + self.counts[..., :_HALF][..., ::-1]
            most = _quantile(both, edges[_HALF:], share)
            most = jnp.minimum(most, jnp.maximum(self.high, -self.low))
            return -most, most
        low = -_quantile(self.counts[..., ::-1], -edges[::-1], share)
        high = _quantile(self.counts, edges, share)
        low, high = jnp.maximum(low, self.low), jnp.minimum(high, self.high)
        return jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)


def _bin(x: Float[Array, "*s"]) -> Int32[Array, "*s"]:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    key = jnp.clip((bits & 0x7FFFFFFF) >> _DROP, _FIRST, _LAST - 1) - _FIRST
    return jnp.where(bits < 0, _HALF - 1 - key, _HALF + key)


def _edges() -> np.ndarray:
    """The `BINS + 1` borders of the bins; the middle one is zero."""
    keys = np.arange(_FIRST, _LAST + 1, dtype=np.int32) << _DROP
    up = keys.view(np.float32).astype(np.float64)
    up[0] = 0.0  # whatever is smaller is there
    return np.concatenate([-up[:0:-1], up])


def _quantile(
    counts: Float[Array, "*batch bins"], edges: Float[Array, " edges"], share: float
) -> Float[Array, "*batch"]:
    """Where a share of the counts lies below, linear inside a bin."""
    upto = jnp.cumsum(counts, axis=-1)
    goal = share * upto[..., -1:]
    at = jnp.minimum(jnp.sum(upto < goal, axis=-1, keepdims=True), counts.shape[-1] - 1)
    own = jnp.take_along_axis(counts, at, axis=-1)
    before = jnp.take_along_axis(upto, at, axis=-1) - own
    part = jnp.clip((goal - before) / jnp.maximum(own, 1.0), 0.0, 1.0)
    left, right = edges[at], edges[at + 1]
    return (left + part * (right - left))[..., 0]
