"""What an equation calls, and which of its operands come out of it as they went in.

A call is an equation with one body, `jit` first of all; some have rules of their own beside it: how
to differentiate, batch or transpose it, which kernel to take. The body says what it computes.
"""

from __future__ import annotations

from typing import Any

from jax.extend import core

REMATS = frozenset({"remat2", "checkpoint"})
RULED = frozenset(
    "custom_jvp_call custom_vjp_call custom_vmap_call custom_partitioning composite "
    "linear_call".split()
)
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"}) | RULED
_BODY = ("jaxpr", "call_jaxpr", "call", "callee")  # under which parameter it is


def close(jaxpr: Any) -> core.ClosedJaxpr:
    """A closed jaxpr; `remat` holds an open one without constants."""
    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())


def callee(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """What a call calls, with the call's operands; None for any other equation."""
    if eqn.primitive.name in CALLS | REMATS:
        for name in _BODY:
            if hasattr(eqn.params.get(name), "eqns"):
                return close(eqn.params[name])
    return None


def scan_parts(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carried values a scan has (JAX 0.12 keeps trees of them)."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    return params["num_consts"], params["num_carry"]


def manual_axes(params: dict[str, Any]) -> frozenset[str]:
    """The axes of its mesh over which a `shard_map` splits (JAX 0.10 calls them newly manual)."""
    names = ("newly_manual_axes", "manual_axes")
    return frozenset(next(params[name] for name in names if name in params))


def split_axes(eqn: core.JaxprEqn) -> dict[str, int]:
    """The axes along which a `shard_map` gives each device a part, and their sizes above one."""
    mesh = eqn.params["mesh"]
    return {a: mesh.shape[a] for a in sorted(manual_axes(eqn.params)) if mesh.shape[a] > 1}


def passed_on(eqn: core.JaxprEqn) -> list[int | None]:
    """For each result of a call, loop or branch, which operand it is, unchanged; or None.

    Where it carries a value from step to step, or gives back what it slices, a loop passes that on
    if its body does; a branch what all of them pass on.
    """
    name, params = eqn.primitive.name, eqn.params
    body = callee(eqn)
    if body is not None:
        return _passed_through(body)
    if name == "scan":
        consts, carry = scan_parts(params)
        sources = _passed_through(close(params["jaxpr"]))
        return [
            at
            if at is not None and (at == consts + k if k < carry else at >= consts + carry)
            else None
            for k, at in enumerate(sources)
        ]
    if name == "while":
        skipped, consts = params["cond_nconsts"], params["body_nconsts"]
        sources = _passed_through(close(params["body_jaxpr"]))
        return [skipped + at if at == consts + k else None for k, at in enumerate(sources)]
    if name == "cond":
        rows = zip(*(_passed_through(close(b)) for b in params["branches"]), strict=True)
        return [1 + row[0] if row[0] is not None and len(set(row)) == 1 else None for row in rows]
    return [None] * len(eqn.outvars)


def _passed_through(closed: core.ClosedJaxpr) -> list[int | None]:
    """For each result of a jaxpr, which of its operands it is."""
    jaxpr = closed.jaxpr
    source: dict[Any, int] = {var: at for at, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for var, at in zip(eqn.outvars, passed_on(eqn), strict=True):
            given = None if at is None else eqn.invars[at]
            if not isinstance(given, core.Literal) and given in source:
                source[var] = source[given]
    return [None if isinstance(v, core.Literal) else source.get(v) for v in jaxpr.outvars]


def made_of(closed: core.ClosedJaxpr, carry: int, offset: int, count: int) -> set[int]:
    """The operands of a loop's body that one of its carries is made of, step after step.

    Args:
        closed: the body; its operands `offset .. offset + count` are the carries.
        carry: which of them.
    """
    jaxpr, todo, operands = closed.jaxpr, [carry], set()
    while todo:
        sources = {jaxpr.outvars[todo.pop()]}
        for eqn in jaxpr.eqns[::-1]:
            if not sources.isdisjoint(eqn.outvars):
                sources.update(v for v in eqn.invars if not isinstance(v, core.Literal))
        places = {at for at, var in enumerate(jaxpr.invars) if var in sources}
        todo += [at - offset for at in places - operands if 0 <= at - offset < count]
        operands |= places
    return operands
