"""One walker over the equations of any JAX function; capture, apply and emulation are its clients.

`trace` gives a function's jaxpr, and a `Walker` evaluates its equations one by one for a client. A
value may be an ordinary array or *special*: a pytree the client understands (an array tagged with
the parameter it came from, a quantized weight). Equations without special operands are bound as
they are. For the others the client's `rule` is asked first; where it declines, the walker descends:

* calls (`calls.py`) are inlined, `remat` is re-emitted as `jax.checkpoint`;
* `scan`, `while` and `cond` are re-emitted with the special values passed as pytrees, so a stack of
  weights slices itself. A special value that goes through one unchanged, however deep the calls
  inside, is not in it; one that is changed is given to `client.drop`, which may raise;
* `shard_map` is re-emitted likewise, on a mesh of one device. On others a special value is refused.

A rule may `emit` values under a key `(name, ...)`. They leave the function beside its results:
added up with the client's `merge` over loops and branches, and stacked along a new leading axis by
a scan that slices a special value of that name. Only public JAX is used; what differs between JAX
versions is in `scan_parts`.

A client that is asked about every equation (`Walker(client, every=True)`) has no special values and
emits nothing. For it loops count their steps, and it sees the program's constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.errors import UnsupportedPrimitiveError
from jquant.programs.calls import (
    CALLS,
    REMATS,
    callee,
    close,
    made_of,
    manual_axes,
    passed_on,
    scan_parts,
    split_axes,
)
from jquant.programs.client import Client
from jquant.programs.primitives import having

Emissions = dict[tuple[Any, ...], Any]  # key -> pytree

# One operand in, the same numbers out in another shape or type. Equal ones are evaluated once, so
# that an input which q, k and v each cast for themselves stays one value with one second moment.
VIEWS = having("cast")


class Walker:
    """Evaluates equations for one client. One walker serves one trace.

    Args:
        client: see there.
        every: ask `client.rule` about all equations, not only those with special operands.
        constant: what to put in place of a constant of the program: `(value, type, walker)`.

    Attributes:
        site: where we are: positions of the enclosing equations and of this one.
        within: the enclosing equations and this one.
        steps: with `every`, the numbers of the current steps of the enclosing loops, uint32.
    """

    def __init__(
        self,
        client: Client,
        *,
        every: bool = False,
        constant: Callable[[Any, Any, Walker], Any] = lambda value, kind, walker: value,
    ):
        self.client = client
        self.every = every
        self.constant = constant
        self.emitted: Emissions = {}
        self.site: tuple[int, ...] = ()
        self.within: tuple[core.JaxprEqn, ...] = ()
        self.steps: tuple[jax.Array, ...] = ()
        self._shared: dict[Any, Any] = {}  # of one level of control flow

    def emit(self, key: Any, value: Any) -> None:
        """File `value` under `key`; a second one is merged with the first."""
        old = self.emitted.get(key)
        self.emitted[key] = value if old is None else self.client.merge(old, value)

    def share(self, what: Any, operand: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, once for equal `what` (hashable) on the same operand, or operands."""
        key = (what, *map(id, operand)) if isinstance(operand, tuple) else (what, id(operand))
        if key not in self._shared:  # the operand is kept beside: an id is unique while it lives
            self._shared[key] = operand, compute()
        return self._shared[key][1]

    def run(self, closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        """Evaluate a closed jaxpr; arguments and results may be special."""
        jaxpr, env = closed.jaxpr, {}
        for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
            env[var] = self.constant(value, var.aval, self)
        env.update(zip(jaxpr.invars, args, strict=True))
        last = {var: at for at, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
        kept = set(_variables(jaxpr.outvars))
        outer, within = self.site, self.within
        for at, eqn in enumerate(jaxpr.eqns):
            self.site, self.within = (*outer, at), (*within, eqn)
            results = self.evaluate(eqn, [self._read(env, atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
            for var in _variables(eqn.invars):
                if last[var] == at and var not in kept:
                    env.pop(var, None)
        self.site, self.within = outer, within
        return [self._read(env, atom) for atom in jaxpr.outvars]

    def _read(self, env: dict[Any, Any], atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return self.constant(atom.val, atom.aval, self)
        return env[atom]

    def evaluate(self, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        """The results of one equation; operands and results may be special."""
        client = self.client
        if self.every or any(map(client.special, values)) or client.asks(eqn, values):
            results = client.rule(eqn, values, self)
            return self.descend(eqn, values) if results is None else results
        if eqn.primitive.name in VIEWS and len(values) == 1:
            what = eqn.primitive.name, repr(sorted(eqn.params.items()))
            return self.share(what, values[0], lambda: bind(eqn, values))
        return bind(eqn, values)

    def descend(self, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        """Evaluate a call, loop or branch with special operands by walking its body."""
        name = eqn.primitive.name
        if name in _DESCENTS:
            return _DESCENTS[name](self, eqn, values)
        body = callee(eqn)
        if body is not None:
            return self.run(body, values)
        return bind(eqn, self._plain(values, eqn))

    def _nested(
        self,
        closed: core.ClosedJaxpr,
        values: list[Any],
        body: int = 0,
        step: jax.Array | None = None,
    ) -> tuple[list[Any], Emissions]:
        """Evaluate a loop's or branch's body number `body`; return its emissions, file none."""
        outer = self.emitted, self._shared, self.site, self.steps, self.within
        self.emitted, self._shared, self.site = {}, {}, (*self.site, body)
        self.steps = self.steps if step is None else (*self.steps, step)
        try:
            results = self.client.leave(self.run(closed, values), self)
            return results, self.emitted
        finally:
            self.emitted, self._shared, self.site, self.steps, self.within = outer

    def _count(self) -> jax.Array | None:
        """The number of a loop's first step, where steps are counted."""
        return jnp.uint32(0) if self.every else None

    def _plain(self, values: Sequence[Any], eqn: core.JaxprEqn) -> list[Any]:
        return [self.client.drop(v, eqn) if self.client.special(v) else v for v in values]

    def _emission_shapes(
        self, closed: core.ClosedJaxpr, values: list[Any], body: int = 0
    ) -> Emissions:
        """Shapes of what a body would emit; nothing is computed."""
        if self.every:
            return {}
        shapes: list[Emissions] = []

        def probe(values: list[Any]) -> Any:
            _, emitted = self._nested(closed, values, body)
            shapes.append(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), emitted))
            return 0

        jax.eval_shape(probe, values)
        return shapes[0]

    def _remat(self, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        def body(values: list[Any]) -> tuple[list[Any], list[Any]]:
            results, emitted = self._nested(close(eqn.params["jaxpr"]), values)
            keys.append(list(emitted))
            return results, list(emitted.values())

        keys: list[list[Any]] = []
        policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
        results, emitted = jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(values)
        for key, value in zip(keys[-1], emitted, strict=True):
            self.emit(key, value)
        return results

    def _scan(self, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        params, closed = eqn.params, close(eqn.params["jaxpr"])
        num_consts, num_carry = scan_parts(params)
        consts, init = values[:num_consts], values[num_consts : num_consts + num_carry]
        xs = values[num_consts + num_carry :]
        passed = self._passed(eqn, values)
        init, rest = self._invariants(eqn, closed, init, num_consts, values, passed)

        stacked = {name for x in xs if self.client.special(x) for name in self.client.names(x)}
        row = jax.eval_shape(lambda xs: jax.tree.map(_row, xs), xs)
        shapes = self._emission_shapes(closed, [*consts, *rest(init), *row])
        summed = [key for key in shapes if key[0] not in stacked]
        zeros = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[key]) for key in summed]
        groups: list[list[int]] = []  # emissions that are one object leave the loop as one array

        def step(state: tuple[list[Any], list[Any], Any], xs: list[Any]) -> Any:
            carry, sums, count = state
            results, emitted = self._nested(closed, [*consts, *rest(carry), *xs], step=count)
            sums = [self.client.merge(s, emitted[k]) for s, k in zip(sums, summed, strict=True)]
            results = self._plain(_without(results, passed), eqn)
            rows, group = _unique([emitted[key] for key in emitted if key not in summed])
            groups.append(group)
            keys.append([key for key in emitted if key not in summed])
            return (results[:num_carry], sums, _next(count)), (results[num_carry:], rows)

        keys: list[list[Any]] = []
        (carry, sums, _), (ys, rows) = lax.scan(
            step,
            (init, zeros, self._count()),
            xs,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        for key, value in zip(summed, sums, strict=True):
            self.emit(key, value)
        for key, group in zip(keys[-1], groups[-1], strict=True):
            self.emit(key, rows[group])
        return [passed.get(k, value) for k, value in enumerate([*carry, *ys])]

    def _passed(self, eqn: core.JaxprEqn, values: list[Any]) -> dict[int, Any]:
        """The results of a loop or branch that are special operands, as they went in."""
        found = {k: values[at] for k, at in enumerate(passed_on(eqn)) if at is not None}
        return {k: value for k, value in found.items() if self.client.special(value)}

    def _invariants(
        self,
        eqn: core.JaxprEqn,
        closed: core.ClosedJaxpr,
        init: list[Any],
        offset: int,
        operands: list[Any],
        passed: dict[int, Any],
    ) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
        """Take special values that a loop passes on unchanged out of its carry.

        Returns the carry that is left (None where a value was taken out) and a function that puts
        the constant values back in their places.
        """
        left = _without(init, passed)
        for k, value in enumerate(left):
            if self.client.special(value):
                sources = [operands[at] for at in made_of(closed, k, offset, len(init))]
                data = any(not self.client.special(v) and jnp.ndim(v) > 0 for v in sources)
                left[k] = self.client.drop(value, eqn, data)
        return left, lambda carry: [passed.get(k, value) for k, value in enumerate(carry)]

    def _while(self, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        params = eqn.params
        cond, body = close(params["cond_jaxpr"]), close(params["body_jaxpr"])
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        cond_consts, body_consts = values[: split[0]], values[split[0] : split[1]]
        passed, operands = self._passed(eqn, values), values[split[0] :]
        init = values[split[1] :]
        init, rest = self._invariants(eqn, body, init, len(body_consts), operands, passed)
        shapes = self._emission_shapes(body, [*body_consts, *rest(init)])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), list(shapes.values()))

        def test(state: Any) -> Any:
            carry, _, count = state
            (result,), emitted = self._nested(cond, [*cond_consts, *rest(carry)], 1, count)
            assert not emitted, "a loop's condition used a weight"
            return result

        def step(state: Any) -> Any:
            carry, sums, count = state
            results, emitted = self._nested(body, [*body_consts, *rest(carry)], 0, count)
            sums = [self.client.merge(s, emitted[k]) for s, k in zip(sums, shapes, strict=True)]
            return self._plain(_without(results, passed), eqn), sums, _next(count)

        carry, sums, _ = lax.while_loop(test, step, (init, zeros, self._count()))
        for key, value in zip(shapes, sums, strict=True):
            self.emit(key, value)
        return rest(carry)

    def _cond(self, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        (index,), operands = self._plain(values[:1], eqn), values[1:]
        branches = [close(branch) for branch in eqn.params["branches"]]
        passed = self._passed(eqn, values)
        shapes: Emissions = {}
        for k, branch in enumerate(branches):
            shapes.update(self._emission_shapes(branch, operands, k))

        def take(k: int, branch: core.ClosedJaxpr) -> Callable[[list[Any]], Any]:
            def run(operands: list[Any]) -> Any:
                results, emitted = self._nested(branch, operands, k)
                empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
                plain = self._plain(_without(results, passed), eqn)
                return plain, [emitted.get(k, empty[k]) for k in shapes]

            return run

        # A boolean predicate reaches the primitive as int32, so `switch` serves both forms.
        results, emitted = lax.switch(
            index, [take(k, branch) for k, branch in enumerate(branches)], operands
        )
        for key, value in zip(shapes, emitted, strict=True):
            self.emit(key, value)
        return [passed.get(k, value) for k, value in enumerate(results)]

    def _shard_map(self, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        """Each device runs the body on its parts; on one device, the parts are the whole."""
        params, split = eqn.params, split_axes(eqn)
        weights = filter(self.client.special, values if split else ())
        for path in (path for value in weights for path in self.client.names(value)):
            raise UnsupportedPrimitiveError(
                f"weight {path!r} enters 'shard_map' on a mesh with axes {split}, where a device "
                "sees only its part of weights and inputs; calibrate the function made for a mesh "
                "of one device (codes do not depend on the mesh) and apply this one, or leave the "
                f"weight out: find_weights(..., ignore={path!r})"
            )
        keys: list[list[Any]] = []

        def body(*values: Any) -> tuple[list[Any], list[Any]]:
            results, emitted = self._nested(close(params["jaxpr"]), list(values))
            keys.append(list(emitted))
            rows = jax.tree.map(lambda leaf: leaf[None], list(emitted.values()))
            return self._plain(results, eqn), rows

        axes = manual_axes(params)
        results, emitted = jax.shard_map(
            body, mesh=params["mesh"], axis_names=axes, check_vma=params["check_vma"],
            in_specs=tuple(params["in_specs"]),
            out_specs=(list(params["out_specs"]), jax.sharding.PartitionSpec(tuple(axes))),
        )(*values)  # fmt: skip
        for key, value in zip(keys[-1], emitted, strict=True):
            self.emit(key, jax.tree.map(lambda leaf: leaf[0], value))
        return results


_DESCENTS: dict[str, Callable[[Walker, core.JaxprEqn, list[Any]], Sequence[Any]]] = {
    **dict.fromkeys(REMATS, Walker._remat),
    "scan": Walker._scan,
    "while": Walker._while,
    "cond": Walker._cond,
    "shard_map": Walker._shard_map,
}
LOOPS = having("loop")
DESCENDED = CALLS | frozenset(_DESCENTS)  # the primitives a walker enters by itself


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation as it stands, on the mesh that it was traced on."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def trace(fn: Callable[..., Any], *args: Any) -> tuple[core.ClosedJaxpr, Any]:
    """The closed jaxpr of `fn` at these (maybe abstract) arguments, and its output's structure."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    return closed, jax.tree.structure(shape)


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


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
