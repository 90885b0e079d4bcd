"""Saliency from gradients: one backward pass per batch, and what it says of every product.

The function is written out as for stages, so layers of a stack are weights of their own. Behind the
product of a weight stands an identity whose cotangent is read on its way back: squared, averaged
over each group of the weight's output rows, and left in the gradient of an array of zeros that
nothing else depends on, `[*batch, tokens, groups]`. So the gradients of the outputs themselves are
never kept, and the pass costs what a gradient costs without those of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jquant.axes.results import Outputs
from jquant.calibration.cutting import Cuts, Recording
from jquant.calibration.data import Data, in_words
from jquant.calibration.find import Weights, find_weights
from jquant.calibration.meeting import Meeting
from jquant.calibration.observe import Observer
from jquant.calibration.running import find_uses
from jquant.calibration.saliency import Saliency, edges_of
from jquant.calibration.segments import watch
from jquant.calibration.stages import Cut, Segment
from jquant.calibration.tagged import array_of
from jquant.calibration.tokens import Given
from jquant.calibration.walk import Run
from jquant.errors import EvidenceError, near
from jquant.numerics import require
from jquant.programs.straight import Piece
from jquant.programs.walker import Walker
from jquant.trees.placement import transferring
from jquant.weights.arguments import Inputs
from jquant.weights.leaves import Leaves

Objective = Callable[..., Array]  # (outputs, *inputs) -> a number


@transferring
def saliency(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    paths: Collection[str] | None = None,
    groups: int = 1,
    objective: Objective | None = None,
    key: PRNGKeyArray | None = None,
    token_weights: Given = None,
    progress: Callable[[int], None] | None = None,
) -> Saliency:
    """What an error in the outputs of each weight costs, token by token: squares of gradients.

    For row t of a weight's inputs and a group of its output rows it is the mean over these of
    `(∂ℓ/∂y_ti)²`, ℓ the objective and y the weight's product. Passed to `quantize` or `capture` it
    gives `Evidence.guided`, which `rounding.Guided` rounds by.

    Args:
        fn: any JAX function `fn(params, *inputs)` that can be differentiated in reverse.
        params: its parameters; lazy ones are read, all of them.
        batches: as for `capture`, and as they will be passed on.
        paths: the weights; None: all that are multiplied with inputs.
        groups: into how many runs of output rows each weight is split, from 1 (default; the paper
            uses 1 to 4). Moments to come are as many times larger.
        objective: `objective(outputs, *inputs)`, a number. None: the negative log likelihood of
            each next token, added up, where outputs are logits `[*b, t, v]` and the first input
            tokens `[*b, t]`. One of your own should add tokens up, not average them, if batches
            differ in length. Its scale does not matter, unless gradients of float16 underflow.
        key: in place of the text's next tokens, tokens drawn from the network's own distribution:
            the Fisher information, which KL from this network follows to second order.
        token_weights: what each token counts where no objective of your own is passed, as for
            `quantize`; a next token counts by the smaller weight of both.
        progress: called after each batch with the number of batches done.

    Returns:
        float32 on the host, of mean 1 for each weight and group: 4 bytes for each token, weight and
        group. On the device the activations of one batch are kept for its backward pass.

    Raises:
        TreeError: params or a batch hold what is no array or number.
        EvidenceError: no batches; a path that is no weight; a weight in a loop or branch, or in a
            product of parameters, whose outputs are not seen; groups that do not fit a weight; an
            objective that is no finite number, or that a weight does not move.
        ValueError: `groups` is no number from 1 on.

    Example:
        >>> fn = lambda p, x: x @ p["w"]
        >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
        >>> seen = saliency(fn, {"w": jnp.eye(2)}, [x], objective=lambda y, x: jnp.sum(y**2))
        >>> seen.batches[0]["w"][0].ravel().tolist()  # 2² and 6², over their mean
        [0.20000000298023224, 1.7999999523162842]

    References:
        Kim et al., GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance,
        2025, https://arxiv.org/abs/2505.07004
    """
    require.integer("groups", groups, 1)
    if objective is not None and (token_weights is not None or key is not None):
        raise EvidenceError(
            "token_weights and key are told to the default objective only; weigh or draw tokens in "
            "the objective(outputs, *inputs) that you pass, and leave them out"
        )
    data, leaves = Data.of(batches, token_weights), Leaves.of(params)
    weights = _chosen(find_weights(fn, params, *data.batches[0]), paths)
    planned = {path: weights[path].stack_axes for path in weights}
    cuts = Cuts(fn, leaves, Recording(planned))
    sizes = {path: weights[path].layout.size("out") for path in weights}
    passes: dict[int, _Pass] = {}
    seen = []
    for number, (inputs, counted) in enumerate(data.pairs()):
        cut = cuts.of(number, inputs, counted)
        if id(cut) not in passes:
            structure = jax.tree.structure(jax.eval_shape(fn, leaves.abstract, *inputs))
            passes[id(cut)] = _Pass(cut, structure, groups, sizes, objective)
        own = None if key is None else jax.random.fold_in(key, number)
        seen.append(passes[id(cut)](number, leaves, inputs, _Told(counted, own)))
        if progress is not None:
            progress(number + 1)
    kinds = tuple(map(in_words, data.batches))
    return Saliency(_normalised(seen), kinds)


class _Told(NamedTuple):
    """What the default objective is told beside the outputs and inputs."""

    weights: Any  # of the tokens
    key: PRNGKeyArray | None  # to draw tokens with; None: they are the inputs'


def _next_tokens(logits: Any, tokens: Any, told: _Told) -> Float[Array, ""]:
    """The negative log likelihood of each next token, or of one drawn there, added up, in nats.

    Raises:
        EvidenceError: outputs and inputs are no logits and tokens.
    """
    shapes = getattr(logits, "shape", None), getattr(tokens, "shape", None)
    if None in shapes or shapes[0][:-1] != shapes[1] or not _are(tokens, jnp.integer):  # type: ignore[index]
        raise EvidenceError(
            "the default objective takes logits [*b, t, v] and tokens [*b, t], got outputs "
            f"{shapes[0]} and a first input {shapes[1]}; pass objective=lambda outputs, *inputs: …"
        )
    log_p = jax.nn.log_softmax(logits[..., :-1, :].astype(jnp.float32))
    labels = tokens[..., 1:]
    if told.key is not None:
        labels = jax.random.categorical(told.key, lax.stop_gradient(log_p))
    likely = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    if told.weights is None:
        return -jnp.sum(likely)
    wide = jnp.asarray(told.weights).astype(jnp.float32)
    pairs = jnp.minimum(wide[..., 1:], wide[..., :-1])
    return -jnp.sum(jnp.where(pairs > 0, likely, 0.0) * pairs)


def _are(array: Any, kind: Any) -> bool:
    return jnp.issubdtype(array.dtype, kind)


def _chosen(weights: Weights, paths: Collection[str] | None) -> Weights:
    """Those of these paths that are multiplied with an input."""
    for path in paths or ():
        if path not in weights:
            raise EvidenceError(f"{path!r} is no weight; near: {near(path, weights)}")
        if not weights[path].has_inputs:
            raise EvidenceError(f"weight {path!r} is only looked up, so it has no saliency")
    kept = [p for p in weights if weights[p].has_inputs and (paths is None or p in paths)]
    return Weights({path: weights[path] for path in kept})


def _normalised(
    batches: Sequence[Mapping[str, tuple[np.ndarray, ...]]],
) -> list[dict[str, tuple[np.ndarray, ...]]]:
    """With a mean of 1 over the tokens of all batches and uses, for each weight and group."""
    scales = {}
    for name in batches[0]:
        arrays = [array for batch in batches for array in batch[name]]
        total = sum(array.sum(-2, dtype=np.float64) for array in arrays)
        mean = total / sum(array.shape[-2] for array in arrays)
        scales[name] = np.expand_dims(np.where(mean > 0, mean, 1.0), -2)
    return [
        {
            name: tuple((array / scales[name]).astype(np.float32) for array in uses)
            for name, uses in batch.items()
        }
        for batch in batches
    ]


@dataclass(frozen=True)
class _Tap:
    """Where a cotangent is read: of which weight, and how a result is rows of its outputs."""

    name: str
    outputs: Outputs
    groups: int

    @property
    def shape(self) -> tuple[int, ...]:
        """`[*batch, tokens, groups]`."""
        return (*self.outputs.way.lead, self.groups)

    def squares(self, g: Array) -> Float[Array, "*batch tokens groups"]:
        """The mean square over each group of output rows."""
        rows = jnp.square(self.outputs.rows(g.astype(jnp.float32)))
        edges = edges_of(rows.shape[-1], self.groups)
        means = [jnp.mean(rows[..., a:b], -1) for a, b in zip(edges, edges[1:], strict=False)]
        return jnp.stack(means, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(tap: _Tap, y: Array, receiver: Array) -> Array:
    """`y`; what is read of its cotangent is the cotangent of the receiver."""
    del tap, receiver
    return y


def _forward(tap: _Tap, y: Array, receiver: Array) -> tuple[Array, None]:
    del tap, receiver
    return y, None


def _back(tap: _Tap, kept: None, g: Array) -> tuple[Array, Array]:
    del kept
    return g, tap.squares(g)


_tapped.defvjp(_forward, _back)


class _Sensing(Observer):
    """An observer that taps the products in which weights meet their inputs.

    Args:
        receivers: an array for every tap, in their order; None: the taps are only counted.
        groups: of output rows.
        sizes: how many output rows the weights have, by name.
    """

    def __init__(
        self,
        receivers: Sequence[Array] | None,
        groups: int,
        sizes: Mapping[str, int],
        roots: Collection[int],
    ) -> None:
        super().__init__(roots=roots)
        self.receivers, self.groups, self.sizes = receivers, groups, sizes
        self.taps: list[_Tap] = []

    def guide(self, walker: Walker, where: Any, meeting: Meeting) -> None:
        name = meeting.origin.path
        if not isinstance(where, int) or len(walker.site) != 1:
            raise _Hidden(name, "the outputs of its product are not values of the function")
        outputs = Outputs.of(meeting.contraction, where, meeting.origin)
        parts = [part for axis in meeting.origin.axes for part in axis]
        if self.groups > 1 and (
            outputs.count != self.sizes[name] or any(part.shuffled for part in parts)
        ):
            raise _Hidden(name, "a product has a part of its outputs, so pass groups=1")
        if outputs.count < self.groups:
            raise _Hidden(name, f"it has {outputs.count} outputs, fewer than groups={self.groups}")
        self.taps.append(_Tap(name, outputs, self.groups))

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any] | None:
        before = len(self.taps)
        results = super().rule(eqn, values, walker)
        if len(self.taps) == before or results is None or self.receivers is None:
            return results
        y, *rest = results
        for k in range(before, len(self.taps)):
            y = _tapped(self.taps[k], array_of(y), self.receivers[k])
        return [y, *rest]


class _Hidden(Exception):
    """A weight whose outputs are not seen; it goes by `name` in the program."""

    def __init__(self, name: str, why: str):
        super().__init__(name, why)
        self.name, self.why = name, why


@dataclass
class _Pass:
    """The backward pass over one kind of batch."""

    cut: Cut
    structure: Any  # of the outputs
    groups: int
    sizes: Mapping[str, int]
    objective: Objective | None
    segment: Segment = field(init=False)
    taps: list[_Tap] | None = None

    def __post_init__(self) -> None:
        for piece, name in self.cut.nested.items():
            raise EvidenceError(
                f"weight {str(piece)!r} is used inside a {name}, in which outputs are not seen; "
                "leave it out of paths=, or write the loop out"
            )
        flat, planned = self.cut.flat, {p.path for stage in self.cut.stages for p in stage.pieces}
        usage = find_uses(flat, planned.__contains__)
        used = tuple(sorted(set().union(*usage.uses.values())))
        made = {n for step in flat.steps for n in step.outs}
        ends = [n for n in flat.outputs if isinstance(n, int)]
        sources = dict.fromkeys(n for step in flat.steps for n in step.reads if n not in made)
        sources |= dict.fromkeys(n for n in ends if n not in made)
        self.segment = Segment(
            flat.steps, tuple(sources), tuple(ends), used,
            tuple(n for n in sources if n in usage.fixed), tuple(usage.uses),
        )  # fmt: skip
        self.run = jax.jit(jax.grad(self._loss))

    @property
    def names(self) -> list[Piece]:
        """The weights, in the order of the names that they go by in the program."""
        return [self.cut.flat.pieces[n] for n in self.segment.watched]

    def __call__(
        self, number: int, leaves: Leaves, inputs: Inputs, told: _Told
    ) -> dict[str, tuple[np.ndarray, ...]]:
        """The saliency of one batch, by weight or layer."""
        operands = Run.of(self.cut, inputs, told.weights).operands(self.segment, 0, leaves.read)
        if self.taps is None:
            self.taps = self._probe(operands, inputs, told)
        receivers = [jnp.zeros(tap.shape, jnp.float32) for tap in self.taps]
        arrays = jax.device_get(self.run(receivers, operands, inputs, told))
        seen: dict[str, tuple[np.ndarray, ...]] = {}
        for tap, array in zip(self.taps, arrays, strict=True):
            name = str(self.names[int(tap.name)])
            if not np.isfinite(array).all():
                raise EvidenceError(
                    f"the gradient of the objective by the outputs of weight {name!r} is NaN or "
                    f"infinite in batch {number}; check that batch, or the objective"
                )
            seen[name] = (*seen.get(name, ()), array)
        return seen

    def _probe(self, operands: Any, inputs: Inputs, told: _Told) -> list[_Tap]:
        """The taps, in the order of the function; nothing is computed."""
        taps: list[_Tap] = []
        try:
            result = jax.eval_shape(partial(self._loss, None, taps=taps), operands, inputs, told)
        except _Hidden as error:
            piece = self.names[int(error.name)]
            raise EvidenceError(
                f"weight {str(piece)!r} has no saliency: {error.why}; or leave it out of paths="
            ) from error
        if result.shape != () or not _are(result, jnp.floating):
            raise EvidenceError(
                f"objective(outputs, *inputs) must be a number, got {result.dtype}"
                f"{list(result.shape)}"
            )
        return taps

    def _loss(
        self,
        receivers: Sequence[Array] | None,
        operands: list[Array],
        inputs: Inputs,
        told: _Told,
        taps: list[_Tap] | None = None,
    ) -> Array:
        sizes = {str(k): self.sizes[piece.path] for k, piece in enumerate(self.names)}
        observer = _Sensing(receivers, self.groups, sizes, self.segment.roots)
        _, values = watch(observer, self.segment, operands)
        if taps is not None:
            taps += observer.taps
        leaves = [
            array_of(values[a]) if isinstance(a, int) else jnp.asarray(a.val)
            for a in self.cut.flat.outputs
        ]
        outputs = jax.tree.unflatten(self.structure, leaves)
        if self.objective is None:
            return _next_tokens(outputs, jax.tree.leaves(inputs)[0], told)
        return jnp.asarray(self.objective(outputs, *inputs))
