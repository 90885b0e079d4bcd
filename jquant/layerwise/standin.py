"""What stands in for evidence that a weight does not have, and what is told of it.

Two things come out only while a function runs. No token may reach a weight, or some of its experts
or layers: a branch that no batch takes, an expert that is never chosen. Where the scheme allows it
(`fallback=True`) nearest rounding stands in there, in whatever form the weight is used; otherwise
it is an error as soon as it is known, before any weight of the stage is rounded. Static ranges of
inputs are then those of the other experts or layers together, if there are any. And the drift of
inputs may be unknown, inside a loop or behind one that rearranges tokens: then no correction is
made, as a drift of zero is none.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jquant.calibration.evidence import Evidence
from jquant.calibration.spread import Spread
from jquant.errors import EvidenceError
from jquant.rounding.elementwise import Nearest
from jquant.schemes.scheme import Scheme


class StandIn(NamedTuple):
    """A scheme and evidence that are there, for those that are not.

    Attributes:
        scheme, evidence: what to round with.
        nearest: whether nearest rounding stands in for a part of the weight or all of it.
        told: what is less than asked, in words.
    """

    scheme: Scheme
    evidence: Evidence
    nearest: bool
    told: tuple[str, ...]


def stand_in(name: str, scheme: Scheme, evidence: Evidence, unpaired: str) -> StandIn:
    """What to round a weight with; `unpaired` says why its inputs have no drift."""
    told = []
    if "drift" in scheme.needs and evidence.drift is None:
        evidence = evidence.with_drift(lambda seen: jnp.zeros_like(seen.second_moment))
        told.append(f"not corrected: the drift of its inputs is not known {unpaired}".rstrip())
    unseen, where = _unseen(evidence), ""
    if unseen.any():
        where = f"no token reached {name}{_which(unseen)}"
    if where and "inputs" in scheme.needs:
        told.append(f"static ranges of all others stand in: {where}")
        evidence = _ranges_of_others(evidence, unseen)
    nearest = bool(where) and "moment" in scheme.needs
    if nearest:
        told.append(f"nearest rounding stands in: {where}")
    if nearest and unseen.all():
        # Of inputs that nobody has seen, any is as likely: the error is that of the weights.
        width = evidence.second_moment.shape[-1]
        moment = evidence.second_moment
        alike = jnp.broadcast_to(jnp.eye(width, dtype=moment.dtype), moment.shape)
        evidence = dataclasses.replace(evidence, second_moment=alike)
        scheme = dataclasses.replace(scheme, rounding=Nearest())
    return StandIn(scheme, evidence, nearest, tuple(told))


def _ranges_of_others(evidence: Evidence, unseen: np.ndarray) -> Evidence:
    """With the extremes and the spread of all inputs where no token was seen."""
    axes, seen = tuple(range(unseen.ndim)), jnp.asarray(~unseen)

    def filled(join: Callable[..., Array], values: Array) -> Array:
        own = seen.reshape(seen.shape + (1,) * (values.ndim - seen.ndim))
        return jnp.where(own, values, join(values, axis=axes, keepdims=True))

    most, spread = evidence.abs_max, evidence.spread
    if most is not None:
        most = filled(jnp.max, most)
    if spread is not None:
        low, high = filled(jnp.min, spread.low), filled(jnp.max, spread.high)
        spread = Spread(low, high, filled(jnp.sum, spread.counts))
    return dataclasses.replace(evidence, abs_max=most, spread=spread)


def check_tokens(name: str, scheme: Scheme, evidence: Evidence) -> None:
    """Refuse evidence of no tokens where nothing may stand in, warn of that of too few.

    Raises:
        EvidenceError: no token has reached the weight, or some of its experts or layers.
    """
    if scheme.needs.isdisjoint({"moment", "inputs"}):
        return
    unseen = _unseen(evidence)
    if unseen.any():
        lost = "inputs" in scheme.needs and unseen.all()
        leave = "or Scheme(..., fallback=True) to let nearest rounding stand in"
        if lost:
            leave = "or Activations(granularity='token'), as nothing stands in for static ranges"
        if lost or not scheme.fallback:
            raise EvidenceError(
                f"weight {name!r} has seen no tokens{_which(unseen)}; pass batches that reach it, "
                f"{leave}"
            )
    if "moment" not in scheme.needs or unseen.all():
        return
    tokens, width = np.asarray(evidence.count)[~unseen].min(), evidence.second_moment.shape[-1]
    if tokens < width:
        warnings.warn(
            f"weight {name!r}: {int(tokens)} tokens for {width} input channels; "
            "its second moment is rank deficient, more tokens would help",
            stacklevel=4,
        )


def _unseen(evidence: Evidence) -> np.ndarray:
    """For every expert or layer of a weight, whether no token has reached it."""
    return np.asarray(evidence.count) <= 0


def _which(unseen: np.ndarray) -> str:
    """Where, if it is not everywhere: ` in 2 of 8 experts or layers (3, 5)`."""
    if unseen.all():
        return ""
    places = [place[0] if len(place) == 1 else place for place in np.argwhere(unseen).tolist()]
    some = ", ".join(map(str, places[:8])) + (", …" if len(places) > 8 else "")
    return f" in {len(places)} of {math.prod(unseen.shape)} experts or layers ({some})"
