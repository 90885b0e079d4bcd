"""Operations on every element by itself, of weights, of inputs, and of both.

Of values that depend on no input they make another such value: an effective weight, its axes as
they were, noted to have been through the operation unless that is multiplication by one common
factor. An input may meet a weight in them as it does a bias, a scale or a mask: as a plain array.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from jax import Array
from jax.extend import core

from jquant.axes.origin import Origin
from jquant.calibration.tagged import (
    Tagged,
    array_of,
    changed,
    fitted,
    is_independent,
    is_uniform,
    settled,
)
from jquant.programs.primitives import having
from jquant.programs.walker import bind


def retagged(value: Any, result: Any) -> Any:
    """The result of an operation that leaves all that is known of its operand."""
    return replace(value, array=result) if isinstance(value, Tagged) else result


def elementwise(observer: Any, eqn: core.JaxprEqn, values: list[Any], free: bool) -> list[Any]:
    """The result; `free`: no operand depends on inputs."""
    name = eqn.primitive.name
    (result,) = bind(eqn, list(map(array_of, values)))
    if free:
        value = combined(name, values, result)
        observer.note([v for v in values if isinstance(v, Tagged)], name, value)
        return [value]
    if name == "convert_element_type":
        return [retagged(values[0], result)]
    scaled = _scaled(name, values, result)
    if scaled is not None:
        weight, rest = scaled
        observer.reach(rest)
        return [weight]
    picked = _of_picked(eqn, values, result)
    if picked is not None:
        return [picked]
    observer.mix(values, name)
    return [
        Tagged(result, dependent=True, uniform=True) if all(map(is_uniform, values)) else result
    ]


def _scales(name: str, values: Sequence[Any]) -> bool:
    """Whether it multiplies, or divides a value that is not one number only."""
    return name == "mul" or (name == "div" and not is_uniform(values[0]))


def _scaled(name: str, values: Sequence[Any], result: Array) -> tuple[Tagged, list[Any]] | None:
    """A weight times numbers that data gives, one for all of it; and these numbers."""
    full = [value for value in values if not is_uniform(value)]
    if len(full) != 1 or not _scales(name, values):
        return None
    (weight,) = full
    if not isinstance(weight, Tagged) or not weight.good:
        return None
    scaled = replace(fitted(weight, result.shape), array=result)
    return scaled, [value for value in values if value is not weight]


def _of_picked(eqn: core.JaxprEqn, values: Sequence[Any], result: Array) -> Tagged | None:
    """What data has picked from weights, and what independent values make of that."""
    skipped = 1 if eqn.primitive.name == "select_n" else 0  # who chooses does not matter
    cases, atoms = values[skipped:], eqn.invars[skipped:]
    picked = [v for v in cases if isinstance(v, Tagged) and v.origins]
    own = (
        isinstance(value, Tagged) or is_independent(atom, value)
        for atom, value in zip(atoms, cases, strict=True)
    )
    if not picked or not all(own):
        return None
    reach = tuple(sorted({number for value in picked for number in value.reach}))
    value = Tagged(result, picked[0].origins[:1], reach, dependent=True)
    return changed(value, result, [None], eqn.primitive.name)


def combined(name: str, values: Sequence[Any], result: Array) -> Tagged:
    """An elementwise operation of independent operands.

    A weight that is one number throughout, or was stretched to the shape of another, is a factor
    or a bias of that one.
    """
    tagged = [fitted(v, result.shape) for v in values if isinstance(v, Tagged)]
    full = _filling(tagged)
    views = _views(full)
    common = len(full) == 1 and _scales(name, values)  # the others are one factor
    after = [_through(origin, name, common) for origin in views]
    origins = _distinct([*after, *_remains(full, after)])
    reach = {number for value in tagged for number in value.reach}
    reach |= {o.product for v in tagged for o in v.good if o.product is not None and o not in views}
    return Tagged(result, *settled(origins, reach), uniform=all(map(is_uniform, tagged)))


def _filling(operands: Sequence[Tagged]) -> Sequence[Tagged]:
    """The operands that are not one number throughout, unless all of them are."""
    return [value for value in operands if not is_uniform(value)] or operands


def _views(operands: Sequence[Tagged]) -> list[Origin]:
    """The views that fill the shape; where there are none, all."""
    good = [origin for value in operands for origin in value.good]
    return [origin for origin in good if not origin.stretched] or good


def _remains(operands: Sequence[Tagged], views: Sequence[Origin]) -> list[Origin]:
    """What is left of weights that are no views any more: summands or factors like others."""
    lost = [o for value in operands for o in value.lost if not any(map(o.overlaps, views))]
    return [origin for origin in lost if not origin.stretched or not views]


def _through(origin: Origin, name: str, common: bool) -> Origin:
    """The origin after an elementwise operation; `common`: by one factor for all of it."""
    if origin.product is not None and name not in having("linear"):
        return origin.break_at(name)  # an activation that nothing flows into
    if common or name in ("neg", "convert_element_type"):
        return origin
    return origin.pass_through(name)


def _distinct(origins: Iterable[Origin]) -> Iterable[Origin]:
    """One of those that are views of one weight alike; the first."""
    return {replace(o, through=()): o for o in reversed(list(origins))}.values()
