"""Loops, branches and other bodies that a walker goes into: each is emitted again as it was.

Special values go in as pytrees, so a stack of weights slices itself. One that comes out unchanged,
however deep the calls inside, is not in the new loop; one that is changed is given to
`client.drop`, which may raise. What a body emits leaves it beside its results: added up with the
client's `merge`, and stacked along a new leading axis by a scan that slices a special value of that
name. `walker` is the `walker.Walker` that goes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.errors import UnsupportedPrimitiveError
from jquant.programs.calls import (
    REMATS,
    close,
    made_of,
    manual_axes,
    passed_on,
    scan_parts,
    split_axes,
)

Emissions = dict[tuple[Any, ...], Any]  # key -> pytree


def _remat(walker: Any, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
    def body(values: list[Any]) -> tuple[list[Any], list[Any]]:
        results, emitted = walker.nested(close(eqn.params["jaxpr"]), values)
        keys.append(list(emitted))
        return results, list(emitted.values())

    keys: list[list[Any]] = []
    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    results, emitted = jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(values)
    for key, value in zip(keys[-1], emitted, strict=True):
        walker.emit(key, value)
    return results


def _scan(walker: Any, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
    params, closed = eqn.params, close(eqn.params["jaxpr"])
    num_consts, num_carry = scan_parts(params)
    consts, init = values[:num_consts], values[num_consts : num_consts + num_carry]
    xs = values[num_consts + num_carry :]
    passed = _passed(walker, eqn, values)
    sources = partial(_sources, values, closed, num_consts, num_carry)
    init, rest = _invariants(walker, eqn, init, passed, sources)

    stacked = {name for x in xs if walker.client.special(x) for name in walker.client.names(x)}
    row = jax.eval_shape(lambda xs: jax.tree.map(_row, xs), xs)
    shapes = walker.emission_shapes(closed, [*consts, *rest(init), *row])
    summed = [key for key in shapes if key[0] not in stacked]
    zeros = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[key]) for key in summed]
    groups: list[list[int]] = []  # emissions that are one object leave the loop as one array

    def step(state: tuple[list[Any], list[Any], Any], xs: list[Any]) -> Any:
        carry, sums, count = state
        results, emitted = walker.nested(closed, [*consts, *rest(carry), *xs], step=count)
        sums = [walker.client.merge(s, emitted[k]) for s, k in zip(sums, summed, strict=True)]
        results = walker.plain(_without(results, passed), eqn)
        rows, group = _unique([emitted[key] for key in emitted if key not in summed])
        groups.append(group)
        keys.append([key for key in emitted if key not in summed])
        return (results[:num_carry], sums, _next(count)), (results[num_carry:], rows)

    keys: list[list[Any]] = []
    (carry, sums, _), (ys, rows) = lax.scan(
        step,
        (init, zeros, _count(walker)),
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    for key, value in zip(summed, sums, strict=True):
        walker.emit(key, value)
    for key, group in zip(keys[-1], groups[-1], strict=True):
        walker.emit(key, rows[group])
    return [passed.get(k, value) for k, value in enumerate([*carry, *ys])]


def _passed(walker: Any, eqn: core.JaxprEqn, values: list[Any]) -> dict[int, Any]:
    """The results of a loop or branch that are special operands, as they went in."""
    passed = {k: values[at] for k, at in enumerate(passed_on(eqn)) if at is not None}
    return {k: value for k, value in passed.items() if walker.client.special(value)}


def _invariants(
    walker: Any,
    eqn: core.JaxprEqn,
    init: list[Any],
    passed: dict[int, Any],
    sources: Callable[[int], list[Any]],
) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """Take special values that a loop passes on unchanged out of its carry.

    Args:
        passed: what is passed on.
        sources: the operands that a carry is made of, step after step.

    Returns:
        the carry that is left (None where a value was taken out) and a function that puts the
        constant values back in their places.
    """
    left = _without(init, passed)
    for k, value in enumerate(left):
        if walker.client.special(value):
            data = any(not walker.client.special(v) and jnp.ndim(v) > 0 for v in sources(k))
            left[k] = walker.client.drop(value, eqn, data)
    return left, lambda carry: [passed.get(k, value) for k, value in enumerate(carry)]


def _sources(
    operands: list[Any], closed: core.ClosedJaxpr, offset: int, count: int, carry: int
) -> list[Any]:
    """The operands that a carry of a loop's body is made of; see `made_of`."""
    return [operands[at] for at in made_of(closed, carry, offset, count)]


def _while(walker: Any, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    cond, body = close(params["cond_jaxpr"]), close(params["body_jaxpr"])
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = values[: split[0]], values[split[0] : split[1]]
    passed, init = _passed(walker, eqn, values), values[split[1] :]
    sources = partial(_sources, values[split[0] :], body, len(body_consts), len(init))
    left, rest = _invariants(walker, eqn, init, passed, sources)
    shapes = walker.emission_shapes(body, [*body_consts, *rest(left)])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), list(shapes.values()))

    def test(state: Any) -> Any:
        carry, _, count = state
        (result,), emitted = walker.nested(cond, [*cond_consts, *rest(carry)], 1, count)
        assert not emitted, "a loop's condition used a weight"
        return result

    def step(state: Any) -> Any:
        carry, sums, count = state
        results, emitted = walker.nested(body, [*body_consts, *rest(carry)], 0, count)
        sums = [walker.client.merge(s, emitted[k]) for s, k in zip(sums, shapes, strict=True)]
        return walker.plain(_without(results, passed), eqn), sums, _next(count)

    carry, sums, _ = lax.while_loop(test, step, (left, zeros, _count(walker)))
    for key, value in zip(shapes, sums, strict=True):
        walker.emit(key, value)
    return rest(carry)


def _cond(walker: Any, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (index,), operands = walker.plain(values[:1], eqn), values[1:]
    branches = [close(branch) for branch in eqn.params["branches"]]
    passed = _passed(walker, eqn, values)
    shapes: Emissions = {}
    for k, branch in enumerate(branches):
        shapes.update(walker.emission_shapes(branch, operands, k))

    def take(k: int, branch: core.ClosedJaxpr) -> Callable[[list[Any]], Any]:
        def run(operands: list[Any]) -> Any:
            results, emitted = walker.nested(branch, operands, k)
            empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            plain = walker.plain(_without(results, passed), eqn)
            return plain, [emitted.get(k, empty[k]) for k in shapes]

        return run

    # A boolean predicate reaches the primitive as int32, so `switch` serves both forms.
    results, emitted = lax.switch(
        index, [take(k, branch) for k, branch in enumerate(branches)], operands
    )
    for key, value in zip(shapes, emitted, strict=True):
        walker.emit(key, value)
    return [passed.get(k, value) for k, value in enumerate(results)]


def _shard_map(walker: Any, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
    """Each device runs the body on its parts; on one device, the parts are the whole."""
    params, split = eqn.params, split_axes(eqn)
    weights = filter(walker.client.special, values if split else ())
    for path in (path for value in weights for path in walker.client.names(value)):
        raise UnsupportedPrimitiveError(
            f"weight {path!r} enters 'shard_map' on a mesh with axes {split}, where a device "
            "sees only its part of weights and inputs; calibrate the function made for a mesh "
            "of one device (codes do not depend on the mesh) and apply this one, or leave the "
            f"weight out: find_weights(..., ignore={path!r})"
        )
    keys: list[list[Any]] = []

    def body(*values: Any) -> tuple[list[Any], list[Any]]:
        results, emitted = walker.nested(close(params["jaxpr"]), list(values))
        keys.append(list(emitted))
        rows = jax.tree.map(lambda leaf: leaf[None], list(emitted.values()))
        return walker.plain(results, eqn), rows

    axes = manual_axes(params)
    results, emitted = jax.shard_map(
        body, mesh=params["mesh"], axis_names=axes, check_vma=params["check_vma"],
        in_specs=tuple(params["in_specs"]),
        out_specs=(list(params["out_specs"]), jax.sharding.PartitionSpec(tuple(axes))),
    )(*values)  # fmt: skip
    for key, value in zip(keys[-1], emitted, strict=True):
        walker.emit(key, jax.tree.map(lambda leaf: leaf[0], value))
    return results


def _count(walker: Any) -> jax.Array | None:
    """The number of a loop's first step, where steps are counted."""
    return jnp.uint32(0) if walker.every else None


def _row(stack: jax.Array) -> jax.Array:
    """What a loop's body sees of a stack, also of an empty one."""
    return stack[0] if len(stack) else jnp.zeros(stack.shape[1:], stack.dtype)


def _next(count: jax.Array | None) -> jax.Array | None:
    return None if count is None else count + jnp.uint32(1)


def _without(values: Sequence[Any], passed: dict[int, Any]) -> list[Any]:
    """The values, with None in the places of what is passed on."""
    return [None if k in passed else value for k, value in enumerate(values)]


def _unique(values: list[Any]) -> tuple[list[Any], list[int]]:
    """The distinct objects among `values`, and for each value the position of its object."""
    kept: list[Any] = []
    where: dict[int, int] = {}
    for value in values:
        if id(value) not in where:
            where[id(value)] = len(kept)
            kept.append(value)
    return kept, [where[id(value)] for value in values]


DESCENTS: Mapping[str, Callable[[Any, core.JaxprEqn, list[Any]], Sequence[Any]]] = {
    **dict.fromkeys(REMATS, _remat),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
