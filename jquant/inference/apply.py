"""The same function, on quantized weights: every weight is decoded where it is used.

`apply(fn)(qparams, *inputs)` gives what `fn(dequantize(qparams), *inputs)` gives, but for products
whose scheme quantizes their inputs (`codes.py`). The walker carries each `QTensor` through calls,
scans, branches and views, and decodes it at the operation that needs its values, and once more for
that operation's derivative (`late.py`): at any moment the program holds the codes and the few
weights in use. A view that cannot be expressed on codes waits beside them until then. Under a scan
a quantized stack slices itself.

Matrix products go through one table of kernels (`kernels.py`), decoding among them. Parts of a
weight besides its codes enter one from the side of its input (`products.py`): a low-rank term as
two thin products beside it. Of a lookup they are those of the rows that were picked. Elsewhere
(convolutions, `ragged_dot`, views that wait, products of a part of an axis) the weight is decoded
with its parts.
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
from jquant.inference.late import anew, decoded
from jquant.inference.products import dot
from jquant.inference.views import view
from jquant.programs.calls import RULED
from jquant.programs.client import Silent
from jquant.programs.walker import DESCENDED, VIEWS, Walker, bind, trace
from jquant.weights.parts import Part
from jquant.weights.qtensor import QTensor, is_qtensor, tree_map_weights, type_of

# Their rules belong to the function, and so does what each device gets: they are called with
# decoded weights, not inlined.
_CUSTOM = RULED | {"shard_map"}
# What a weight may go through on its way to a product whose input is to be quantized, and what
# would keep that product from sight.
_SAME_NUMBERS = frozenset(
    "slice split rev copy copy_p stop_gradient sharding_constraint reduce_precision name".split()
)
_HIDING = frozenset({"optimization_barrier", "dynamic_slice", "concatenate"})
# Their derivatives take the operands once more.
_PRODUCTS = frozenset("dot_general conv_general_dilated ragged_dot ragged_dot_general".split())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Waiting:
    """A quantized weight, and views to take of it once it is decoded."""

    q: QTensor
    views: tuple[tuple[core.JaxprEqn, int], ...] = field(metadata={"static": True})  # which result


def _altering(value: Any) -> tuple[Part, ...]:
    """The parts of a weight that its products must see, innermost first."""
    q = value.q if isinstance(value, _Waiting) else value
    return tuple(part for part in q.parts if part.alters) if isinstance(q, QTensor) else ()


def _special(value: Any) -> bool:
    return isinstance(value, QTensor | _Waiting)


def _drop(value: Any, eqn: core.JaxprEqn, data: bool = False) -> jax.Array:
    return _decode(value)


def _rule(eqn: core.JaxprEqn, values: list[Any], walker: Any) -> Sequence[Any] | None:
    """The results of an equation on quantized weights, by the first way that there is."""
    name = eqn.primitive.name
    if name == "scan":
        return walker.descend(eqn, _sliceable(values))
    if name in DESCENDED - _CUSTOM:
        return None
    _refuse_hidden(eqn, values)
    seen = view(eqn, values)
    if seen is not None:
        return [seen]
    waiting = _wait(eqn, values)
    if waiting is not None:
        return waiting
    result = dot(eqn, values)
    return _decoded(eqn, values) if result is None else [result]


def _sliceable(values: Sequence[Any]) -> list[Any]:
    """What a scan may slice: codes can be sliced, views to come can not."""
    waiting = [v for v in values if isinstance(v, _Waiting)]
    if any(map(_altering, waiting)):
        raise _hidden("a scan, after a view that codes cannot follow")
    return [_decode(v) if isinstance(v, _Waiting) else v for v in values]


def _refuse_hidden(eqn: core.JaxprEqn, values: Sequence[Any]) -> None:
    name, inside = eqn.primitive.name, any(True for _ in core.jaxprs_in_params(eqn.params))
    if any(map(_altering, values)) and (inside or name in _HIDING):
        raise _hidden(repr(name))


def _wait(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[_Waiting] | None:
    """A weight that a view is yet to be taken of, for each result; None if this is no view."""
    name, value = eqn.primitive.name, values[0]
    if len(values) > 1 or not (name in VIEWS or (_altering(value) and name in _SAME_NUMBERS)):
        return None
    q, views = (value.q, value.views) if isinstance(value, _Waiting) else (value, ())
    return [_Waiting(q, (*views, (eqn, k))) for k in range(len(eqn.outvars))]


def _decoded(eqn: core.JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    """The results on decoded weights, and on rounded inputs where a weight asks for such."""
    operands = rounded_inputs(eqn, values, [_altering(v) for v in values])
    if eqn.primitive.name in _PRODUCTS:
        return [anew(lambda *operands: _bound(eqn, operands)[0], *operands)]
    return _bound(eqn, operands)


def _bound(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """The results on decoded weights."""
    other = next((v for v in operands if isinstance(v, jax.Array) and v.size), None)
    return bind(eqn, [_decode(v, other) if _special(v) else v for v in operands])


_CLIENT = Silent(_rule, _special, _drop)


def _hidden(where: str) -> UnsupportedPrimitiveError:
    return UnsupportedPrimitiveError(
        f"a weight whose inputs are to be quantized enters {where}, where its products are out of "
        "sight; leave the activations out of its scheme, or write the function without that"
    )


def _decode(value: Any, after: jax.Array | None = None) -> jax.Array:
    """The array a special value stands for, computed not before `after` is there."""
    if isinstance(value, QTensor):
        return decoded(value, after)
    result = decoded(value.q, after)
    for eqn, output in value.views:
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
        results = Walker(_CLIENT).run(closed, [*leaves, *jax.tree.leaves(inputs)])
        plain = [_decode(r) if _special(r) else r for r in results]
        return jax.tree.unflatten(structure, plain)

    return applied
