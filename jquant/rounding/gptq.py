"""GPTQ: rounding that moves the weights not yet rounded to make up for those that are.

For every row w of W it seeks codes with small `(w - q) H (w - q)ᵀ`, H the second moment of the
inputs: column by column, nearest rounding, each error fed back into the columns to come (Frantar et
al. 2022). Here the columns are arranged (order, padding, groups); `factor` factorises H once;
`substitution` sweeps. Rows are independent given H, so rows may be sharded; leading axes (layers,
experts) are mapped over. Static: the choice, the grid, the blocks; arrays: weights and evidence.

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

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from jquant.axes.groups import Blocks, from_blocks, to_blocks
from jquant.calibration.evidence import Evidence
from jquant.errors import EvidenceError
from jquant.grids.base import Grid, Params, code_dtype, shares
from jquant.grids.grouped import Grouped
from jquant.numerics.packed import unpacked
from jquant.rounding.base import Rounded
from jquant.rounding.correction import STRENGTH, Correction, corrected
from jquant.rounding.elementwise import importance_of, second_moment
from jquant.rounding.factor import factorise
from jquant.rounding.substitution import Known, loss_of, substitute

BLOCK = 128  # columns per matrix product (GPTQ §3.3, step 2)
LEAF = 16  # columns whose errors reach each other one by one; see docs/notes/gptq-solver.md


@jax.tree_util.register_static
@dataclass(frozen=True)
class GPTQ:
    """Second-order rounding with error feedback, on any grid.

    Args:
        order: `"activation"` (columns by falling `H_jj`; default, see DESIGN) or `"natural"`.
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
        return ("frantar2022gptq", *more)

    def __call__(
        self,
        w: Float[Array, "*batch out in"],
        grid: Grid,
        blocks: Blocks = Blocks(),
        *,
        evidence: Evidence | Float[Array, "*batch in in"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Rounded:
        """Round `w`.

        Args:
            w: weights `[*batch, out, in]`; arithmetic is float32.
            grid: any grid.
            blocks: groups along either axis, a ragged last one included.
            evidence: the second moment of the inputs, `[*batch, in, in]`, sum or mean; with a
                correction, an `Evidence` that holds the drift too.
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
        moment = second_moment(evidence)
        width = w.shape[-1]
        if moment is None:
            raise EvidenceError("GPTQ needs the second moment of the inputs: pass evidence=")
        if moment.shape != (*w.shape[:-2], width, width):
            raise EvidenceError(
                f"GPTQ on weights {w.shape} needs a second moment of shape "
                f"{(*w.shape[:-2], width, width)}, got {moment.shape}"
            )
        drift = None if self.correction is None else _drift(evidence, moment, self.correction)
        ordered = self.order == "activation"
        if self.groups == "dynamic" and ordered and blocks.axis == "in" and blocks.count(width) > 1:
            raise ValueError(
                "GPTQ cannot sweep dynamic groups along the input axis in activation order (every "
                "column would need its group's index stored): pass order='natural' or "
                "groups='static'"
            )
        if self.groups == "dynamic" and shares(grid):
            raise ValueError(
                f"GPTQ cannot fit {grid} to one group after the other, as a parameter of it stands "
                "for several: pass groups='static'"
            )
        return _round(w, moment, self, grid, blocks, drift)


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


class Arrangement(NamedTuple):
    """Where columns go in the sweep: places, padded so that every block size divides."""

    source: Integer[Array, " n"]  # the column at each place
    real: Bool[Array, " n"]  # false for padding
    edge: Integer[Array, " n"]  # the place in its unit whose weight stands for it in a fit
    home: Integer[Array, " in"]  # the place of each column
    sizes: tuple[int, ...]  # nested block sizes


def split(length: int, limit: int) -> int:
    """The size of the fewest equal parts of at most `limit` that cover `length`."""
    return -(-length // -(-length // limit))


def arrange(width: int, run: int, order: Integer[Array, " in"] | np.ndarray) -> Arrangement:
    """Places for `width` columns in `order`, runs of `run` of them padded each by itself."""
    leaf = split(run, LEAF)
    block = -(-split(run, BLOCK) // leaf) * leaf
    padded = -(-run // block) * block
    runs = -(-width // run)
    within, which = np.tile(np.arange(padded), runs), np.repeat(np.arange(runs), padded)
    edge = np.minimum(within, np.minimum(run, width - which * run) - 1)
    real = within == edge
    return Arrangement(
        source=jnp.asarray(order, jnp.int32)[which * run + edge],
        real=jnp.asarray(real),
        edge=jnp.asarray(edge, jnp.int32),
        home=jnp.zeros(width, jnp.int32).at[order].set(np.flatnonzero(real).astype(np.int32)),
        sizes=tuple(dict.fromkeys([runs * padded, padded, block, leaf, 1])),
    )


@partial(jax.jit, static_argnames=("choice", "grid", "blocks"))
def _round(
    w: Float[Array, "*batch out in"],
    moment: Float[Array, "*batch in in"],
    choice: GPTQ,
    grid: Grid,
    blocks: Blocks,
    drift: Float[Array, "*batch in in"] | None = None,
) -> Rounded:
    one = partial(_round_one, choice=choice, grid=grid, blocks=blocks)
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    wide = None if drift is None else drift.astype(jnp.float32)
    return one(w.astype(jnp.float32), moment.astype(jnp.float32), wide)


def _round_one(
    w: Float[Array, "out in"],
    moment: Float[Array, "in in"],
    drift: Float[Array, "in in"] | None = None,
    *,
    choice: GPTQ,
    grid: Grid,
    blocks: Blocks,
) -> Rounded:
    rows, width = w.shape
    inward = blocks.axis == "in"
    group = blocks.group(width) if inward else 1
    # One group of all columns is fitted before any column has moved: it is static in any case.
    dynamic = choice.groups == "dynamic" and group < width

    power = jnp.diagonal(moment)
    order = jnp.argsort(-power) if choice.order == "activation" else np.arange(width)
    place = arrange(width, group if dynamic and inward else width, order)
    factor = factorise(moment, place.source, place.real, choice.damping, choice.max_damping)

    grouped, importance = Grouped(grid, blocks), importance_of(moment)
    params = grouped.fit(w, importance)
    target, static = w, params
    if choice.correction is not None and drift is not None:
        strength = STRENGTH[choice.correction] if choice.strength is None else choice.strength
        target = corrected(w, drift, place, factor, choice.correction, strength)
        # As in the codes of both: QEP hands over another weight, GPTAQ fits first.
        if choice.correction == "qep":
            static = grouped.fit(target, importance)

    def by_input(w: Float[Array, "out in"]) -> Float[Array, "in m b"]:
        return w.T[:, :, None] if inward else to_blocks(w, blocks)

    columns = by_input(target)  # as the grid sees them; whoever pads rows must not count them
    counted = np.arange(columns[0].size).reshape(columns[0].shape) < rows

    def by_column(params: Params) -> Params:
        wide = jax.tree.map(
            unpacked, params
        )  # parameters of a group are looked up, column by column
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1) if inward else leaf, wide)

    loss, solved = substitute(
        columns,
        place.source,
        Known(by_column(static), jnp.arange(width, dtype=jnp.int32) // group),
        factor,
        grid,
        place.sizes,
        unit=None if not dynamic else place.sizes[1] if inward else 1,
        edge=place.edge if inward else None,
    )
    codes = jnp.take(solved.codes, place.home, axis=0)
    codes = codes[:, :, 0].T if inward else from_blocks(codes, blocks, rows)

    def total(loss: Float[Array, "m b"]) -> Float[Array, ""]:
        loss = factor.unit * jnp.maximum(jnp.sum(jnp.where(counted, loss, 0.0)), 0.0)
        return jnp.where(factor.failed, jnp.nan, loss)

    if solved.fitted is not None:
        table = solved.fitted
        if not inward:
            table = jax.tree.map(lambda leaf: jnp.take(leaf, place.home, axis=0), table)
        static = by_column(table)
    if choice.correction is None:
        plain_loss = loss_of(solved.plain, factor)
    else:
        # The sweep has measured against the target; what is reported is against W.
        def loss_from(codes: Array, params: Params) -> Float[Array, "m b"]:
            error = w - grouped.decode(codes, params)
            return loss_of(jnp.take(by_input(error), place.source, axis=0), factor)

        loss = loss_from(codes, static)
        plain_loss = loss_from(grouped.nearest(w, params), params)
    info = {
        "damping": factor.damping,
        "dead": factor.dead,
        "failed": factor.failed,
        "error": total(loss),
        "nearest_error": total(plain_loss),
    }
    info = {name: value.astype(jnp.float32) for name, value in info.items()}
    moved = None if target is w else target
    static = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), static, params)
    return Rounded(codes.astype(code_dtype(grid)), static, info, moved)
