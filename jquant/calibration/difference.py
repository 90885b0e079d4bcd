"""How far values of two networks are apart, where tokens may be weighed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jquant.calibration.place import Place
from jquant.calibration.stages import Cut
from jquant.calibration.tokens import Weights
from jquant.programs.straight import Piece


@partial(jax.jit, static_argnames="places")
def squares(
    values: list[Array],
    others: list[Array],
    places: tuple[Place, ...] = (),
    weights: Array | None = None,
) -> Array:
    """The sum of squared differences, in float32, by the weights of tokens."""

    def one(x: Array, y: Array) -> Array:
        if jnp.iscomplexobj(x):
            return jnp.abs(x - y) ** 2
        return (x.astype(jnp.float32) - y.astype(jnp.float32)) ** 2

    each = map(one, values, others)
    if weights is not None:
        many = [place.over(weights, x.shape) for place, x in zip(places, values, strict=True)]
        each = (jnp.where(w > 0, x, 0) * w for x, w in zip(each, many, strict=True))
    return sum(map(jnp.sum, each), jnp.float32(0))


def count(
    shapes: Sequence[tuple[int, ...]], places: Sequence[Place], weights: Weights | None = None
) -> float:
    """How many values there are, by the weights of their tokens."""
    if weights is None:
        return sum(map(math.prod, shapes))
    many = [place.over(jnp.asarray(weights), x) for place, x in zip(places, shapes, strict=True)]
    return sum(float(jnp.sum(w)) for w in many)


def uncompared(cuts: Sequence[Cut], weights: Sequence[Weights]) -> dict[Piece, str]:
    """Weights compared on values whose tokens are not known → why."""
    reasons: dict[Piece, str] = {}
    for cut, own in zip(cuts, weights, strict=True):
        for piece, one in cut.comparisons.items():
            for why in (cut.places[n].unknown(own.shape) for n in one.varying.outputs):
                if why:
                    reasons.setdefault(piece, f"output (lost in {why!r})")
    return reasons
