"""Who gets the bits: a scheme for every weight, under a budget for all of them together.

`allocate` takes losses (a `Sensitivity`, or numbers of your own), candidates and a budget, and
gives a plan and what was chosen. The budget is in bytes as a checkpoint stores them, or in bits per
weight, scales and zero points and factors counted; a plan never exceeds the budget. Methods are
those of `budget.py`, and CPTQuant's (`blocks.py`), which puts blocks into clusters by their score
and gives each cluster one width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from jquant.allocation import budget as ways
from jquant.allocation.blocks import by_cluster, clusters_of
from jquant.allocation.candidates import Candidates
from jquant.allocation.sensitivity import Sensitivity
from jquant.errors import EvidenceError, PlanError, extra
from jquant.schemes.scheme import Plan, Scheme

if TYPE_CHECKING:
    from rich.table import Table

Method = Literal["auto", "dynamic", "greedy", "lagrange", "clusters"]
METHODS = ("auto", "dynamic", "greedy", "lagrange", "clusters")
Losses = Sensitivity | Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Share:
    """What a weight got.

    Attributes:
        position: of the scheme among the weight's candidates.
        scheme: the scheme.
        bytes: as a checkpoint stores it.
        size: how many numbers the weight has.
        loss: that the scheme was said to cost.
    """

    position: int
    scheme: Scheme
    bytes: int
    size: int
    loss: float

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.bytes / self.size


@dataclass(frozen=True)
class Allocation(Mapping[str, Share]):
    """Path → `Share` for every weight of the plan, in the order of depth.

    Attributes:
        weights: the mapping.
        budget: bytes that might be spent.
        method: how it was chosen.
        by: the name of the losses.
        papers: what to cite, as keys of `papers.bib`; `jq.cite(allocation)` prints them.
    """

    weights: Mapping[str, Share]
    budget: int
    method: str
    by: str
    papers: tuple[str, ...] = ()

    def __getitem__(self, path: str) -> Share:
        return self.weights[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def bytes(self) -> int:
        """Bytes spent."""
        return sum(share.bytes for share in self.values())

    @property
    def bits(self) -> float:
        """Stored bits per weight, over all."""
        return 8 * self.bytes / sum(share.size for share in self.values())

    @property
    def loss(self) -> float:
        """The sum of losses."""
        return math.fsum(share.loss for share in self.values())

    @property
    def positions(self) -> dict[str, int]:
        """Path → position among the candidates: the same choice for other ones, `other.plan(…)`."""
        return {path: share.position for path, share in self.items()}

    @property
    def widths(self) -> dict[int, int]:
        """Bits of codes → how many weights have them, fewest bits first."""
        return dict(sorted(Counter(share.scheme.grid.bits for share in self.values()).items()))

    def __str__(self) -> str:
        widths = ", ".join(f"{count} of {bits} bits" for bits, count in self.widths.items())
        return f"{widths}; {self.bits:.3f} bits per weight stored, by {self.by} ({self.method})"

    def table(self) -> Table:
        """A table for `rich.print`: a row per weight."""
        with extra("cli"):
            from rich.table import Table

        caption = f"{self}; {self.bytes} of {self.budget} bytes"
        table = Table(title="who gets the bits", caption=caption)
        table.add_column("weight", overflow="fold")
        for name in ("code bits", "stored bits", "bytes", "loss"):
            table.add_column(name, justify="right")
        for path, share in self.items():
            bits = f"{share.scheme.grid.bits}", f"{share.bits:.3f}"
            table.add_row(path, *bits, str(share.bytes), f"{share.loss:.3g}")
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings, for `json.dump`."""
        rows = {
            path: {
                "scheme": repr(share.scheme), "position": share.position, "bytes": share.bytes,
                "bits": share.bits, "loss": share.loss,
            }
            for path, share in self.items()
        }  # fmt: skip
        return {
            "by": self.by, "method": self.method, "budget_bytes": self.budget,
            "bytes": self.bytes, "bits_per_weight": self.bits, "loss": self.loss, "weights": rows,
        }  # fmt: skip


def allocate(
    losses: Losses,
    candidates: Candidates,
    *,
    bits: float | None = None,
    bytes: int | None = None,
    method: Method = "auto",
    clusters: int = 3,
) -> tuple[Plan, Allocation]:
    """The plan of least total loss that a budget pays for, and what it gives to each weight.

    Args:
        losses: what `exact_kl`, `kl_gradient`, `fisher`, … return; or path → one number for each
            candidate, in their order.
        candidates: what `candidates` returned.
        bits: budget in stored bits per weight, over all weights of the plan, fixed ones too.
        bytes: the same budget in bytes. Exactly one of the two.
        method: "dynamic" is exact; "greedy" misses by less than one upgrade; "lagrange" may leave a
            part of the budget; "clusters" is the paper's. "auto": dynamic where its table has fewer
            than 50 million entries, else greedy. Ties give more bits to the earlier weight, except
            by "lagrange", which gives weights that tie the same.
        clusters: how many, for that method (3 is the paper's).

    Returns:
        the plan, and what was chosen. More budget is never worse in total loss.

    Raises:
        PlanError: no budget or two; a budget below the smallest possible (the message says what
            that is); losses of other weights or candidates; a method that does not exist, or has no
            room for this problem.
        EvidenceError: a loss is NaN, infinite or negative.

    Example:
        >>> import jax.numpy as jnp, jquant as jq
        >>> params = {"a": jnp.ones((64, 8)), "b": jnp.ones((8, 8))}
        >>> fn = lambda p, x: (x @ p["a"]) @ p["b"]
        >>> plan = jq.plan(jq.find_weights(fn, params, jnp.ones((2, 64))), {".*": jq.Scheme(
        ...     jq.grids.Uniform(4, symmetric=True, scale_dtype="float16"))})
        >>> choice = jq.allocation.candidates(plan, (2, 4, 8))
        >>> plan, chosen = allocate({"a": (1.0, 0.5, 0.1), "b": (9.0, 5.0, 0.3)}, choice, bits=3.2)
        >>> chosen.widths, chosen.bytes, chosen.budget
        ({2: 1, 8: 1}, 224, 230)

    References:
        Nanda et al., CPTQuant, 2024, https://arxiv.org/abs/2412.03599
    """
    if not isinstance(candidates, Candidates):
        raise PlanError(
            f"expected what allocation.candidates returns, got {type(candidates).__name__}"
        )
    if method not in METHODS:
        raise PlanError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    paths = list(candidates)
    sizes = [candidates.bytes(path) for path in paths]
    budget = budget_bytes(candidates, bits=bits, bytes=bytes)
    sensitivity = losses if isinstance(losses, Sensitivity) else None
    given = losses.losses(candidates) if isinstance(losses, Sensitivity) else losses
    lost = {path: _losses(path, given, len(candidates[path])) for path in paths}
    if method == "auto":
        method = "dynamic" if ways.cells(sizes, budget) <= ways.MOST else "greedy"
    if method == "clusters":
        labels = clusters_of(sensitivity, candidates, lost, clusters)
        choose = partial(by_cluster, labels)
    else:
        choose = _METHODS[method]
    positions = choose(list(lost.values()), sizes, budget)
    shares = {
        path: Share(at, candidates[path][at], size[at], candidates.size(path), lost[path][at])
        for path, at, size in zip(paths, positions, sizes, strict=True)
    }
    by, papers = "losses given", ("nanda2024cptquant",) if method == "clusters" else ()
    if sensitivity is not None:
        by, papers = sensitivity.name, tuple(dict.fromkeys((*sensitivity.papers, *papers)))
    plan = Plan({path: shares[path].scheme for path in paths}, candidates.weights)
    return plan, Allocation(shares, budget, method, by, papers)


def budget_bytes(
    candidates: Candidates, *, bits: float | None = None, bytes: int | None = None
) -> int:
    """The budget in bytes, checked: what `allocate` refuses, before anything is measured.

    Raises:
        PlanError: no budget or two, or one below the smallest possible.
    """
    numbers = sum(map(candidates.size, candidates))
    if (bits is None) == (bytes is None):
        raise PlanError(f"pass bits or bytes, exactly one; got bits={bits!r}, bytes={bytes!r}")
    if bytes is not None:
        if isinstance(bytes, bool) or not isinstance(bytes, int) or bytes < 1:
            raise PlanError(f"bytes must be a whole number above 0, got {bytes!r}")
        budget = bytes
    else:
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < math.inf:
            raise PlanError(f"bits must be a number above 0, got {bits!r}")
        budget = math.floor(bits * numbers / 8 + 1e-6)  # 4.3125 bits may come as 4.3124999…
    least = sum(candidates.bytes(path)[0] for path in candidates)
    if budget < least:
        raise PlanError(
            f"a budget of {budget} bytes, {8 * budget / numbers:.4g} bits per weight, is below the "
            f"smallest possible: {least} bytes, {math.ceil(8e4 * least / numbers) / 1e4:g} bits "
            "per weight (scales, zero points and factors counted); raise it, or offer smaller "
            "schemes"
        )
    return budget


def _losses(path: str, given: Mapping[str, Sequence[float]], count: int) -> tuple[float, ...]:
    if path not in given:
        if count == 1:
            return (0.0,)
        raise PlanError(f"losses do not name weight {path!r}, which has {count} candidates")
    losses = tuple(float(x) for x in given[path])
    if len(losses) != count:
        raise PlanError(f"weight {path!r} has {count} candidates, got {len(losses)} losses for it")
    for loss in losses:
        if not (math.isfinite(loss) and loss >= 0):
            raise EvidenceError(f"weight {path!r}: a loss must be 0 or more, got {loss}")
    return losses


def _dynamic(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    if ways.cells(sizes, budget) > ways.MOST:
        raise PlanError(
            f"method='dynamic' would need a table of {ways.cells(sizes, budget)} entries, more "
            f"than {ways.MOST}; pass method='greedy'"
        )
    return ways.dynamic(losses, sizes, budget)


_METHODS = {"dynamic": _dynamic, "greedy": ways.greedy, "lagrange": ways.lagrange}
