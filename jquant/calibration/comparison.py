"""What a weight's error is measured on: its part of the network, up to the residual stream.

Some choices are made by what a weight does to the network around it, not by its own product alone
(AdaDim: Heo et al. 2023, which compares the attention's output for q, k and v, and the MLP's for
gate and up). No name says where that part ends; the steps of a flat function do:

* The results of the steps that use a weight are *reached*. So is whatever is computed of something
  reached, except behind a join.
* A *join* is an addition or subtraction of a reached value and one that is not reached but carries
  data: the residual stream. A value *carries data* if it is made of a floating-point input, or of
  an input and a parameter. Biases (parameters alone), causal masks and positions (made of neither),
  and masks made of tokens alone do not.
* The weight is *compared* on the reached operands of its joins, and on the reached floating-point
  values that the function returns. Where there are none, it is compared on its own product.

In a transformer block that is the attention's output for q, k, v and out, the MLP's output for
gate, up and down. Rotary embeddings add two reached values, concatenated skips (DenseNet, U-Net)
add nothing: both lead on. Loops and branches that are one step are passed as a whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp

from jquant.programs.primitives import having
from jquant.programs.straight import Flat, Piece, Step

Level = Literal["residual", "weight"]

_PRODUCTS = having("product") | having("loop")


class Compared(NamedTuple):
    """The values that a weight is compared on, by number, and what they are in words.

    The words call the weights after whose products the values come, `self` for the weight's own.
    """

    outputs: tuple[int, ...]
    words: str


def compared(flat: Flat, uses: Mapping[int, Collection[int]], level: Level) -> dict[int, Compared]:
    """For every weight by number, what it is compared on.

    Args:
        flat: the function.
        uses: step → the numbers of the weights that it uses.
        level: "residual", as the module docstring says, or "weight": the product alone.
    """
    starts: dict[int, set[int]] = {}
    for at, numbers in uses.items():
        for number in numbers:
            starts.setdefault(number, set()).add(at)
    follower = _Follower(flat)
    return {
        number: follower.own(number, steps) if level == "weight" else follower.follow(number, steps)
        for number, steps in starts.items()
    }


class _Follower:
    """Follows weights through the steps of a flat function."""

    def __init__(self, flat: Flat):
        self.flat = flat
        self.consumers: dict[int, list[int]] = {}
        self.maker: dict[int, int] = {}
        for at, step in enumerate(flat.steps):
            self.maker.update(dict.fromkeys(step.outs, at))
            for n in set(step.reads):
                self.consumers.setdefault(n, []).append(at)
        self.carries, self.origin = _dependence(flat)
        self.returned = {n for n in flat.outputs if isinstance(n, int)}

    def own(self, number: int, starts: Collection[int]) -> Compared:
        return Compared(self._products(starts), "its own product")

    def follow(self, number: int, starts: Collection[int]) -> Compared:
        reached: set[int] = set()
        joined: list[int] = []
        queue, seen = sorted(starts), set()
        while queue:  # in the order of the steps, so that all operands are known
            at = heapq.heappop(queue)
            if at in seen:
                continue
            seen.add(at)
            step = self.flat.steps[at]
            ends = [] if at in starts else self._joined(step, reached)
            if ends:
                joined += ends
                continue
            reached.update(step.outs)
            for n in step.outs:
                for later in self.consumers.get(n, ()):
                    heapq.heappush(queue, later)
        returned = [n for n in sorted(reached & self.returned) if self._floating(n)]
        outputs = tuple(dict.fromkeys([*joined, *returned]))
        if not outputs:
            return self.own(number, starts)
        words = [self._words(number, joined)] if joined else []
        words += ["what the function returns"] if returned else []
        return Compared(outputs, ", and ".join(words))

    def _joined(self, step: Step, reached: Collection[int]) -> list[int]:
        """The reached operand of a join; nothing for any other step."""
        if step.eqn.primitive.name not in having("join"):
            return []
        ends = [n for n in step.reads if n in reached]
        others = [n for n in step.reads if n not in reached]
        return ends if len(ends) == 1 and len(others) == 1 and others[0] in self.carries else []

    def _products(self, starts: Iterable[int]) -> tuple[int, ...]:
        outs = [n for at in sorted(starts) for n in self.flat.steps[at].outs]
        return tuple(n for n in outs if self._floating(n))

    def _floating(self, number: int) -> bool:
        return jnp.issubdtype(self.flat.shapes[number].dtype, jnp.inexact)

    def _words(self, number: int, values: Iterable[int]) -> str:
        """The weights after whose products these values come."""
        paths: dict[str, None] = {}
        todo, seen = sorted(values), set()
        while todo:
            at = self.maker.get(todo.pop(0))
            if at is None or at in seen:
                continue
            seen.add(at)
            step = self.flat.steps[at]
            pieces = [self.origin[n] for n in step.reads if n in self.origin]
            if step.eqn.primitive.name in _PRODUCTS and pieces:
                paths.update(dict.fromkeys(piece.path for piece in pieces))
            else:
                todo += step.reads
        own = self.flat.pieces[number].path
        if list(paths) == [own]:
            return "its own output"
        return "the output of " + ", ".join(paths)


def _dependence(flat: Flat) -> tuple[set[int], dict[int, Piece]]:
    """The values that carry data, and of those made of parameters alone, the matrix in them."""
    floats: set[int] = {
        n for n in flat.inputs if jnp.issubdtype(flat.shapes[n].dtype, jnp.floating)
    }
    inputs, params = set(flat.inputs), set(flat.pieces)
    origin = {n: piece for n, piece in flat.pieces.items() if len(flat.shapes[n].shape) > 1}
    for step in flat.steps:
        for group in (floats, inputs, params):
            if not group.isdisjoint(step.reads):
                group.update(step.outs)
        matrices = [origin[n] for n in step.reads if n in origin]
        if matrices and inputs.isdisjoint(step.outs):
            origin.update(dict.fromkeys(step.outs, matrices[0]))
    return floats | (inputs & params), origin
