"""Numbers that are computed once, whatever reads them.

XLA fuses what computes a number into what reads it. A `roll` or a difference of neighbours reads
numbers at two places, so they are computed twice, and what they are made of is four times: cheap
for an addition, not for one with a rounding behind it. A step of shallow water took ten times the
plain program's time that way (random 30, in the range of float16 366 times); it takes 1.03 times
now (2.0, 7.7).

A division is what XLA's CPU compiler does not repeat: the number is divided by a one that the
compiler cannot know (`numerics/opaque.py`). So are results of arithmetic where something reads them
at another place, arrays pieced together from nothing else where they are read so again (a kernel
that rounds what it pieces together is not vectorised), and, as whole formats take some forty
instructions, all results that are rounded to one. What a program only moves is never divided: it
may be bits, and a division makes zero of subnormals and quiet NaN of signalling ones. Other
compilers are left to judge for themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array, Float32

from jquant.arithmetic.operations import ARITHMETIC, SHIFTS, VIEWS
from jquant.numerics.opaque import zero
from jquant.programs.client import Rule
from jquant.programs.walker import Walker


def one_of(leaves: Iterable[Any]) -> Float32[Array, ""] | None:
    """A one that is computed from the first of these that are arrays of numbers; None: of none."""
    for leaf in leaves:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.size and not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return 1.0 + zero(lax.stop_gradient(leaf)).astype(jnp.float32)
    return None


def once(x: Any, one: Float32[Array, ""] | None) -> Any:
    """`x` itself, not computed again by each of its readers.

    Arrays of real floating numbers only; anything else, and without a one, is returned as it is.
    """
    if one is None or not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
        return x
    return lax.platform_dependent(
        x, one.astype(x.dtype), cpu=lambda x, one: x / one, default=lambda x, one: x
    )


class Once:
    """A rule around another: results of arithmetic are computed once where they are read elsewhere.

    Args:
        rule: the rule that gives the results.
        one: what `one_of` returned for the arguments of the program.
    """

    def __init__(self, rule: Rule, one: Float32[Array, ""] | None):
        self.rule = rule
        self.one = one
        self.computed: dict[int, Any] = {}  # by id, arrays of nothing but results of arithmetic

    def __call__(
        self, eqn: core.JaxprEqn, values: list[Any], walker: Walker
    ) -> Sequence[Any] | None:
        """The results of an equation; None where the other rule lets the walker enter it."""
        name = eqn.primitive.name
        read = [self._shared(v, walker) for v in values] if name in SHIFTS else values
        results = self.rule(eqn, read, walker)
        if name in ARITHMETIC or (name in VIEWS | SHIFTS and self._all_computed(values)):
            self.computed |= {id(result): result for result in results or ()}
        return results

    def _shared(self, value: Any, walker: Walker) -> Any:
        if id(value) not in self.computed:
            return value
        return walker.share("once", value, lambda: once(value, self.one))

    def _all_computed(self, values: Sequence[Any]) -> bool:
        # Only arrays count: a padding value is none.
        arrays = [v for v in values if jnp.ndim(v) and jnp.issubdtype(v.dtype, jnp.inexact)]
        return bool(arrays) and all(id(array) in self.computed for array in arrays)
