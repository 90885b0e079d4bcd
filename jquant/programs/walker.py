"""One walker over the equations of any JAX function; capture, apply and emulation are its clients.

`trace` gives a function's jaxpr, and a `Walker` evaluates its equations one by one for a client. A
value may be an ordinary array or *special*: a pytree the client understands (an array tagged with
the parameter it came from, a quantized weight). Equations without special operands are bound as
they are. For the others the client's `rule` is asked first; where it declines, the walker descends:

* calls (`calls.py`) are inlined, `remat` is re-emitted as `jax.checkpoint`;
* `scan`, `while` and `cond` are re-emitted with the special values in them (`loops.py`);
* `shard_map` is re-emitted likewise, on a mesh of one device. On others a special value is refused.

A rule may `emit` values under a key `(name, ...)`. They leave the function beside its results:
added up with the client's `merge` over loops and branches, and stacked along a new leading axis by
a scan that slices a special value of that name. Only public JAX is used; what differs between JAX
versions is in `calls.scan_parts`.

A client that is asked about every equation (`Walker(client, every=True)`) has no special values and
emits nothing. For it loops count their steps, and it sees the program's constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jquant.programs.calls import (
    CALLS,
    callee,
)
from jquant.programs.client import Client
from jquant.programs.loops import DESCENTS, Emissions
from jquant.programs.primitives import having

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
        if name in DESCENTS:
            return DESCENTS[name](self, eqn, values)
        body = callee(eqn)
        if body is not None:
            return self.run(body, values)
        return bind(eqn, self.plain(values, eqn))

    def nested(
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

    def plain(self, values: Sequence[Any], eqn: core.JaxprEqn) -> list[Any]:
        """The values, with ordinary arrays in place of special ones; the client may raise."""
        return [self.client.drop(v, eqn) if self.client.special(v) else v for v in values]

    def emission_shapes(
        self, closed: core.ClosedJaxpr, values: list[Any], body: int = 0
    ) -> Emissions:
        """Shapes of what a body would emit; nothing is computed."""
        if self.every:
            return {}
        shapes: list[Emissions] = []

        def probe(values: list[Any]) -> Any:
            _, emitted = self.nested(closed, values, body)
            shapes.append(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), emitted))
            return 0

        jax.eval_shape(probe, values)
        return shapes[0]


LOOPS = having("loop")
DESCENDED = CALLS | frozenset(DESCENTS)  # the primitives a walker enters by itself


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
