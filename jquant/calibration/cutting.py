"""A function cut for batches of one shape: flattened, its stacks taken apart if they can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from jquant.calibration.comparison import Level
from jquant.calibration.follow import Follower
from jquant.calibration.place import Place
from jquant.calibration.stages import Cut, Granularity, cut_at_weights
from jquant.calibration.tokens import follow_steps, input_places
from jquant.programs.straight import Flat, flatten
from jquant.weights.arguments import shape_of


def cut_for(
    fn: Callable[..., Any],
    leaves: Sequence[tuple[str, jax.ShapeDtypeStruct]],
    structure: Any,
    inputs: tuple[Any, ...],
    planned: Mapping[str, Collection[int]],
    granularity: Granularity,
    level: Level | None,
    reconstruct: bool,
    drift: bool,
    tokens: Sequence[int] | None = None,
) -> Cut:
    """Flatten and cut; a stack is taken as a whole unless every layer is used, and by itself.

    `tokens`: the shape of the token weights, which are followed through the function.
    """
    abstract = jax.tree.map(shape_of, inputs)
    shapes, stacks = dict(leaves), dict(planned)
    while True:
        flat = flatten(fn, leaves, structure, abstract, stacks)
        found = cut_at_weights(flat, planned.__contains__, granularity, level, reconstruct, drift)
        layers: dict[str, list[tuple[tuple[int, int], ...]]] = {}
        for stage in found.stages:
            for piece in stage.pieces:
                layers.setdefault(piece.path, []).append(piece.where)
        whole = {path for path, where in layers.items() if not _covers(shapes[path].shape, where)}
        if not whole:
            return found if tokens is None else replace(found, places=_places(flat, tokens))
        stacks = {path: axes for path, axes in stacks.items() if path not in whole}


def _places(flat: Flat, tokens: Sequence[int]) -> dict[int, Place]:
    """Where the tokens are in every value."""
    places = {n: Place.blank(flat.shapes[n].shape) for n in (*flat.pieces, *flat.consts)}
    inputs = [flat.shapes[n] for n in flat.inputs]
    places.update(zip(flat.inputs, input_places(inputs, tokens), strict=True))
    return follow_steps(Follower(), flat.steps, places)


def _covers(shape: Sequence[int], layers: Sequence[tuple[tuple[int, int], ...]]) -> bool:
    """Whether these layers are all there are, along the same axes."""
    axes = tuple(axis for axis, _ in layers[0])
    same = all(tuple(axis for axis, _ in where) == axes for where in layers)
    return same and len(layers) == math.prod(shape[axis] for axis in axes)
