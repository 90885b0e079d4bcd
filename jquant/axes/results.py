"""From the result of a product to what a weight makes of each of its rows, `[*batch, tokens, out]`.

`rows.py` arranges the other operand as rows of the weight's inputs, `[*batch, tokens, in]`. This is
the same for the result, token by token in the same order, so that what is known of a row of outputs
is known of the row of inputs that it came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jquant.axes.contraction import Contraction
from jquant.axes.origin import Origin
from jquant.axes.rows import Arrangement, Share


class Outputs(NamedTuple):
    """How the result of a product is rows of outputs; static and hashable.

    Attributes:
        turn: the order of the result's axes: those of the operand, then those of the weight.
        shape: what they are read as then.
        way: from there to rows; the weight's own axes take the part that its inputs have elsewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> eqn = jax.make_jaxpr(lambda w, x: w @ x)(jnp.ones((2, 3)), jnp.ones((3, 5))).eqns[0]
        >>> w, contraction = Origin.of("w", (2, 3)), Contraction.of(eqn, 0)
        >>> Outputs.of(contraction, 0, w).rows(jnp.ones((2, 5))).shape
        (5, 2)
    """

    turn: tuple[int, ...]
    shape: tuple[int, ...]
    way: Arrangement

    @staticmethod
    def of(contraction: Contraction, slot: int, origin: Origin) -> Outputs:
        """Of a weight in operand number `slot`, whose array has this origin (`split` before)."""
        kept = [k for k in range(len(contraction.operand)) if k not in contraction.summed]
        left = [k for k, role in enumerate(contraction.roles) if role == "out"]
        shape = [contraction.operand[k] for k in kept] + [contraction.shape[k] for k in left]
        rank, shares = len(contraction.shape), dict[int, Share]()
        own = zip(origin.own(rank), origin.own_offsets(rank), strict=True)
        for axis, (parts, offset) in enumerate(own):
            role, there = contraction.roles[axis], contraction.meets[axis]
            if role == "batch" and there is not None:
                shares[kept.index(there)] = Share("batch", parts, offset)
            elif role == "out":
                shares[len(kept) + left.index(axis)] = Share("in", parts, offset)
        way = Arrangement.of(shape, shares)
        return Outputs(_turn(contraction, slot, kept, left), tuple(shape), way)

    @property
    def count(self) -> int:
        """How many outputs there are in a row."""
        left = [n for k, n in enumerate(self.way.sizes) if k not in self.way.copies]
        return math.prod(left[k] for k in self.way.turn[len(left) - self.way.inner :])

    def rows(self, y: jax.Array) -> jax.Array:
        """`[*batch, tokens, out]`; where a weight was repeated along out axes, the copies' sum."""
        return self.way.rows(y.transpose(self.turn).reshape(self.shape))


def _turn(
    contraction: Contraction, slot: int, kept: Sequence[int], left: Sequence[int]
) -> tuple[int, ...]:
    """The order in which a result has the axes that are kept of the operand and of the weight."""
    if contraction.patches is not None:  # positions as they lie, then channels
        feature, rank = contraction.patches.feature, len(contraction.patches.numbers.out_spec)
        return (*(k for k in range(rank) if k != feature), feature)
    along = [("operand", contraction.meets[axis]) for axis in contraction.along]
    free = [("operand", k) for k in kept if ("operand", k) not in along]
    own = [("weight", k) for k in left]
    names = [*along, *(own + free if slot == 0 else free + own)]
    return tuple(map(names.index, [*(("operand", k) for k in kept), *own]))
