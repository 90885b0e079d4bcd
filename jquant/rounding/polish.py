"""Polish: what another rounding has made of a weight, improved code by code and scale by scale.

GPTQ settles every column once, before it sees the columns to come. Afterwards each code can be
chosen again with all others in place, and each group's scale fitted again to the codes it has, both
exactly (see `coordinates`). Turn by turn they lower one loss, `tr((Q - V) (H + λI) (Q - V)ᵀ)`,
which never rises; λ keeps it from learning the calibration data by heart. The columns' order does
not matter, nor who rounded first: `Polish` takes the codes, the parameters and, where there is one,
the target `V` of any rounding. Rows are independent given H; leading axes are mapped over.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.grids.base import Grid, GridParams, is_refitted
from jquant.grids.grouped import Grouped
from jquant.numerics import require
from jquant.numerics.packed import unpacked
from jquant.rounding.base import Rounded, Rounding, label_of, mapped
from jquant.rounding.columns import columns_of
from jquant.rounding.coordinates import Bowl, State, Sweep
from jquant.rounding.elementwise import moment_for
from jquant.rounding.gptq import GPTQ
from jquant.rounding.prepare import prepared_for
from jquant.rounding.units import Places, params_of, table_of


class Prepared(NamedTuple):
    """What is made of evidence before a weight is seen: the same for all that share inputs."""

    inner: Any  # what the other rounding has made of it
    power: Float[Array, "*batch in"]  # H_jj
    unit: Float[Array, "*batch"]  # the mean of H_jj over live inputs
    ridge: Float[Array, "*batch n"]  # λ where a column counts, in that unit, by place
    bowl: Bowl  # likewise; leaves [*batch, n, …]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Polish:
    """Another rounding, and then better codes and scales for the same loss.

    Args:
        rounding: what rounds first; default `GPTQ()`. Any will do, with what it needs.
        rounds: how often every code is chosen anew, 3 by default (the first gains two thirds).
        refit: whether each group's scale is fitted to its codes, and its offset too where a grid
            has one that is no code (A4, `KMeans`, GGUF's kinds with offsets); values are judged as
            they are stored. Scales that stand for several groups stay as they are.
        damping: λ relative to the mean of `H_jj` over live inputs; 0.1, ten times GPTQ's, which on
            other text lost less than 0.01 did, and no more for the network (docs/notes/quality.md).

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> from jquant.grids import Uniform
        >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.tri(8)
        >>> w = jax.random.normal(jax.random.key(1), (4, 8))
        >>> gptq, polished = (r(w, Uniform(2), evidence=x.T @ x) for r in (GPTQ(), Polish()))
        >>> bool(polished.info["error"] < gptq.info["error"])
        True

    References:
        Behdin et al., QuantEase: Optimization-based Quantization for Language Models, 2023,
        https://arxiv.org/abs/2309.01885 (codes, column by column)
        Kim et al., GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance,
        2025, https://arxiv.org/abs/2505.07004 (in turns with values fitted in closed form)
    """

    rounding: Rounding = GPTQ()
    rounds: int = 3
    refit: bool = True
    damping: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.rounding, type) or not isinstance(self.rounding, Rounding):
            raise ValueError(
                f"Polish.rounding must be a rounding, such as GPTQ(), got {self.rounding!r}"
            )
        require.integer("Polish.rounds", self.rounds, 1, 100)
        require.boolean("Polish.refit", self.refit)
        number = isinstance(self.damping, int | float) and not isinstance(self.damping, bool)
        if not number or not 0 <= self.damping < float("inf"):
            raise ValueError(f"Polish.damping must be a number from 0, got {self.damping!r}")

    @property
    def needs(self) -> frozenset[str]:
        return self.rounding.needs | {"moment"}

    @property
    def papers(self) -> tuple[str, ...]:
        return ("behdin2023quantease", *(("kim2025guidedquant",) if self.refit else ()))

    @property
    def label(self) -> str:
        """What a report calls it."""
        return f"Polish({label_of(self.rounding)})"

    def prepare(
        self, evidence: Evidence | Float[Array, "*batch in in"] | None, groups: Groups = Groups()
    ) -> Prepared:
        """What every weight with these inputs, and these groups, can be given as evidence.

        Raises:
            EvidenceError: no evidence, or what the other rounding raises.

        Example:
            >>> from jquant.grids import Uniform
            >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.tri(8)
            >>> q, k = jax.random.normal(jax.random.key(1), (2, 4, 8))
            >>> seen = Polish().prepare(x.T @ x)
            >>> codes = [Polish()(w, Uniform(3), evidence=seen).codes for w in (q, k)]
        """
        moment = moment_for("Polish", evidence)
        inner = prepared_for(self.rounding, evidence, groups)  # pyright: ignore
        return Prepared(inner, *_prepare(moment, jnp.float32(self.damping), groups))

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
            w: weights `[*batch, out, in]`; arithmetic is float32.
            grid: any grid; to refit one, it must have the method `rescaled`, as all of jquant's do.
            groups: along either axis, a ragged last one included.
            evidence: what the other rounding takes, with the second moment of the inputs; or what
                `prepare` made of it, for these groups.
            key: for the other rounding.

        Returns:
            Codes, parameters and target, and in `info`, float32 `[*batch]`, what the other rounding
            tells, but `error` of the codes that are returned, and besides `polished`, the loss as
            a part of what it was before, and `changed`, the share of codes that are others now.
            Dead inputs (`H_jj = 0`) keep their codes. Where a factorisation has failed, and where a
            loss cannot be told (a second moment that is none), all stays as it was.

        Raises:
            EvidenceError: no evidence, or of the wrong shape, or what the other rounding raises.
            ValueError: the grid cannot be refitted, or what the other rounding raises.
        """
        if self.refit and not is_refitted(grid):
            raise ValueError(
                f"Polish cannot refit {grid}, which has no method rescaled(params, factor, shift): "
                "pass refit=False"
            )
        if not isinstance(evidence, Prepared):
            moment_for("Polish", evidence, w.shape)
            evidence = self.prepare(evidence, groups)
        first = self.rounding(w, grid, groups, evidence=evidence.inner, key=key)
        rounds = jnp.asarray(self.rounds, jnp.int32)  # no part of the program
        return _polish(w, first, evidence, rounds, self.refit, Grouped(grid, groups))


@partial(jax.jit, static_argnames="groups")
def _prepare(
    moment: Float[Array, "*batch in in"], damping: Float[Array, ""], groups: Groups
) -> tuple[Float[Array, "*batch in"], Float[Array, "*batch"], Float[Array, "*batch n"], Bowl]:
    def one(moment: Float[Array, "in in"]) -> tuple[Array, Array, Array, Bowl]:
        power = jnp.diagonal(moment)
        alive = power > 0
        count = jnp.sum(alive.astype(jnp.float32))
        unit = jnp.sum(jnp.where(alive, power, 0.0)) / jnp.maximum(count, 1.0)
        unit = jnp.where(unit > 0, unit, 1.0)
        place = Places.of(groups, len(power))
        live = place.real & alive[place.source]
        scaled = jnp.take(jnp.take(moment, place.source, 0), place.source, 1) / unit
        scaled = jnp.where(live[:, None] & live[None], scaled, 0.0)
        ridge = jnp.where(live, damping, 0.0)
        return power, unit, ridge, Bowl(scaled + jnp.diag(ridge), live)

    return mapped(one, moment.shape[:-2])(moment.astype(jnp.float32))


@partial(jax.jit, static_argnames=("refit", "grid"))
def _polish(
    w: Float[Array, "*batch out in"],
    first: Rounded,
    prepared: Prepared,
    rounds: Integer[Array, ""],
    refit: bool,
    grid: Grouped,
) -> Rounded:
    one = partial(_polish_one, rounds=rounds, refit=refit, grid=grid)
    return mapped(one, w.shape[:-2])(w.astype(jnp.float32), first, prepared._replace(inner=None))


def _polish_one(
    w: Float[Array, "out in"],
    first: Rounded,
    prepared: Prepared,
    *,
    rounds: Integer[Array, ""],
    refit: bool,
    grid: Grouped,
) -> Rounded:
    _, power, unit, ridge, bowl = prepared
    columns = columns_of(grid, w.shape)
    place = Places.of(grid.groups, w.shape[-1])
    target = w if first.target is None else first.target.astype(jnp.float32)

    def losses(aim: Array, codes: Array, params: GridParams) -> tuple[Array, Array, Array]:
        """What pulls at all columns, their loss, and without the damping's share."""
        error = columns.of(grid.decode(codes, params) - aim)
        error = jnp.where(place.real[:, None, None], jnp.take(error, place.source, 0), 0.0)
        error = jnp.where(jnp.asarray(columns.real), error, 0.0)
        n, m, b = error.shape
        pull = jnp.matmul(bowl.moment, error.reshape(n, m * b), precision=lax.Precision.HIGHEST)
        # A reduction that is fused with a product is slow on CPUs.
        pull = lax.optimization_barrier(pull).reshape(n, m, b)
        loss = jnp.sum(error * pull)
        share = jnp.sum(ridge[:, None, None] * error**2)
        return pull, loss, jnp.maximum(loss - share, 0.0)

    pull, before, lost = losses(target, first.codes, first.params)
    state = State(
        pull,
        jnp.take(columns.of(unpacked(first.codes)), place.source, 0),
        table_of(first.params, columns, place),
    )
    sweep = Sweep(grid.grid, place.sizes, place.unit, refit)
    real = jnp.asarray(columns.real)
    state = lax.fori_loop(0, rounds, lambda _, s: sweep(s, bowl, real), state)
    codes = columns.weights(jnp.take(state.codes, place.home, 0)).astype(first.codes.dtype)
    params = params_of(state.table, first.params, columns, place)

    _, after, error = losses(target, codes, params)
    failed = jnp.asarray(first.info.get("failed", 0.0)) > 0
    better = (after <= before) & (after >= 0) & ~failed

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(better, new, old)

    changed = jnp.mean((codes != first.codes).astype(jnp.float32))
    codes, params = jax.tree.map(pick, (codes, params), (first.codes, dict(first.params)))
    error = pick(error, lost) if first.target is None else losses(w, codes, params)[2]
    info = {
        "error": jnp.where(failed, jnp.nan, unit * error),
        "polished": jnp.where(
            better & (before > 0), after / jnp.where(before > 0, before, 1.0), 1.0
        ),
        "changed": pick(changed, jnp.zeros((), jnp.float32)),
    }
    if "nearest_error" not in first.info:
        plain = grid.fit(w, power[None])
        nearest = unit * losses(w, grid.nearest(w, plain), plain)[2]
        info["nearest_error"] = jnp.where(failed, jnp.nan, nearest)
    info = {name: value.astype(jnp.float32) for name, value in info.items()}
    return Rounded(codes, params, {**first.info, **info}, first.target)
