"""GPTQ: rounding that moves the weights not yet rounded to make up for those that are.

For every row w of W it seeks codes with small `(w - q) H (w - q)ᵀ`, H the second moment of the
inputs: column by column, nearest rounding, each error fed back into the columns to come (Frantar et
al. 2022). `prepare` does what H alone decides, once for all weights that share their inputs: it
arranges the columns (`arrangement`) and factorises H (`factor`). A call then finds the target,
sweeps over its columns (`substitution`), and accounts for what the codes lose. Rows are independent
given H, so rows may be sharded; leading axes (layers, experts) are mapped over. Static: the choice,
the grid, the groups; arrays: weights and evidence.

Two choices matter. *Order*: columns by falling `H_jj` (activation order) or as they lie. *Groups*:
parameters fitted to the original weights (static), or to the weights as updated when the sweep
arrives at them (dynamic). With static groups every column knows its parameters beforehand, so the
order is merely a permutation. Dynamic groups along the input axis need the order as it lies: any
other would store an index per column. The two differ from GPTQ's code in these points: (1) dynamic
groups are exact also when smaller than the block, where the code fits them to weights that miss the
updates from inside the block; (2) a dead input keeps its weights, rounded to nearest, and does not
count in the mean that damping refers to; (3) grids with a range search weigh inputs by `H_jj`.

When earlier layers are quantized already, the weight to approximate is not the given one but one
that makes up for their errors: `correction` moves it there before the sweep, and the sweep knows
nothing of it (see `correction.py` for both methods and how they are related).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jquant import deprecated
from jquant.axes.groups import Groups
from jquant.calibration.evidence import Evidence
from jquant.errors import EvidenceError
from jquant.grids.base import Grid, GridParams, code_dtype, shares
from jquant.grids.grouped import Grouped
from jquant.rounding.arrangement import Arrangement, arrange, by_power
from jquant.rounding.base import Rounded, mapped
from jquant.rounding.columns import Across, Within, columns_of
from jquant.rounding.correction import STRENGTH, Correction, corrected
from jquant.rounding.elementwise import moment_for
from jquant.rounding.factor import Factor, factorise
from jquant.rounding.substitution import ColumnParams, Solved, loss_of, substitute


class Prepared(NamedTuple):
    """What GPTQ makes of evidence before it sees a weight: the same for all that share inputs."""

    power: Float[Array, "*batch in"]  # H_jj
    factor: Factor  # of H, in the order of the sweep; leaves [*batch, ...]
    drift: Float[Array, "*batch in in"] | None  # Δ, for a correction


@jax.tree_util.register_static
@dataclass(frozen=True)
class GPTQ:
    """Second-order rounding with error feedback, on any grid.

    Args:
        order: of columns: `"activation"` (default; by falling `H_jj`, GPTQ's act-order) or
            `"natural"`, as they lie.
        groups: `"static"` (parameters from the original weights) or `"dynamic"` (from the weights
            as updated so far; along the input axis only in natural order).
        damping: λ relative to the mean of `H_jj` over live inputs; 0.01 as in GPTQ §3.3.
        max_damping: a failed factorisation is tried again with ten times the damping up to this cap
            (heuristic); after that the codes are nearest codes, and `info["failed"]` is 1.
        correction: what to make of inputs that carry the errors of quantized layers before;
            needs `Evidence.drift`. `None`: nothing, the given weight is the target. `"qep"`: the
            target is `W + strength · W Δ (H + λI)⁻¹`, and static grids are fitted to it. `"gptaq"`:
            each column's residual moves later columns only, and static grids stay fitted to W.
            Where drift is read stage by stage, the quantized network sends tokens where the full
            one does (experts, top-k, sorting). In loops and branches, and behind loops that move
            tokens, no drift is known and no correction is made; the report says so.
        strength: the part of the correction to make, 0 to 1; default ½ for QEP, ¼ for GPTAQ, as
            in the codes of qwix and GPTAQ. Δ is an estimate: 1 is best given tens of tokens per
            input, and can be worse than no correction with four.

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> from jquant.grids import Uniform
        >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.tri(8)
        >>> w = jax.random.normal(jax.random.key(1), (4, 8))
        >>> info = GPTQ()(w, Uniform(3), evidence=x.T @ x).info
        >>> bool(info["error"] < info["nearest_error"])
        True
        >>> evidence = Evidence.of(x, full=x + x @ jnp.eye(8, k=1))  # x lacks what full has
        >>> info = GPTQ(correction="qep")(w, Uniform(3), evidence=evidence).info

    References:
        Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers, 2022, https://arxiv.org/abs/2210.17323
        Arai & Ichikawa, Quantization Error Propagation: Revisiting Layer-Wise Post-Training
        Quantization, 2025, https://arxiv.org/abs/2504.09629
        Li et al., GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration, 2025,
        https://arxiv.org/abs/2504.02692
    """

    order: Literal["activation", "natural"] = "activation"
    groups: Literal["static", "dynamic"] = "static"
    damping: float = 0.01
    max_damping: float = 1.0
    correction: Correction | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.order not in ("activation", "natural"):
            raise ValueError(f"GPTQ.order must be 'activation' or 'natural', got {self.order!r}")
        if self.groups not in ("static", "dynamic"):
            raise ValueError(f"GPTQ.groups must be 'static' or 'dynamic', got {self.groups!r}")
        if not 0 < self.damping <= self.max_damping:
            raise ValueError(
                f"GPTQ needs 0 < damping <= max_damping, got {self.damping} and {self.max_damping}"
            )
        if self.correction not in (None, *STRENGTH):
            raise ValueError(
                f"GPTQ.correction must be None, 'gptaq' or 'qep', got {self.correction!r}"
            )
        if self.strength is not None and self.correction is None:
            raise ValueError(
                f"GPTQ.strength={self.strength} without a correction to make; pass "
                "correction='gptaq' or 'qep'"
            )
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"GPTQ.strength must be from 0 to 1, got {self.strength}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"moment"} if self.correction is None else {"moment", "drift"})

    @property
    def papers(self) -> tuple[str, ...]:
        more = {None: (), "qep": ("arai2025qep",), "gptaq": ("li2025gptaq",)}[self.correction]
        if self.correction == "qep" and self.strength == 1:
            more += ("zhang2025qronos",)
        return ("frantar2022gptq", *more)

    @deprecated.keywords("a rounding")
    def prepare(
        self, evidence: Evidence | Float[Array, "*batch in in"] | None, groups: Groups = Groups()
    ) -> Prepared:
        """The factor of the second moment, which every weight with these inputs can be given.

        Args:
            evidence: as for a call.
            groups: those of the weights; dynamic groups along the input axis are swept one by one.

        Raises:
            EvidenceError: no evidence, or a correction and no drift.

        Example:
            >>> from jquant.grids import Uniform
            >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.tri(8)
            >>> q, k = jax.random.normal(jax.random.key(1), (2, 4, 8))
            >>> seen = GPTQ().prepare(x.T @ x)
            >>> codes = [GPTQ()(w, Uniform(3), evidence=seen).codes for w in (q, k)]
        """
        moment = moment_for("GPTQ", evidence)
        drift = None if self.correction is None else _drift(evidence, moment, self.correction)
        return _prepare(moment, drift, self, self._run(groups, moment.shape[-1]))

    def _run(self, groups: Groups, width: int) -> int:
        """How many columns are swept until parameters are fitted anew."""
        across = self.groups == "dynamic" and groups.axis == "in"
        return groups.group(width) if across else width

    def _arrange(self, power: Float[Array, " in"], run: int) -> Arrangement:
        order = by_power(power) if self.order == "activation" else np.arange(len(power))
        return arrange(len(power), run, order)

    @deprecated.keywords("a rounding")
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
            grid: any grid.
            groups: along either axis, a ragged last one included.
            evidence: the second moment of the inputs, `[*batch, in, in]`, sum or mean; with a
                correction, an `Evidence` that holds the drift too. Or what `prepare` made of it,
                for these groups.
            key: not used.

        Returns:
            Codes and parameters, with a correction the target, and in `info`, float32 `[*batch]`:
            `damping` (as used, relative), `dead` (inputs with `H_jj = 0`), `failed` (0 or 1),
            `error` = `tr((W - Q) H (W - Q)ᵀ)` and `nearest_error`, the same for nearest rounding
            on the static grid, to within 1e-3. Both are NaN after a failure: such an H measures
            nothing. Both are of the given W on the grid fitted to it, also with a correction, whose
            aim is another: what it gains, `‖W X_full - Q X_q‖²`, cannot be had from H and Δ, and
            `error` rises with it.

        Raises:
            EvidenceError: no evidence, or of the wrong shape, or a correction and no drift.
            ValueError: dynamic groups along the input axis in activation order, or of a grid whose
                parameters are not each of one group.
        """
        del key
        width = w.shape[-1]
        if not isinstance(evidence, Prepared):
            moment_for("GPTQ", evidence, w.shape)
        if self.groups == "dynamic" and self.order == "activation":
            if groups.axis == "in" and groups.count(width) > 1:
                raise ValueError(
                    "GPTQ cannot sweep dynamic groups along the input axis in activation order "
                    "(every column would need its group's index stored): pass order='natural' or "
                    "groups='static'"
                )
        if self.groups == "dynamic" and shares(grid):
            raise ValueError(
                f"GPTQ cannot fit {grid} to one group after the other, as a parameter of it stands "
                "for several: pass groups='static'"
            )
        prepared = evidence if isinstance(evidence, Prepared) else self.prepare(evidence, groups)
        return _round(w, prepared, self, Grouped(grid, groups))


def _drift(
    evidence: Evidence | Float[Array, "*batch in in"] | None,
    moment: Float[Array, "*batch in in"],
    correction: Correction,
) -> Float[Array, "*batch in in"]:
    drift = evidence.drift if isinstance(evidence, Evidence) else None
    if drift is None:
        raise EvidenceError(
            f"GPTQ(correction={correction!r}) needs to know how far the inputs are from the "
            "unquantized network's: pass Evidence(..., drift=), or Evidence.of(x, full=), or "
            "quantize stage by stage"
        )
    if drift.shape != moment.shape:
        raise EvidenceError(
            f"GPTQ needs a drift of the second moment's shape {moment.shape}, got {drift.shape}"
        )
    return drift


@partial(jax.jit, static_argnames=("choice", "run"))
def _prepare(
    moment: Float[Array, "*batch in in"],
    drift: Float[Array, "*batch in in"] | None,
    choice: GPTQ,
    run: int,
) -> Prepared:
    def factor(moment: Float[Array, "in in"]) -> Factor:
        place = choice._arrange(jnp.diagonal(moment), run)
        return factorise(moment, place.source, place.real, choice.damping, choice.max_damping)

    moment = moment.astype(jnp.float32)
    return Prepared(
        jnp.diagonal(moment, axis1=-2, axis2=-1),
        mapped(factor, moment.shape[:-2])(moment),
        None if drift is None else drift.astype(jnp.float32),
    )


@partial(jax.jit, static_argnames=("choice", "grid"))
def _round(
    w: Float[Array, "*batch out in"], prepared: Prepared, choice: GPTQ, grid: Grouped
) -> Rounded:
    one = partial(_round_one, choice=choice, grid=grid)
    return mapped(one, w.shape[:-2])(w.astype(jnp.float32), prepared)


def _round_one(
    w: Float[Array, "out in"], prepared: Prepared, *, choice: GPTQ, grid: Grouped
) -> Rounded:
    power, factor, drift = prepared
    place = choice._arrange(power, choice._run(grid.groups, w.shape[-1]))
    plain = grid.fit(w, power[None])
    target, params = w, plain
    if choice.correction is not None and drift is not None:
        strength = STRENGTH[choice.correction] if choice.strength is None else choice.strength
        target = corrected(w, drift, place, factor, choice.correction, strength)
        # As in the codes of both: QEP hands over another weight, GPTAQ fits first.
        if choice.correction == "qep":
            params = grid.fit(target, power[None])
    columns = columns_of(grid, w.shape)
    loss, solved = _sweep(target, params, factor, place, columns, choice.groups == "dynamic")
    codes = columns.weights(jnp.take(solved.codes, place.home, axis=0))
    if solved.fitted is not None:
        fitted = columns.params(solved.fitted, place)
        params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), fitted, params)

    def lost(codes: Array, params: GridParams) -> Float[Array, "m b"]:
        error = columns.of(w - grid.decode(codes, params))
        return loss_of(jnp.take(error, place.source, axis=0), factor)

    # The sweep has measured against the target; what is reported is against W.
    moved = choice.correction is not None
    losses = {
        "error": lost(codes, params) if moved else loss,
        "nearest_error": lost(grid.nearest(w, plain), plain)
        if moved
        else loss_of(solved.plain, factor),
    }
    info = _account(losses, factor, columns)
    return Rounded(codes.astype(code_dtype(grid)), params, info, target if moved else None)


def _sweep(
    target: Float[Array, "out in"],
    params: GridParams,
    factor: Factor,
    place: Arrangement,
    columns: Across | Within,
    dynamic: bool,
) -> tuple[Float[Array, "m b"], Solved]:
    """The codes of a target, place by place, and the loss of every row."""
    width = target.shape[-1]
    # One group of all columns is fitted before any column has moved: it is static in any case.
    unit = columns.unit(place) if dynamic and columns.span < width else None
    return substitute(
        columns.of(target),
        place.source,
        ColumnParams(columns.table(params), jnp.arange(width, dtype=jnp.int32) // columns.span),
        factor,
        columns.grid.grid,
        place.sizes,
        unit=unit,
        edge=columns.edge(place),
    )


def _account(
    losses: Mapping[str, Float[Array, "m b"]], factor: Factor, columns: Across | Within
) -> dict[str, Float[Array, ""]]:
    """What is told of a weight: losses of all rows, in the units of H, and how H was factorised."""

    def total(loss: Float[Array, "m b"]) -> Float[Array, ""]:
        loss = factor.unit * jnp.maximum(jnp.sum(jnp.where(columns.real, loss, 0.0)), 0.0)
        return jnp.where(factor.failed, jnp.nan, loss)

    info = {"damping": factor.damping, "dead": factor.dead, "failed": factor.failed}
    info |= {name: total(loss) for name, loss in losses.items()}
    return {name: value.astype(jnp.float32) for name, value in info.items()}
