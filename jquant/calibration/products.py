"""The products in which a weight meets its input: `dot_general`, convolutions, `ragged_dot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jquant.axes.contraction import Contraction
from jquant.axes.origin import Origin
from jquant.calibration.meeting import Rows, meet, refusing, unsupported
from jquant.calibration.pending import Product
from jquant.calibration.picks import meet_picked
from jquant.calibration.tagged import Tagged, array_of, is_independent
from jquant.programs.walker import Walker, bind


def _is_weight(value: Any) -> bool:
    """Whether anything of a weight is in a value."""
    return isinstance(value, Tagged) and bool(value.origins)


def _lost(observer: Any, origin: Origin, eqn: core.JaxprEqn) -> Exception:
    why = f"it has been through {origin.broken!r}"
    if origin.path in observer.interleaved:
        why += (
            " where elements of weights are interleaved, as lax.associative_scan does (instead of "
            "adding weights up, add up their products with the input; instead of multiplying them "
            "together, multiply the input by one after the other, as in lax.scan)"
        )
    return unsupported(origin, eqn.primitive.name, why)


def dot(observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any]:
    free = all(map(is_independent, eqn.invars, values))
    contract, _ = eqn.params["dimension_numbers"]
    if not contract[0]:
        return _outer(observer, eqn, values, free)
    if free:
        return _of_parameters(observer, eqn, values, walker)
    results = bind(eqn, list(map(array_of, values)))
    for slot, weight in enumerate(values):
        other = values[1 - slot]
        if not isinstance(weight, Tagged) or (_is_weight(other) and not _is_weight(weight)):
            continue
        if not _is_weight(other) and meet_picked(observer, walker, slot, weight, array_of(other)):
            values[slot] = observer.met(weight)
            continue
        if weight.lost and not _is_weight(other):
            raise _lost(observer, weight.lost[0], eqn)
        if not weight.dependent:
            rows = Rows(array_of(other), 1 - slot)
            meet(observer, walker, slot, weight, rows, Contraction.of(eqn, slot))
    observer.reach([v for v in values if isinstance(v, Tagged) and not v.good])
    return results


def _outer(observer: Any, eqn: core.JaxprEqn, values: list[Any], free: bool) -> Sequence[Any]:
    """Nothing is contracted: each number of one operand times numbers of the other, a scale."""
    if free and any(map(_is_weight, values)):
        return observer.other(eqn, values, True)
    results = bind(eqn, list(map(array_of, values)))
    observer.mix(values, eqn.primitive.name)
    return [Tagged(r) for r in results] if free else results


def _of_parameters(
    observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker
) -> Sequence[Any]:
    """A product of values that depend on no input; what it is depends on what becomes of it."""
    left, right = (v if isinstance(v, Tagged) else Tagged(jnp.asarray(v)) for v in values)
    if not left.good and not right.good:
        return observer.other(eqn, values, True)
    (result,) = bind(eqn, list(map(array_of, values)))
    number = observer.pending.add(
        Product(walker.site, left, right, *eqn.params["dimension_numbers"])
    )
    reach = tuple(sorted({*left.reach, *right.reach}))
    return [Tagged(result, (Origin.of("", result.shape, number),), reach)]


def conv(observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any]:
    x, weight = values
    if _is_weight(weight):
        return _second(observer, eqn, values, walker)
    if isinstance(x, Tagged) and x.good:
        with refusing(x.good[0], eqn.primitive.name):
            Contraction.of(eqn, 0)
    observer.reach(values)
    return bind(eqn, list(map(array_of, values)))


def ragged_dot(
    observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker
) -> Sequence[Any]:
    slots = [slot for slot, value in enumerate(values) if _is_weight(value)]
    if slots == [1]:
        return _second(observer, eqn, values, walker)
    if slots:
        with refusing(values[slots[0]].origins[0], eqn.primitive.name):
            Contraction.of(eqn, slots[0] if slots[0] != 1 else slots[1])
    observer.reach(values)
    return bind(eqn, list(map(array_of, values)))


def _second(observer: Any, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any]:
    """The second operand is a weight; the first one holds rows, the third one sizes of groups."""
    x, weight, *sizes = values
    observer.reach(values)
    results = bind(eqn, list(map(array_of, values)))
    with refusing(weight.origins[0], eqn.primitive.name):
        contraction = Contraction.of(eqn, 1)
    if weight.lost:
        raise _lost(observer, weight.lost[0], eqn)
    for origin in weight.good:
        if origin.product is not None:
            raise unsupported(origin, eqn.primitive.name, "it is a product of parameters")
    rows = Rows(array_of(x), 0, *map(array_of, sizes[:1]))
    meet(observer, walker, 1, weight, rows, contraction)
    return results


RULES: Mapping[str, Any] = {
    "dot_general": dot,
    "conv_general_dilated": conv,
    "ragged_dot": ragged_dot,
    "ragged_dot_general": ragged_dot,
}
