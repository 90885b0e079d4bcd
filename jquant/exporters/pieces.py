"""What a folder's files are made of: the tensors of each weight, and how they are encoded.

MLX keeps the experts of a layer in one tensor. Where one of their weights is quantized the others
are stacked too, since mlx-lm itself stacks either all of a layer or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jquant.exporters.described import Holding
from jquant.exporters.shards import Piece
from jquant.exporters.targets import Target
from jquant.formats.base import Spec
from jquant.formats.mlx import in_stack


def pieces_of(
    target: Target, leaves: Mapping[str, Any], holdings: Mapping[str, Holding]
) -> list[Piece]:
    """The pieces of a folder, in order.

    Args:
        target: the format.
        leaves: name → array in the dtype that it is written in, or weight `[out, in]`.
        holdings: how those that are weights are held.
    """
    pieces = {name: _piece(name, leaf, holdings.get(name)) for name, leaf in leaves.items()}
    if not target.stacks:
        return list(pieces.values())
    layers = {_layer(name) for name in holdings if in_stack(name) != name}
    stacks: dict[str, list[str]] = {}
    for name in pieces:
        whole = in_stack(name) if _layer(name) in layers else name
        stacks.setdefault(whole, []).append(name)
    return [
        pieces[whole] if names == [whole] else _stack([pieces[name] for name in names])
        for whole, names in stacks.items()
    ]


def _layer(name: str) -> str:
    """What comes before the experts in a name; empty: it is not of experts."""
    return name.partition(".experts.")[0] if in_stack(name) != name else ""


def _stack(pieces: Sequence[Piece]) -> Piece:
    """The tensors of all experts of a layer as one."""
    names = [list(piece.specs) for piece in pieces]

    def make() -> dict[str, np.ndarray]:
        made = [piece.make() for piece in pieces]
        return {
            in_stack(own[0]): np.stack([made[k][name] for k, name in enumerate(own)])
            for own in zip(*names, strict=True)
        }

    specs = {
        in_stack(name): Spec((len(pieces), *spec.shape), spec.dtype)
        for name, spec in pieces[0].specs.items()
    }
    return Piece(specs, make)


def _piece(name: str, leaf: Any, holding: Holding | None) -> Piece:
    if holding is None or holding.codec is None:
        spec = Spec(tuple(leaf.shape), np.dtype(leaf.dtype))
        return Piece({name: spec}, lambda: {name: leaf[...]})
    module, codec = name.removesuffix("weight"), holding.codec
    specs = codec.storage.tensors(tuple(leaf.codes.shape))

    def make() -> dict[str, np.ndarray]:
        return {module + own: tensor for own, tensor in codec.encode(leaf).items()}

    return Piece({module + own: spec for own, spec in specs.items()}, make)
