"""Stochastic rounding: up or down at random, so that the mean is what was rounded.

Of the two neighbours `a <= x <= b` of a number, b is taken with probability `(x - a) / (b - a)`.
The error of one number is larger than that of the nearest, by up to a whole step, but it has mean
zero, and errors of many numbers average out: sums and means of rounded numbers are right where
nearest rounding is off by the same amount every time (Croci et al. 2022 survey it). `Stochastic` is
a rounding of weights on any grid; `stochastic_round` a function of arrays, for states of optimizers
and whatever else is kept in few bits and changed in small steps.

Randomness comes from an explicit key. Equal keys give equal results; the number of devices and the
sharding change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jquant import deprecated
from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.grids.base import Grid, GridParams, code_dtype
from jquant.grids.grouped import Grouped
from jquant.numerics import noise, require
from jquant.numerics.narrow import ends
from jquant.numerics.significand import cut, onto_steps, share_of, with_sign
from jquant.rounding.base import Rounded
from jquant.rounding.elementwise import importance_of, second_moment


@jax.tree_util.register_static
@dataclass(frozen=True)
class Stochastic:
    """Each weight to one of its two neighbouring codes, with its value as the mean.

    Unbiased where the grid encloses the weight; a weight outside its range is clipped as by
    `Nearest`. Needs a key: `quantize(..., key=)` derives one per path.

    Args:
        source: of random words: `"hash"` (default, the faster) or `"threefry"`, JAX's own.

    Raises:
        ValueError: there is no such source; when called, without a key.

    Example:
        >>> from jquant.grids import Uniform
        >>> w = jnp.array([[0.0, 0.3, 3.0]])
        >>> keys = jax.random.split(jax.random.key(0), 1000)
        >>> codes = jax.vmap(lambda key: Stochastic()(w, Uniform(2), key=key).codes)(keys)
        >>> [round(float(x), 1) for x in codes.astype(float).mean((0, 1))]
        [0.0, 0.3, 3.0]
    """

    source: noise.Source = "hash"

    def __post_init__(self) -> None:
        require.one_of("Stochastic.source", self.source, noise.SOURCES)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"key"})

    @property
    def papers(self) -> tuple[str, ...]:
        return ("croci2022stochastic",)

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
        if key is None:
            raise ValueError("Stochastic rounding needs randomness: pass key=jax.random.key(...)")
        return _round(w, second_moment(evidence), key, self, grid, groups)


@partial(jax.jit, static_argnames=("choice", "grid", "groups"))
def _round(
    w: Float[Array, "*batch out in"],
    moment: Float[Array, "*batch in in"] | None,
    key: PRNGKeyArray,
    choice: Stochastic,
    grid: Grid,
    groups: Groups,
) -> Rounded:
    w, grouped = w.astype(jnp.float32), Grouped(grid, groups)
    params = grouped.fit(w, importance_of(moment))
    luck = noise.uniform(key, w.shape, choice.source)
    codes = _either(w, luck, grouped, params)
    return Rounded(codes.astype(code_dtype(grid)), params, {})


def _either(
    w: Float[Array, "*s"], luck: Float[Array, "*s"], grid: Grid, params: GridParams
) -> Shaped[Array, "*s"]:
    """The upper code where luck, uniform in `[0, 1)`, is below the number's share of the step."""
    lo, hi = grid.bracket(w, params)
    below, above = grid.decode(lo, params), grid.decode(hi, params)
    # Sizes: values fall as codes rise where a scale is negative.
    step, part = above - below, w - below
    part = jnp.where(step < 0, -part, part)
    return jnp.where(luck * jnp.abs(step) < part, hi, lo)


@partial(jax.jit, static_argnames=("to", "source"))
def stochastic_round(
    key: PRNGKeyArray, x: Shaped[Array, ...], to: Any, *, source: noise.Source = "hash"
) -> Shaped[Array, ...]:
    """The array in a dtype or on a grid, each number rounded up or down at random, without bias.

    Args:
        key: randomness; use a new one for every call (`jax.random.fold_in(key, step)`).
        x: floating, any shape; computed in float32, or float64 if it is that.
        to: a floating or integer dtype, or a grid. A grid is fitted to the last axis, as one group.
        source: where random words come from: `"hash"` (about as fast as a cast) or `"threefry"`.

    Returns:
        `x` in that dtype, or float32 values on the grid. A number that the dtype or the grid holds
        exactly is kept; one beyond the largest becomes the largest (so that finite stays finite);
        NaN and infinities stay what they are in floating dtypes, as far as these have them, and a
        group that holds NaN is NaN on a grid with a scale or a table. Chances are multiples of
        2^-24, of float64 numbers 2^-32.

    Raises:
        ValueError: `x` is not floating, or `to` is neither a dtype of numbers nor a grid.

    Example:
        >>> x = jnp.full(10_000, 1.001)  # bfloat16 has 1 and 1.0078 there
        >>> y = stochastic_round(jax.random.key(0), x, jnp.bfloat16)
        >>> sorted(set(y.tolist())), abs(float(y.astype(float).mean()) - 1.001) < 1e-4
        ([1.0, 1.0078125], True)
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"stochastic_round takes floating arrays, got {x.dtype}")
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    if isinstance(to, Grid):
        if x.dtype == jnp.float64:  # grids are of float32: neither step may be to nearest
            key, own = jax.random.split(key)
            x = _to_floating(x, noise.words(own, x.shape, source), jnp.dtype(jnp.float32))
        params = to.fit(x)
        return to.decode(_either(x, noise.uniform(key, x.shape, source), to, params), params)
    try:
        dtype = jnp.dtype(to)
    except TypeError:
        raise ValueError(f"stochastic_round rounds to a dtype or a grid, got {to!r}") from None
    if jnp.issubdtype(dtype, jnp.integer):
        return _to_integer(x, noise.words(key, x.shape, source), dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"stochastic_round rounds to numbers, got the dtype {dtype}")
    if jnp.finfo(dtype).nmant >= jnp.finfo(x.dtype).nmant:
        return x.astype(dtype)
    return _to_floating(x, noise.words(key, x.shape, source), dtype)


def _to_integer(x: Float[Array, ...], word: Shaped[Array, ...], dtype: Any) -> Shaped[Array, ...]:
    whole = jnp.floor(x)
    up = share_of(word, x.dtype) < x - whole
    low, high = _limits(dtype, x.dtype)
    return jnp.clip(jnp.where(up, whole + 1, whole), low, high).astype(dtype)


def _limits(dtype: Any, kind: Any) -> tuple[float, float]:
    """The integer dtype's limits, or what the float `kind` has next to the largest inside."""
    info, top = jnp.iinfo(dtype), np.asarray(jnp.iinfo(dtype).max).astype(kind)
    return float(info.min), float(top if int(top) <= info.max else np.nextafter(top, 0))


def _to_floating(x: Float[Array, ...], word: Shaped[Array, ...], dtype: Any) -> Shaped[Array, ...]:
    info = jnp.finfo(dtype)
    y = cut(x, info.nmant, word)
    # Below its least normal number a dtype's steps no longer shrink.
    if info.minexp > jnp.finfo(x.dtype).minexp:
        low = onto_steps(jnp.abs(x), 2.0 ** (info.minexp - info.nmant), word)
        y = jnp.where(jnp.abs(x) < 2.0**info.minexp, with_sign(low, x), y)
    y = jnp.clip(y, *ends(dtype))
    return jnp.where(jnp.isfinite(x), y, x).astype(dtype)
