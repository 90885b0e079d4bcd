"""CPTQuant's way to share bits: blocks in clusters by their score, one width for each cluster.

Nanda et al. 2024. Here the clusters are optimal and sorted (`clusters.py`), and the widths the best
that the budget pays for, the more sensitive cluster never the smaller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jquant.allocation.candidates import Candidates
from jquant.allocation.clusters import clusters
from jquant.allocation.sensitivity import Sensitivity
from jquant.errors import PlanError


def clusters_of(
    sensitivity: Sensitivity | None,
    candidates: Candidates,
    losses: Mapping[str, Sequence[float]],
    count: int,
) -> list[int]:
    """The cluster of every weight, 0 for the least sensitive; -1 where there is no choice.

    A block is clustered by its score, or by its loss per number under the smallest scheme.

    Args:
        sensitivity: where the losses came from, if its blocks and scores are known.
        candidates: the weights, in order.
        losses: path → one number for each candidate.
        count: how many clusters.

    Raises:
        PlanError: weights with a choice have different numbers of candidates, or `count` is none.
    """
    lengths = {len(candidates[path]) for path in candidates.free}
    if len(lengths) > 1:
        raise PlanError(
            f"method='clusters' gives all weights of a cluster the candidate at one position, but "
            f"they have {sorted(lengths)} candidates; offer all the same, or use another method"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise PlanError(f"clusters must be a whole number above 0, got {count!r}")
    block_of = {} if sensitivity is None or sensitivity.blocks is None else sensitivity.blocks
    blocks: dict[str, list[str]] = {}
    for path in candidates.free:
        blocks.setdefault(block_of.get(path, path), []).append(path)
    if sensitivity is not None and sensitivity.schemes is None:
        shares, divisor = sensitivity.values, len
    else:
        shares, divisor = losses, lambda paths: sum(map(candidates.size, paths))
    scores = [
        math.fsum(shares[path][0] for path in paths) / divisor(paths) for paths in blocks.values()
    ]
    labels = clusters(scores, count)
    label_of: dict[str, int] = {}
    for paths, label in zip(blocks.values(), labels, strict=True):
        label_of |= dict.fromkeys(paths, label)
    return [label_of.get(path, -1) for path in candidates]


def by_cluster(
    labels: Sequence[int],
    losses: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    budget: int,
) -> list[int]:
    """One position per cluster, rising with sensitivity, of the least loss that fits.

    Args:
        labels: the cluster of every weight, -1 for a weight without a choice.
        losses, sizes: of every weight under each of its candidates; sizes in bytes.
        budget: bytes for all.

    Returns:
        the position of every weight's scheme among its candidates.
    """
    free = [k for k, label in enumerate(labels) if label >= 0]
    fixed = sum(some[0] for some, label in zip(sizes, labels, strict=True) if label < 0)
    many, length = max(labels) + 1, len(losses[free[0]])
    loss, cost = np.zeros((many, length)), np.zeros((many, length), np.int64)
    own = [labels[k] for k in free]
    np.add.at(loss, own, [losses[k] for k in free])
    np.add.at(cost, own, [sizes[k] for k in free])
    rows = np.arange(many)
    offers = (
        (sum(loss[rows, at].tolist()), -fixed - int(cost[rows, at].sum()), at)
        for at in map(list, itertools.combinations_with_replacement(range(length), many))
    )
    # Of equal losses the offer that spends more. The smallest schemes fit, so there is one.
    _, _, best = min(offer for offer in offers if -offer[1] <= budget)
    return [0 if label < 0 else best[label] for label in labels]
