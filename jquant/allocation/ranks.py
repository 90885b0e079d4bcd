"""Which weight gets how much of a budget of bytes for low-rank terms: greedy, by singular values.

The i-th rank of a weight's term takes `σ_i²` off its squared error (see `schemes/lorc.py`) and
costs a column and a row. Ranks are bought one by one, the next always where

    σ_i² / power / bytes        power: the squared output of the weight (plain: its squared norm)

is largest, until nothing that is left fits. What is minimised is the sum of the relative errors
that reports show, as if the weights' errors were independent of each other. Singular values fall,
so this is the best possible where all ranks cost the same, and elsewhere misses the best by less
than the worth of the first rank that did not fit. Everything chosen is static, a `Plan`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jquant.calibration.evidence import Evidence
from jquant.errors import PlanError
from jquant.layerwise.checks import check_evidence, check_needs, check_weights
from jquant.layerwise.weight import remainder
from jquant.numerics.distortion import output_error
from jquant.schemes.lorc import LoRC
from jquant.schemes.scheme import Plan, Scheme
from jquant.trees.lazy import read
from jquant.trees.paths import key_of
from jquant.weights.arguments import by_path
from jquant.weights.leaves import check_finite
from jquant.weights.qtensor import array_bits


def lorc_ranks(
    params: PyTree,
    plan: Plan,
    bytes: int,
    *,
    evidence: Mapping[str, Evidence] | None = None,
    key: PRNGKeyArray | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """The plan with a budget of bytes for low-rank terms divided among its weights.

    Each weight is rounded as its scheme says, once; the singular values of what is left, in the
    metric of its `LoRC`, decide. A stack of layers has one rank, and its layers' gains are summed.
    What `quantize` finds later, stage by stage, differs a little.

    Args:
        params: the parameters; lazy leaves are read one by one.
        plan: what `jq.plan` returned. Schemes with a `LoRC` take part; its rank is the most that
            the weight may get. Others stay as they are.
        bytes: for the factors of all weights together, as they are stored: floats at their width,
            codes as dense streams, parameters of a `factor_grid` counted.
        evidence: path → `Evidence` (as from `capture`) for the weights whose rounding or metric
            needs it.
        key: for roundings that are random.
        progress: called with the path of every weight that was looked at.

    Returns:
        The plan with the ranks bought; a weight that got none has no compensation.

    Raises:
        PlanError: no scheme has a compensation, `bytes` is no number of bytes, or they pay for no
            rank of any weight.
        WeightError, EvidenceError: as `quantize`.

    Example:
        >>> import jquant as jq
        >>> fn = lambda p, x: (x @ p["a"]) @ p["b"]
        >>> a = jax.random.normal(jax.random.key(0), (2, 16, 16))
        >>> params, x = {"a": a[0], "b": a[1]}, jnp.ones((2, 16))
        >>> scheme = jq.Scheme(jq.grids.Uniform(3), compensation=jq.LoRC(16))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": scheme})
        >>> plan = lorc_ranks(params, plan, 400)  # a rank of 16 + 16 float16 takes 64 bytes
        >>> sum(s.compensation.rank for s in plan.values())
        6
    """
    if isinstance(bytes, bool) or not isinstance(bytes, int) or bytes < 1:
        raise PlanError(f"bytes must be a whole number above 0, got {bytes!r}")
    arrays, given = by_path(params), dict(evidence or {})
    check_weights(plan, arrays)
    taking = Plan({p: s for p, s in plan.items() if s.compensation is not None}, plan.weights)
    if not taking:
        raise PlanError("no scheme of the plan has a compensation; pass schemes with jq.LoRC(rank)")
    check_needs(taking, given, key, batches=False, staged=False)
    check_evidence(taking, given)
    offers = {}
    for path, scheme in taking.items():
        offers[path] = _offer(path, scheme, taking, arrays[path], given.get(path), key)
        if progress is not None:
            progress(path)
    ranks = _buy(offers, bytes)
    if not any(ranks.values()):
        path = min(offers, key=lambda p: offers[p].price(1))
        raise PlanError(
            f"{bytes} bytes pay for no rank of any weight; the cheapest, one of {path!r}, takes "
            f"{offers[path].price(1)} bytes"
        )
    return Plan({path: _with_rank(s, ranks.get(path)) for path, s in plan.items()}, plan.weights)


def _with_rank(scheme: Scheme, rank: int | None) -> Scheme:
    """The scheme with a compensation of this rank; as it is with None, and without one with 0."""
    choice = scheme.compensation
    if choice is None or rank is None:
        return scheme
    return replace(scheme, compensation=replace(choice, rank=rank) if rank else None)


@dataclass(frozen=True)
class Offer:
    """What ranks of one weight are worth and cost.

    Attributes:
        gains: relative squared error that each further rank takes away, falling.
        bits: of each stored array, at rank 0 and for each rank.
    """

    gains: tuple[float, ...]
    bits: tuple[tuple[float, float], ...]

    def price(self, rank: int) -> int:
        """Bytes of both factors."""
        return sum(math.ceil((base + each * rank) / 8) for base, each in self.bits) if rank else 0


def _buy(offers: Mapping[str, Offer], budget: int) -> dict[str, int]:
    """Ranks by path: the best gain per byte first, until nothing fits."""
    ranks = dict.fromkeys(offers, 0)
    waiting: list[tuple[float, str, int]] = []

    def ask(path: str) -> None:
        offer, rank = offers[path], ranks[path]
        if rank < len(offer.gains):
            more = offer.price(rank + 1) - offer.price(rank)
            heapq.heappush(waiting, (-offer.gains[rank] / max(more, 1), path, more))

    for path in offers:
        ask(path)
    while waiting:
        _, path, more = heapq.heappop(waiting)
        if more <= budget:  # else this weight is done: its next ranks cost as much
            budget -= more
            ranks[path] += 1
            ask(path)
    return ranks


def _offer(
    path: str,
    scheme: Scheme,
    plan: Plan,
    leaf: Any,
    evidence: Evidence | None,
    key: PRNGKeyArray | None,
) -> Offer:
    choice, layout = scheme.compensation, plan.weights[path].layout
    assert choice is not None
    w = jnp.asarray(read(leaf))
    if not isinstance(leaf, jax.Array):
        check_finite(path, w)
    own = None if key is None else key_of(key, path)
    left = remainder(w, scheme, layout, evidence=evidence, key=own)
    whole = layout.canonical(w).astype(jnp.float32)
    if choice.metric == "frobenius" or evidence is None:
        power = jnp.sum(whole**2)
    else:
        power = jnp.sum(output_error(whole, evidence.second_moment))
    spectra = np.asarray(choice.spectrum(left, evidence), np.float64)
    total = spectra.reshape(-1, spectra.shape[-1]).sum(0)
    gains = total / max(float(power), np.finfo(np.float32).tiny)
    return Offer(tuple(gains.tolist()), _prices(choice, left.shape))


def _prices(choice: LoRC, shape: tuple[int, ...]) -> tuple[tuple[float, float], ...]:
    """Bits of every stored array of the factors: at rank 0 (extrapolated), and per rank."""
    error = jax.ShapeDtypeStruct(shape, jnp.float32)

    def stored(rank: int) -> list[float]:
        low = jax.eval_shape(replace(choice, rank=rank, metric="frobenius"), error)
        return [bits for factor in (low.left, low.right) for bits in array_bits(factor)]

    one = stored(1)
    two = stored(2) if min(shape[-2:]) > 1 else [2 * bits for bits in one]
    return tuple((2 * a - b, b - a) for a, b in zip(one, two, strict=True))
