"""Arrays that are not computed before another one is there, and not kept after their use.

A compiler is free to decode all weights of a network first, and some do. What is computed from a
weight's parameters waits for the other operand of its product by adding a zero to them that only
that operand can tell (`numerics/opaque.py`).

A derivative needs the operands of a product once more, when all other products are done. Where it
keeps them, it keeps every weight of a network decoded. So a product of quantized weights has a
rule (`anew`): its derivative takes the codes, and decodes them a second time, when the cotangent is
there. `jax.checkpoint` does not suffice: the CPU's compiler drops its barrier, sees the same weight
decoded twice, and keeps the first; told apart, it decodes all of them first.

The rule must transpose by a function of ours, and JAX's own way to say that, `custom_vjp`, takes
forward derivatives away. `lax.custom_linear_solve` leaves them: with L the derivative,

    [ 1   0 ] [ t ]   [ t ]                  y' = L t  for  b = 0,  and transposed  t' = a + Lᵀ g
    [-L   1 ] [ y'] = [ b ]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Int32

from jquant.numerics.opaque import zero
from jquant.trees.placement import automatic, typed
from jquant.weights.qtensor import QTensor, dequantize_weight, is_qtensor, tree_map_weights


def decoded(q: QTensor, after: jax.Array | None = None) -> jax.Array:
    """The array a weight stands for, computed not before `after` is there."""
    return dequantize_weight(q if after is None else _held_weight(q, after))


def anew(function: Callable[..., Array], *operands: Any) -> Array:
    """`function(*operands)`, which computes it a second time where it is differentiated.

    Args:
        function: closes over no traced value.
        operands: its arguments; weights among them, or pytrees of such.
    """
    return _twice(function, function, *operands)


def straight(
    function: Callable[..., Array], through: Callable[..., Array], *operands: Any
) -> Array:
    """`function(*operands)` with the derivative of `through`, which is computed anew for it."""
    return _twice(function, through, *operands)


def _twice(function: Callable[..., Array], second: Callable[..., Array], *operands: Any) -> Array:
    leaves, structure = jax.tree.flatten(operands)

    @jax.custom_jvp
    def run(*leaves: Array) -> Array:
        return function(*jax.tree.unflatten(structure, leaves))

    def rule(leaves: Any, tangents: Any) -> tuple[Array, Array]:
        y = run(*leaves)
        moving = {k: t for k, t in enumerate(tangents) if not isinstance(t, SymbolicZero)}
        return y, _derivative(second, jax.tree.unflatten(structure, leaves), moving, y)

    run.defjvp(rule, symbolic_zeros=True)
    return run(*leaves)


def _derivative(
    function: Callable[..., Array], operands: Any, tangents: dict[int, Array], y: Array
) -> Array:
    """The derivative along the tangents of some leaves; transposed it waits for the cotangent."""

    def along(operands: Any) -> tuple[Callable[..., Array], list[Array]]:
        """The function of the leaves that move, and these."""
        leaves, structure = jax.tree.flatten(operands)

        def of(*moved: Array) -> Array:
            both = dict(enumerate(leaves)) | dict(zip(tangents, moved, strict=True))
            return function(*jax.tree.unflatten(structure, list(both.values())))

        return of, [leaves[k] for k in tangents]

    def forward(t: Any) -> Array:
        of, leaves = along(operands)
        return jax.jvp(of, leaves, list(t))[1]

    def back(g: Array) -> Any:
        of, leaves = along(_after(operands, zero(g)) if g.size else operands)
        return jax.vjp(of, *leaves)[1](g)

    # Never solved by, but transposed: without `checkpoint` that keeps what it has decoded.
    lean = jax.checkpoint(forward)
    same, result = lax.custom_linear_solve(
        lambda z: (z[0], z[1] - lean(z[0])),
        (tuple(tangents.values()), _zeros(next(iter(tangents.values())), y)),
        lambda _, b: (b[0], b[1] + forward(b[0])),
        lambda _, b: (tuple(map(jnp.add, b[0], back(b[1]))), b[1]),
    )
    # JAX 0.10 cannot differentiate once more where a part of the solution has no cotangent.
    return sum((_zeros(t, y) for t in same), result)


def _zeros(t: Array, y: Array) -> Array:
    """Zeros like `y` that are linear in `t`: right-hand sides must be linear as a whole."""

    def padded(t: Array, y: Array) -> Array:
        none = t.reshape(-1)[:0].astype(y.dtype).reshape(0, *y.shape[1:])
        return jnp.pad(none, [(0, y.shape[0]), *[(0, 0)] * (y.ndim - 1)])

    return automatic(padded, t, lax.stop_gradient(y), out=typed(y))


def _after(operands: Any, late: Int32[Array, ""]) -> Any:
    """The operands, with weights that are computed from a zero too."""

    def later(leaf: Any) -> Any:
        if not is_qtensor(leaf):
            return leaf
        if jax.tree.leaves(leaf.params):
            return replace(leaf, params=_added(leaf.params, late))
        return replace(leaf, codes=_added(leaf.codes, late))

    return tree_map_weights(later, operands)


def _held_weight(q: QTensor, after: jax.Array) -> QTensor:
    """The weight itself, without parts that are nothing of the array; it waits for `after`."""
    q = q.only(lambda part: not part.alters)
    rest = replace(_held(replace(q, codes=None), after), codes=q.codes)
    return rest if jax.tree.leaves(q.params) else replace(rest, codes=_held(q.codes, after))


def held_codes(codes: Array, after: jax.Array) -> Array:
    """The codes themselves, likewise."""
    return _held(codes, after)


def _held(leaves: Any, after: jax.Array) -> Any:
    """The leaves themselves; on the CPU computed from `after` too."""
    if not after.size or not jax.tree.leaves(leaves):
        return leaves

    def later(leaves: Any, after: jax.Array) -> Any:
        late = zero(after)
        return jax.tree.map(lambda leaf: _plus(leaf, late), leaves)

    return lax.platform_dependent(
        leaves, lax.stop_gradient(after), cpu=later, default=lambda leaves, after: leaves
    )


def _added(leaves: Any, late: Int32[Array, ""]) -> Any:
    """The leaves themselves; on the CPU computed from a zero too."""

    def later(leaves: Any, late: Int32[Array, ""]) -> Any:
        return jax.tree.map(lambda leaf: _plus(leaf, late), leaves)

    return lax.platform_dependent(leaves, late, cpu=later, default=lambda leaves, late: leaves)


def _plus(leaf: Array, zero: Int32[Array, ""]) -> Array:
    """The leaf itself, computed from `zero` too."""
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        # Not by a sum: where the CPU compiler of JAX 0.10 fuses a large product with what is done
        # to its operands and result, sums of a byte in two operands come out wrong.
        return leaf | zero.astype(leaf.dtype)
    if leaf.dtype.itemsize > 1:
        return leaf + zero.astype(leaf.dtype)
    # The bits of floats of one byte: among powers of two there is no zero to add.
    return lax.bitcast_convert_type(
        _plus(lax.bitcast_convert_type(leaf, jnp.uint8), zero), leaf.dtype
    )
