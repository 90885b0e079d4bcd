"""The same function, on quantized weights: every weight is decoded where it is used.

`apply(fn)(qparams, *inputs)` gives what `fn(dequantize(qparams), *inputs)` gives. The walker carries
each `QTensor` through calls, scans, branches and views, and decodes it at the operation that needs
its values. The decoding is made to depend on that operation's other operand, so that a compiler
cannot decode all weights up front: at any moment the program holds the codes and the few weights in
use. Under a scan a quantized stack slices itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jaxtyping import PyTree

from jquant.inference.views import view
from jquant.interpreter import DESCENDED, Walker, bind, trace
from jquant.qtensor import QTensor, dequantize_weight, is_qtensor, tree_map_weights

# Their derivative rules belong to the function: they are called with decoded weights, not inlined.
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})


class _Decoder:
    """Client of the walker: special values are quantized weights."""

    def special(self, value: Any) -> bool:
        return is_qtensor(value)

    def name(self, value: QTensor) -> None:
        return None

    def merge(self, left: Any, right: Any) -> Any:
        raise AssertionError("apply emits nothing")

    def drop(self, value: QTensor, eqn: core.JaxprEqn) -> jax.Array:
        return dequantize_weight(value)

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any] | None:
        if eqn.primitive.name in DESCENDED - _CUSTOM:
            return None
        seen = view(eqn, values)
        return [seen] if seen is not None else bind(eqn, _decoded(values))


def _decoded(values: list[Any]) -> list[Any]:
    """The operands with quantized weights decoded, not before the other operands are there."""
    quantized = {k: v for k, v in enumerate(values) if is_qtensor(v)}
    others = {k: v for k, v in enumerate(values) if k not in quantized and isinstance(v, jax.Array)}
    if others:
        quantized, others = lax.optimization_barrier((quantized, others))
    decoded = {k: dequantize_weight(v) for k, v in quantized.items()}
    return [decoded.get(k, others.get(k, value)) for k, value in enumerate(values)]


def apply(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, taking parameters in which any leaf may be a `QTensor`.

    The result is compiled once per shapes and plan, and may itself be used under `jit`, `vmap` and
    `grad` with respect to the inputs. For one `fn` the same compiled function is returned each time.

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
        results = Walker(_Decoder()).run(closed, [*leaves, *jax.tree.leaves(inputs)])
        plain = [dequantize_weight(r) if is_qtensor(r) else r for r in results]
        return jax.tree.unflatten(structure, plain)

    return applied
