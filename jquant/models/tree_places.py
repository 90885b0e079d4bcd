"""The places of a decoder's tensors in the tree of another library, one by one.

A tensor is a matrix `[out, in]`, or a vector, under Hugging Face's name. In the tree it is a part
of an array: its axes split by heads and turned, in a stack of experts, of layers (MaxText's second
axis), or of k and v. A `Layout` says how the axes go, there and back, for codes and for numbers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jquant.axes.layout import Factor, Layout, Role
from jquant.models.assembly import Source, sources
from jquant.models.coded import in_halves, in_pairs
from jquant.models.config import DecoderConfig
from jquant.models.tree_names import LIBRARIES, Class, Library, Row
from jquant.trees.lazy import Lazy

LAYERS_AXIS = 1  # of MaxText's stacks, its `param_scan_axis`


class Stack(NamedTuple):
    """A part's place along one axis of the whole array."""

    axis: int
    index: int
    size: int


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
        source: what it is called here and in Hugging Face's files.
        path: of the array.
        layout: of the part, as `[out, in]`; a vector is one of one input.
        stacks: where the part lies in the array, by axes of the array, the first ones first.
    """

    source: Source
    path: str
    layout: Layout
    stacks: tuple[Stack, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return self.around(self.layout.shape((self.layout.size("out"), self.layout.size("in"))))

    def around(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole of which this is the shape of a part."""
        sizes = list(part)
        for stack in self.stacks:
            sizes.insert(stack.axis, stack.size)
        return tuple(sizes)

    def window(self, rank: int) -> tuple[int | slice, ...]:
        """The index of the part in an array of so many axes."""
        own = {stack.axis: stack.index for stack in self.stacks}
        return tuple(own.get(axis, slice(None)) for axis in range(rank))


@dataclass(frozen=True, eq=False)
class Tree:
    """A decoder's parameters as a class of another library has them.

    Attributes:
        library: see `tree_names`.
        model_type: of the decoder.
        config: the decoder's.
        scanned: whether layers are stacked.
    """

    library: Library
    model_type: str
    config: DecoderConfig
    scanned: bool = False

    @functools.cached_property
    def own(self) -> Class:
        """The class; FormatError: there is none that computes this decoder."""
        return self.library.of(self.model_type, self.config)

    def places(self) -> list[Place]:
        """The places of all tensors, in the order of `assembly.sources`.

        Raises:
            FormatError: no class of the library computes this decoder.

        Example:
            >>> from jquant.models.tree_names import LIBRARIES
            >>> config = DecoderConfig(32, 8, 16, 2, heads=4, kv_heads=2, rope_theta=1e6)
            >>> places = Tree(LIBRARIES["tunix"], "llama", config).places()
            >>> own = {place.source.name: place for place in places}
            >>> place = own["model.layers.0.self_attn.k_proj.weight"]
            >>> place.path, place.shape
            ('layers/0/attn/k_proj/w', (8, 2, 2))
        """
        rows = self.own.rows(self.config)
        slots: dict[str, int] = {}
        for row in rows.values():
            if row.slot is not None:
                slots[row.path] = max(slots.get(row.path, 0), row.slot + 1)
        return [
            self._place(source, row, slots.get(row.path, 0))
            for source in sources(self.config, "hf")
            if (row := rows[source.leaf.removeprefix("layers/")])
        ]

    def _place(self, source: Source, row: Row, slots: int) -> Place:
        path, stacks = row.path.format(source.layer), []
        if source.expert is not None:
            stacks.append(Stack(0, source.expert, self.config.experts))
        if slots:
            stacks.append(Stack(0, row.slot or 0, slots))
        if self.scanned and source.layer is not None:
            path = path.replace(f"layers_{source.layer}/", "layers/")
            stacks.append(Stack(LAYERS_AXIS, source.layer, self.config.layers))
        axes = row.axes[1:] if source.expert is not None else row.axes
        return Place(source, path, self._layout(source.axes, axes), tuple(stacks))

    def _layout(self, stored: str, axes: str) -> Layout:
        c = self.config
        sizes = {"v": c.vocab, "d": c.width, "f": c.hidden, "e": c.experts, "n": c.heads,
                 "m": c.kv_heads, "h": c.head_dim}  # fmt: skip
        factors: dict[str, Factor] = {}
        roles: tuple[Role, Role] = ("out", "in")
        for axis, role in zip(stored, roles, strict=False):
            for place, letter in enumerate(_letters(axis)):
                factors[letter] = Factor(role, place, sizes[letter])
        return Layout(tuple(tuple(factors[k] for k in _letters(axis)) for axis in axes))

    def ordered(self, source: Source, leaf: Lazy) -> Lazy:
        """A tensor of Hugging Face's with its rows and numbers as the class has them."""
        heads, scale = self._turned(source), self._scale(source)
        leaf = leaf if not heads else in_pairs(leaf, heads)
        return leaf if scale is None else _times(leaf, scale)

    def usual(self, source: Source, leaf: Lazy) -> Lazy:
        """The inverse of `ordered`."""
        heads, scale = self._turned(source), self._scale(source)
        leaf = leaf if scale is None else _times(leaf, 1 / scale)
        return leaf if not heads else in_halves(leaf, heads)  # type: ignore[return-value]

    def is_array(self, source: Source) -> bool:
        """Whether the class has other numbers than Hugging Face's, or their rows in another order,
        so that codes would not be its own."""
        return bool(self._turned(source) or self._scale(source))

    def _turned(self, source: Source) -> int:
        """How many heads have their channels in pairs, where MaxText's frequencies are Llama 3.1's;
        0: they are as they are."""
        part = source.leaf.removeprefix("layers/attention/").partition("/")[0]
        heads = {"q": self.config.heads, "k": self.config.kv_heads}.get(part, 0)
        turned = self.own.scaled and self.config.rope_divisors is not None
        return heads if turned else 0

    def _scale(self, source: Source) -> float | None:
        is_query = source.leaf.startswith("layers/attention/q/")
        return self.config.head_dim**-0.5 if self.own.scaled and is_query else None


def tree_of(library: str, model_type: str, config: DecoderConfig, scanned: bool = False) -> Tree:
    """A decoder's tree in a library, "tunix" or "maxtext"."""
    return Tree(LIBRARIES[library], model_type, config, scanned)


def part(place: Place, matrix: np.ndarray) -> np.ndarray:
    """A tensor `[out, in]` or `[out]` as the part of an array that it is."""
    whole = matrix if matrix.ndim == 2 else matrix[:, None]
    return np.asarray(place.layout.original(whole))  # type: ignore[arg-type]


def tensor(place: Place, array: np.ndarray) -> np.ndarray:
    """The inverse of `part`, of the part of an array."""
    whole = np.asarray(place.layout.canonical(array))  # type: ignore[arg-type]
    return whole.reshape(place.source.shape)


def _letters(axis: str) -> str:
    return {"q": "nh", "k": "mh"}.get(axis, axis)


def _times(leaf: Lazy, scale: float) -> Lazy:
    def times(values: np.ndarray) -> np.ndarray:
        return (values.astype(np.float32) * np.float32(scale)).astype(values.dtype)

    return leaf.map(times, leaf.dtype, f"times {scale}")
