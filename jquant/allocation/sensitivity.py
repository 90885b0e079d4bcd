"""How much a network loses by quantizing one of its weights, as data: what `allocate` weighs.

A score is measured once and kept: a `Sensitivity` prints, goes to JSON and comes back. Two kinds:

* by scheme: for every weight and candidate a loss, in the units of the score;
* one number per weight, which knows of no scheme (CMPQ, PMPQ, TDMPQ's noise). It is read as a
  density, and the loss of `n` numbers in codes of `b` bits is taken to be `score · n · 4^-b`: an
  error of rounding falls to a quarter with each bit, and equal scores give equal bits. That is a
  heuristic of ours; the papers' scores are compared among each other only.

Losses of different weights are added as if they did not touch each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jquant.allocation.candidates import Candidates, key_of_file, key_of_scheme
from jquant.errors import EvidenceError, PlanError, extra, near
from jquant.schemes.scheme import Scheme

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing each weight costs, by one measure.

    Attributes:
        name: of the score, as `"exact KL"`.
        units: of the numbers, in words.
        how: on what and how it was measured, in words.
        values: path → one number for every scheme of `schemes[path]`, or a single one.
        schemes: path → the schemes the numbers belong to, in words (grid, groups and term); None
            where the score knows of no scheme.
        blocks: path → the block of the network that the weight is in.
        papers: what to cite, as keys of `papers.bib`; `jq.cite(sensitivity)` prints them.

    Raises:
        EvidenceError: a number is NaN, infinite or negative.

    Example:
        >>> Sensitivity("mine", "nats", "guessed", {"w": (1.0,)}).by_block()
        {'w': 1.0}
    """

    name: str
    units: str
    how: str
    values: Mapping[str, tuple[float, ...]]
    schemes: Mapping[str, tuple[str, ...]] | None = None
    blocks: Mapping[str, str] | None = None
    papers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for path, numbers in self.values.items():
            for at, number in enumerate(numbers):
                if not (math.isfinite(number) and number >= 0):
                    of = "" if self.schemes is None else f" under {self.schemes[path][at]}"
                    raise EvidenceError(
                        f"weight {path!r}: its score by {self.name} is {number}{of}; look for NaN "
                        "or infinite values in weights and batches"
                    )

    def losses(self, candidates: Candidates) -> dict[str, tuple[float, ...]]:
        """The loss of every candidate, for each weight in the order of its candidates.

        Weights with a single candidate lose 0: nothing depends on it.

        Raises:
            PlanError: a weight or a candidate was not measured.
        """
        losses = {}
        for path, schemes in candidates.items():
            if len(schemes) == 1:
                losses[path] = (0.0,)
            elif path not in self.values:
                raise PlanError(
                    f"{self.name} was not measured for weight {path!r}; measure it for these "
                    f"candidates (it is known for {near(path, self.values)})"
                )
            elif self.schemes is None:
                (score,), size = self.values[path], candidates.size(path)
                losses[path] = tuple(score * size * 4.0**-scheme.grid.bits for scheme in schemes)
            else:
                measured = dict(zip(self.schemes[path], self.values[path], strict=True))
                losses[path] = tuple(self._of(path, measured, scheme) for scheme in schemes)
        return losses

    def _of(self, path: str, measured: Mapping[str, float], scheme: Scheme) -> float:
        key = key_of_scheme(scheme)
        if key not in measured:
            raise PlanError(
                f"{self.name} was not measured for weight {path!r} under {key}, but under "
                f"{', '.join(measured)}; measure it for these candidates, or pass losses of your "
                "own (path → one number for each candidate)"
            )
        return measured[key]

    def by_block(self, at: int = 0) -> dict[str, float]:
        """One number per block: the sum over its weights of scheme `at`; of scores, the mean.

        Weights without a block stand for themselves.
        """
        by_block: dict[str, list[float]] = {}
        for path, numbers in self.values.items():
            block = path if self.blocks is None else self.blocks.get(path, path)
            by_block.setdefault(block, []).append(numbers[at if self.schemes is not None else 0])
        if self.schemes is None:
            return {block: math.fsum(some) / len(some) for block, some in by_block.items()}
        return {block: math.fsum(some) for block, some in by_block.items()}

    def table(self) -> Table:
        """A table for `rich.print`: a row per weight."""
        with extra("cli"):
            from rich.table import Table

        table = Table(title=f"{self.name}, {self.units}", caption=self.how)
        table.add_column("weight", overflow="fold")
        table.add_column("score" if self.schemes is None else "smallest scheme first")
        for path, numbers in self.values.items():
            table.add_row(path, "  ".join(f"{number:.3g}" for number in numbers))
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings, for `json.dump`; `from_json` makes the same value of it."""
        lists = [] if self.schemes is None else list(dict.fromkeys(self.schemes.values()))
        which = None
        if self.schemes is not None:
            which = {path: lists.index(some) for path, some in self.schemes.items()}
        return {
            "format": FORMAT, "name": self.name, "units": self.units, "how": self.how,
            "values": {path: list(numbers) for path, numbers in self.values.items()},
            "lists": [list(some) for some in lists], "schemes": which,
            "blocks": None if self.blocks is None else dict(self.blocks),
            "papers": list(self.papers),
        }  # fmt: skip

    @staticmethod
    def from_json(data: Any) -> Sensitivity:
        """The value that `to_json` was called on.

        Raises:
            ValueError: it is something else.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, this version reads {FORMAT}")
            lists = [[*map(key_of_file, some)] for some in data["lists"]]
            which = data["schemes"]
            values = {path: tuple(map(float, some)) for path, some in data["values"].items()}
            schemes = None if which is None else {p: tuple(lists[at]) for p, at in which.items()}
            lengths = {path: 1 if schemes is None else len(schemes[path]) for path in values}
            if any(len(values[path]) != count for path, count in lengths.items()):
                raise ValueError("numbers and schemes do not match")
            name, units, how = (str(data[word]) for word in ("name", "units", "how"))
            papers = tuple(map(str, data["papers"]))
            return Sensitivity(name, units, how, values, schemes, data["blocks"], papers)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"this is not what Sensitivity.to_json gives: {error!r}") from error
