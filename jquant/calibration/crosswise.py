"""Weights whose parts are used crosswise: each of them would have other axes by itself.

    jnp.tanh(x @ s[0]) @ s[1].T

One weight has one set of axes: along its inputs its groups lie, and errors are passed on. Where a
layer of a stack, or a slice of a fused kernel, is contracted along others, its codes would be of
the wrong axis, and its inputs unseen. Such a leaf is refused by name before any work.
"""

from __future__ import annotations

from collections.abc import Sequence

from jquant.axes.agreement import Patch, astray, counted, digits, patches
from jquant.axes.roles import Axes, Sighting, decisive
from jquant.errors import EvidenceError, WeightError

_MOST = 4  # parts that a message names


def check_astray(
    path: str, sightings: Sequence[Sighting], shape: Sequence[int], axes: Axes
) -> None:
    """Refuse a leaf with parts that would have other axes by themselves.

    Args:
        path: of the leaf.
        sightings: its uses.
        shape: of the leaf.
        axes: what `settled` makes of them.

    Raises:
        WeightError: names the leaf, the parts, and what each is contracted over.
    """
    stray = astray(sightings, shape, axes)
    if not stray:
        return
    at_home = [
        patch
        for patch in patches(sightings, shape)
        if counted(decisive(patch.sightings), axes, shape)
    ]
    raise WeightError(
        f"weight {path!r} is used crosswise: {_named(path, at_home, shape)}, but "
        f"{_named(path, stray, shape)}; one quantized array has its groups along one. Pass these "
        "parts as leaves of their own, or leave the weight out: "
        f"find_weights(..., ignore={path!r})"
    )


def used_otherwise(
    name: str, sightings: Sequence[Sighting], shape: Sequence[int], axes: Axes
) -> str:
    """Which parts of a weight are used along other axes than these, in words; nothing if none.

    Args:
        name: of the weight, or of one of its layers.
        sightings: its uses.
        shape: of it.
        axes: as a plan has them, or another batch.
    """
    multiplied = [s for s in sightings if s.reading.kind != "lookup"]
    if all(counted(s.reading, axes, shape) for s in multiplied):
        return ""
    stray = [
        patch
        for patch in patches(multiplied, shape)
        if not any(counted(s.reading, axes, shape) for s in patch.sightings)
    ]
    return _named(name, stray, shape)


def check_multiplied(name: str, sightings: Sequence[Sighting], shape: Sequence[int]) -> None:
    """Refuse a weight of which parts are only looked up, where their inputs are to be known.

    Raises:
        EvidenceError: names the weight and the parts.
    """
    if all(s.reading.kind != "lookup" for s in sightings):
        return
    only = [
        patch
        for patch in patches(sightings, shape)
        if all(s.reading.kind == "lookup" for s in patch.sightings)
    ]
    if only:
        places = [_place(name, patch, shape) for patch in only]
        raise EvidenceError(
            f"weight {name!r} is only looked up in {_listed(places)}, so that no second moment is "
            "known there; pass these parts as leaves of their own, use rounding.Nearest() or keep "
            "it, or Scheme(..., fallback=True) to let nearest rounding stand in"
        )


def _named(path: str, some: Sequence[Patch], shape: Sequence[int]) -> str:
    """Which parts are contracted over which axes, in words."""
    groups: dict[str, list[str]] = {}
    for patch in some:
        reading = decisive(patch.sightings)
        over = [digit.axis for digit in digits(reading.axes(shape), "in")]
        verb = "looked up along" if reading.kind == "lookup" else "contracted over"
        groups.setdefault(f"{verb} {_over(over)}", []).append(_place(path, patch, shape))
    return ", and ".join(
        f"{_listed(places)} {'is' if len(places) == 1 else 'are'} {how}"
        for how, places in groups.items()
    )


def _over(axes: Sequence[int]) -> str:
    own = sorted(set(axes))
    return f"axis {own[0]}" if len(own) == 1 else f"axes {tuple(own)}"


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - _MOST} more" if len(places) > _MOST else ""
    return ", ".join(places[:_MOST]) + more


def _place(path: str, patch: Patch, shape: Sequence[int]) -> str:
    """A part of a leaf as it would be indexed: `s[1]`, `qkv[:, 8:16]`."""
    index = [_span(own, size) for own, size in zip(patch.places, shape, strict=True)]
    while index and index[-1] == ":":
        index.pop()
    return f"{path}[{', '.join(index)}]" if index else path


def _span(places: Sequence[int], size: int) -> str:
    """Entries of an axis: all, one, a range, or every so many."""
    if len(places) == size:
        return ":"
    if len(places) == 1:
        return str(places[0])
    first, step, end = places[0], places[1] - places[0], places[-1] + 1
    if list(places) == list(range(first, end, step)):
        return f"{first}:{end}" if step == 1 else f"{first}:{end}:{step}"
    return f"{first}…{end - 1}"
