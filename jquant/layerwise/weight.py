"""One weight: a grid, a rounding and a compensation meet here, and nowhere else.

`quantize_weight` turns one array into a `QTensor`: canonical view, rounding, what makes up for its
error, packing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jquant.axes.layout import Layout
from jquant.calibration.evidence import Evidence
from jquant.errors import PlanError, WeightError
from jquant.grids.grouped import Grouped
from jquant.numerics.distortion import output_error
from jquant.numerics.narrow import as_dtype, ends, is_coarse
from jquant.rounding.base import Rounded
from jquant.rounding.elementwise import Nearest, importance_of
from jquant.rounding.prepare import prepared_for
from jquant.schemes.inputs import quantized_inputs
from jquant.schemes.scheme import Scheme
from jquant.weights.parts import Part
from jquant.weights.qtensor import (
    LowRank,
    QTensor,
    canonical_weight,
    weight_bits,
    weight_bytes,
)

# Values of weights do not get there: a dtype that goes on so far holds them all.
FAR = 2.0**100


class Rounder(NamedTuple):
    """A scheme's rounding, with all that it is told beside the weight."""

    scheme: Scheme
    evidence: Evidence | None
    key: PRNGKeyArray | None
    prepared: Any  # what the rounding has made of the evidence

    @staticmethod
    def of(
        scheme: Scheme,
        evidence: Evidence | None = None,
        key: PRNGKeyArray | None = None,
        prepared: Any = None,
    ) -> Rounder:
        """Evidence is prepared here unless it has been before."""
        if prepared is None:
            prepared = prepared_for(scheme.rounding, evidence, scheme.grouping)
        return Rounder(scheme, evidence, key, prepared)

    @property
    def moment(self) -> Float[Array, "*batch in in"] | None:
        """The second moment of the inputs, if it is known."""
        return None if self.evidence is None else self.evidence.second_moment

    def __call__(self, w: Float[Array, "*batch out in"], turn: int = 0) -> Rounded:
        """A weight rounded; every turn of a compensation has its own randomness."""
        key = self.key if turn == 0 or self.key is None else jax.random.fold_in(self.key, turn)
        rounding, grid, groups = self.scheme.rounding, self.scheme.grid, self.scheme.grouping
        return rounding(w, grid, groups, evidence=self.prepared, key=key)


def quantize_weight(
    w: Float[Array, ...],
    scheme: Scheme,
    layout: Layout,
    *,
    evidence: Evidence | None = None,
    key: PRNGKeyArray | None = None,
    prepared: Any = None,
) -> tuple[QTensor, dict[str, Array]]:
    """One weight as its scheme says, and numbers about its error.

    Args:
        w: the weight, in its own shape.
        scheme: what to do.
        layout: how `w` is read as `[*batch, out, in]`; see `Weight.layout`.
        evidence: what is known of its inputs.
        key: randomness, for roundings that need it; later rounds of a compensation fold in their
            number.
        prepared: what the rounding has made of this evidence before, for another weight with the
            same inputs, by its method `prepare`. Default: it is made here.

    Returns:
        the quantized weight, and numbers per `[*batch]`: `error`, `nearest_error` and `power` (the
        output error of this and of nearest rounding, and of leaving the weight out; without
        evidence those of the weights themselves), and what the rounding reports. The error is that
        of codes and compensation together, nearest rounding has none.

    Raises:
        WeightError: the weight has no elements.
        PlanError, EvidenceError: what rounding and compensation raise; static ranges of inputs that
            `evidence` does not tell.
    """
    if w.size == 0:
        raise WeightError(f"a weight of shape {w.shape} has no elements to quantize; keep it")
    canonical = layout.canonical(w)
    if is_coarse(w.dtype):  # exact, and a dtype that all arithmetic and all checks of types know
        canonical = canonical.astype(jnp.float32)
    transforms, canonical, evidence = _apart(canonical, scheme, evidence)
    if transforms:  # what was prepared was of the inputs as they come
        scheme, prepared = dataclasses.replace(scheme, transforms=()), None
    rounder = Rounder.of(scheme, evidence, key, prepared)
    q, info = stored(canonical, rounder(canonical), layout, w.dtype, rounder)
    return dataclasses.replace(q, transforms=transforms), info


def _apart(
    canonical: Float[Array, "*batch out in"], scheme: Scheme, evidence: Evidence | None
) -> tuple[tuple[Part, ...], Float[Array, "*batch out in"], Evidence | None]:
    """The parts that a scheme's transforms take off a weight, what is left, and its evidence."""
    parts: list[Part] = []
    for transform in scheme.transforms:
        part, canonical, evidence = transform.apart(canonical, evidence)
        parts.append(part)
    return tuple(parts), canonical, evidence


def stored(
    canonical: Float[Array, "*batch out in"],
    rounded: Rounded,
    layout: Layout,
    dtype: Any,
    rounder: Rounder,
) -> tuple[QTensor, dict[str, Array]]:
    """What `quantize_weight` returns of a weight that has been rounded.

    Args:
        canonical: the weight.
        rounded: what became of it.
        layout, dtype: how it lay, and in which numbers.
        rounder: what has rounded it, and will round what a compensation leaves of it.

    Raises:
        PlanError: the scheme has transforms, which were to be taken off before.
    """
    scheme, moment = rounder.scheme, rounder.moment
    if scheme.transforms:
        raise PlanError(
            f"weights with transforms are not learned by a whole network, got {scheme}; pass "
            "Scheme(..., transforms=()), or another rounding or objective"
        )
    info = dict(_errors(canonical, rounded, moment, scheme), **rounded.info)
    low = None
    if scheme.compensation is not None:
        rounded, low, told = _compensated(canonical, rounded, rounder)
        info |= told
    q = QTensor(
        rounded.codes, dict(rounded.params), scheme.grid, scheme.grouping, layout,
        jnp.dtype(dtype), low, quantized_inputs(scheme.activations, rounder.evidence),
    )  # fmt: skip
    if is_coarse(dtype) or ends(dtype)[1] < FAR:
        exact = {name: info[name] for name in ("error", "nearest_error")}
        info |= _errors_as_kept(canonical, q, moment, exact)
    return q, info


def remainder(
    w: Float[Array, ...],
    scheme: Scheme,
    layout: Layout,
    *,
    evidence: Evidence | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*batch out in"]:
    """What the codes of a scheme leave of a weight for a compensation, float32; see above."""
    _, canonical, evidence = _apart(layout.canonical(w), scheme, evidence)
    rounded = Rounder.of(scheme, evidence, key)(canonical)
    return _left(canonical if rounded.target is None else rounded.target, rounded, scheme)


def _compensated(
    w: Float[Array, "*batch out in"], rounded: Rounded, rounder: Rounder
) -> tuple[Rounded, LowRank, dict[str, Array]]:
    """Codes and the term beside them after the best round, and what that changes in the report.

    Codes of later rounds are those of what the term leaves of the weight. What they and the term
    together are to come near to stays the first round's target.
    """
    scheme, moment, choice = rounder.scheme, rounder.moment, rounder.scheme.compensation
    assert choice is not None
    target = w if rounded.target is None else rounded.target

    def measured(rounded: Rounded) -> tuple[Rounded, LowRank, Array, Array]:
        """With the term, and the squared error from the weight and from the target."""
        low = choice(_left(target, rounded, scheme), rounder.evidence)
        error = _size_left(w, rounded, low, moment, scheme)
        aim = error if target is w else _size_left(target, rounded, low, moment, scheme)
        return rounded, low, error, aim

    best = last = measured(rounded)
    for turn in range(1, choice.rounds):
        last = measured(rounder(w.astype(jnp.float32) - last[1].product(), turn))
        best = _better(last[3] < best[3], last, best)
    rounded, low, error, _ = best
    told = {name: value for name, value in rounded.info.items() if name != "nearest_error"}
    if "failed" in told:  # such a moment measures nothing
        error = jnp.where(told["failed"] > 0, jnp.nan, error)
    return rounded, low, {**told, "error": error}


@jax.jit(static_argnames="scheme")
def _left(
    target: Float[Array, "*batch out in"], rounded: Rounded, scheme: Scheme
) -> Float[Array, "*batch out in"]:
    """What codes leave of a target."""
    grid = Grouped(scheme.grid, scheme.grouping)
    return target.astype(jnp.float32) - grid.decode(rounded.codes, rounded.params)


@jax.jit(static_argnames="scheme")
def _size_left(
    target: Float[Array, "*batch out in"],
    rounded: Rounded,
    low: LowRank,
    moment: Float[Array, "*batch in in"] | None,
    scheme: Scheme,
) -> Float[Array, "*batch"]:
    """The squared error of codes and compensation together."""
    return _size(_left(target, rounded, scheme) - low.product(), moment)


@jax.jit
def _better(first: Float[Array, "*batch"], one: Any, two: Any) -> Any:
    """For every weight of a batch `one` where `first` says so, else `two`."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(first.reshape(first.shape + (1,) * (a.ndim - first.ndim)), a, b)

    return jax.tree.map(pick, one, two)


def _size(
    e: Float[Array, "*batch out in"], moment: Float[Array, "*batch in in"] | None
) -> Float[Array, "*batch"]:
    return jnp.sum(e**2, (-2, -1)) if moment is None else output_error(e, moment)


def stored_bits(shape: Sequence[int], scheme: Scheme, layout: Layout | None = None) -> float:
    """Bits per weight that a scheme stores of a weight, group parameters counted; nothing is run.

    Args:
        shape: of the weight.
        scheme: grid, groups, compensation and static ranges count, the rounding does not.
        layout: how the weight is read; default as `[..., out, in]`.

    Example:
        >>> from jquant.grids import Uniform
        >>> stored_bits((8, 128), Scheme(Uniform(4, scale_dtype="float16"), 64))
        4.3125
    """
    return weight_bits(_abstract(tuple(shape), scheme, layout))


@functools.lru_cache(maxsize=4096)
def stored_bytes(shape: tuple[int, ...], scheme: Scheme, layout: Layout | None = None) -> int:
    """Bytes that a checkpoint takes for a weight of this scheme; arguments as for `stored_bits`.

    Example:
        >>> from jquant.grids import Uniform
        >>> stored_bytes((8, 128), Scheme(Uniform(4, scale_dtype="float16"), 64))
        552
    """
    return weight_bytes(_abstract(shape, scheme, layout))


def _abstract(shape: tuple[int, ...], scheme: Scheme, layout: Layout | None) -> QTensor:
    """The shapes of a quantized weight."""
    rank = len(shape)
    layout = layout or Layout.of(shape, in_axes=(rank - 1,), batch_axes=tuple(range(rank - 2)))
    choice = scheme.compensation
    if choice is not None:
        choice = dataclasses.replace(choice, metric="frobenius", rounds=1)
    nearest_only = dataclasses.replace(scheme, rounding=Nearest(), compensation=choice)
    told = bool({"inputs", "spread"} & scheme.needs)

    def run(w: Array) -> QTensor:
        evidence = None
        if told:
            *batch, _, width = jax.eval_shape(layout.canonical, w).shape
            evidence = Evidence.of(jnp.zeros((*batch, 1, width), jnp.float32), spread=True)
        return quantize_weight(w, nearest_only, layout, evidence=evidence)[0]

    return jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))


@jax.jit(static_argnames="scheme")
def _errors(
    w: Float[Array, "*batch out in"],
    rounded: Rounded,
    moment: Float[Array, "*batch in in"] | None,
    scheme: Scheme,
) -> dict[str, Array]:
    """Squared errors that the rounding has not reported itself."""
    w, grid, params = w.astype(jnp.float32), Grouped(scheme.grid, scheme.grouping), rounded.params
    errors = {"power": _size(w, moment)}
    if "error" not in rounded.info:
        errors["error"] = _size(_left(w, rounded, scheme), moment)
    if "nearest_error" not in rounded.info:
        errors["nearest_error"] = _size(w - grid.decode(grid.nearest(w, params), params), moment)
    return errors


@jax.jit
def _errors_as_kept(
    w: Float[Array, "*batch out in"],
    q: QTensor,
    moment: Float[Array, "*batch in in"] | None,
    exact: dict[str, Array],
) -> dict[str, Array]:
    """Squared errors of values in the weight's own dtype, which is coarse or does not reach far.

    NaN where the `exact` ones are. In sixteen bits they stand unless a value is beyond the dtype.
    """
    w, grid, values = w.astype(jnp.float32), Grouped(q.grid, q.groups), canonical_weight(q)

    def of(values: Array, exact: Array) -> Array:
        error = _size(w - as_dtype(values, q.dtype).astype(jnp.float32), moment)
        return jnp.where(jnp.isnan(exact), exact, error)

    def measured() -> dict[str, Array]:
        params = grid.fit(w, importance_of(moment))
        plain = grid.decode(grid.nearest(w, params), params)
        return {
            "error": of(values, exact["error"]),
            "nearest_error": of(plain, exact["nearest_error"]),
        }

    if is_coarse(q.dtype):
        return measured()
    return lax.cond(jnp.any(jnp.abs(values) > ends(q.dtype)[1]), measured, lambda: exact)
