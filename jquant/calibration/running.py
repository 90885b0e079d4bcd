"""Running the steps of a flat function under a walker, and what that shows of its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jquant.axes.roles import Sighting
from jquant.calibration.observe import Observer
from jquant.calibration.routing import alike
from jquant.calibration.tagged import Tagged, array_of, constant, is_key
from jquant.programs.straight import Atom, Flat, Piece, Step
from jquant.programs.walker import Walker

Uses = dict[int, tuple[int, ...]]  # step → the weights it uses


class Usage(NamedTuple):
    """What a flat function does with its weights.

    Attributes:
        uses: which steps use which weights. An embedding lookup has no evidence: it counts for
            weights that are looked up only.
        nested: weights that are used inside a step's own loop or branch, and its name.
        fixed: values that depend on no input.
        deferred: steps that pick matrices of a weight for a later use, see `picks.py`.
        sightings: all uses of each weight, as it is read there.
    """

    uses: Uses
    nested: dict[Piece, str]
    fixed: frozenset[int]
    deferred: frozenset[int] = frozenset()
    sightings: Mapping[Piece, tuple[Sighting, ...]] = MappingProxyType({})


def find_uses(flat: Flat, planned: Callable[[str], bool]) -> Usage:
    """Run all steps abstractly, watching the planned weights."""
    watched = {n: piece for n, piece in flat.pieces.items() if planned(piece.path)}
    observer, fixed = _watch(flat, watched)
    numbers = {str(piece): number for number, piece in watched.items()}
    sightings = [
        (site, numbers[path], reading.kind)
        for (site, _), (path, reading, *_) in observer.uses.items()
    ]
    multiplied = {number for _, number, kind in sightings if kind != "lookup"}
    uses: dict[int, dict[int, None]] = {}
    for (at, *_), number, kind in sightings:
        if kind != "lookup" or number not in multiplied:
            uses.setdefault(at, {})[number] = None
    nested = {
        flat.pieces[number]: flat.steps[at].eqn.primitive.name
        for (at, *inside), number, _ in sightings
        if inside
    }
    deferred = frozenset(at for at, *inside in observer.deferred if not inside)
    seen = _by_piece(watched.values(), observer)
    return Usage({at: tuple(uses[at]) for at in sorted(uses)}, nested, fixed, deferred, seen)


def _by_piece(watched: Iterable[Piece], observer: Observer) -> dict[Piece, tuple[Sighting, ...]]:
    """All uses of each weight."""
    names = {str(piece): piece for piece in watched}
    seen: dict[Piece, list[Sighting]] = {}
    for sighting in observer.uses.values():
        seen.setdefault(names[sighting.path], []).append(sighting)
    return {piece: tuple(uses) for piece, uses in seen.items()}


def _watch(flat: Flat, watched: Mapping[int, Piece]) -> tuple[Observer, frozenset[int]]:
    """What an observer sees of weights in an abstract run, and the values without inputs."""
    observer, fixed = Observer(), set[int]()
    keys = {number for number in flat.inputs if is_key(flat.shapes[number])}
    plain = {*flat.pieces, *flat.consts, *keys}

    def tagged(number: int, value: Any) -> Any:
        if number in watched:
            return Tagged.of(str(watched[number]), value)
        return Tagged(value) if number in plain else value

    def probe(values: dict[int, Any]) -> int:
        walker = Walker(observer, constant=constant)
        values = {number: tagged(number, value) for number, value in values.items()}
        evaluate(walker, flat.steps, values)
        observer.leave([values[n] for n in flat.outputs if isinstance(n, int)], walker)
        fixed.update(n for n, v in values.items() if isinstance(v, Tagged) and not v.dependent)
        return 0

    sources = [*flat.pieces, *flat.inputs, *flat.consts]
    jax.eval_shape(probe, {number: flat.shapes[number] for number in sources})
    return observer, frozenset(fixed)


def evaluate(
    walker: Walker,
    steps: Sequence[Step],
    values: dict[int, Any],
    seen: Mapping[int, Any] | None = None,
    shared: Collection[int] = (),
) -> dict[int, Any]:
    """Run steps; `values` holds their sources, and then their results too.

    With all values `seen` in the full-precision network, `shared` steps choose as they do there.
    """
    for at, step in enumerate(steps):
        walker.site, walker.within = (at,), (step.eqn,)
        operands = [read(values, atom) for atom in step.ins]
        results = walker.evaluate(step.eqn, operands)
        if seen is not None and at in shared:
            own, there = (
                [array_of(read(values, atom)) for atom in step.ins] for values in (values, seen)
            )
            full = [array_of(seen[n]) for n in step.outs]
            results = alike(step.eqn, own, list(map(array_of, results)), there, full)
        values.update(zip(step.outs, results, strict=True))
    walker.site, walker.within = (), ()
    return values


def read(values: Mapping[int, Any], atom: Atom) -> Any:
    return values[atom] if isinstance(atom, int) else atom.val
