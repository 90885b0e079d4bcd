"""Choosing one of several options for each item, of least total loss, under a budget.

    minimise  Σ loss_i(choice_i)   such that   Σ size_i(choice_i) ≤ budget

Three ways, all pure functions of numbers:

* `dynamic`: exact. One table over items and sizes, whose unit is the greatest common divisor of all
  differences of sizes: weights of equal shapes keep it small.
* `lagrange`: bisection of the price λ of a byte, where each item takes the least
  `loss + λ · size`. Exact for what it spends, which may be less than the budget.
* `greedy`: upgrades along each item's lower convex hull, the best gain per byte first; an item
  whose next upgrade does not fit is done. That is the Lagrangian's choice and what fits beside it,
  misses the best by less than the gain of the first upgrade that did not fit, and is never worse
  with a larger budget.

Ties give more bytes to the earlier item. Losses are compared as whole numbers, so that equal sums
are equal in whatever order they are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Numbers = Sequence[Sequence[float]]
Sizes = Sequence[Sequence[int]]

MOST = 50_000_000  # entries of the table of `dynamic` (bytes, and about a second per 50 million)


def cells(sizes: Sizes, budget: int) -> int:
    """How many entries the table of `dynamic` has."""
    return len(sizes) * (_room(sizes, budget)[1] + 1)


def dynamic(losses: Numbers, sizes: Sizes, budget: int) -> list[int]:
    """The choices of least total loss; ties give more bytes to the earlier item.

    Args:
        losses: of each option of each item, not negative.
        sizes: of the same, bytes, rising.
        budget: at least the sum of the smallest sizes.

    Returns:
        the position of the chosen option of every item.

    Example:
        >>> dynamic([[4.0, 1.0], [9.0, 3.0], [4.0, 1.0]], [[1, 2]] * 3, 5)
        [1, 1, 0]
    """
    unit, room = _room(sizes, budget)
    costs = [[(size - some[0]) // unit for size in some] for some in sizes]
    whole = _whole(losses)
    best = np.zeros(room + 1, np.int64)
    choices = []
    for options, prices in zip(reversed(whole), reversed(costs), strict=True):
        now = np.full(room + 1, np.iinfo(np.int64).max, np.int64)
        choice = np.zeros(room + 1, np.uint8 if len(prices) < 256 else np.int32)
        for at, (loss, price) in enumerate(zip(options, prices, strict=True)):
            if price > room:
                break
            total = best[: room + 1 - price] + loss
            better = total <= now[price:]  # an equal one is larger
            now[price:][better] = total[better]
            choice[price:][better] = at
        best = now
        choices.append(choice)
    left, chosen = room, []
    for choice, prices in zip(reversed(choices), costs, strict=True):
        chosen.append(int(choice[left]))
        left -= prices[chosen[-1]]
    return chosen


def greedy(losses: Numbers, sizes: Sizes, budget: int) -> list[int]:
    """The best upgrade per byte first, along convex hulls; arguments as for `dynamic`.

    Example:
        >>> greedy([[4.0, 1.0], [9.0, 3.0], [4.0, 1.0]], [[1, 2]] * 3, 5)
        [1, 1, 0]
    """
    chosen = [0] * len(losses)
    left = budget - sum(some[0] for some in sizes)
    upgrades = []
    for item, (some, bytes_) in enumerate(zip(losses, sizes, strict=True)):
        hull = _hull(some, bytes_)
        chosen[item] = hull[0]
        for low, high in zip(hull, hull[1:], strict=False):
            more = bytes_[high] - bytes_[low]
            upgrades.append(((some[low] - some[high]) / more, item, high, more))
    done: set[int] = set()
    for _, item, high, more in sorted(upgrades, key=lambda u: (-u[0], u[1], u[2])):
        if item in done:
            continue
        if more > left:
            done.add(item)
        else:
            left -= more
            chosen[item] = high
    return chosen


def lagrange(losses: Numbers, sizes: Sizes, budget: int) -> list[int]:
    """Bisection of the price of a byte; arguments as for `dynamic`.

    Example:
        >>> lagrange([[4.0, 1.0], [9.0, 3.0], [4.0, 1.0]], [[1, 2]] * 3, 5)
        [0, 1, 0]
    """

    def chosen(price: float) -> list[int]:
        choice = []
        for some, bytes_ in zip(losses, sizes, strict=True):
            paid = [loss + price * size for loss, size in zip(some, bytes_, strict=True)]
            least = min(paid)
            choice.append(max(at for at, p in enumerate(paid) if p <= least))
        return choice

    def fits(choice: list[int]) -> bool:
        return sum(bytes_[at] for bytes_, at in zip(sizes, choice, strict=True)) <= budget

    losses = _normal(losses)
    best = chosen(0.0)
    if fits(best):
        return best
    best = [0] * len(losses)
    low, high = 0.0, 2.0  # no byte is worth more than the largest loss
    for _ in range(200):
        middle = (low + high) / 2
        choice = chosen(middle)
        if fits(choice):
            high, best = middle, choice
        else:
            low = middle
    return best


def _room(sizes: Sizes, budget: int) -> tuple[int, int]:
    """The unit of size, and how many of them the budget has beyond the smallest options."""
    differences = [size - some[0] for some in sizes for size in some[1:]]
    unit = math.gcd(*differences) or 1
    most = sum(some[-1] - some[0] for some in sizes)
    return unit, min(budget - sum(some[0] for some in sizes), most) // unit


def _normal(losses: Numbers) -> list[list[float]]:
    """Losses times a power of two, the largest from a half to one; nothing is rounded but what is
    too small to matter."""
    _, exponent = math.frexp(max(max(some) for some in losses))
    return [[math.ldexp(loss, -exponent) for loss in some] for some in losses]


def _whole(losses: Numbers) -> list[list[int]]:
    """Losses as whole numbers whose sum fits 62 bits. The scale is a power of two, so that floats
    of about one size stay what they are, and so do their sums."""
    bits = 61 - math.ceil(math.log2(len(losses) + 1))
    return [[round(math.ldexp(loss, bits)) for loss in some] for some in _normal(losses)]


def _hull(losses: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """The options on the lower convex hull of loss over size, from the smallest to the best."""
    hull: list[int] = []
    for at, (loss, size) in enumerate(zip(losses, sizes, strict=True)):
        if hull and size == sizes[hull[-1]] and loss < losses[hull[-1]]:
            hull.pop()
        elif hull and loss >= losses[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            before = (losses[a] - losses[b]) * (size - sizes[a])
            if before > (losses[a] - loss) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(at)
    return hull
