"""A weight meets rows of an input: its use is recorded, and the evidence of the rows emitted.

All products come down to this. Where the array that meets the input is made of several weights,
each of them sees rows of its own; where it is a product of parameters, its factors meet the input
one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.axes.contraction import Contraction, UnreadableError
from jquant.axes.digits import Axis
from jquant.axes.origin import Origin
from jquant.axes.rows import Arrangement
from jquant.calibration.evidence import Evidence
from jquant.calibration.reassociate import is_read_so, reassociated
from jquant.calibration.tagged import Tagged
from jquant.errors import UnsupportedPrimitiveError
from jquant.programs.walker import Walker
from jquant.trees.placement import automatic


class Rows(NamedTuple):
    """An array that holds rows.

    `operand` is its place among the operands of the equation; None: it is made of one and of
    parameters. `sizes` are those of groups of rows that see a weight each.
    """

    x: jax.Array
    operand: int | None
    sizes: jax.Array | None = None


class Meeting(NamedTuple):
    """How a weight is contracted with rows: its origin there, and how the rows are arranged."""

    origin: Origin
    contraction: Contraction
    way: Arrangement


def unsupported(origin: Origin, operation: str, why: str) -> UnsupportedPrimitiveError:
    return UnsupportedPrimitiveError(
        f"weight {origin.path!r} enters {operation!r}: {why}, so its evidence cannot be "
        "read. Rewrite that operation with dot, conv or einsum on the weight itself, or leave the "
        f"weight out: find_weights(..., ignore={origin.path!r})"
    )


@contextmanager
def refusing(origin: Origin, operation: str) -> Iterator[None]:
    """Say which weight it is that cannot be read, and where."""
    try:
        yield
    except UnreadableError as error:
        raise unsupported(origin, operation, str(error)) from error


def _operation(walker: Walker) -> str:
    """The operation that a weight enters now; a product of parameters where the function ends."""
    return walker.within[-1].primitive.name if walker.within else "dot_general"


def meet(
    observer: Any, walker: Walker, where: Any, weight: Tagged, rows: Rows, contraction: Contraction
) -> None:
    """An effective weight is contracted with rows; `where` tells it from others of the equation."""
    for k, origin in enumerate(weight.good):
        if origin.product is not None:
            _follow(observer, walker, (where, k), origin, rows, contraction)
            continue
        with refusing(origin, _operation(walker)):
            split = contraction.split(origin, weight.array.shape)
            reading = contraction.reading(split)
        way = contraction.arrangement(split)
        layers = split.scanned(len(contraction.shape))
        observer.see(walker, (where, k), origin, reading, _rows(walker, way.tokens, layers))
        weights = _token_weights(observer, walker, origin.path, rows, contraction, way)
        meeting = Meeting(split, contraction, way)
        guide = observer.guide(walker, where, meeting)
        compute = _reader(observer, walker, (where, way), meeting, _Counts(weights, guide))
        operands = (rows.x,) if rows.sizes is None else (rows.x, rows.sizes)
        what = contraction.kind, contraction.patches, way
        if guide is not None:  # no other weight's rows count the same
            what = *what, origin.path, where, k
        evidence = walker.share(what, operands, partial(automatic, compute, *operands))
        walker.emit((origin.path, reading), evidence)


def _rows(walker: Walker, tokens: int, layers: Sequence[Axis]) -> int:
    """How many rows each matrix of a weight meets, of so many in one turn of every loop.

    `layers`: the axes that loops have sliced off the weight, a matrix each turn.
    """
    turns = math.prod(
        eqn.params.get("length", 1) for eqn in walker.within[:-1] if eqn.primitive.name == "scan"
    )
    return tokens * turns // math.prod(part.length for axis in layers for part in axis)


def _follow(
    observer: Any, walker: Walker, where: Any, origin: Origin, rows: Rows, contraction: Contraction
) -> None:
    """A product of parameters is contracted with an input."""
    product = observer.pending.product(origin)
    detour = reassociated(product, origin, rows.x, contraction)
    if detour is None:
        why = "as part of a product of parameters that cannot be taken apart there"
        raise unsupported(observer.pending.weight(origin), _operation(walker), why)
    observer.reach([side for side in product.sides if not side.good])
    near, (weight, x, first) = detour.near, detour.first
    if is_read_so(product.sides[near], product.contract[near], observer.uses.values()):
        alone = Rows(product.sides[1 - near].array, None)
        meet(observer, walker, (where, 0), product.sides[near], alone, product.contraction(near))
    else:
        meet(observer, walker, (where, 0), weight, Rows(x, rows.operand), first)
    weight, x, second = detour.second
    meet(observer, walker, (where, 1), weight, Rows(x, None), second)


def _token_weights(
    observer: Any, walker: Walker, path: str, rows: Rows, contraction: Contraction, way: Arrangement
) -> jax.Array | None:
    """What the tokens of the rows count, `[*batch, tokens]`; None where each counts 1."""
    if observer.tokens is None:
        return None
    if contraction.patches is None:
        shape = contraction.operand
        return observer.tokens.rows(walker.site, rows.operand, path, shape, way)
    result = walker.within[-1].outvars[0].aval
    return observer.tokens.result(walker.site, path, result, contraction.patches.feature)


class _Counts(NamedTuple):
    """What rows count: those of each token, and for each group of a weight's outputs."""

    tokens: jax.Array | None  # [*batch, tokens]
    guide: jax.Array | None  # [*batch, tokens, groups]


def _reader(
    observer: Any, walker: Walker, what: Any, meeting: Meeting, counts: _Counts
) -> Callable[..., Evidence]:
    """What makes evidence of the other operand, and of the sizes of its groups."""
    contraction, way, (weights, guide) = meeting.contraction, meeting.way, counts

    def compute(x: jax.Array, sizes: jax.Array | None = None) -> Evidence:
        rows, count = way.rows(contraction.seen(x)), None
        if contraction.kind == "dot" and way.batch:
            # Experts: slots that hold no token are zero rows.
            held = jnp.any(rows != 0, -1)
            held = held if weights is None else jnp.where(held, weights, 0 * weights)
            count = jnp.sum(held, -1, dtype=jnp.float32)
        rows = _floats(rows)
        evidence = observer.evidence(walker, what, rows, count, sizes, weights)
        if guide is None:
            return evidence
        own = guide if weights is None else guide * weights[..., None].astype(jnp.float32)
        groups = [own[..., g] for g in range(own.shape[-1])]
        return evidence.guided_by(
            [observer.evidence(walker, what, rows, None, sizes, one) for one in groups]
        )

    return compute


def _floats(rows: jax.Array) -> jax.Array:
    """Half-precision rows as they are, everything else as float32."""
    return rows if rows.dtype in (jnp.bfloat16, jnp.float16) else rows.astype(jnp.float32)
