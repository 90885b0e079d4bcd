"""Products of rows and a quantized weight: one table of kernels.

A kernel gives `[*batch, tokens, out]` of an input `[*batch, tokens, in]` and a `QTensor`, and knows
nothing of equations. Its row in `TABLE` says which weights it takes: how their inputs are
quantized, their grid, the axis of their groups, and on which platforms. The first row that fits is
taken, on each platform; where none fits, the weight is decoded and multiplied as the function has
it. So a new kernel is a file and a row. Derivatives of a kernel that only some platforms have are
those of decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array, Float

from jquant.axes.dimensions import Product
from jquant.grids import Float as FloatGrid
from jquant.grids import Uniform
from jquant.inference.codes import fits, on_codes
from jquant.inference.grouped import (
    as_stored,
    fuses_on_gpus,
    fuses_on_tpus,
    scaled_after,
    signed,
)
from jquant.inference.inputs import refuse_integers, seen_by
from jquant.inference.late import anew, decoded, straight
from jquant.inference.operand import Operand
from jquant.programs.walker import bind
from jquant.trees.placement import automatic, typed
from jquant.weights.activations import Way
from jquant.weights.inputs import Inputs
from jquant.weights.qtensor import QTensor

Kernel = Callable[[Float[Array, "*batch tokens in"], QTensor], Float[Array, "*batch tokens out"]]


class Row(NamedTuple):
    """Which products a kernel computes.

    Attributes:
        way: of products with quantized inputs, see `Activations.way`; None: inputs are as they are.
        grids: of the weight, one of these classes.
        groups: along which axis the weight's groups run.
        kernel: see `Kernel`; its result may have any float dtype.
        fits: whether it takes this one of such weights, with what it meets.
        platforms: as `jax.lax.platform_dependent` names them; none: all.
    """

    way: Way | None
    grids: tuple[type, ...]
    groups: Literal["in", "out"]
    kernel: Kernel
    fits: Callable[[QTensor, Operand], bool] = lambda q, operand: True
    platforms: tuple[str, ...] = ()

    def takes(self, q: QTensor, operand: Operand) -> bool:
        fine = isinstance(q.grid, self.grids) and q.groups.axis == self.groups
        return fine and _way(q) == self.way and self.fits(q, operand)


def _way(q: QTensor) -> Way | None:
    """How a product with a weight is computed, see `Row.way`."""
    match q.parts:
        case ():
            return None
        case (Inputs() as inputs,):
            return inputs.choice.way(q.grid, q.groups)
        case _:
            return "fake_quant"


TABLE: tuple[Row, ...] = (
    Row("integer", (Uniform,), "in", partial(on_codes, dtype=jnp.int8), fits),
    Row("float", (Uniform, FloatGrid), "in", partial(on_codes, dtype=jnp.bfloat16), fits),
    Row(None, (Uniform,), "in", partial(scaled_after, numbers=signed), fuses_on_gpus, ("cuda",)),
    Row(None, (Uniform,), "in", partial(scaled_after, numbers=as_stored), fuses_on_tpus, ("tpu",)),
)


def product(eqn: core.JaxprEqn, dimensions: Product, x: jax.Array, q: QTensor) -> jax.Array:
    """The result of a `dot_general` of an array and a weight without parts but one that alters it.

    Raises:
        UnsupportedPrimitiveError: a product of integers was asked for, and this is none.
    """
    kind: Any = eqn.outvars[0].aval

    def on_rows(kernel: Kernel, q: QTensor, x: jax.Array) -> jax.Array:
        y = kernel(dimensions.input.rows(x), q)
        return dimensions.result(y, kind.shape).astype(kind.dtype)

    def placed(kernel: Kernel) -> Callable[[QTensor, jax.Array], jax.Array]:
        return lambda q, x: automatic(partial(on_rows, kernel), q, x, out=typed(kind))

    operand = Operand.of(dimensions.input, x, eqn.params["precision"])
    rows = [row for row in TABLE if row.takes(q, operand)] if dimensions.role == "in" else []
    if not rows:
        x = _seen(dimensions, q, x)
        return anew(partial(_multiplied, eqn, dimensions.at), q, x)
    kernels = {
        platform: placed(row.kernel)
        for row in reversed(rows)
        for platform in row.platforms or (None,)
    }
    plain = partial(_decoded, eqn, dimensions)
    everywhere = kernels.pop(None, plain)
    own = {str(platform): kernel for platform, kernel in kernels.items()}
    if not own:
        return everywhere(q, x)

    def by_platform(q: QTensor, x: jax.Array) -> jax.Array:
        return lax.platform_dependent(q, x, default=everywhere, **own)

    return straight(by_platform, plain, q, x)


def _decoded(eqn: core.JaxprEqn, dimensions: Product, q: QTensor, x: jax.Array) -> jax.Array:
    """The product as the function has it, of the rounded input and the decoded weight."""
    return _multiplied(eqn, dimensions.at, q, _seen(dimensions, q, x))


def _seen(dimensions: Product, q: QTensor, x: jax.Array) -> jax.Array:
    """The input as a weight's parts let its codes see it."""
    for part in q.parts:
        refuse_integers(
            part, q.shape, "it is contracted along its output axis, or over too many inputs"
        )
        x = automatic(partial(seen_by, dimensions.input), part, x, out=typed(x))
    return x


def _multiplied(eqn: core.JaxprEqn, at: int, q: QTensor, x: jax.Array) -> jax.Array:
    """An equation of an array and a decoded weight, which is its operand `at`."""
    operands = [x, x]
    operands[at] = decoded(q, x)
    (y,) = bind(eqn, operands)
    return y
