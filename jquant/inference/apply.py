"""The same function, on quantized weights: every weight is decoded where it is used.

`apply(fn)(qparams, *inputs)` gives what `fn(dequantize(qparams), *inputs)` gives. The walker
carries each `QTensor` through calls, scans, branches and views, and decodes it at the operation
that needs its values: at any moment the program holds the codes and the few weights in use. A view
that cannot be expressed on codes waits beside them until then. Under a scan a quantized stack
slices itself.

A low-rank compensation enters a matrix product as two thin products beside it (`products.py`), a
lookup as a thin product of the rows that were picked. Elsewhere (convolutions, `ragged_dot`, views
that wait, products of a part of an axis) the weight is decoded with the term added in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array, Int32, PyTree

from jquant.inference.products import beside
from jquant.inference.views import view
from jquant.interpreter import DESCENDED, VIEWS, Walker, bind, trace
from jquant.qtensor import QTensor, dequantize_weight, is_qtensor, tree_map_weights

# Their derivative rules belong to the function: they are called with decoded weights, not inlined.
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Waiting:
    """A quantized weight, and views to take of it once it is decoded."""

    q: QTensor
    views: tuple[core.JaxprEqn, ...] = field(metadata={"static": True})


class _Decoder:
    """Client of the walker: special values are quantized weights."""

    def special(self, value: Any) -> bool:
        return isinstance(value, QTensor | _Waiting)

    def name(self, value: Any) -> None:
        return None

    def merge(self, left: Any, right: Any) -> Any:
        raise AssertionError("apply emits nothing")

    def drop(self, value: Any, eqn: core.JaxprEqn) -> jax.Array:
        return _decode(value)

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any] | None:
        name = eqn.primitive.name
        if name == "scan":  # slices what it is given: codes can be sliced, views to come can not
            return walker.descend(
                eqn, [_decode(v) if isinstance(v, _Waiting) else v for v in values]
            )
        if name in DESCENDED - _CUSTOM:
            return None
        seen = view(eqn, values)
        if seen is not None:
            return [seen]
        if name in VIEWS and len(values) == 1:
            (value,) = values
            views = value.views if isinstance(value, _Waiting) else ()
            return [_Waiting(value.q if isinstance(value, _Waiting) else value, (*views, eqn))]
        split = beside(eqn, values, _decode)
        if split is not None:
            return [split]
        other = next((v for v in values if isinstance(v, jax.Array) and v.size), None)
        return bind(eqn, [_decode(v, other) if self.special(v) else v for v in values])


def _decode(value: Any, after: jax.Array | None = None) -> jax.Array:
    """The array a special value stands for, computed not before `after` is there."""
    q, views = (value.q, value.views) if isinstance(value, _Waiting) else (value, ())
    if after is not None and after.size:
        late = _zero(lax.stop_gradient(after))
        if q.compensation is not None:
            q = replace(
                q, compensation=jax.tree.map(lambda leaf: _plus(leaf, late), q.compensation)
            )
        if jax.tree.leaves(q.params):
            q = replace(q, params=jax.tree.map(lambda leaf: _plus(leaf, late), q.params))
        else:
            q = replace(q, codes=_plus(q.codes, late))
    result = dequantize_weight(q)
    for eqn in views:
        (result,) = bind(eqn, [result])
    return result


def _plus(leaf: Array, zero: Int32[Array, ""]) -> Array:
    """The leaf itself, computed from `zero` too."""
    if leaf.dtype.itemsize > 1 or jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf + zero.astype(leaf.dtype)
    # The bits of floats of one byte: among powers of two there is no zero to add.
    bits = lax.bitcast_convert_type(leaf, jnp.uint8) + zero.astype(jnp.uint8)
    return lax.bitcast_convert_type(bits, leaf.dtype)


@jax.custom_batching.custom_vmap
def _zero(x: Array) -> Int32[Array, ""]:
    """Zero, but only `x` can tell: the number of set bits of a 32-bit word, divided by 64.

    A weight decoded from parameters to which this is added cannot be decoded before `x` is known.
    `lax.optimization_barrier` says the same, but XLA's CPU compiler of JAX 0.10 drops it before it
    schedules, and then decodes all weights first. Under vmap the first element stands for all, so
    that weights are not batched.
    """
    first = x[(0,) * x.ndim]
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    word = lax.bitcast_convert_type(first.astype(jnp.float32), jnp.int32) if floating else first
    return lax.shift_right_logical(lax.population_count(word.astype(jnp.int32)), jnp.int32(6))


@_zero.def_vmap
def _(size: int, batched: Sequence[bool], x: Array) -> tuple[Array, bool]:
    del size, batched
    return _zero(x[0]), False


def apply(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, taking parameters in which any leaf may be a `QTensor`.

    The result is compiled once per shapes and plan, and may itself be used under `jit`, `vmap` and
    `grad` with respect to the inputs. For one `fn` the same compiled function is returned each
    time.

    Args:
        fn: any JAX function `fn(params, *inputs)`.

    Returns:
        a function `(qparams, *inputs)` with `fn`'s results.

    Example:
        >>> import jax.numpy as jnp
        >>> apply(lambda p, x: x @ p["w"])({"w": jnp.eye(2)}, jnp.ones((1, 2))).tolist()
        [[1.0, 1.0]]
    """
    try:
        return _compiled(fn)
    except TypeError:  # an unhashable callable: compiled anew
        return _compiled.__wrapped__(fn)


@functools.lru_cache(maxsize=64)
def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    @jax.jit
    @functools.wraps(fn)
    def applied(qparams: PyTree, *inputs: Any) -> Any:
        def shape(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_qtensor(leaf) else leaf

        closed, structure = trace(fn, tree_map_weights(shape, qparams), *inputs)
        leaves = jax.tree.leaves(qparams, is_leaf=is_qtensor)
        decoder = _Decoder()
        results = Walker(decoder).run(closed, [*leaves, *jax.tree.leaves(inputs)])
        plain = [_decode(r) if decoder.special(r) else r for r in results]
        return jax.tree.unflatten(structure, plain)

    return applied
