"""Learning scales: codes stay as they are, what they are multiplied by is trained.

The other half of rounding: where DiscQuant moves weights on a fixed grid, this moves the grid under
fixed weights. Every floating parameter of a group (scales, tables, exponents, real zero points)
becomes `p * (1 + δ)` and δ is learned on the whole network, from 0. It composes with any rounding
and any grid, changes no size and no format, and the result is never worse than what came in on the
batches it is compared on. DWQ of mlx-lm is this, with KL to the full model; parameters in 8-bit
floats (scales of MX and NV) are left alone, as steps of 1e-3 are lost in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree

from jquant.axes.groups import Groups
from jquant.calibration.data import Data
from jquant.errors import PlanError
from jquant.grids.base import Grid, GridParams
from jquant.grids.grouped import Grouped
from jquant.learning.descend import Subjects, Watch, descend
from jquant.learning.network import Feed, Network
from jquant.learning.objectives import KL, Objective
from jquant.learning.programs import Task
from jquant.learning.trace import Trace
from jquant.numerics.narrow import as_dtype
from jquant.rounding.descent import Descent
from jquant.rounding.relaxed import Between, Unit, Variables
from jquant.weights.arguments import by_path, replaced
from jquant.weights.parts import Part
from jquant.weights.qtensor import QTensor, is_qtensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Coded:
    """What `relaxed.Target` is, of a weight that is rounded already."""

    codes: Integer[Array, "*batch out in"]
    params: GridParams
    parts: tuple[Part, ...]  # they stay as they are
    grid: Grid = field(metadata={"static": True})
    groups: Groups = field(metadata={"static": True})

    @property
    def w(self) -> Float[Array, "*batch out in"]:
        return self.decode(self.codes)

    def nearest(self) -> Integer[Array, "*batch out in"]:
        return self.codes

    def decode(
        self, codes: Array, params: GridParams | None = None
    ) -> Float[Array, "*batch out in"]:
        params = self.params if params is None else params
        values = Grouped(self.grid, self.groups).decode(codes, params)
        for part in self.parts:
            values = part.weight(values)
        return values


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Scales:
    """A relaxation of group parameters; see `relaxed.Relaxation`."""

    descent: Descent

    def start(self, target: _Coded, key: PRNGKeyArray | None) -> Variables:
        del key
        return {
            name: jnp.zeros(leaf.shape, jnp.float32)
            for name, leaf in target.params.items()
            if _learnable(leaf)
        }

    def relax(self, variables: Variables, target: _Coded, progress: Any) -> Between:
        del progress
        value = target.decode(target.codes, _moved(variables, target.params))
        return Between(jnp.zeros_like(value), value, value)

    def direction(
        self, gradient: Variables, variables: Variables, target: _Coded, unit: Unit, progress: Any
    ) -> Variables:
        del variables, target, unit, progress
        return gradient

    def project(self, variables: Variables, target: _Coded) -> Variables:
        del target
        return jax.tree.map(lambda d: jnp.clip(d, -0.5, 1.0), variables)  # signs and order stay

    def harden(self, variables: Variables, target: _Coded) -> tuple[Array, GridParams]:
        moved = _moved(variables, target.params)
        return target.codes, {
            name: as_dtype(moved[name], leaf.dtype) for name, leaf in target.params.items()
        }


def _learnable(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 1


def _moved(variables: Variables, params: GridParams) -> GridParams:
    moved = {name: params[name].astype(jnp.float32) * (1 + d) for name, d in variables.items()}
    return {**params, **moved}


def tune_scales(
    fn: Callable[..., Any],
    params: PyTree,
    qparams: PyTree,
    batches: Iterable[Any],
    *,
    objective: Objective = KL(),
    descent: Descent = Descent(200, 1e-3),
    progress: Callable[[int], None] | None = None,
) -> tuple[PyTree, Trace]:
    """The quantized parameters with their group parameters trained; codes stay.

    Args:
        fn: any JAX function `fn(params, *inputs)`.
        params: the original parameters; the reference is what the function gives with them.
        qparams: the same with quantized weights.
        batches: each one array or a tuple of inputs; gone over again until the steps are done.
        objective: as for `quantize`, on the whole network.
        descent: steps and learning rate, relative to each parameter (200 of 1e-3 by Adam:
            heuristic; DWQ takes absolute steps of 1e-6).
        progress: called with the number of steps done.

    Returns:
        the quantized parameters with other group parameters, and what happened. The best of all
        looks is returned; the first is what came in.

    Raises:
        PlanError: nothing is quantized, or nothing of it can be learned.
        EvidenceError: no batches.
        ObjectiveError: as for `quantize`.

    Example:
        >>> import jquant as jq
        >>> w = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
        >>> fn = lambda p, x: x @ p["w"]
        >>> x = jax.random.normal(jax.random.key(1), (64, 16))
        >>> plan = jq.plan(jq.find_weights(fn, w, x), {".*": jq.Scheme(jq.grids.Uniform(2))})
        >>> q, _ = jq.quantize(fn, w, plan)
        >>> tuned, trace = tune_scales(fn, w, q, [x], objective=jq.objectives.MSE())
        >>> trace.looks[trace.kept_at] < trace.looks[0]
        True
    """
    leaves = by_path(qparams, "qparams")
    structure = jax.tree.structure(qparams, is_leaf=is_qtensor)
    quantized: dict[str, QTensor] = {
        path: q
        for path, q in leaves.items()
        if isinstance(q, QTensor) and any(map(_learnable, q.params.values()))
    }
    if not quantized:
        raise PlanError(
            "no quantized weight with group parameters of 16 bits or more; pass what jq.quantize "
            "returned, on a grid with such scales"
        )
    data = Data.of(batches, most=descent.steps * descent.accumulate)
    task = Task(
        Network.of(fn, structure, leaves, quantized), _Scales(descent), objective,
        tuple(q.layout for q in quantized.values()), tuple(q.dtype for q in quantized.values()),
    )  # fmt: skip
    targets = [_Coded(q.codes, q.params, q.parts, q.grid, q.groups) for q in quantized.values()]
    fixed = [None if path in quantized else leaf for path, leaf in leaves.items()]
    feed = Feed(jax.jit(fn), params, data)
    subjects = Subjects(list(quantized), targets)
    tuned, trace = descend(task, subjects, fixed, feed, Watch(told=progress))
    moved = {
        path: dataclasses.replace(q, params=dict(rounded.params))
        for (path, q), rounded in zip(quantized.items(), tuned, strict=True)
    }
    return replaced(qparams, moved), trace
