"""AdaDim: groups along the input or the output axis of each weight, whichever harms less.

    axis(W) = argmin over (in, out) of  mean (f(W) - f(nearest(W, groups along axis)))²

`f` is the part of the network that the weight belongs to (Heo et al. 2023, ICLR 2024: the
attention's output for q, k, v, the MLP's for gate and up, the weight's own for the others); here it
is found from the function itself, see `calibration/comparison.py`. Groups along the output axis
isolate input channels: they win where sensitive channels' weights have another scale than their
neighbours, and lose where rows have.

It is a choice by nearest rounding alone, greedy: weights are taken one after the other, each is
left quantized along its better axis for those that are calibrated beside it, and what enters a
stage is always the unquantized network's. Everything chosen is static, a `Plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
from jaxtyping import Array, PyTree

from jquant.allocation.choices import Axis, Choice, Choices
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.calibration.comparison import Level
from jquant.calibration.cutting import Recording
from jquant.calibration.data import Data
from jquant.calibration.find import Weight
from jquant.calibration.tokens import Given
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError, PlanError
from jquant.grids.base import Grid
from jquant.jobs.progress import OnProgress, Progress
from jquant.layerwise.checks import check_compared, check_reached, check_weights
from jquant.programs.straight import Piece
from jquant.rounding import GPTQ, Nearest, Polish
from jquant.schemes.scheme import Plan, Scheme
from jquant.weights.arguments import by_path
from jquant.weights.leaves import Leaves
from jquant.weights.qtensor import QTensor, dequantize_weight


def adadim(
    fn: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any],
    *,
    level: Level = "residual",
    token_weights: Given = None,
    budget: int | None = None,
    progress: OnProgress | None = None,
) -> tuple[Plan, Choices]:
    """The plan with every weight's groups along the better of its two axes, and why.

    Each weight is rounded to nearest on its scheme's grid (fitted without evidence), in groups of
    its scheme's size along either axis. The better axis is that with the smaller mean squared
    error, in float32, of what the weight is compared on; ties go to "in". Quantize with the plan
    that comes back: with `Nearest` schemes that is the paper's RTN-ada, with `GPTQ` ones GPTQ-ada.

    What a weight is compared on, at level "residual": follow its product through all that is
    computed of it, up to every addition or subtraction of something that carries data and was not
    reached on the way: the residual stream. The operand that was reached is compared, and so is
    what is reached and returned by the function. Carrying data means being computed from a
    floating-point input, or from an input and a parameter: biases, causal masks and positions do
    not. So q, k and v are compared on the attention's output after its projection, gate and up on
    the MLP's, out and down on their own. At level "weight" it is each weight's own product (as
    LightCompress does), which says less of q and k, and is cheaper.

    Weights of one level (q, k and v; gate and up) are decided in the order of their use, each with
    the ones before rounded along their better axis; what enters their level is unquantized, as in
    the paper. Of a stack of layers (a scan over them) each layer is judged so; the losses are
    summed and one axis is chosen for the whole, as a quantized stack has one. Weights that are
    applied several times are one level with all between.

    Left as planned, for a reason that stands in the choices: weights that are only looked up, that
    have no second axis, or an axis shorter than a group (smaller groups would win by storing more);
    and at level "weight" those inside a loop or branch.

    It takes, per weight and batch, three runs of the part of its sub-network that depends on it and
    one of the rest; programs are shared by equal blocks, memory is that of one stage's weights and
    the values alive.

    Args:
        fn: any JAX function `fn(params, *inputs)`.
        params: its parameters; lazy ones are read as their stage comes.
        plan: what `jq.plan` returned; grid, group size and rounding of its schemes stay.
        batches: calibration batches, each one array or a tuple of `fn`'s inputs.
        level: "residual" (default, the paper's) or "weight".
        token_weights: what each token counts, in all that is compared; as for `quantize`.
        budget: bytes of activations kept on the device; what exceeds it waits on the host.
        progress: called with a `Progress` after every weight and batch; its `ratio` is the error
            of the better axis relative to "in".

    Returns:
        the plan with every axis as chosen, and the choices: losses, what was compared, and why.

    Raises:
        PlanError: a plan of other parameters, or with nothing to choose; a level that does not
            exist; GPTQ with dynamic groups in activation order, which exists along "out" only.
        EvidenceError: no batches, weights that they do not reach, errors that are not finite, or
            values that are compared and whose tokens are not known.

    Example:
        >>> import jquant as jq
        >>> x = jax.random.normal(jax.random.key(0), (64, 16)).at[:, 3].multiply(20.0)
        >>> w = jax.random.normal(jax.random.key(1), (16, 16)).at[3].multiply(0.1)
        >>> fn = lambda p, x: x @ p["w"]
        >>> scheme = jq.Scheme(jq.grids.Uniform(3, convention="A2"), 8)
        >>> plan = jq.plan(jq.find_weights(fn, {"w": w}, x), {".*": scheme})
        >>> plan, choices = jq.allocation.adadim(fn, {"w": w}, plan, [x])
        >>> plan["w"].groups, choices["w"].ratio < 0.5
        (Groups(axis='out', size=8), True)

    References:
        Heo et al., Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight
        Quantization of Large Language Models, 2023, https://arxiv.org/abs/2309.15531
    """
    if level not in ("residual", "weight"):
        raise PlanError(f"level must be 'residual' or 'weight', got {level!r}")
    check_weights(plan, by_path(params))
    left = {path: why for path in plan if (why := _no_choice(plan.weights[path], plan[path]))}
    _check_any(plan, left)
    planned = {path: w for path in plan if (w := plan.weights[path]).has_inputs}
    leaves, data = Leaves.of(params), Data.of(batches, token_weights)
    walk = Walk.start(fn, leaves, data, Recording.at(planned, level=level), budget)
    check_compared(walk, data)
    check_reached(walk, planned)
    if level == "weight":
        for piece, loop in walk.nested.items():
            why = f"it is used inside a {loop}; level='residual' compares what comes out"
            left[piece.path] = why
        _check_any(plan, left)
    chooser = _Chooser(plan, leaves, walk, left, progress)
    chooser.run()
    choices = Choices({path: chooser.choice(path) for path in plan}, level)
    return chosen(plan, {path: choice.axis for path, choice in choices.items()}), choices


def chosen(plan: Plan, axes: Mapping[str, Axis]) -> Plan:
    """The plan with groups of the same sizes along these axes.

    Example:
        >>> import jax.numpy as jnp, jquant as jq
        >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
        >>> weights = jq.find_weights(fn, params, jnp.ones((2, 8)))
        >>> chosen(jq.plan(weights, {".*": jq.presets.int4_nearest(4)}), {"w": "out"})["w"].groups
        Groups(axis='out', size=4)
    """
    schemes = {
        path: replace(
            scheme, groups=Groups(axes.get(path, scheme.grouping.axis), scheme.grouping.size)
        )
        for path, scheme in plan.items()
    }
    return Plan(schemes, plan.weights)


class _Chooser:
    """The state of one call of `adadim`; see there."""

    def __init__(
        self,
        plan: Plan,
        leaves: Leaves,
        walk: Walk,
        left: Mapping[str, str],
        progress: OnProgress | None,
    ):
        self.plan, self.leaves, self.walk, self.left = plan, leaves, walk, left
        self.progress = progress
        self.at = 0
        self.done: dict[Piece, Array] = {}  # weights of this stage, rounded
        self.losses: dict[str, list[tuple[float, float]]] = {}  # of each layer
        self.logs: list[float] = []

    def run(self) -> None:
        self.walk.advance(None, self.original, self.original)
        for at, stage in enumerate(self.walk.stages):
            self.at = at
            for number, piece in enumerate(stage.pieces, start=1):
                self.done[piece] = self.rounded(piece)
                self.tell("rounding", len(stage.pieces))(number)
            self.done = {}
            told = self.tell("advancing", self.walk.batch_count)
            self.walk.advance(at, self.original, self.original, told)

    def rounded(self, piece: Piece) -> Array:
        """The piece rounded to nearest along its better axis, or along the planned one."""
        scheme, layout = self.plan[piece.path], self.plan.weights[piece.path].layout
        w, size = self.original(piece), scheme.grouping.size
        if piece.path in self.left:
            return _nearest(w, scheme.grid, scheme.grouping, layout)
        both = Groups("in", size), Groups("out", size)
        candidates = [_nearest(w, scheme.grid, groups, layout) for groups in both]
        sums, count = self.walk.compare(piece, candidates, self.current)
        inward, outward = (total / count for total in sums)
        if not math.isfinite(inward + outward):
            raise EvidenceError(
                f"weight {str(piece)!r}: the error of {self.words(piece)} is {inward} with groups "
                f"along 'in' and {outward} along 'out'; its values are NaN, infinite or too large "
                "to square in float32: check the batches, or pass level='weight'"
            )
        self.losses.setdefault(piece.path, []).append((inward, outward))
        if inward > 0 and outward > 0:
            self.logs.append(math.log(min(inward, outward) / inward))
        return candidates[outward < inward]

    def choice(self, path: str) -> Choice:
        if path in self.left:
            return Choice(self.plan[path].grouping.axis, None, self.left[path])
        by_layer = self.losses[path]
        inward, outward = (math.fsum(losses) for losses in zip(*by_layer, strict=True))
        piece = next(p for stage in self.walk.stages for p in stage.pieces if p.path == path)
        return Choice(
            axis="out" if outward < inward else "in",
            losses=(inward, outward),
            compared=self.words(piece),
            layers=len(by_layer),
            layers_out=sum(outward < inward for inward, outward in by_layer),
        )

    def words(self, piece: Piece) -> str:
        return self.walk.comparison(piece).words

    def original(self, piece: Piece) -> Array:
        """The piece as it came."""
        planned = piece.path in self.plan
        return self.leaves.read_weight(piece) if planned else self.leaves.read(piece)

    def current(self, piece: Piece) -> Array:
        """The piece as it is by now; of other stages than this one, as it came."""
        return self.done[piece] if piece in self.done else self.original(piece)

    def tell(self, doing: Literal["rounding", "advancing"], total: int) -> Callable[[int], None]:
        progress, stages = self.progress, self.walk.stages
        if progress is None:
            return lambda done: None
        at, name = self.at, stages[self.at].name
        ratio = math.exp(sum(self.logs) / len(self.logs)) if self.logs else math.nan
        return lambda done: progress(Progress(at, len(stages), name, doing, done, total, ratio))


@partial(jax.jit, static_argnames=("grid", "groups", "layout"))
def _nearest(w: Array, grid: Grid, groups: Groups, layout: Layout) -> Array:
    """A weight rounded to nearest, in its own shape and dtype."""
    rounded = Nearest()(layout.canonical(w), grid, groups)
    q = QTensor(rounded.codes, dict(rounded.params), grid, groups, layout, w.dtype)
    return dequantize_weight(q)


def _no_choice(weight: Weight, scheme: Scheme) -> str:
    """Why there is nothing to choose for a weight; nothing where there is."""
    if not weight.has_inputs:
        return "it is only looked up: there is no product to compare"
    lengths = {"in": weight.layout.size("in"), "out": weight.layout.size("out")}
    short = min(lengths, key=lengths.__getitem__)
    groups = scheme.grouping
    if lengths[short] == 1:
        return f"it has no {short}put axis: a group along it would be one weight"
    fair = groups.size is None or len({groups.group(n) for n in lengths.values()}) == 1
    if not fair:
        return (
            f"its {short}put axis has {lengths[short]} weights, fewer than a group of "
            f"{groups.size}: smaller groups would store more"
        )
    rounding = scheme.rounding
    while isinstance(rounding, Polish):
        rounding = rounding.rounding
    several = groups.count(lengths["in"]) > 1
    if isinstance(rounding, GPTQ) and rounding.groups == "dynamic":
        if several and rounding.order == "activation":
            raise PlanError(
                f"weight {weight.path!r}: {rounding} cannot run along the input axis, which may be "
                "chosen: pass GPTQ() in the plan, and change the schemes that chose 'out' if wanted"
            )
    return ""


def _check_any(plan: Plan, left: Mapping[str, str]) -> None:
    if len(left) == len(plan):
        reasons = "; ".join(f"{path!r}: {why}" for path, why in list(left.items())[:3])
        raise PlanError(
            f"there is nothing to choose in this plan of {len(plan)} weights"
            + (f" ({reasons})" if reasons else "; pass one that quantizes some")
        )
