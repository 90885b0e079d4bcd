"""The same function, on quantized weights: every weight is decoded where it is used.

`apply(fn)(qparams, *inputs)` gives what `fn(dequantize(qparams), *inputs)` gives, but for products
whose scheme quantizes their inputs (`codes.py`). The walker
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
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree

from jquant.errors import UnsupportedPrimitiveError
from jquant.inference.inputs import rounded_inputs
from jquant.inference.late import held
from jquant.inference.products import beside
from jquant.inference.views import view
from jquant.programs.calls import RULED
from jquant.programs.walker import DESCENDED, VIEWS, Walker, bind, trace
from jquant.weights.qtensor import (
    Inputs,
    QTensor,
    dequantize_weight,
    is_qtensor,
    tree_map_weights,
    type_of,
)

# Their rules belong to the function, and so does what each device gets: they are called with
# decoded weights, not inlined.
_CUSTOM = RULED | {"shard_map"}
# What a weight may go through on its way to a product whose input is to be quantized, and what
# would keep that product from sight.
_SAME_NUMBERS = frozenset(
    "slice split rev copy copy_p stop_gradient sharding_constraint reduce_precision name".split()
)
_HIDING = frozenset({"optimization_barrier", "dynamic_slice", "concatenate"})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Waiting:
    """A quantized weight, and views to take of it once it is decoded."""

    q: QTensor
    views: tuple[tuple[core.JaxprEqn, int], ...] = field(metadata={"static": True})  # which result


def _inputs(value: Any) -> Inputs | None:
    """What a value asks of its inputs."""
    q = value.q if isinstance(value, _Waiting) else value
    return q.activations if isinstance(q, QTensor) else None


class _Decoder:
    """Client of the walker: special values are quantized weights."""

    def special(self, value: Any) -> bool:
        return isinstance(value, QTensor | _Waiting)

    def asks(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> bool:
        return False

    def names(self, value: Any) -> tuple[()]:
        return ()

    def leave(self, results: list[Any], walker: Walker) -> list[Any]:
        return results

    def merge(self, left: Any, right: Any) -> Any:
        raise AssertionError("apply emits nothing")

    def drop(self, value: Any, eqn: core.JaxprEqn, data: bool = False) -> jax.Array:
        return _decode(value)

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any] | None:
        name, inputs = eqn.primitive.name, [_inputs(v) for v in values]
        if name == "scan":  # slices what it is given: codes can be sliced, views to come can not
            if any(_inputs(v) for v in values if isinstance(v, _Waiting)):
                raise _hidden("a scan, after a view that codes cannot follow")
            return walker.descend(
                eqn, [_decode(v) if isinstance(v, _Waiting) else v for v in values]
            )
        if name in DESCENDED - _CUSTOM:
            return None
        inside = any(True for _ in core.jaxprs_in_params(eqn.params))
        if any(inputs) and (inside or name in _HIDING):
            raise _hidden(repr(name))
        seen = view(eqn, values)
        if seen is not None:
            return [seen]
        if len(values) == 1 and (name in VIEWS or (any(inputs) and name in _SAME_NUMBERS)):
            (value,) = values
            views = value.views if isinstance(value, _Waiting) else ()
            q = value.q if isinstance(value, _Waiting) else value
            return [_Waiting(q, (*views, (eqn, k))) for k in range(len(eqn.outvars))]
        split = beside(eqn, values, _decode)
        if split is not None:
            return [split]
        values = rounded_inputs(eqn, values, inputs)
        other = next((v for v in values if isinstance(v, jax.Array) and v.size), None)
        return bind(eqn, [_decode(v, other) if self.special(v) else v for v in values])


def _hidden(where: str) -> UnsupportedPrimitiveError:
    return UnsupportedPrimitiveError(
        f"a weight whose inputs are to be quantized enters {where}, where its products are out of "
        "sight; leave the activations out of its scheme, or write the function without that"
    )


def _decode(value: Any, after: jax.Array | None = None) -> jax.Array:
    """The array a special value stands for, computed not before `after` is there."""
    q, views = (value.q, value.views) if isinstance(value, _Waiting) else (value, ())
    result = dequantize_weight(q if after is None else held(q, after))
    for eqn, output in views:
        result = bind(eqn, [result])[output]
    return result


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
            return type_of(leaf) if is_qtensor(leaf) else leaf

        closed, structure = trace(fn, tree_map_weights(shape, qparams), *inputs)
        leaves = jax.tree.leaves(qparams, is_leaf=is_qtensor)
        decoder = _Decoder()
        results = Walker(decoder).run(closed, [*leaves, *jax.tree.leaves(inputs)])
        plain = [_decode(r) if decoder.special(r) else r for r in results]
        return jax.tree.unflatten(structure, plain)

    return applied
