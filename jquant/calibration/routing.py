"""Two networks that choose alike, so that rows of one can be compared with rows of the other.

A network may choose by its data where a token goes: the experts of a token (argmax, top-k), the
tokens of an expert, slots by a running count, an order by sorting. Quantized weights move the data,
hence the choices, and row k of an expert's input is then another token than row k of the same
expert in the full-precision network. Their difference is no drift. So where drift is read, the
quantized network makes the full one's choices: `alike` puts them in the place of its own.

Not every comparison is such a choice (a leaky ReLU's is none), and what needs no pairing is left as
it is. What quantizing changes is followed through the steps of a flat function:

* A value is *moved* if a planned weight's product leads to it. A step that makes integers or
  booleans of moved values *chooses*; what is made of choices alone is *chosen* too.
* A chosen value *routes* where it is an index (of a gather, scatter or dynamic slice, the size of a
  group), where it is compared for equality with places (a one-hot encoding), and as a mask in a
  product with something moved. A sort that carries moved rows along routes by itself.
* Both networks share the steps that choose what routes.

Nothing can be shared inside a loop or branch that stays one step. If something routes there, what
leaves it is *unpaired*, and so is all that is made of that: no drift is read of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jquant.programs.calls import close, scan_parts
from jquant.programs.primitives import having
from jquant.programs.straight import Atom, Flat, Step

# Which operands are places.
_INDICES = {
    "gather": slice(1, 2),
    "dynamic_slice": slice(1, None),
    "dynamic_update_slice": slice(2, None),
    "ragged_dot": slice(2, 3),
    "ragged_dot_general": slice(2, 3),
}
_PRODUCTS = having("product") - set(_INDICES)
_LARGEST = {"top_k": "axis", "approx_top_k": "reduction_dimension"}  # values, and where they were


class Routing(NamedTuple):
    """What is to be known of a function's choices before drift is read.

    Attributes:
        shared: positions of the steps that choose what routes.
        unpaired: values whose rows may be different tokens in the two networks → the loop or branch
            in which that began.
    """

    shared: frozenset[int]
    unpaired: Mapping[int, str]


def routing(flat: Flat, uses: Mapping[int, Collection[int]]) -> Routing:
    """Follow what quantizing the weights changes; `uses`: step → the weights it uses."""
    following = _Following(uses)
    following.follow(flat.steps)
    return Routing(frozenset(following.shared(flat.steps)), following.unpaired)


def alike(
    eqn: core.JaxprEqn,
    operands: Sequence[Any],
    results: Sequence[Any],
    full_operands: Sequence[Any],
    full_results: Sequence[Any],
) -> list[Any]:
    """The results of a step that chooses, with the full-precision network's choices.

    Values that come with a choice (the k largest, sorted rows) are this network's own, at the full
    one's places.
    """
    name = eqn.primitive.name
    if name == "sort":
        axis, keys = eqn.params["dimension"], eqn.params["num_keys"]
        places = lax.broadcasted_iota(jnp.int32, full_operands[0].shape, axis)
        order = lax.sort((*full_operands, places), dimension=axis, num_keys=keys)[-1]
        own = [jnp.take_along_axis(x, order, axis) for x in operands]
    elif name in _LARGEST:
        places = full_results[1]
        own = [jnp.take_along_axis(operands[0], places, eqn.params.get(_LARGEST[name], -1)), places]
    else:
        own = list(results)
    return [
        full if _discrete(full.dtype) else mine
        for mine, full in zip(own, full_results, strict=True)
    ]


class _Following:
    """Follows what moves through steps, and which choices come of it."""

    def __init__(
        self,
        uses: Mapping[int, Collection[int]],
        moved: Iterable[int] = (),
        chosen: Iterable[int] | None = None,
    ) -> None:
        self.uses = uses
        self.sharing = chosen is None  # what is chosen out here is the same in both networks
        self.moved, self.chosen = set(moved), set(chosen or ())
        self.masks: set[int] = set()  # chosen values that are 0 or 1, or made of such
        self.unpaired: dict[int, str] = {}
        self.choosing: set[int] = set()  # positions of the steps that choose
        self.leading: set[int] = set()  # chosen values that route
        self.sorts: set[int] = set()  # steps that route by themselves

    def follow(self, steps: Sequence[Step]) -> None:
        for at, step in enumerate(steps):
            began = next((self.unpaired[n] for n in step.reads if n in self.unpaired), None)
            if began is None and at not in self.uses:
                self._route(at, step)
            if began is None and self._routes_inside(at, step):
                began = step.eqn.primitive.name
            if began is not None:
                self.unpaired.update(dict.fromkeys(step.outs, began))
            elif at in self.uses or not self.moved.isdisjoint(step.reads):
                self._move(at, step)
            elif not self.chosen.isdisjoint(step.reads):
                self.chosen.update(step.outs)
                if not self.masks.isdisjoint(step.reads):
                    self.masks.update(step.outs)
                self.masks.update(n for n, dtype in _made(step) if _is_bool(dtype))

    def _move(self, at: int, step: Step) -> None:
        for n, dtype in _made(step):
            if _discrete(dtype):
                self.chosen.add(n)
                self.choosing.add(at)
                if _is_bool(dtype):
                    self.masks.add(n)
            else:
                self.moved.add(n)

    def _route(self, at: int, step: Step) -> None:
        """Note the chosen operands that decide where something goes."""
        name, reads = step.eqn.primitive.name, step.reads
        if name in _INDICES or name.startswith("scatter"):
            places = step.ins[_INDICES.get(name, slice(1, 2))]
            self.leading.update(n for n in places if isinstance(n, int) and n in self.chosen)
        elif name == "eq":
            self.leading.update(
                n for n, var in _read(step) if n in self.chosen and not _is_bool(var.aval.dtype)
            )
        elif name in _PRODUCTS and not self.moved.isdisjoint(reads):
            self.leading.update(self.masks.intersection(reads))
        elif name == "sort":
            keys = step.ins[: step.eqn.params["num_keys"]]
            carried = step.ins[step.eqn.params["num_keys"] :]
            if self._any(keys) and self._any(carried):
                self.sorts.add(at)

    def _any(self, atoms: Iterable[Atom]) -> bool:
        return any(isinstance(n, int) and n in self.moved for n in atoms)

    def shared(self, steps: Sequence[Step]) -> set[int]:
        """The steps that choose what routes."""
        leading, shared = set(self.leading), set(self.sorts)
        for at in range(len(steps))[::-1]:
            if leading.isdisjoint(steps[at].outs):
                continue
            if at in self.choosing:
                shared.add(at)
            else:
                leading.update(self.chosen.intersection(steps[at].reads))
        return shared

    def _routes_inside(self, at: int, step: Step) -> bool:
        """Whether something routes in this step's own body, where nothing can be shared."""
        used = self.uses.get(at, ())
        chosen = set() if self.sharing else self.chosen
        states = [
            _State(n in self.moved or n in used, n in chosen) if isinstance(n, int) else _STILL
            for n in step.ins
        ]
        return any(map(any, states)) and any(
            _inside(body, states, loop) for body, loop in _bodies(step.eqn)
        )


class _State(NamedTuple):
    """What is known of an operand of a body."""

    moved: bool
    chosen: bool


_STILL = _State(False, False)


class _Loop(NamedTuple):
    """How a body's operands are those of its equation: the first are skipped, some are carried."""

    skipped: int = 0
    first: int = 0
    carried: int = 0


def _inside(body: core.ClosedJaxpr, states: Sequence[_State], loop: _Loop) -> bool:
    """Whether a body routes by what is chosen in it, or was where nothing is shared."""
    steps, ins, outs = _numbered(body)
    carried = list(states[loop.skipped :])
    if len(carried) != len(ins):  # of an operation that nobody here knows
        carried = [_State(True, False)] * len(ins)
    while True:
        pairs = list(zip(ins, carried, strict=True))
        following = _Following(
            {}, [n for n, state in pairs if state.moved], [n for n, state in pairs if state.chosen]
        )
        following.follow(steps)
        if following.leading or following.sorts or following.unpaired:
            return True
        before = list(carried)
        for k in range(loop.carried):  # what one turn moves or chooses, the next one starts with
            old, n = carried[loop.first + k], outs[k]
            if isinstance(n, int):
                state = _State(
                    old.moved or n in following.moved, old.chosen or n in following.chosen
                )
                carried[loop.first + k] = state
        if carried == before:
            return False


def _bodies(eqn: core.JaxprEqn) -> list[tuple[core.ClosedJaxpr, _Loop]]:
    """The bodies of an equation whose operands flow into them."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        consts, carry = scan_parts(params)
        return [(close(params["jaxpr"]), _Loop(0, consts, carry))]
    if name == "while":
        body, consts = close(params["body_jaxpr"]), params["body_nconsts"]
        carried = len(eqn.invars) - params["cond_nconsts"] - consts
        return [(body, _Loop(params["cond_nconsts"], consts, carried))]
    if name == "cond":
        return [(close(branch), _Loop(1)) for branch in params["branches"]]
    if name == "sort" or name.startswith(("scatter", "reduce", "select_and", "argm", "cum")):
        return []  # what these hold combines two numbers
    return [(close(body), _Loop()) for body in core.jaxprs_in_params(params)]


def _numbered(closed: core.ClosedJaxpr) -> tuple[list[Step], list[int], list[Atom]]:
    """The steps of a body, its operands, and its results."""
    numbers: dict[Any, int] = {}

    def name(var: Any) -> Atom:
        return var if isinstance(var, core.Literal) else numbers.setdefault(var, len(numbers))

    def names(variables: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(map(name, variables))

    jaxpr = closed.jaxpr
    ins = list(names(jaxpr.invars))
    steps = [Step(eqn, names(eqn.invars), names(eqn.outvars)) for eqn in jaxpr.eqns]
    return steps, ins, list(names(jaxpr.outvars))


def _made(step: Step) -> list[tuple[int, Any]]:
    """What a step makes, and of which dtype."""
    made: Any = zip(step.outs, step.eqn.outvars, strict=True)
    return [(n, var.aval.dtype) for n, var in made]


def _read(step: Step) -> list[tuple[int, Any]]:
    """What a step reads, and the variables for it."""
    pairs = zip(step.ins, step.eqn.invars, strict=True)
    return [(n, var) for n, var in pairs if isinstance(n, int)]


def _discrete(dtype: Any) -> bool:
    return _is_bool(dtype) or jnp.issubdtype(dtype, jnp.integer)


def _is_bool(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.bool_)
