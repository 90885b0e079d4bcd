"""The walker's client that watches weights being used: one rule per kind of operation.

What depends on no input is followed as a `Tagged` value (`tagged.py`): views and elementwise maps
of a weight, sums and concatenations of several, products of parameters. Where such a value is
contracted with an input, the reading is recorded for each of its weights and the input's evidence
is emitted. An operation that is none of these breaks the tag; a broken tag may still be added to or
multiply an input (biases, norm scales, positions), but contracting it with one raises: the weight
behind it would silently go unseen. So does any operation that mixes a weight and an input in a way
that is not listed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jquant.axes.layout import Role
from jquant.axes.origin import Origin
from jquant.axes.roles import Reading, Sighting
from jquant.calibration import lookups, products
from jquant.calibration.elementwise import elementwise, retagged
from jquant.calibration.evidence import Evidence
from jquant.calibration.meeting import Meeting, Rows, meet, unsupported
from jquant.calibration.pending import Lookup, Pending, Product
from jquant.calibration.picks import Picked
from jquant.calibration.saliency import Turns
from jquant.calibration.tagged import Tagged, array_of, changed, is_independent
from jquant.calibration.tokens import Tokens
from jquant.calibration.views import MADE, view
from jquant.programs.calls import scan_parts
from jquant.programs.primitives import having
from jquant.programs.walker import DESCENDED, LOOPS, Walker, bind

_RULES = {**products.RULES, **lookups.RULES}


class Observer:
    """Client of `walker.Walker`; see the module docstring.

    To see two networks at once (one with quantized weights, one without), an observer that walks
    the first is given the `rows` that another has kept of the second, walked in the same order.

    Args:
        keep: keep the rows of inputs in `rows`, by site.
        full: the rows another observer has kept.
        spread: whether evidence says how inputs are spread.
        tokens: what every token counts, and where they are; None: each row is a token.
        saliency: what the rows of each use of a weight count; None: the same.
        roots: positions of the steps that are known to use weights, where only a part of a function
            is walked.

    Attributes:
        uses: by site and operand, each use once.
        mixed: path → the operation that took the weight in as a plain array.
        interleaved: weights whose elements were spread out to lie between others.
        pending: uses that are not decided yet.
        picked: the matrices that data has picked from stacks, by number.
        deferred: where those were picked that met rows.
    """

    def __init__(
        self,
        *,
        keep: bool = False,
        full: Mapping[Any, jax.Array] | None = None,
        spread: bool = False,
        tokens: Tokens | None = None,
        saliency: Turns | None = None,
        roots: Collection[int] | None = None,
    ) -> None:
        self.keep, self.full, self.spread, self.tokens = keep, full, spread, tokens
        self.saliency = saliency
        self.rows: dict[Any, jax.Array] = {}
        self.uses: dict[tuple[tuple[int, ...], Any], Sighting] = {}
        self.mixed: dict[str, str] = {}
        self.interleaved: set[str] = set()
        self.pending = Pending(roots)
        self.picked: list[Picked] = []
        self.deferred: set[tuple[int, ...]] = set()

    def special(self, value: Any) -> bool:
        return isinstance(value, Tagged)

    def asks(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> bool:
        """Also for numbers that are made of none but literals, and for one number made many."""
        if not any(isinstance(v, jax.Array) for v in values):
            return not eqn.effects
        return eqn.primitive.name == "broadcast_in_dim" and jnp.size(values[0]) == 1

    def names(self, value: Tagged) -> frozenset[str]:
        return frozenset(value.paths)

    def merge(self, left: Evidence, right: Evidence) -> Evidence:
        return left.merge(right)

    def drop(self, value: Tagged, eqn: core.JaxprEqn, data: bool = False) -> jax.Array:
        if data:  # the first state of a recurrence
            self.mix([value], eqn.primitive.name)
        elif value.origins and not value.dependent:
            why = "a loop or branch changes it or passes it out"
            raise unsupported(self.pending.weight(value.origins[0]), eqn.primitive.name, why)
        self.reach([replace(value, origins=())])
        return value.array

    def leave(self, results: list[Any], walker: Walker) -> list[Any]:
        """End a function, or the body of a loop: what is pending in it is decided now."""
        inner = self.pending.inside(walker.site)
        name = walker.within[-1].primitive.name if walker.within else None
        results = [self.pending.outside(v, inner, name) if self.special(v) else v for v in results]
        if name is None:  # the function itself: what it returns is used
            self.reach(results)
        site = walker.site
        for number in sorted(inner, reverse=True):
            item, counts = self.pending.end(number)
            walker.site = item.site
            self._decide(walker, item, counts)
        walker.site = site
        return results

    def _decide(self, walker: Walker, item: Product | Lookup, counts: bool) -> None:
        """A use that was pending counts, or went into other weights, if anywhere."""
        if isinstance(item, Product) and not counts:
            self.note([item.left, item.right], "dot_general")
        elif isinstance(item, Product):  # an activation of its own: the rows of each are parameters
            self.reach(item.sides)
            for k, (own, other) in enumerate(zip(item.sides, item.sides[::-1], strict=True)):
                plain = Tagged(own.array, tuple(o for o in own.good if o.product is None))
                rows = Rows(other.array, 1 - k)
                meet(self, walker, ("alone", k), plain, rows, item.contraction(k))
        elif counts:
            self.uses |= {(item.site, (0, k)): use for k, use in enumerate(item.uses)}

    def reach(self, values: Sequence[Any]) -> None:
        """These values met an input, or were returned."""
        self.pending.reach(v for v in values if isinstance(v, Tagged))

    def note(self, values: Sequence[Any], name: str, result: Tagged | None = None) -> None:
        """The weights among the values that are not in the result went into it as plain arrays."""
        left = () if result is None else result.paths
        for value in values:
            for path in value.paths if isinstance(value, Tagged) else ():
                if path not in left:
                    self.mixed.setdefault(path, name)

    def mix(self, values: Sequence[Any], name: str) -> None:
        """Weights among the values were taken in as plain arrays by an operation on inputs."""
        self.reach(values)
        self.note(values, name)

    def rule(self, eqn: core.JaxprEqn, values: list[Any], walker: Walker) -> Sequence[Any] | None:
        name = eqn.primitive.name
        free = all(map(is_independent, eqn.invars, values))
        if name in LOOPS and free:
            return self._closed_loop(eqn, values, walker)
        if name in DESCENDED:
            return None
        if name in _RULES:
            return _RULES[name](self, eqn, values, walker)
        if name in having("identity"):
            results = bind(eqn, list(map(array_of, values)))
            return [retagged(v, r) for v, r in zip(values, results, strict=False)]
        seen = view(eqn, values)
        if seen is not None:
            return seen
        if name in having("elementwise"):
            return elementwise(self, eqn, values, free)
        if name == "broadcast_in_dim":  # of one number
            return [Tagged(r, dependent=not free, uniform=True) for r in bind(eqn, values)]
        if free and name in MADE:
            return [self._made(eqn, values)]
        return self.other(eqn, values, free)

    def _made(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        """An array that an operation makes of weights alone."""
        name = eqn.primitive.name
        if name == "pad" and any(inner > 0 for _, _, inner in eqn.params["padding_config"]):
            weights = values[0].origins if isinstance(values[0], Tagged) else ()
            self.interleaved |= {self.pending.weight(origin).path for origin in weights}
        return MADE[name](eqn, values)

    def _closed_loop(
        self, eqn: core.JaxprEqn, values: list[Any], walker: Walker
    ) -> Sequence[Any] | None:
        """A loop or branch that no input enters: a network of its own, or what makes a weight."""
        weights = [v for v in values if isinstance(v, Tagged) and v.origins]
        before = len(self.uses)
        if eqn.primitive.name == "scan" and weights:
            consts, carry = scan_parts(eqn.params)
            if any(v is w for v in values[consts + carry :] for w in weights):
                results = walker.descend(eqn, values)
                if len(self.uses) > before:
                    return [r if isinstance(r, Tagged) else Tagged(r) for r in results]
        return self.other(eqn, values, True)

    def other(self, eqn: core.JaxprEqn, values: list[Any], free: bool) -> list[Any]:
        """An operation that is no view, no map and no use."""
        weights = [v for v in values if isinstance(v, Tagged) and v.origins and not v.dependent]
        why = _refusal(eqn, free)
        if weights and why:
            raise unsupported(weights[0].origins[0], eqn.primitive.name, why)
        results = bind(eqn, list(map(array_of, values)))
        if not free:
            if eqn.outvars:
                self.mix(values, eqn.primitive.name)
            return results
        return [_broken(eqn, values, result) for result in results]

    def see(self, walker: Walker, where: Any, origin: Origin, reading: Reading, rows: int) -> None:
        """Record a use of a weight, each matrix of which meets so many rows."""
        self.uses[walker.site, where] = Sighting(origin.path, reading, rows, origin.through)

    def guide(self, walker: Walker, where: Any, meeting: Meeting) -> jax.Array | None:
        """What the rows count that a weight meets now, `[*batch, tokens, groups]`; None: the same.

        `where`: the operand that holds the weight; something else where the weight is not in the
        product as it stands.
        """
        del walker, where
        if self.saliency is None:
            return None
        return self.saliency.take(meeting.origin.path, meeting.way.lead)

    def looked_up(self, walker: Walker, origin: Origin, roles: Sequence[Role]) -> Reading:
        """How a table is read whose axes have these roles in a lookup."""
        reading = Reading.of("lookup", origin, roles)
        if reading is None:
            why = (
                "it was indexed along an axis that is contracted, or that inputs or a loop go along"
            )
            raise unsupported(origin, walker.within[-1].primitive.name, why)
        return reading

    def pick(self, picked: Picked) -> int:
        """The number by which picked matrices are known."""
        self.picked.append(picked)
        return len(self.picked) - 1

    def met(self, weight: Tagged) -> Tagged:
        """Picked matrices that met rows, and so are no lookup."""
        assert weight.pick is not None
        lookup = self.picked[weight.pick].lookup
        return replace(weight, reach=tuple(n for n in weight.reach if n != lookup))

    def postpone(self, walker: Walker, origins: Sequence[Origin], roles: Sequence[Role]) -> int:
        """Lookups that count if what they picked meets an input as it is."""
        uses = [
            Sighting(o.path, self.looked_up(walker, o, roles), 0, o.through)
            for o in origins
            if o.product is None
        ]
        return self.pending.add(Lookup(walker.site, tuple(uses)))

    def evidence(
        self,
        walker: Walker,
        what: Any,
        rows: jax.Array,
        count: jax.Array | None,
        sizes: jax.Array | None,
        weights: jax.Array | None,
    ) -> Evidence:
        """The evidence of these rows, and of their drift where the other network's are known.

        `sizes`: of groups that each have evidence of their own; `weights`: of the tokens.
        """
        full = None
        if len(walker.site) == 1:  # what is inside a loop stays in it
            if self.keep:
                self.rows[walker.site, what] = rows
            full = None if self.full is None else self.full[walker.site, what]
        if sizes is not None:
            return Evidence.grouped(rows, sizes, full=full, spread=self.spread, weights=weights)
        return Evidence.of(rows, count, full=full, spread=self.spread, weights=weights)


def _refusal(eqn: core.JaxprEqn, free: bool) -> str:
    """Why an operation may take in no weight; nothing where it may."""
    name = eqn.primitive.name
    if not eqn.outvars:  # a print, a callback: nothing that a weight could go on in
        return ""
    if name not in LOOPS and any(True for _ in core.jaxprs_in_params(eqn.params)):
        return "jquant has no rule to look inside it"
    # Where a parameter may meet an input without being a weight: biases, scales, positions, masks.
    if not free and name not in having("elementwise") | having("beside"):
        return "it mixes the weight with other values"
    return ""


def _broken(eqn: core.JaxprEqn, values: Sequence[Any], result: jax.Array) -> Tagged:
    """What is made of values that depend on no input, and is no view of any weight in them."""
    tagged = [value for value in values if isinstance(value, Tagged)]
    origins = tuple(origin for value in tagged for origin in value.origins)
    reach = tuple(sorted({number for value in tagged for number in value.reach}))
    value = Tagged(jnp.zeros((), jnp.float32), origins, reach)
    value = changed(value, result, [None] * len(origins), eqn.primitive.name)
    return replace(value, origins=tuple(dict.fromkeys(value.origins)))
