"""Rounding by what errors of outputs cost: each group of output rows by a moment of its own.

Rows of a weight are rounded independently, given the second moment of the inputs. So moments that
are weighed for groups of rows (`Evidence.guided`) need no rounding that knows of them: the weight
is split into its groups, and each is given to another rounding with the moment, and the drift, of
that group in the place of the common ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.calibration.saliency import edges_of
from jquant.errors import EvidenceError
from jquant.grids.base import Grid, GridParams
from jquant.numerics.packed import joined
from jquant.rounding.base import Rounded, Rounding, label_of
from jquant.rounding.gptq import GPTQ
from jquant.rounding.prepare import prepared_for


class Prepared(NamedTuple):
    """What the other rounding has made of the evidence of each group."""

    groups: tuple[Any, ...]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Guided:
    """Another rounding, by moments that are weighed by what errors of the outputs cost.

    Args:
        rounding: what rounds each group of output rows; default `GPTQ()`. `Polish(GPTQ())` goes
            inside, not around, so that it polishes for the same moments.

    Raises:
        ValueError: `rounding` is none.

    Example:
        >>> import jquant as jq
        >>> fn = lambda p, x: jnp.tanh(x @ p["w"])
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
        >>> x = jax.random.normal(jax.random.key(1), (64, 8))
        >>> scheme = jq.Scheme(jq.grids.Uniform(2), rounding=Guided(GPTQ()))
        >>> plan = jq.plan(jq.find_weights(fn, params, x), {".*": scheme})
        >>> seen = jq.saliency(fn, params, [x], objective=lambda y, x: jnp.sum(y))
        >>> qparams, report = jq.quantize(fn, params, plan, [x], saliency=seen)

    References:
        Kim et al., GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance,
        2025, https://arxiv.org/abs/2505.07004
    """

    rounding: Rounding = GPTQ()

    def __post_init__(self) -> None:
        if isinstance(self.rounding, type) or not isinstance(self.rounding, Rounding):
            raise ValueError(
                f"Guided.rounding must be a rounding, such as GPTQ(), got {self.rounding!r}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return self.rounding.needs | {"moment", "guided"}

    @property
    def papers(self) -> tuple[str, ...]:
        return ("kim2025guidedquant",)

    @property
    def label(self) -> str:
        """What a report calls it."""
        return f"Guided({label_of(self.rounding)})"

    def prepare(
        self, evidence: Evidence | Float[Array, "*batch in in"] | None, groups: Groups = Groups()
    ) -> Prepared:
        """What every call with this evidence, and these groups, can be given in its place.

        Raises:
            EvidenceError: there is nothing guided in it, or what the other rounding raises.
        """
        if not isinstance(evidence, Evidence) or evidence.guided is None:
            raise EvidenceError(
                f"{self.label} needs moments weighed by what errors of the outputs cost: pass "
                "saliency=jq.saliency(...) to quantize or capture"
            )
        parts = map(evidence.of_group, range(evidence.groups))
        return Prepared(tuple(prepared_for(self.rounding, part, groups) for part in parts))

    def __call__(
        self,
        w: Float[Array, "*batch out in"],
        grid: Grid,
        groups: Groups = Groups(),
        *,
        evidence: Evidence | Float[Array, "*batch in in"] | Prepared | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Rounded:
        """Round `w`.

        Args:
            w: weights `[*batch, out, in]`.
            grid: any grid that the other rounding takes.
            groups: along either axis; along out only with one group of moments.
            evidence: with `guided`, or what `prepare` made of it, for these groups.
            key: for the other rounding; each group folds its number in, but for the first.

        Returns:
            what the other rounding returns, groups together, but no errors in `info`: theirs are
            by other moments. `damping`, `dead` and `failed` are the largest of all groups, other
            numbers their mean.

        Raises:
            EvidenceError: nothing is guided in the evidence, or what the other rounding raises.
            ValueError: several moments for rows that share parameters of the grid.
        """
        prepared = evidence if isinstance(evidence, Prepared) else self.prepare(evidence, groups)
        edges = edges_of(w.shape[-2], len(prepared.groups))
        self._check(w, grid, groups, edges)
        parts = []
        for number, own in enumerate(prepared.groups):
            turn = key if key is None or number == 0 else jax.random.fold_in(key, number)
            rows = w[..., edges[number] : edges[number + 1], :]
            parts.append(self.rounding(rows, grid, groups, evidence=own, key=turn))
        told = {name: _told(name, [p.info[name] for p in parts]) for name in parts[0].info}
        info = {name: value for name, value in told.items() if name not in _OWN}
        if len(parts) == 1:
            return parts[0]._replace(info=info)
        targets = [part.target for part in parts if part.target is not None]
        return Rounded(
            joined([part.codes for part in parts], w.ndim - 2),
            _together([part.params for part in parts], w, edges),
            info,
            jnp.concatenate(targets, -2) if targets else None,
        )

    def _check(
        self, w: Float[Array, "*batch out in"], grid: Grid, groups: Groups, edges: Sequence[int]
    ) -> None:
        """Refuse groups of rows that cannot be rounded each for itself."""
        if any(a == b for a, b in zip(edges, edges[1:], strict=False)):
            raise EvidenceError(
                f"evidence is guided for {len(edges) - 1} groups of rows, and the weight has "
                f"{w.shape[-2]} rows"
            )
        if len(edges) > 2 and groups.axis == "out":
            raise ValueError(
                f"{self.label} has {len(edges) - 1} moments for rows that share parameters of "
                f"{grid} along out; pass jq.saliency(..., groups=1), or groups along in"
            )


_OWN = ("error", "nearest_error")  # measured by the moments of a group
_WORST = ("damping", "dead", "failed")


def _told(name: str, values: Sequence[Array]) -> Array:
    join = jnp.max if name in _WORST else jnp.mean
    return join(jnp.stack(values), 0)


def _together(
    params: Sequence[GridParams], w: Float[Array, "*batch out in"], edges: Sequence[int]
) -> Mapping[str, Array]:
    """The parameters of all rows.

    Raises:
        ValueError: some are not of one row each.
    """
    axis = w.ndim - 2
    for leaf in jax.tree.leaves(dict(params[0])):
        if leaf.shape[axis] != edges[1]:
            raise ValueError(
                f"rows of this grid share parameters {list(leaf.shape)}, and cannot be rounded by "
                f"{len(edges) - 1} moments; pass jq.saliency(..., groups=1)"
            )
    return jax.tree.map(lambda *leaves: joined(leaves, axis), *map(dict, params))
